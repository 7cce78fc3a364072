"""Sources: upstream data sets in their own formats, read into canonical rows.

A format is one module here, named in `FORMATS`; other packages add theirs through the entry-point group
`prefmix.sources` (see layout.py for what a format says of itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from prefmix import files
from prefmix.errors import SourceError
from prefmix.schema import Kind
from prefmix.sources import hh_rlhf, messages, openhermes, orca_dpo_pairs, sharegpt, ultrafeedback, ultrafeedback_binarized
from prefmix.sources.canonical import Reading, canonical_rows, check_where, upstream_rows, where_columns
from prefmix.sources.hub_files import fetch
from prefmix.sources.layout import Layout, describe, fits, layouts

if TYPE_CHECKING:
    from prefmix import recipe

ENTRY_POINTS = "prefmix.sources"

#: By name, in the order in which they are tried when a source names no format: of two that fit equally the first wins.
FORMATS: dict[str, Any] = {
    each.NAME: each
    for each in (orca_dpo_pairs, ultrafeedback, openhermes, sharegpt, hh_rlhf, messages, ultrafeedback_binarized)
}
_broken: dict[str, str] = {}
for _entry_point in entry_points(group=ENTRY_POINTS):
    try:
        FORMATS.setdefault(_entry_point.name, _entry_point.load())
    except Exception as error:
        _broken[_entry_point.name] = f"{_entry_point.value} cannot be imported: {error}"


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `name` is what the ledger says: relative to the recipe, or the path in the Hub repository."""

    name: str
    path: Path


@dataclass(frozen=True)
class Source:
    """A source whose files are here and whose columns fit its format."""

    name: str
    spec: recipe.Source
    format: str
    kind: Kind
    files: tuple[SourceFile, ...]
    revision: str | None
    sniffed: bool
    root: Path
    layout: Layout = field(repr=False)

    def fingerprints(self) -> list[tuple[str, str]]:
        """(name, sha256 of the content) of each file, read anew each time."""
        return [(each.name, files.fingerprint(each.path)) for each in self.files]

    def count_rows(self) -> int | None:
        """Rows by the metadata of the files; None where counting would mean reading them."""
        counts = [files.count_rows(each.path) for each in self.files]
        return None if None in counts else sum(count for count in counts if count is not None)

    def read(self, seed: int, limit: int | None = None, meta: bool = False) -> pl.DataFrame:
        """All rows as canonical rows of `kind`, in file order; with `limit` the first ones.

        Rows that do not fit have `reason` source/invalid, source/where or source/excluded; none is removed. `meta` is
        null unless asked for: JSON of every row's other columns takes longer than reading the row.

        Raises:
            SourceError: a file cannot be read; `where` cannot be evaluated on the columns.
        """
        reading = self._reading(meta)
        upstream = upstream_rows(reading, [each.path for each in self.files], [each.name for each in self.files], limit)
        return canonical_rows(reading, upstream, seed)

    def _reading(self, meta: bool = False) -> Reading:
        return Reading(
            source=self.name,
            layout=self.layout,
            renames=self.spec.columns,
            options=_options(self.name, self.format, self.spec.options),
            where=self.spec.where,
            excluded=None if self.spec.exclude is None else _excluded_ids(self.root / self.spec.exclude),
            meta=meta,
        )


def resolve(name: str, spec: recipe.Source, root: Path) -> Source:
    """Finds the files of a source (or downloads them), its format where none is named, and checks its columns.

    `root` is the folder of the recipe. Raises SourceError (no such files, format or column; a file that cannot be
    read) and HubError.
    """
    if spec.format is not None:
        _known_format(name, spec.format)
    if spec.hub is not None:
        revision, found = fetch(spec.hub, spec.revision, spec.split)
        located = tuple(SourceFile(file, path) for file, path in found)
    else:
        revision = None
        paths = files.find_files(spec.path or [], root, spec.split)
        located = tuple(SourceFile(files.relative_name(path, root), path) for path in paths)
    schemas = {each: files.schema(each.path) for each in located}
    every_column = _merged(list(schemas.values()))
    renamed = _renamed(every_column, spec.columns)
    format_name = spec.format or sniff(renamed)
    if format_name is None:
        raise SourceError(
            f"source {name}: no format fits the columns {', '.join(sorted(every_column))} of {located[0].name}: say which one "
            f"with format = ..., and where its columns are with columns = {{ ... }} (formats: {', '.join(FORMATS)})"
        )
    layout = _layout(name, format_name, renamed, spec.columns, every_column, located[0].name)
    for each, columns in schemas.items():
        _check_columns(each, format_name, layout, columns, spec.columns, numerals=files.is_csv(each.path))
    source = Source(
        name=name,
        spec=spec,
        format=format_name,
        kind=layout.kind,
        files=located,
        revision=revision,
        sniffed=spec.format is None,
        root=root,
        layout=layout,
    )
    reading = source._reading()
    if all(files.knows_columns(each.path) for each in located):
        check_where(reading, every_column)
    else:
        where_columns(reading)
    return source


def sniff(columns: Mapping[str, pl.DataType]) -> str | None:
    """The format that some columns are in: the one with most columns among them, required ones first. None if none fits."""
    best, best_score = None, (0, 0)
    for name, each in FORMATS.items():
        layout = _best_layout(layouts(each), columns)
        if layout is not None and (score := _score(layout, columns)) > best_score:
            best, best_score = name, score
    return best
