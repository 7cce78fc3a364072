"""From the rows of files to canonical rows: `where`, checks for nulls, the format's own reading, ids, `exclude`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import polars as pl

from prefmix import files
from prefmix.errors import SourceError
from prefmix.ledger import Drop, mark
from prefmix.rows import FAULT, RAW, common_types, raw_json, retyped, same_types
from prefmix.schema import CANONICAL, PARTS, with_ids
from prefmix.sources.layout import Invalid, Layout, cast, mark_invalid

FILE, ROW = "_file", "_row"
_TYPED_ROWS = 1 << 16
_INVALID = pl.col("reason") == "source/invalid"


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read. `renames`: column of the format -> column of the files."""

    source: str
    layout: Layout
    renames: Mapping[str, str]
    options: Mapping[str, Any]
    where: str | None
    columns: Sequence[str]  # of the files, as far as they are known before reading
    excluded: pl.Series | None
    meta: bool

    @property
    def wanted(self) -> dict[str, pl.DataType]:
        """The columns of the files that the format reads, with the types it wants."""
        return {self.renames.get(name, name): dtype for name, dtype in self.layout.types.items()}


def upstream_rows(
    reading: Reading, paths: Sequence[Path], names: Sequence[str], limit: int | None = None
) -> pl.DataFrame:
    """The rows of all files in the order given, or the first `limit`, with FILE, ROW, FAULT and RAW."""
    others = None if reading.meta else set(where_columns(reading))
    frames, count = [], 0
    for path, name in zip(paths, names, strict=True):
        left = None if limit is None else limit - count
        if left == 0:
            break
        frames.append(_numbered(reading, files.read(path, reading.wanted, others, left), name, count))
        count += frames[-1].height
    return pl.concat(same_types(frames), how="diagonal")


def upstream_batches(
    reading: Reading, path: Path, name: str, span: files.Span, rows: int, types: Mapping[str, pl.DataType]
) -> Iterator[pl.DataFrame]:
    """What `upstream_rows` gives, of a part of a file and in frames of about so many rows, numbered from the first one of
    the part. `types` are those of the columns that `where` reads (see `where_types`)."""
    count = 0
    for batch in files.batches(path, reading.wanted, set(where_columns(reading)), span, rows):
        yield retyped(_numbered(reading, batch, name, count), types)
        count += batch.height


def where_types(reading: Reading, paths: Sequence[Path]) -> dict[str, pl.DataType]:
    """The types of the columns that only `where` reads, over all rows of all files: text files are read for it.

    Raises a SourceError if `where` looks at more than one row at once: then it cannot be evaluated in parts.
    """
    others = {name for name in where_columns(reading) if name not in reading.wanted}
    if reading.where is not None and not _is_by_row(json.loads(_expression(reading).meta.serialize(format="json"))):
        raise _where_error(reading, "it may look at several rows at once (an aggregate, a window), which a build in parts "
                                    "cannot do: compare with a number instead, or build with --engine memory")  # fmt: skip
    if not others:
        return {}

    def schemas() -> Iterator[Mapping[str, pl.DataType]]:
        for path in paths:
            if files.knows_types(path):
                yield files.schema(path)
            else:
                yield from (batch.schema for batch in files.batches(path, {}, others, files.Span(), _TYPED_ROWS))

    return {name: dtype for name, dtype in common_types(schemas()).items() if name in others}


def _numbered(reading: Reading, rows: pl.DataFrame, name: str, first: int) -> pl.DataFrame:
    """Rows of a file with the columns of the format in the types that it wants, and FILE and ROW."""
    wanted = reading.wanted
    columns = [
        cast(pl.col(each), dtype, wanted[each]).alias(each) if each in wanted else pl.col(each)
        for each, dtype in rows.schema.items()
    ]
    row = pl.int_range(first, first + pl.len(), dtype=pl.Int64)
    return rows.select(*columns, pl.lit(name).alias(FILE), row.alias(ROW))


def canonical_rows(reading: Reading, upstream: pl.DataFrame, seed: int) -> pl.DataFrame:
    """One canonical row for each row of `upstream`, in its order; nothing is removed.

    Of several reasons the first counts: a record that cannot be parsed or has a value of the wrong type, `where`, what
    does not fit the format, `exclude`. Invalid rows have null parts, and an id made of what they were.
    """
    layout = reading.layout
    kept = _satisfies(reading, upstream)
    columns = [
        (
            pl.col(file_name)
            if (file_name := reading.renames.get(name, name)) in upstream.columns
            else pl.lit(None, dtype)
        ).alias(name)
        for name, dtype in layout.types.items()
    ]
    faulty = pl.col(FAULT).is_not_null()
    rows = upstream.lazy().select(
        *columns,
        pl.lit(reading.source).alias("source"),
        pl.col(FILE).alias("source_file"),
        pl.col(ROW).alias("source_row"),
        pl.when(faulty).then(pl.lit("source/invalid")).alias("reason"),
        pl.col(FAULT).alias("detail"),
        pl.lit(None, pl.String).alias("kept_id"),
        FAULT,
    )
    rows = layout.read(mark_invalid(rows, _nulls(reading)), reading.options, seed)
    given = rows.collect_schema().names()
    rows = rows.with_columns(
        pl.lit(None, dtype).alias(name)
        for name, dtype in CANONICAL[layout.kind].items()
        if name not in given and name != "id"
    )
    parts = PARTS[layout.kind]
    missing = [(pl.col(part).is_null(), f"the row has no {part}") for part in parts]
    rows = mark_invalid(rows, missing).with_columns(
        pl.when(_INVALID.fill_null(False)).then(None).otherwise(part).alias(part) for part in parts
    )
    table = rows.collect().rechunk()  # see schema.with_ids: Polars cannot work with chunks of nulls alone
    if table.height != upstream.height or not table["source_row"].equals(upstream[ROW]):
        raise SourceError(
            f"source {reading.source}: its format removed, added or moved rows ({upstream.height:,} read, "
            f"{table.height:,} returned): this is a defect of the format"
        )
    table = _with_raw(reading, upstream, table)
    if kept is not None:
        dropped = ~kept & pl.col(FAULT).is_null()
        table = table.with_columns(
            pl.when(dropped).then(pl.lit("source/where")).otherwise("reason").alias("reason"),
            pl.when(dropped).then(pl.lit(raw_json({"where": reading.where}))).otherwise("detail").alias("detail"),
        )
    if reading.meta:
        table = table.with_columns(meta=_meta(reading, upstream, table["meta"]))
    table = with_ids(table, layout.kind)
    if reading.excluded is not None:
        drop = Drop("source/excluded", pl.col("id").is_in(reading.excluded.implode()))
        table = mark(table, [drop])
    return table.select(pl.col(name).cast(dtype) for name, dtype in CANONICAL[layout.kind].items())


def where_columns(reading: Reading) -> list[str]:
    """The upstream columns that `where` reads. Raises a SourceError if it is not an expression."""
    if reading.where is None:
        return []
    return _expression(reading).meta.root_names()


def check_where(reading: Reading, columns: Collection[str]) -> None:
    """Raises a SourceError if `where` names a column that is not among `columns`."""
    for name in where_columns(reading):
        if name not in columns:
            near = get_close_matches(name, columns, n=1)
            hint = f'did you mean "{near[0]}"? ' if near else ""
            raise _where_error(reading, f'no column "{name}": {hint}The files have: {", ".join(sorted(columns))}')


def _expression(reading: Reading) -> pl.Expr:
    try:
        return pl.sql_expr(reading.where or "")
    except pl.exceptions.PolarsError as error:
        raise _where_error(reading, f"{error}: write a condition in SQL on the columns of the files") from None


def _is_by_row(node: Any) -> bool:
    """Whether an expression, as Polars writes it in JSON, says of each row what it says of the row alone. Only what is
    known to is counted as such."""
    if node == "Len" or not isinstance(node, dict) or len(node) != 1:
        return False
    (kind, inner), *_ = node.items()
    if kind in ("Column", "Literal"):
        return True
    if kind == "Function":
        name, detail = inner["function"], None
        if isinstance(name, dict):
            (name, detail), *_ = name.items()
        if isinstance(detail, dict):
            detail = next(iter(detail))
        known = detail in _SQL_BY_ROW if name == "Sql" else name in _BY_ROW and detail not in _NOT_BY_ROW
        return known and all(map(_is_by_row, inner["input"]))
    operands = _OPERANDS.get(kind)
    return operands is not None and all(_is_by_row(inner[operand]) for operand in operands)


_OPERANDS = {"BinaryExpr": ("left", "right"), "Ternary": ("predicate", "truthy", "falsy"), "Cast": ("expr",)}
_BY_ROW = {"StringExpr", "Boolean", "Coalesce", "Negate", "Abs", "Round", "Floor", "Ceil", "Sign", "Pow", "FillNull"}
_SQL_BY_ROW = {"IsIn", "Binary"}
_NOT_BY_ROW = {"Any", "All", "IsUnique", "IsDuplicated", "IsFirstDistinct", "IsLastDistinct", "ConcatVertical"}


def _satisfies(reading: Reading, upstream: pl.DataFrame) -> pl.Series | None:
    """bool: whether each row satisfies `where` (null is not enough)."""
    if reading.where is None:
        return None
    internal = {FILE, ROW, FAULT, RAW}
    check_where(reading, {*reading.columns, *upstream.columns} - internal)
    try:
        kept = upstream.select(_expression(reading).alias("kept")).to_series()
    except pl.exceptions.PolarsError as error:
        types = ", ".join(f"{name} is {upstream.schema[name]}" for name in where_columns(reading))
        raise _where_error(reading, f"{str(error).splitlines()[0]} ({types}): compare values of one type") from None
    if kept.dtype != pl.Boolean:
        raise _where_error(reading, f"it gives {kept.dtype}, not true or false: write a condition")
    if kept.len() == 1:
        kept = kept.new_from_index(0, upstream.height)
    return kept.fill_null(False)


def _where_error(reading: Reading, what: str) -> SourceError:
    return SourceError(f"source {reading.source}: where = {reading.where!r}: {what}")


def _nulls(reading: Reading) -> list[Invalid]:
    """The rules that a required value is null, or a list of turns empty."""
    rules: list[Invalid] = []
    for name, dtype in reading.layout.types.items():
        label = reading.renames.get(name, name)
        if name in reading.layout.columns:
            rules.append((pl.col(name).is_null(), f"{label} is null"))
        rules += _inner_nulls(pl.col(name), dtype, label, reading.layout.loose)
    return rules


def _inner_nulls(value: pl.Expr, dtype: Any, label: str, loose: frozenset[str]) -> list[Invalid]:
    found: list[Invalid] = []
    if isinstance(dtype, pl.List):
        item = f"an item of {label}"
        inner: list[Invalid] = [
            (pl.element().is_null(), f"{item} is null"),
            *_inner_nulls(pl.element(), dtype.inner, item, loose),
        ]
        found.append((value.list.len() == 0, f"{label} is empty"))
        found += [(value.list.eval(wrong).list.any(), error) for wrong, error in inner]
    elif isinstance(dtype, pl.Struct):
        for each in dtype.fields:
            if each.name not in loose:
                inside = value.struct.field(each.name)
                found.append((value.is_not_null() & inside.is_null(), f"{label}: {each.name} is null"))
                found += _inner_nulls(inside, each.dtype, f"{label}: {each.name}", loose)
    return found


def _with_raw(reading: Reading, upstream: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """Adds `raw`, the JSON of the format's columns, for the rows that have no parts and no raw text from the reader."""
    places = table.with_columns(upstream[RAW]).select((_INVALID & pl.col(RAW).is_null()).arg_true()).to_series()
    raw = upstream[RAW].alias("raw")
    if places.len():
        columns = [name for name in reading.wanted if name in upstream.columns]
        raw = raw.scatter(places, [raw_json(row) for row in upstream.select(columns)[places].iter_rows(named=True)])
    return table.with_columns(raw)


def _meta(reading: Reading, upstream: pl.DataFrame, notes: pl.Series) -> pl.Series:
    """string: JSON of the upstream columns that the format does not read, and of the format's own notes."""
    others = [name for name in upstream.columns if name not in reading.wanted and name not in {FILE, ROW, FAULT, RAW}]
    if not others:
        return notes
    rows = upstream.select(pl.struct(others).struct.json_encode().alias("meta")).with_columns(notes.alias("notes"))
    noted = pl.concat_str(pl.col("meta").str.strip_suffix("}"), pl.lit(","), pl.col("notes").str.strip_prefix("{"))
    return rows.select(pl.when(pl.col("notes").is_null()).then("meta").otherwise(noted).alias("meta")).to_series()
