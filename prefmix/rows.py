"""Typed columns from dict records: the types are checked row by row, so that one odd row never changes another.

Two kinds of columns come out. The wanted ones have exactly the types that a source format asks for; a record that does
not fit is marked with a fault. The others (used in `where`, or kept as meta) are typed by a scan of all values:
text, integers, floats and booleans as such, anything nested as JSON text, a mixture as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import orjson
import polars as pl
import pyarrow as pa

from prefmix.records import Chunk, json_type

#: Beside the columns: why a record could not be read (JSON, as in the ledger's `detail`), and what it was.
FAULT, RAW = "_fault", "_raw"

_INT64 = range(-(2**63), 2**63)


class Misfit(Exception):
    """A value of the wrong type; the text says what it is and what is wanted."""


def frame(
    chunks: Iterable[Chunk], wanted: Mapping[str, pl.DataType], others: Collection[str] | None, numerals: bool = False
) -> pl.DataFrame:
    """One row a record: the columns of `wanted` that any record has, `others` (None: all there are), FAULT and RAW.

    With `numerals`, numbers are written as text (CSV), and "" is a null number.
    """
    frames = [_chunk_frame(chunk, wanted, others, numerals) for chunk in chunks if chunk.rows]
    if not frames:
        return pl.DataFrame(schema={**wanted, FAULT: pl.String, RAW: pl.String})
    return pl.concat(same_types(frames), how="diagonal")


def same_types(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Frames in which a column has one type throughout: numbers are widened, other mixtures become text."""
    types = common_types(each.schema for each in frames)
    return [retyped(each, {name: types[name] for name in each.columns}) for each in frames]


def common_types(schemas: Iterable[Mapping[str, pl.DataType]]) -> dict[str, pl.DataType]:
    """The one type that each column of some frames can have."""
    seen: dict[str, set[pl.DataType]] = {}
    for schema in schemas:
        for name, dtype in schema.items():
            seen.setdefault(name, set()).add(dtype)
    return {name: _common(dtypes) if len(dtypes) > 1 else dtypes.pop() for name, dtypes in seen.items()}


def retyped(rows: pl.DataFrame, types: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """A frame whose columns have the types that `common_types` found; one that it lacks is null."""
    return rows.with_columns(
        pl.lit(None, dtype).alias(name)
        if name not in rows.columns
        else (as_text(rows[name]) if dtype == pl.String else rows[name].cast(dtype)).alias(name)
        for name, dtype in types.items()
        if name not in rows.columns or rows.schema[name] != dtype
    )


def as_text(column: pl.Series) -> pl.Series:
    """string: text as it is, any other value as JSON."""
    if column.dtype == pl.Null:
        return column.cast(pl.String)
    return pl.Series(column.name, [_text(value) for value in column], dtype=pl.String)


def conform(value: Any, dtype: pl.DataType) -> Any:
    """`value` as `dtype` has it (text, float64, and lists and structs of them); raises Misfit."""
    if value is None:
        return None
    kind = type(value)
    if dtype == pl.String:
        if kind is not str:
            raise Misfit(f" is {json_type(value)}, not text")
        return value
    if dtype == pl.Float64:
        if kind is not float and kind is not int:
            raise Misfit(f" is {json_type(value)}, not a number")
        try:
            return float(value)
        except OverflowError:
            raise Misfit(" is too large a number") from None
    if isinstance(dtype, pl.List):
        if kind is not list:
            raise Misfit(f" is {json_type(value)}, not a list")
        items = []
        for place, item in enumerate(value):
            try:
                items.append(conform(item, dtype.inner))  # ty: ignore[invalid-argument-type]
            except Misfit as misfit:
                raise Misfit(f"[{place}]{misfit}") from None
        return items
    if isinstance(dtype, pl.Struct):
        if kind is not dict:
            raise Misfit(f" is {json_type(value)}, not an object")
        fields = {}
        for each in dtype.fields:
            try:
                fields[each.name] = conform(value.get(each.name), each.dtype)  # ty: ignore[invalid-argument-type]
            except Misfit as misfit:
                raise Misfit(f".{each.name}{misfit}") from None
        return fields
    raise TypeError(f"no source format may ask for {dtype}")


def infer(values: Iterable[Any]) -> pl.DataType:
    """The type that most of some JSON values have. Null if there are none."""
    seen: dict[str, list[Any]] = {}
    empty = False
    for value in values:
        if value == []:  # says nothing about what the list holds
            empty = True
        elif value is not None:
            kind = "turns" if isinstance(value, list) and isinstance(value[0], dict) else json_type(value)
            seen.setdefault(kind, []).append(value)
    if not seen:
        return pl.List(pl.Null()) if empty else pl.Null()
    kind = max(seen, key=lambda each: (len(seen[each]), each == "turns", each == "text", each))
    some = seen[kind]
    if kind == "turns":
        return pl.List(_struct(item for value in some for item in value if isinstance(item, dict)))
    if kind == "an object":
        return _struct(some)
    if kind == "a list":
        return pl.List(infer(item for value in some for item in value))
    return {"text": pl.String(), "a boolean": pl.Boolean(), "a number": pl.Float64()}[kind]


def _struct(objects: Iterable[dict[str, Any]]) -> pl.Struct:
    fields: dict[str, list[Any]] = {}
    for each in objects:
        for key, value in each.items():
            fields.setdefault(key, []).append(value)
    return pl.Struct({key: infer(values) for key, values in fields.items()})


def _chunk_frame(
    chunk: Chunk, wanted: Mapping[str, pl.DataType], others: Collection[str] | None, numerals: bool
) -> pl.DataFrame:
    keys: set[str] = set().union(*chunk.rows)
    columns, misfits = [], {}
    for name, dtype in wanted.items():
        if name in keys:
            values = [row.get(name) for row in chunk.rows]
            columns.append(
                _wanted(name, values, dtype, misfits, _numeral if numerals and dtype == pl.Float64 else conform)
            )
    for name in sorted(keys if others is None else keys.intersection(others)):
        if name not in wanted:
            columns.append(_scanned(name, [row.get(name) for row in chunk.rows]))
    faults, raw = dict(chunk.faults), dict(chunk.raw)
    for place, error in misfits.items():
        faults[place] = {"error": error, "line": chunk.lines[place]}
        raw[place] = raw_json({name: chunk.rows[place].get(name) for name in wanted})
    for name, found in ((FAULT, {i: orjson.dumps(fault).decode() for i, fault in faults.items()}), (RAW, raw)):
        if found:
            columns.append(pl.Series(name, [found.get(i) for i in range(len(chunk.rows))], dtype=pl.String))
        else:
            columns.append(pl.repeat(None, len(chunk.rows), dtype=pl.String, eager=True).alias(name))
    return pl.DataFrame(columns)


def raw_json(row: Mapping[str, Any]) -> str:
    """The JSON of a row that cannot be used: what its id is made of. Nulls are left out, keys are sorted."""
    kept = {name: value for name, value in row.items() if value is not None}
    return orjson.dumps(kept, option=orjson.OPT_SORT_KEYS).decode()


def _numeral(text: str | None, dtype: pl.DataType) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise Misfit(f' is "{text[:40]}", not a number') from None


def _wanted(
    name: str,
    values: list[Any],
    dtype: pl.DataType,
    misfits: dict[int, str],
    convert: Callable[[Any, pl.DataType], Any],
) -> pl.Series:
    arrow = _arrow_type(dtype)
    if "double" not in str(arrow):  # a number may not be a boolean, which Arrow would let pass
        try:
            return _series(name, pa.array(values, arrow))
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass
    fitting = []
    for place, value in enumerate(values):
        try:
            fitting.append(convert(value, dtype))
        except Misfit as misfit:
            fitting.append(None)
            misfits.setdefault(place, f"{name}{misfit}")
    return _series(name, pa.array(fitting, arrow))


def _series(name: str, array: pa.Array) -> pl.Series:
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series.alias(name)


def _arrow_type(dtype: pl.DataType) -> pa.DataType:
    if isinstance(dtype, pl.List):
        return pa.large_list(_arrow_type(dtype.inner))  # ty: ignore[invalid-argument-type]
    if isinstance(dtype, pl.Struct):
        return pa.struct([(each.name, _arrow_type(each.dtype)) for each in dtype.fields])  # ty: ignore
    return pa.float64() if dtype == pl.Float64 else pa.large_string()


def _scanned(name: str, values: list[Any]) -> pl.Series:
    kinds = set(map(type, values)) - {type(None)}
    if kinds <= {str}:
        return pl.Series(name, values, dtype=pl.String if kinds else pl.Null)
    if kinds == {bool}:
        return pl.Series(name, values, dtype=pl.Boolean)
    if kinds == {int} and all(value is None or value in _INT64 for value in values):
        return pl.Series(name, values, dtype=pl.Int64)
    if kinds <= {int, float}:
        return pl.Series(name, [None if value is None else float(value) for value in values], dtype=pl.Float64)
    return pl.Series(name, [_text(value) for value in values], dtype=pl.String)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return orjson.dumps(value.to_list() if isinstance(value, pl.Series) else value, default=str).decode()


def _common(dtypes: set[pl.DataType]) -> pl.DataType:
    dtypes = dtypes - {pl.Null()}
    if len(dtypes) == 1:
        return dtypes.pop()
    if all(dtype.is_numeric() for dtype in dtypes):
        return pl.Int64() if all(dtype.is_signed_integer() for dtype in dtypes) else pl.Float64()
    return pl.String()
