"""Which benchmarks any data set holds text of: what `prefmix build` drops rows for, asked without a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prefmix import benchmarks, decontaminate, files, recipe, sources
from prefmix.errors import MixtureError
from prefmix.fields import read_texts
from prefmix.ledger import ALIVE
from prefmix.mixture import MANIFEST
from prefmix.schema import CANONICAL, KINDS, MESSAGES, Kind, with_ids
from prefmix.starter.groups import grouped
from prefmix.store import open_mixture

#: What may be the name of a mixture in the store.
_REFERENCE = re.compile(r"[a-z0-9][a-z0-9._-]*(@.*)?")


@dataclass(frozen=True)
class Contamination:
    """What was found: `report` as in a mixture's manifest (see `decontaminate.report`), and the rows themselves.

    `found` has a row for each row of the data, benchmark text and rule: `id, source, source_file, source_row, kind,
    part, benchmark, item, field, rule, coverage, matched`. `rows` counts the rows that were searched by source, `invalid`
    those that do not fit the format of their source and were not.
    """

    report: Mapping[str, Mapping[str, Any]]
    found: pl.DataFrame
    rows: Mapping[str, int]
    invalid: Mapping[str, int]


def contamination(
    data: str | Sequence[str],
    against: str | Sequence[str],
    *,
    fields: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    ngram: int = 13,
    answers: bool = False,
    store: str | Path | None = None,
) -> Contamination:
    """Looks for text of benchmarks in data sets.

    `data`: mixtures (see `open_mixture`), files, folders, glob patterns or data sets on the Hub (owner/name). Their
    formats are found from their columns; with `columns` each row's texts in these are searched instead. `against`: suites,
    or files with the `fields` that hold the text of an item (without, those with well-known names).

    Raises:
        SourceError, HubError: data or a benchmark cannot be read, or has no such field.
        UsageError: a suite was given fields.
    """
    measured = [benchmarks.from_argument(text, fields) for text in _listed(against)]
    rows: dict[Kind, list[pl.DataFrame]] = {kind: [] for kind in KINDS}
    for text in _listed(data):
        for kind, frame in _read(text, columns, store):
            rows[kind].append(frame)
    frames = {kind: pl.concat(parts, rechunk=True) for kind, parts in rows.items() if parts}
    index = decontaminate.index_of(measured, ngram)
    found = decontaminate.find(frames, index, answers)
    origins = pl.concat(
        frame.with_row_index("place").select("place", "source_file", "source_row", kind=pl.lit(kind))
        for kind, frame in frames.items()
    )
    named = found.join(origins, on=["kind", "place"], maintain_order="left").select(
        "id",
        "source",
        "source_file",
        "source_row",
        "kind",
        "part",
        "benchmark",
        "item",
        "field",
        "rule",
        "coverage",
        "matched",
    )
    return Contamination(decontaminate.report(found, index), named, _counts(frames, ALIVE), _counts(frames, ~ALIVE))


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _read(text: str, columns: Sequence[str], store: str | Path | None) -> list[tuple[Kind, pl.DataFrame]]:
    """The canonical rows of a data set."""
    root = Path.cwd()
    if columns:
        return [("sft", _plain_rows(path, columns, root)) for path in files.find_files(text, root)]
    found = []
    for name, spec in _specs(text, root, store).items():
        source = sources.resolve(name, recipe.Source.model_validate(spec), root)
        found.append((source.kind, source.read(seed=0)))
    return found


def _specs(text: str, root: Path, store: str | Path | None) -> dict[str, Mapping[str, str | list[str]]]:
    """`path` or `hub` of the sources that a data set is, by their names."""
    path = root / text
    if (path / MANIFEST).is_file() or (not path.exists() and _REFERENCE.fullmatch(text)):
        try:
            mixture = open_mixture(text, store)
        except MixtureError as error:
            raise MixtureError(f"{text} is no file or folder either, where it could be data: {error}") from None
        return {
            f"{mixture}/{kind}": {
                "path": [str(mixture.folder / file["path"]) for split in splits.values() for file in split["files"]]
            }
            for kind, splits in mixture.manifest["subsets"].items()
        }
    return {group.title: group.origin for group in grouped([text], root)}


def _plain_rows(path: Path, columns: Sequence[str], root: Path) -> pl.DataFrame:
    """Rows of any file as prompts without an answer: the texts of a row's columns, one below the other."""
    name = files.relative_name(path, root)
    texts = [(text.row, text.text) for text in read_texts(path, columns, name).texts]
    turns = pl.struct(role=pl.lit("user"), content=pl.col("content").str.join("\n"))
    answer = pl.struct(role=pl.lit("assistant"), content=pl.lit(""))
    rows = (
        pl.DataFrame(texts, schema={"source_row": pl.Int64, "content": pl.String}, orient="row")
        .group_by("source_row", maintain_order=True)
        .agg(turns.alias("turn"))
        .select(
            "source_row",
            messages=pl.concat_list("turn", answer).cast(MESSAGES),
            source=pl.lit(name),
            source_file=pl.lit(name),
        )
    )
    missing = {
        column: pl.lit(None, dtype) for column, dtype in CANONICAL["sft"].items() if column not in (*rows.columns, "id")
    }
    return with_ids(rows.with_columns(**missing), "sft").select(list(CANONICAL["sft"]))


def _counts(frames: Mapping[Kind, pl.DataFrame], which: pl.Expr) -> dict[str, int]:
    return {
        source: rows
        for frame in frames.values()
        for source, rows in frame.filter(which).group_by("source", maintain_order=True).len().rows()
    }
