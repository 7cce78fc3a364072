"""From pydantic's errors to what a person can act on: one problem per key, what would be right, the nearest key.

Works on the JSON Schema of a model, so that the words follow from its keys and limits.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from prefmix.recipe.toml_lines import KeyPath

Schema = dict[str, Any]

#: What the patterns of keys and values mean, for a message.
PATTERNS = {
    r"^[a-z0-9][a-z0-9._-]*$": "a name of lower-case letters, digits, '.', '_' and '-'",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a name of letters, digits, '.', '_' and '-'",
    r"^[a-z0-9][a-z0-9_]*$": "a name of lower-case letters, digits and '_'",
    r"^[a-z]{2}$": 'a language code of two lower-case letters such as "en"',
    r"^[\w.-]+(/[\w.-]+)?$": "a name on the Hub (owner/name)",
}
_MANY = 8  # values that a message lists although a nearest one is proposed


class Finding(NamedTuple):
    """A problem at a place in the data, before it has a line."""

    path: KeyPath
    message: str
    hint: str | None = None


def dotted(path: KeyPath) -> str:
    """The key as it is written with --set: `train.stages.0.beta`."""
    return ".".join(
        part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part, ensure_ascii=False)
        for part in map(str, path)
    )


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one, whatever the case."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def explain(error: ValidationError, schema: Schema, data: object) -> list[Finding]:
    """One finding per wrong key of `data`, which the model with this JSON Schema has refused.

    A value that fails as each member of a union is one finding, at the innermost key that is wrong. Errors that a
    validator of the whole model has raised are left out: they have no key.
    """
    schema = inlined(schema)
    found: dict[KeyPath, Finding] = {}
    proposed: set[KeyPath] = set()
    for item in error.errors(include_url=False):
        path, kind = _path(item["loc"], item["type"], data), item["type"]
        if not path or path in found:
            continue
        if kind == "extra_forbidden":
            if _options(schema, path):
                continue  # a key of an alternative of this table: the key that chooses between them is the problem
            hint, key = _known_key(path, schema)
            found[path] = Finding(path, "unknown key", hint)
            proposed |= {(*path[:-1], key)} if key else set()
        elif kind == "missing":
            choices = all("const" in member for member in _at(schema, path))
            hint = either(list(_words(_at(schema, path)))) if choices else _description(schema, path)
            found[path] = Finding(path, "missing", hint)
        elif kind in ("too_short", "string_too_short"):
            found[path] = Finding(path, "must not be empty", _description(schema, path))
        elif item["loc"][-1] == "[key]":
            rule = PATTERNS.get(item.get("ctx", {}).get("pattern", ""), "text that is not empty")
            found[path] = Finding(path, f"expected {rule} as the key")
        else:
            found[path] = _wrong_value(path, _value(data, path), _at(schema, path))
    return [
        finding
        for path, finding in found.items()
        if not (finding.message == "missing" and path in proposed)
        and not any(len(other) > len(path) and other[: len(path)] == path for other in found)
    ]


def _wrong_value(path: KeyPath, value: object, members: list[Schema]) -> Finding:
    words = list(_words(members))
    hint = _better(value, members)
    if hint and len(words) > _MANY:
        return Finding(path, f"{shown(value)} is unknown", hint)
    return Finding(path, f"expected {either(words)}, got {shown(value)}", hint)


def expected(schema: Schema) -> str:
    """What is right for an inlined schema, in words.

    >>> expected({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}, {"type": "null"}]})
    'a whole number of at least 1 or "auto"'
    """
    return either(list(_words(alternatives_of(schema))))


def either(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _words(members: list[Schema]) -> Iterator[str]:
    said: list[str] = []
    for member in members:
        for word in _member_words(member, said):
            if word not in said:
                said.append(word)
    yield from said


def _member_words(member: Schema, said: list[str]) -> list[str]:
    if "const" in member or "enum" in member:
        return [shown(value) for value in member.get("enum", [member.get("const")])]
    match member.get("type"):
        case "integer":
            return [f"a whole number{_bounds(member)}"]
        case "number":
            return [f"a number{_bounds(member)}"]
        case "boolean":
            return ["true or false"]
        case "string" if "pattern" in member:
            return [PATTERNS.get(member["pattern"], f"text that matches {member['pattern']}")]
        case "string":
            return ["text"]
        case "object":
            values = [word for entry in _entries(member) for word in _words(alternatives_of(entry))]
            return [f"a table, each value {either(values)}" if values else "a table"]
        case "array":
            items = list(_words(alternatives_of(member["items"])))
            return ["a list of them" if items == said else f"a list, each item {either(items)}"]
    return []


def _bounds(member: Schema) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    parts = [f"{words[key]} {member[key]}" for key in words if key in member]
    return f" {' and '.join(parts)}" if parts else ""


def shown(value: object) -> str:
    """A value as TOML shows it, shortened."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "a list"
    text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _better(value: object, members: list[Schema]) -> str | None:
    """A guess at what was meant by a wrong value."""
    keys = [key for member in members for key in member.get("properties", {}).values()]
    if value is True and keys and all(key.get("default") is not None for key in keys):
        return "{} takes the defaults"
    if not isinstance(value, str):
        return None
    choices = [choice for member in members for choice in member.get("enum", [member.get("const")])]
    if choice := nearest(value, (choice for choice in choices if isinstance(choice, str))):
        return f'did you mean "{choice}"?'
    types = {member.get("type") for member in members}
    if types == {"array"}:
        return f"as a list: [{shown(value)}]"
    number = types & {"integer", "number"} and re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value)
    return f"without quotes: {value}" if number or ("boolean" in types and value in ("true", "false")) else None


def _known_key(path: KeyPath, schema: Schema) -> tuple[str | None, str | None]:
    """A hint for an unknown key, and the key of the same table that it proposes."""
    *table, key = path
    known = list(dict.fromkeys(name for member in _at(schema, tuple(table)) for name in member.get("properties", {})))
    close = nearest(str(key), known, cutoff=0.75)
    homes = [header for header, members in tables(schema) if any(key in member["properties"] for member in members)]
    if close is None and len(homes) == 1:
        return f"it belongs in {homes[0]}" if homes[0] else "it belongs at the top, before the first [table]", None
    close = close or nearest(str(key), known)
    return f"did you mean `{close}`?" if close else f"known: {', '.join(known)}", close


def tables(schema: Schema, name: str = "", array: bool = False) -> Iterator[tuple[str, list[Schema]]]:
    """Every table of an inlined schema, as (header as in TOML, its alternatives), the outer before the inner.

    The header of the top is empty; a name that the user chooses is `<name>`.
    """
    members = alternatives_of(schema)
    if alternatives := [member for member in members if "properties" in member]:
        yield f"[[{name}]]" if array else f"[{name}]" if name else "", alternatives
        for key, value in merged(alternatives).items():
            yield from tables(value, f"{name}.{key}" if name else key)
    for member in members:
        for entry in _entries(member):
            yield from tables(entry, f"{name}.<name>")
        if "items" in member:
            yield from tables(member["items"], name, array=True)


def merged(alternatives: list[Schema]) -> dict[str, Schema]:
    """The keys of all alternatives of a table; a key with different schemas has them all."""
    keys: dict[str, list[Schema]] = {}
    for member in alternatives:
        for key, value in member["properties"].items():
            keys.setdefault(key, []).extend([] if value in keys.get(key, []) else [value])
    return {key: values[0] if len(values) == 1 else {**values[0], "anyOf": values} for key, values in keys.items()}


def inlined(schema: Schema) -> Schema:
    """The schema with every reference replaced by what it refers to (a recipe's tables do not contain themselves)."""
    definitions = schema.get("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        target = definitions[reference.rsplit("/", 1)[-1]] if isinstance(reference, str) else {}
        both = {**value, **target}  # the text about a table says more than that about the key that holds it
        return {key: inline(item) for key, item in both.items() if key not in ("$ref", "$defs")}

    return inline(schema)


def alternatives_of(schema: Schema) -> list[Schema]:
    """An inlined schema as a list of alternatives without null."""
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return [member for option in schema[union] for member in alternatives_of(option)]
    return [] if schema.get("type") == "null" else [schema]


def _entries(schema: Schema) -> list[Schema]:
    """The schemas of the values of a table whose keys the user chooses."""
    free = schema.get("additionalProperties")
    return [*schema.get("patternProperties", {}).values(), *([free] if isinstance(free, dict) else [])]


def _options(schema: Schema, path: KeyPath) -> list[Schema]:
    """The schemas for the key at `path`, one for each alternative of its table."""
    here = [schema]
    for part in path:
        inner: list[Schema] = []
        for member in (member for option in here for member in alternatives_of(option)):
            if isinstance(part, int):
                inner += [member["items"]] if "items" in member else []
            elif part in member.get("properties", {}):
                inner.append(member["properties"][part])
            else:
                inner += _entries(member)
        here = inner
    return here


def _at(schema: Schema, path: KeyPath) -> list[Schema]:
    return [member for option in _options(schema, path) for member in alternatives_of(option)]


def _description(schema: Schema, path: KeyPath) -> str | None:
    return next(
        (option["description"].rstrip(".") for option in _options(schema, path) if "description" in option), None
    )


def _path(loc: tuple[str | int, ...], kind: str, data: Any) -> KeyPath:
    """Pydantic's location without the names of the members of unions that it passes through."""
    path: KeyPath = ()
    for position, part in enumerate(loc):
        in_table = isinstance(data, dict) and part in data
        in_array = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_table or in_array:
            data = data[part]
            path = (*path, part)
        elif kind == "missing" and position == len(loc) - 1:
            path = (*path, part)
    return path


def _value(data: Any, path: KeyPath) -> object:
    for part in path:
        data = data[part]
    return data
