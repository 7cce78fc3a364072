"""Sources: upstream data sets in their own formats, read into canonical rows.

A format is one module here, named in `FORMATS`; other packages add theirs through the entry-point group
`prefmix.sources` (see layout.py for what a format says of itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from prefmix import files
from prefmix.errors import SourceError
from prefmix.files import SourceFile
from prefmix.schema import Kind
from prefmix.sources import (
    hh_rlhf,
    messages,
    openhermes,
    orca_dpo_pairs,
    sharegpt,
    ultrafeedback,
    ultrafeedback_binarized,
)
from prefmix.sources.canonical import (
    Reading,
    canonical_rows,
    check_where,
    upstream_batches,
    upstream_rows,
    where_columns,
    where_types,
)
from prefmix.sources.layout import Layout, layouts
from prefmix.sources.match import best_layout, fitting_layout, matched, renamed, union

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
    license: str | None  # as the recipe says, else the card on the Hub
    columns: tuple[str, ...] = field(repr=False)  # of the files; of JSON files those of the first rows
    layout: Layout = field(repr=False)
    excluded: SourceFile | None = None

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

    def where_types(self) -> dict[str, pl.DataType]:
        """The types that `read_part` wants for the columns that `where` reads. Raises SourceError if `where` cannot be
        evaluated in parts."""
        return where_types(self._reading(), [each.path for each in self.files])

    def read_part(
        self, number: int, span: files.Span, rows: int, seed: int, types: Mapping[str, pl.DataType]
    ) -> Iterator[pl.DataFrame]:
        """What `read` gives, of a part of file `number` and in frames of about so many rows; `source_row` counts from the
        first row of the part.

        Raises:
            SourceError: as for `read`.
        """
        reading, each = self._reading(), self.files[number]
        for upstream in upstream_batches(reading, files.here(each), each.name, span, rows, types):
            yield canonical_rows(reading, upstream, seed)

    def _reading(self, meta: bool = False) -> Reading:
        return Reading(
            source=self.name,
            layout=self.layout,
            renames=self.spec.columns,
            options=_options(self.name, self.format, self.spec.options),
            where=self.spec.where,
            columns=self.columns,
            excluded=None if self.excluded is None else _excluded_ids(files.here(self.excluded)),
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
        from prefmix.sources.hub_files import fetch  # 0.2 s, for those who need the Hub

        fetched = fetch(spec.hub, spec.revision, spec.split)
        revision, licence = fetched.commit, spec.license or fetched.license
        located = tuple(SourceFile(file, path) for file, path in fetched.files)
    else:
        revision, licence = None, spec.license
        located = tuple(files.find(spec.path or [], root, spec.split))
    schemas = {each.name: files.schema(each.path) for each in located}
    every_column = union(schemas.values())
    format_name = spec.format or sniff(renamed(every_column, spec.columns))
    if format_name is None:
        raise SourceError(
            f"source {name}: no format fits the columns {', '.join(sorted(every_column))} of {located[0].name}: say "
            f"which it is with format = ... ({', '.join(FORMATS)}), and where its columns are with columns = {{ ... }}"
        )
    layout = fitting_layout(format_name, layouts(FORMATS[format_name]), schemas, spec.columns)
    source = Source(
        name=name,
        spec=spec,
        format=format_name,
        kind=layout.kind,
        files=located,
        revision=revision,
        sniffed=spec.format is None,
        root=root,
        license=licence,
        columns=tuple(every_column),
        layout=layout,
        excluded=None if spec.exclude is None else _excluded_file(spec.exclude, root),
    )
    reading = source._reading()
    if all(files.knows_columns(each.path) for each in located):
        check_where(reading, every_column)
    else:
        where_columns(reading)
    return source


def sniff(columns: Mapping[str, pl.DataType]) -> str | None:
    """The format that columns are in: the one that fits with most columns, required ones first. None if none fits."""
    best, best_score = None, (0, 0)
    for name, each in FORMATS.items():
        layout = best_layout(layouts(each), columns)
        if layout is not None and (score := matched(layout, columns)) > best_score:
            best, best_score = name, score
    return best


def _known_format(source: str, name: str) -> None:
    if name in _broken:
        raise SourceError(f"source {source}: format {name}: {_broken[name]}: repair or uninstall that package")
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise SourceError(f'source {source}: no format "{name}": {hint}There are: {", ".join(FORMATS)}')


def _options(source: str, format_name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a format, defaults filled in.

    Its `OPTIONS` has, by name, a tuple of all values (the default first), or a default whose type a value must have.
    """
    known = FORMATS[format_name].OPTIONS
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"it has: {', '.join(known) or 'none'}"
            raise SourceError(f'source {source}: format {format_name} has no option "{key}": {hint}')
        allowed = known[key]
        if value not in allowed if isinstance(allowed, tuple) else type(value) is not type(allowed):
            wanted = " or ".join(map(repr, allowed)) if isinstance(allowed, tuple) else type(allowed).__name__
            raise SourceError(f"source {source}: options.{key} = {value!r}: it must be {wanted}")
    defaults = {key: allowed[0] if isinstance(allowed, tuple) else allowed for key, allowed in known.items()}
    return defaults | dict(given)


def _excluded_file(name: str, root: Path) -> SourceFile:
    try:
        return files.find_file(name, root)
    except SourceError as error:
        raise SourceError(f"{error}: correct `exclude`") from None


def _excluded_ids(path: Path) -> pl.Series:
    """The ids in a file: its `id` column (a ledger, say), or one id a line."""
    if path.suffix == ".txt":
        try:
            return pl.Series("id", [line.strip() for line in path.read_text("utf-8").splitlines()], dtype=pl.String)
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: cannot be read as a list of ids ({error}): correct `exclude`") from None
    if "id" not in (columns := files.schema(path)):
        raise SourceError(f"{path}: no column id (it has: {', '.join(columns)}): correct `exclude`")
    return files.read(path, {}, {"id"})["id"].cast(pl.String)
