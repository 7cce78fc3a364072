"""Benchmarks: where the rows of each are, and their texts, for decontamination to look for.

A benchmark is a suite (by name, in prefmix/data/suites.toml, read from the Hub), a table of `decontaminate.against`
(files, or a data set on the Hub), or what a command is given.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from prefmix import files
from prefmix.errors import HubError, SourceError, StorageError, UsageError
from prefmix.fields import check_columns, known_fields, listed, read_texts
from prefmix.recipe.problems import nearest
from prefmix.recipe.suites import Suite, holding, suites
from prefmix.sources import SourceFile
from prefmix.storage import is_address

if TYPE_CHECKING:
    from prefmix import recipe

__all__ = ["Benchmark", "Section", "Suite", "from_argument", "resolve", "suites"]

TEXTS = {"item": pl.String, "field": pl.String, "text": pl.String}


@dataclass(frozen=True)
class Section:
    """Files of a benchmark that have their text in the same fields.

    With a `label` (configuration and split on the Hub) items are named after it and their rows counted through all
    files; without one they are named after the file.
    """

    files: tuple[SourceFile, ...]
    fields: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose files are here. `table` says in errors where it was asked for."""

    name: str
    table: str
    sections: tuple[Section, ...]
    revisions: Mapping[str, str]  # the commit of each data set on the Hub
    sniffed: bool = False  # the fields are those that have well-known names

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of all sections, each once."""
        return tuple(dict.fromkeys(field for section in self.sections for field in section.fields))

    def fingerprints(self) -> list[tuple[str, str]]:
        """(name, sha256 of the content) of each file, read anew each time. On the Hub the name is the path there."""
        return [(each.name, files.fingerprint(each.path)) for section in self.sections for each in section.files]

    def read(self) -> pl.DataFrame:
        """All texts that are not blank: `item`, `field`, `text`, one row per text, all strings.

        An item is `<file, or configuration/split>:<0-based row>`, with `[<place>]` behind it where a row holds a list
        of questions; a field is as asked for, with the place in a list of texts: `choices[2]`. Order: files, rows,
        fields as given, lists.

        Raises:
            SourceError: a file cannot be read as a whole or lacks a field; a field, or the benchmark, has no text.
        """
        items: list[str] = []
        fields: list[str] = []
        texts: list[str] = []
        spoken: set[str] = set()
        for section in self.sections:
            before = 0
            for each in section.files:
                with _named(self.table):
                    found = read_texts(each.path, section.fields, each.name)
                spoken.update(field for field in section.fields if field not in found.silent)
                start = f"{section.label or each.name}:"
                items += [
                    f"{start}{before + text.row}{'' if text.element < 0 else f'[{text.element}]'}"
                    for text in found.texts
                ]
                fields += [text.field for text in found.texts]
                texts += [text.text for text in found.texts]
                before += found.rows if section.label else 0
        silent = [field for field in self.fields if field not in spoken]
        if not texts or (silent and not self.sniffed):
            named = " and ".join(f'"{field}"' for field in silent)
            raise SourceError(
                f"{self.table}: not one text in {named}: it holds nothing, or numbers, which are no texts: "
                "name other fields"
            )
        return pl.DataFrame({"item": items, "field": fields, "text": texts}, schema=TEXTS)


def resolve(settings: recipe.Decontaminate, root: Path) -> list[Benchmark]:
    """Finds the files of the suites and the own benchmarks of a recipe, in this order, or downloads them.

    `root` is the folder of the recipe. No text is read yet; columns are checked where that takes no reading.

    Raises:
        SourceError: no such files, split or column; a file that cannot be read.
        HubError: see hub.py.
    """
    named = [
        _suite(name, f"; or take it out of `suites` and name a copy of your own in [decontaminate.against.{name}]")
        for name in settings.suites
    ]
    return [*named, *(_own(name, each, root) for name, each in settings.against.items())]


def from_argument(text: str, fields: Sequence[str] | None = None, root: Path = Path()) -> Benchmark:
    """The benchmark that a command names: a suite, else a file, a folder or a glob relative to `root`.

    Without `fields` each file gives those that have well-known names: `sections` says which.

    Raises:
        UsageError: a suite was given fields.
        SourceError, HubError: as for `resolve`; no column has a well-known name.
    """
    if text in suites():
        if fields:
            raise UsageError(f"the suite {text} has fields of its own: leave them out, or name a path (./{text})")
        return _suite(text, "; a copy of your own can be named in its place")
    try:
        found = files.find(text, root)
    except SourceError as error:
        if is_address(text) or (root / text).exists():
            raise
        if close := nearest(text, suites()):
            hint = f"did you mean the suite {close}?"
        else:
            holder = holding(text)
            hint = f"it is part of the suite {holder}" if holder else f"suites: {', '.join(suites())}"
        missing = str(error).removesuffix(": correct `path`")
        raise SourceError(f"{missing}; no suite has this name either ({hint})") from None
    sections = []
    for each in found:
        columns = files.schema(each.path) if fields is None else {}
        if not (taken := known_fields(columns) if fields is None else fields):
            raise SourceError(
                f"{each.name}: no column has a well-known name (it has: {listed(columns)}): name the fields with the text"
            )
        sections.append(Section((each,), tuple(taken)))
    return _checked(Benchmark(text, text, tuple(sections), {}, sniffed=fields is None))


def _suite(name: str, remedy: str) -> Benchmark:
    """`remedy`: what else can be done when the Hub does not give it."""
    from prefmix import hub  # 0.2 s, for those who need the Hub
    from prefmix.sources.hub_files import fetch

    table = f"suite {name}"
    parts = suites()[name].parts
    if hub.is_offline():
        raise HubError(
            f"{table}: {parts[0].hub}: offline (HF_HUB_OFFLINE), and suites are read anew: go online{remedy}"
        )
    several = len({part.hub for part in parts}) > 1
    commits: dict[str, str] = {}
    sections = []
    for part in parts:
        prefix = f"{part.hub}/" if several else ""
        for split in [f"{config}/{part.split}" for config in part.config] or [part.split]:
            with _named(table, remedy):
                fetched = fetch(part.hub, commits.get(part.hub, "main"), split)
            commits[part.hub] = fetched.commit
            located = tuple(SourceFile(prefix + file, path) for file, path in fetched.files)
            sections.append(Section(located, tuple(part.fields), prefix + split))
    return _checked(Benchmark(name, table, tuple(sections), commits))


def _own(name: str, spec: recipe.Against, root: Path) -> Benchmark:
    table, label, commits = f"decontaminate.against.{name}", None, {}
    with _named(table):
        if spec.hub is None:
            located = files.find(spec.path or [], root, spec.split)
        else:
            from prefmix.sources.hub_files import fetch

            label = f"{spec.config}/{spec.split}" if spec.config else spec.split
            fetched = fetch(spec.hub, spec.revision, label, default="test")
            located = [SourceFile(file, path) for file, path in fetched.files]
            commits = {spec.hub: fetched.commit}
    return _checked(Benchmark(name, table, (Section(tuple(located), tuple(spec.fields), label),), commits))


def _checked(benchmark: Benchmark) -> Benchmark:
    """The benchmark, its columns checked in the files that say what they have without being read."""
    for section in benchmark.sections:
        for each in section.files:
            if files.knows_columns(each.path):
                with _named(benchmark.table):
                    check_columns(files.schema(each.path), section.fields, each.name)
    return benchmark


@contextmanager
def _named(table: str, remedy: str = "") -> Generator[None]:
    """Puts the table's name before what goes wrong, and a remedy behind what goes wrong on the Hub."""
    try:
        yield
    except SourceError as error:
        named = str(error).startswith(f"{table}:")  # a file that is the whole benchmark
        raise SourceError(str(error) if named else f"{table}: {error}") from None
    except StorageError as error:
        raise StorageError(f"{table}: {error}") from None
    except HubError as error:
        raise HubError(f"{table}: {error}{remedy}") from None
