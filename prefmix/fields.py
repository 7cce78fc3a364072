"""Fields: the texts at dotted paths in the rows of a file, whatever its type.

A field is a column, or a path to a key inside it (`choices.text`). A key that holds dots itself is taken as it is. A
value is one text, or a list with any number of them; what is neither is no text, and numbers are not made into one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import polars as pl

from prefmix import files
from prefmix.errors import SourceError
from prefmix.recipe.problems import nearest
from prefmix.rows import FAULT

#: Columns that hold the text of a benchmark in the sets we know, in lower case: questions, then what answers them.
KNOWN = {
    *("question", "question_stem", "query", "prompt", "input", "instruction", "problem", "goal", "ctx", "context"),
    *("passage", "sentence", "turns", "text"),
    *("choices", "options", "endings", "option1", "option2", "sol1", "sol2"),
}
#: Keys that hold the text where such a column holds objects.
_INNER = ("text", "content", "turns")


class Text(NamedTuple):
    """A text of a file. `element` is the object that it comes from where a column is a list of objects, else -1."""

    row: int
    element: int
    field: str  # as asked for, with the places in lists: `choices.text[2]`
    text: str


class FileTexts(NamedTuple):
    """All texts of a file, how many rows it has, and the fields that hold no text in any of them."""

    texts: list[Text]
    rows: int
    silent: list[str]


def read_texts(path: Path, fields: Sequence[str], name: str) -> FileTexts:
    """The texts of a file that are not blank: rows in order, in each the fields as given, lists in order.

    Where the first part of a path is a list of objects, each object counts like a row: its texts stand together. A
    .json file that is one object is one row if it has the columns asked for, else the rows of its only array.

    Raises:
        SourceError: the file cannot be read as a whole, or no row has a field. `name` is what it calls the file.
    """
    if files.knows_columns(path):
        columns = list(files.schema(path))
        check_columns(columns, fields, name)
        rows = _table_rows(path, [_step(columns, field)[0] for field in fields], name)
    else:
        rows = _json_rows(path, fields, name)
        columns = list(_keys(rows))
    texts: list[Text] = []
    silent = list(dict.fromkeys(fields))
    for number, row in enumerate(rows):
        found = {field: list(_field_texts(row, field)) for field in fields}
        silent = [field for field in silent if not found[field]]
        in_row = sorted((each for some in found.values() for each in some), key=lambda each: each[0])
        texts += [Text(number, *each) for each in in_row]
    for field in silent:
        if why := _unreachable(rows, columns, field):
            raise SourceError(f"{name}: {why}")
    return FileTexts(texts, len(rows), silent)


def check_columns(columns: Collection[str], fields: Iterable[str], name: str) -> None:
    """Raises SourceError, naming the file, when it lacks the column of a field."""
    for field in fields:
        if _step(columns, field)[0] not in columns:
            raise SourceError(f"{name}: {_unreachable([], columns, field)}")


def known_fields(columns: Mapping[str, pl.DataType]) -> list[str]:
    """The fields that hold text by their well-known names, in the order of the columns; empty if there is none.

    >>> known_fields({"id": pl.Int64(), "goal": pl.String(), "choices": pl.Struct({"text": pl.List(pl.String)})})
    ['goal', 'choices.text']
    """
    found = (_text_field(name, dtype) for name, dtype in columns.items() if name.lower() in KNOWN)
    return [field for field in found if field]


def listed(columns: Iterable[str]) -> str:
    """The names of columns for a message, long ones shortened (a CSV file without a header has texts there)."""
    names = (" ".join(name.split()) for name in columns)
    return ", ".join(name if len(name) <= 40 else f"{name[:37]}..." for name in names)


def _text_field(name: str, dtype: pl.DataType) -> str | None:
    if isinstance(dtype, pl.List | pl.Array):
        return _text_field(name, dtype.inner)  # ty: ignore[invalid-argument-type]
    if isinstance(dtype, pl.Struct):
        inside = dict(dtype)
        found = (_text_field(f"{name}.{key}", inside[key]) for key in _INNER if key in inside)  # ty: ignore
        return next((field for field in found if field), None)
    return name if dtype in (pl.String, pl.Unknown) else None


def _table_rows(path: Path, columns: Collection[str], name: str) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(columns))
    table = files.read(path, {}, columns)
    if table[FAULT].null_count() < table.height:
        _refuse(name, orjson.loads(table[FAULT].drop_nulls()[0]))
    return table.select(columns).to_dicts()


def _json_rows(path: Path, fields: Sequence[str], name: str) -> list[dict[str, Any]]:
    if _is_json_value(path):
        try:
            value = orjson.loads(files.content(path))
        except orjson.JSONDecodeError:
            value = None  # JSON lines under another name, or a file with a fault: below it is found, with its line
        if isinstance(value, dict) and all(_step(value, field)[0] in value for field in fields):
            return [value]
    rows = []
    for chunk in files.json_records(path):
        for fault in chunk.faults.values():
            _refuse(name, fault)
        rows += chunk.rows
    return rows


def _is_json_value(path: Path) -> bool:
    inner = path.with_suffix("") if path.suffix.lower() in files.COMPRESSIONS else path
    return files.FILE_TYPES.get(inner.suffix.lower()) == "json"


def _refuse(name: str, fault: Mapping[str, Any]) -> None:
    raise SourceError(f"{name}, line {fault['line']}: {fault['error']}: correct or remove the line")


def _field_texts(row: Mapping[str, Any], field: str) -> Iterator[tuple[int, str, str]]:
    """(element, field, text) of all texts of a field in a row, in order."""
    key, rest = _step(row, field)
    value = row.get(key)
    if rest and isinstance(value, list):
        for place, item in enumerate(value):
            yield from ((place, *each) for each in _texts(item, rest, key))
    else:
        yield from ((-1, *each) for each in _texts(value, rest, key))


def _texts(value: Any, path: str, name: str) -> Iterator[tuple[str, str]]:
    """(field, text) of all texts at a path below a value, in order."""
    if isinstance(value, str):
        if not path and value.strip():
            yield name, value
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _texts(item, path, f"{name}[{place}]")
    elif isinstance(value, dict) and path:
        key, rest = _step(value, path)
        yield from _texts(value.get(key), rest, f"{name}.{key}")


def _step(keys: Collection[str], path: str) -> tuple[str, str]:
    """The first key of a path, and the rest of it."""
    if path in keys:
        return path, ""
    key, _, rest = path.partition(".")
    return key, rest


def _unreachable(rows: Sequence[Any], columns: Collection[str], field: str) -> str | None:
    """Why no row has a text at a path; None if it could have one (nulls, blank texts, numbers)."""
    level, keys, done, path = rows, columns, "", field
    while path:
        key, rest = _step(keys, path)
        if key not in keys:
            here = f'"{done}"' if done else "it"
            close = nearest(key, keys) or nearest(path, keys)
            meant = ".".join(part for part in (done, close, rest) if part)
            remedy = f'did you mean "{meant}"?' if close else "name one of them in `fields`"
            return f'no field "{field}" ({here} has: {listed(keys)}): {remedy}'
        done, path = f"{done}.{key}" if done else key, rest
        level = [value for each in _objects(level) if (value := each.get(key)) not in (None, [])]
        keys = list(_keys(_objects(level)))
        if level and path and not keys:
            return f'no field "{field}": "{done}" has no keys: name it without the rest in `fields`'
        if not level:
            return None
    if keys:
        examples = ", ".join(f'"{done}.{key}"' for key in keys)
        return f'the field "{field}" holds objects, not text: name keys of them in `fields` ({examples})'
    return None


def _objects(values: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """The objects among some values and in the lists among them."""
    for value in values:
        if isinstance(value, dict):
            yield value
        elif isinstance(value, list):
            yield from _objects(value)


def _keys(objects: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(key for each in objects for key in each)
