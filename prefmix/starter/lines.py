"""The text of a starter recipe: the sources that were found, and the keys that are most often wanted.

`# ` begins an explanation; `#` right before a key or a table is an option that is not in force.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefmix import files, sources
from prefmix.card import KNOWN_LICENCES
from prefmix.schema import KINDS
from prefmix.sources.layout import TEXT
from prefmix.sources.match import union
from prefmix.starter.groups import Origin

_MOST_NAMED = 4
_COMMENT_AT = 33


@dataclass(frozen=True)
class Found:
    """A source of a starter recipe: `origin` is its `path` or `hub`, `beside` names files of other splits."""

    name: str
    origin: Origin
    source: sources.Source
    beside: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(each.path.stat().st_size for each in self.source.files)


@dataclass(frozen=True)
class LeftOut:
    """Data that cannot be a source: why, and the keys to try (lines of TOML, the most promising first)."""

    name: str
    origin: Origin
    reason: str
    nearest: tuple[tuple[str, ...], ...] = ()


def recipe_lines(name: str, found: Sequence[Found], left_out: Sequence[LeftOut]) -> Iterator[str]:
    """The lines of the recipe."""
    yield "# A starter recipe, written by `prefmix init`. `prefmix schema` and docs/recipes.md have every key."
    yield "# Where # stands right before a key it is an option: remove the # to use it."
    yield ""
    yield f"name = {toml(name)}"
    yield _key("seed = 42", "decides the order of the rows and the splits, on every machine alike")
    yield _key('#license = "apache-2.0"', "of the mixture; absent: the strictest of its sources")
    yield ""
    yield "# The order of the sources is their priority: of two equal rows, the one of the earlier source stays."
    for number, each in enumerate(found):
        yield from _source(each, with_options=number == 0)
    for each in left_out:
        yield from _without_format(each)
    yield from _filter({each.source.kind for each in found})
    yield from _rest({kind: [each.name for each in found if each.source.kind == kind] for kind in KINDS})


def toml(value: str | list[str]) -> str:
    """A string or a list of strings in TOML, whose escapes are those of JSON."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def one_line(text: str) -> str:
    """Text for a comment."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _key(key: str, comment: str) -> str:
    return f"{key.ljust(_COMMENT_AT - 2)}  # {comment}"


def _source(each: Found, with_options: bool) -> Iterator[str]:
    source = each.source
    columns = union(files.schema(file.path) for file in source.files[:1])
    read = [column for column in columns if column in source.layout.types]
    other = [one_line(column) for column in columns if column not in read]
    rows = source.count_rows()
    many = f"{len(source.files)} files, " if len(source.files) > 1 else ""
    size = f"{rows:,} rows" if rows is not None else f"{each.bytes:,} bytes"
    yield ""
    yield f"[sources.{each.name}]"
    yield f"# {source.kind} rows; columns that are read: {', '.join(map(one_line, read))}"
    if other:
        yield f"# columns that are not read: {', '.join(other)}"
    yield f"format = {toml(source.format)}"
    for key, value in each.origin.items():
        yield _key(f"{key} = {toml(value)}", f"{many}{size}")
    if source.spec.hub:
        yield _key(
            'revision = "main"', f"now {source.revision}; a commit in its place is a data set that stays as it is"
        )
    if each.beside:
        named = ", ".join(map(one_line, each.beside[:_MOST_NAMED]))
        more = len(each.beside) - _MOST_NAMED
        yield f"# other splits, left aside: {named}{f' and {more} more' if more > 0 else ''}"
    if source.spec.hub not in KNOWN_LICENCES:
        yield _key('#license = "unknown"', "of this data")
    if with_options:
        needed = [name for name, dtype in source.layout.columns.items() if dtype == TEXT and name in read]
        text = next((name for name in needed if re.fullmatch(r"\w+", name)), None)
        if text:
            yield _key(f'#where = "length({text}) < 4000"', "Polars SQL on the columns of the files")
        yield _key("#take = 5000", "at most so many of the rows that survive; 0.5 is half of them")
        yield _key("#repeat = 2", "each row so many times")


def _without_format(each: LeftOut) -> Iterator[str]:
    yield ""
    yield f"# {one_line(each.reason)}"
    for keys in each.nearest[:1]:
        yield f"#[sources.{each.name}]"
        yield from (f"#{key}" for key in keys)
        yield from (f"#{key} = {toml(value)}" for key, value in each.origin.items())


def _filter(kinds: set[str]) -> Iterator[str]:
    yield ""
    yield _key("[filter]", 'rules are "drop", "report" or "off"; those that are not named keep their defaults')
    yield _key('#languages = ["en"]', "rows in other languages are dropped")
    yield _key('#refusals = "report"', "refusals are dropped unless this says otherwise")
    yield _key('#cut_off = "drop"', "answers that end in the middle are only reported")
    yield _key('#placeholders = "drop"', "{{name}}, [insert ...]: likewise")
    if "preference" in kinds:
        yield _key("#min_margin = 0.5", "chosen_score - rejected_score must be above this (0.0: ties are dropped)")
        yield _key('#on_inverted = "swap"', "the rejected answer has the higher score: dropped unless swapped")
        yield _key("#max_length_ratio = 4.0", "characters of chosen to rejected")
    yield _key("#max_tokens = 2048", "prompt and longer answer; needs [format] tokenizer")


def _rest(by_kind: dict[str, list[str]]) -> Iterator[str]:
    yield ""
    yield _key("#[decontaminate]", "rows that hold text of a benchmark are dropped")
    yield _key(
        '#suites = ["truthfulqa"]', "by name, read from the Hub; files of your own: [decontaminate.against.<name>]"
    )
    yield ""
    yield "[dedupe]"
    yield _key('exact = "pair"', 'equal rows are dropped; or "prompt" (one row for each prompt), "off"')
    yield _key("#near = {}", "rows whose prompt and answer are nearly those of another one are dropped too")
    if by_kind["preference"]:
        yield _key("#prompt_cap = 4", "at most so many pairs of one prompt")
    yield ""
    yield "[format]"
    yield _key('layout = "text"', 'ChatML text, or "messages"')
    yield _key('#system = "drop"', "system messages are kept; or a text for the rows that have none")
    yield _key('#tokenizer = "..."', "Hub name, or folder with a tokenizer.json: counts the tokens of every row")
    mixed = {kind: names for kind, names in by_kind.items() if len(names) > 1}
    if mixed:
        yield ""
        yield _key("#[mix]", "shares; without them everything that survives is kept")
    for kind, names in mixed.items():
        yield f"#{kind} = {{ {', '.join(f'{name} = 1' for name in names)} }}"
    yield ""
    yield "[splits]"
    yield _key("test = 0.02", "held out; rows with the same prompt land on the same side")
