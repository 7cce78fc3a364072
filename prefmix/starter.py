"""A starter recipe: what some data files are, written down as a recipe to go on from.

    starter = starter_recipe(["data/orca.jsonl", "Intel/orca_dpo_pairs"], Path("."))
    starter.text        # a commented recipe that loads and builds
    starter.left_out    # the data that no format fits, each with the formats that come nearest

Also finds what comes with prefmix: data cards, and the files of shipped recipes.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import polars as pl
import yaml

from prefmix import files, recipe, sources
from prefmix.card import KNOWN_LICENCES
from prefmix.errors import SourceError, UsageError
from prefmix.schema import KINDS
from prefmix.sources.layout import TEXT, Layout, fits, layouts
from prefmix.sources.match import union

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBERS = re.compile(r"(?:[-_. ]*(?:of[-_. ]*)?\d+)+")
_SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = re.compile(r"(?<![^\W_])(?:train(?:ing)?|valid(?:ation)?|dev|val|test(?:ing)?|eval(?:uation)?)(?![^\W_])")
_MOST_NEAREST = 2

#: What other data sets call the columns of the formats, the likeliest first: for suggestions, never read by themselves.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "question": ("prompt", "instruction", "query", "input", "user", "problem"),
    "instruction": ("prompt", "question", "query", "input", "user", "problem", "task"),
    "prompt": ("question", "instruction", "query", "input", "user", "problem", "context"),
    "chosen": ("chosen_response", "preferred", "accepted", "better", "winner", "good", "positive", "response_chosen"),
    "rejected": ("rejected_response", "dispreferred", "worse", "loser", "bad", "negative", "response_rejected"),
    "output": ("response", "answer", "completion", "target", "reply", "assistant"),
    "completion": ("response", "answer", "output", "target", "reply", "assistant"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "turns", "chat"),
    "conversations": ("conversation", "messages", "dialog", "dialogue", "turns", "chat"),
}

Origin = Mapping[str, str | list[str]]


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
    """Data that cannot be a source: why, and the keys to try (TOML lines, the most promising first)."""

    name: str
    origin: Origin
    reason: str
    nearest: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Starter:
    """What `starter_recipe` found, and the recipe."""

    name: str
    text: str
    found: tuple[Found, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class DataCard:
    """A datasheet that comes with prefmix: the Hub names and formats that it is about, its text without the YAML head."""

    name: str
    hub: tuple[str, ...]
    formats: tuple[str, ...]
    text: str


@cache
def data_cards() -> tuple[DataCard, ...]:
    """The data cards that come with prefmix: in the wheel, or in a checkout of the repository."""
    package = Path(__file__).parent
    folders = (package / "data" / "data_cards", package.parent / "data_cards")
    cards: dict[str, DataCard] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.md"))):
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        about = yaml.safe_load(head)
        card = DataCard(about["name"], tuple(about["hub"]), tuple(about["formats"]), text.strip())
        cards.setdefault(card.name, card)
    return tuple(cards.values())


def shipped_files(name: str) -> dict[str, Path]:
    """The files of a shipped recipe by the place they go to: `<name>.toml`, and what is in the folder `<name>/`.

    Raises UsageError with the names that there are.
    """
    shipped = recipe.shipped_recipes()
    if name not in shipped:
        near = get_close_matches(name, shipped, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(
            f'no recipe "{name}" comes with prefmix. {hint}There are: {", ".join(sorted(shipped))}.'
        )
    home = shipped[name].parent
    beside = sorted(path for path in (home / name).rglob("*") if path.is_file())
    return {path.relative_to(home).as_posix(): path for path in (shipped[name], *beside)}


def starter_recipe(data: Sequence[str], folder: Path, name: str | None = None) -> Starter:
    """A starter recipe, for a file in `folder`, over files, folders, glob patterns and data sets on the Hub.

    `data` is relative to the current folder; without any, the data files of the current folder and of `data/` in it are
    taken. Files whose names differ only in numbers are one source; where some files of a folder are called train, those
    of other splits are left aside. `name` is that of the mixture: else that of the only source, or of the folder.

    Raises SourceError when nothing can be used, with the formats that come nearest; HubError.
    """
    root = folder.resolve()
    found: list[Found] = []
    left_out: list[LeftOut] = []
    for group in _groups(data, root):
        title = _free(group.title, [each.name for each in found])
        spec = recipe.Source.model_validate(dict(group.origin))
        try:
            source = sources.resolve(title, spec, root)
        except SourceError as error:
            left_out.append(_left_out(title, group.origin, spec, root, error))
        else:
            found.append(Found(title, group.origin, source, group.beside))
    if not found:
        raise SourceError("\n".join(each.reason for each in left_out))
    if name is None:
        name = found[0].name if len(found) == 1 else root.name
    name = _plain(name).lower() or "mixture"
    return Starter(name, "\n".join(_lines(name, found, left_out)) + "\n", tuple(found), tuple(left_out))


@dataclass(frozen=True)
class _Group:
    """Data that becomes one source, if a format fits."""

    title: str
    origin: Origin
    beside: tuple[str, ...] = ()


def _groups(data: Sequence[str], root: Path) -> list[_Group]:
    here = Path.cwd()
    if not data:
        data = sorted(path.name for path in here.iterdir() if path.is_file() and files.is_data_file(path.name))
        data = [*data, *(["data"] if (here / "data").is_dir() else [])]
        if not data:
            raise SourceError(
                f"no data files in {here} or in data/ below it: name files, folders, glob patterns or data sets on the "
                "Hub (owner/name), or take a shipped recipe with --recipe"
            )
    groups: dict[object, _Group] = {}
    alike: dict[object, list[Path]] = {}
    for each in data:
        path = here / each
        if path.is_file():
            key = (path.parent, _NUMBERS.sub("", path.name))
            alike.setdefault(key, []).append(path)
            title = _title(path, _NUMBERS) if len(alike[key]) > 1 else _title(path)
            groups[key] = _Group(title, _written_path(alike[key], root, Path(each).is_absolute()))
        elif not path.exists() and not glob.has_magic(each) and _HUB_NAME.fullmatch(each) and not files.is_data_file(each):
            groups[each] = _Group(_plain(each.rpartition("/")[2]), {"hub": each})
        else:
            for group in _below(each, root):
                groups[str(group.origin)] = group
    return list(groups.values())


def _below(pattern: str, root: Path) -> Iterator[_Group]:
    """What a folder or a glob pattern means: one source for each kind of file name."""
    here = Path.cwd()
    paths = files.find_files(pattern, here)
    base = here / pattern
    names = {path: path.relative_to(base).as_posix() if base in path.parents else path.name for path in paths}
    held_out: list[Path] = []
    if any(files.in_split(name, "train") for name in names.values()):
        held_out = [path for path in paths if _split_of(names[path]) not in (None, "train")]
    alike: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        if path not in held_out:
            alike.setdefault((path.parent, _SPLIT_WORDS.sub("", _NUMBERS.sub("", path.name))), []).append(path)
    beside = tuple(sorted(names[path] for path in held_out))
    for group in alike.values():
        title = _title(group[0], _NUMBERS, _SPLIT_WORDS)
        yield _Group(title, _written_path(group, root, Path(pattern).is_absolute()), beside)
        beside = ()


def _split_of(name: str) -> str | None:
    return next((split for split in _SPLITS if files.in_split(name, split)), None)


def _title(path: Path, *without: re.Pattern[str]) -> str:
    """A source's name by its file's, without numbers and words that name a split; else by its folder's."""
    stem = path.name.split(".")[0]
    for pattern in without:
        stem = pattern.sub("", stem)
    return _plain(stem) or _plain(path.parent.name) or "data"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _free(title: str, taken: Sequence[str]) -> str:
    """The name, with a number where it is taken (a recipe keeps `tokenizer` for itself)."""
    names = (title, *(f"{title}_{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken and name != "tokenizer")


def _written_path(paths: Sequence[Path], root: Path, absolute: bool) -> Origin:
    """`path` of a source: a file, a glob pattern that means just these files, or a list."""

    def written(path: Path) -> str:
        return path.as_posix() if absolute else Path(os.path.relpath(path, root)).as_posix()

    if len(paths) == 1:
        return {"path": written(paths[0])}
    names = [path.name for path in paths]
    start = re.split(r"\d", os.path.commonprefix(names))[0]
    end = os.path.commonprefix([name[::-1] for name in names])[::-1].lstrip("0123456789")
    pattern = written(paths[0].with_name(f"{glob.escape(start)}*{glob.escape(end)}"))
    if len({path.parent for path in paths}) == 1 and files.find_files(pattern, root) == sorted(paths):
        return {"path": pattern}
    return {"path": [written(path) for path in paths]}


def _left_out(name: str, origin: Origin, spec: recipe.Source, root: Path, error: SourceError) -> LeftOut:
    """Why data is no source: for readable files without a format, their columns and what comes nearest."""
    try:
        paths = files.find_files(spec.path or [], root)
        columns = union(files.schema(path) for path in paths)
    except SourceError:
        return LeftOut(name, origin, str(error).removeprefix(f"source {name}: "))
    if spec.path is None or sources.sniff(columns) is not None:
        return LeftOut(name, origin, str(error).removeprefix(f"source {name}: "))
    nearest = tuple(_as_toml(each, mapping) for each, mapping in nearest_formats(columns))
    tries = "; or ".join(", ".join(keys) for keys in nearest)
    hint = f"Nearest: {tries}" if tries else "None comes near: `prefmix sources` says what each format needs"
    shown = ", ".join(_one_line(column) for column in columns)
    where = files.relative_name(paths[0], Path.cwd()) if len(paths) == 1 else str(spec.path)
    return LeftOut(name, origin, f"{where}: no format fits its columns {shown}. {hint}", nearest)


def nearest_formats(columns: Mapping[str, pl.DataType]) -> list[tuple[str, dict[str, str]]]:
    """The formats that columns would fit under other names: (format, {its column: column there}), the likeliest first.

    A column for which there is no candidate is "..."; a format lacks at most one, and has at least one.
    """
    ranked = []
    for number, (name, each) in enumerate(sources.FORMATS.items()):
        for layout in layouts(each):
            mapping = _mapping(layout, columns)
            missing = sum(there == "..." for there in mapping.values())
            if missing <= 1 and missing < len(mapping):
                exact = sum(wanted == there for wanted, there in mapping.items())
                ranked.append((missing, -len(mapping), -exact, number, name, mapping))
    best: dict[str, dict[str, str]] = {}
    for *_, name, mapping in sorted(ranked, key=lambda item: item[:4]):
        best.setdefault(name, {wanted: there for wanted, there in mapping.items() if wanted != there})
    return list(best.items())[:_MOST_NEAREST]


def _mapping(layout: Layout, columns: Mapping[str, pl.DataType]) -> dict[str, str]:
    """Each column that a layout needs -> the column that is most likely meant, or "..."."""
    free = [name for name in columns if name not in layout.types]
    mapping = {}
    for wanted, dtype in layout.columns.items():
        fitting = [name for name in free if fits(columns[name], dtype, layout.loose)]
        by_lower = {name.lower(): name for name in fitting}
        if wanted in columns and fits(columns[wanted], dtype, layout.loose):
            mapping[wanted] = wanted
            continue
        likely = [by_lower[name] for name in SYNONYMS.get(wanted, ()) if name in by_lower]
        likely += [by_lower[name] for name in get_close_matches(wanted, by_lower, n=1, cutoff=0.7)]
        mapping[wanted] = likely[0] if likely else "..."
        free = [name for name in free if name != mapping[wanted]]
    return mapping


def _as_toml(format_name: str, mapping: Mapping[str, str]) -> tuple[str, ...]:
    renames = ", ".join(f"{wanted} = {_toml(there)}" for wanted, there in mapping.items())
    return f"format = {_toml(format_name)}", f"columns = {{ {renames} }}"


def _toml(value: str | list[str]) -> str:
    """A string or a list of strings in TOML: JSON's escapes are also TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lines(name: str, found: Sequence[Found], left_out: Sequence[LeftOut]) -> Iterator[str]:
    """The lines of the recipe. `# ` begins an explanation; `#` right before a key is an option that is not in force."""
    yield "# A starter recipe, written by `prefmix init`. Every key: `prefmix schema`, docs/recipes.md."
    yield "# A line that begins with # and a key is an option: remove the # to use it."
    yield ""
    yield f"name = {_toml(name)}"
    yield "seed = 42                        # decides the order of the rows and the splits, on every machine alike"
    yield "#license = \"apache-2.0\"          # of the mixture; absent: the strictest of its sources"
    yield ""
    yield "# The order of the sources is their priority: of two equal rows, the one of the earlier source stays."
    for number, each in enumerate(found):
        yield from _source_lines(each, with_options=number == 0)
    for each in left_out:
        yield from _left_out_lines(each)
    yield from _settings_lines(found)


def _source_lines(each: Found, with_options: bool) -> Iterator[str]:
    source = each.source
    columns = union(files.schema(file.path) for file in source.files[:1])
    used = [column for column in columns if column in source.layout.types]
    other = [column for column in columns if column not in source.layout.types]
    rows = source.count_rows()
    many = f"{len(source.files)} files, " if len(source.files) > 1 else ""
    yield ""
    yield f"[sources.{each.name}]"
    yield f"# {many}{f'{rows:,} rows' if rows is not None else f'{each.bytes:,} bytes'}; {source.kind} rows"
    not_read = f"; not read: {', '.join(map(_one_line, other))}" if other else ""
    yield f"# read: {', '.join(map(_one_line, used))}{not_read}"
    if each.beside:
        shown = ", ".join(map(_one_line, each.beside[:4]))
        yield f"# left aside, because they are other splits: {shown}{' ...' if len(each.beside) > 4 else ''}"
    yield f"format = {_toml(source.format)}"
    for key, value in each.origin.items():
        yield f"{key} = {_toml(value)}"
    hub = source.spec.hub
    if hub:
        yield f'revision = "main"                # now {source.revision}'
    if not (hub and hub in KNOWN_LICENCES):
        yield '#license = "..."                  # of this data'
    if with_options:
        text = next((column for column in used if source.layout.types[column] == TEXT), None)
        if text and re.fullmatch(r"\w+", text):
            yield f'#where = "length({text}) < 4000"'
            yield "# (Polars SQL on the columns of the files)"
        yield "#take = 5000                      # at most so many of the rows that survive; 0.5 is half of them"
        yield "#repeat = 2                       # each row so many times"


def _left_out_lines(each: LeftOut) -> Iterator[str]:
    yield ""
    yield f"# {_one_line(each.reason)}"
    for keys in each.nearest[:1]:
        yield f"#[sources.{each.name}]"
        yield from (f"#{key}" for key in keys)
        yield from (f"#{key} = {_toml(value)}" for key, value in each.origin.items())


def _settings_lines(found: Sequence[Found]) -> Iterator[str]:
    yield from (
        "",
        '[filter]                         # "drop", "report" or "off"; rules that are not named keep their defaults',
        '#languages = ["en"]              # rows in other languages are dropped',
        '#refusals = "report"             # refusals are dropped unless this says otherwise',
        '#cut_off = "drop"                # answers that end in the middle are only reported',
        '#placeholders = "drop"           # {{name}}, [insert ...]: likewise',
    )
    if any(each.source.kind == "preference" for each in found):
        yield "#min_margin = 0.5                # chosen_score - rejected_score must be above this; ties are dropped anyway"
        yield '#on_inverted = "swap"            # the rejected answer has the higher score: dropped unless swapped'
        yield "#max_length_ratio = 4.0          # characters of chosen to rejected"
    yield from (
        "#max_tokens = 2048               # prompt and longer answer; needs [format] tokenizer",
        "",
        "[dedupe]",
        'exact = "pair"                   # or "prompt" (one row for each prompt), "off"',
        "#prompt_cap = 4                  # at most so many pairs of one prompt",
        "",
        "[format]",
        'template = "chatml"',
        'layout = "text"                  # or "messages"',
        '#system = "drop"                 # system messages are kept; or a text for rows that have none',
        '#tokenizer = "teknium/OpenHermes-2.5-Mistral-7B"     # Hub name or folder, to count tokens',
    )
    by_kind = {kind: [each.name for each in found if each.source.kind == kind] for kind in KINDS}
    mixed = {kind: names for kind, names in by_kind.items() if len(names) > 1}
    yield from (("", "#[mix]                           # shares; without them everything that survives is kept") if mixed else ())
    for kind, names in mixed.items():
        yield f"#{kind} = {{ {', '.join(f'{name} = 1' for name in names)} }}"
    yield from (
        "",
        "[splits]",
        "test = 0.02                      # held out; rows with the same prompt land on the same side",
    )
