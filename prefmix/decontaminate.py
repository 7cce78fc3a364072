"""Rows that hold text of a benchmark: the search over the rows, the drops with their evidence, the report.

What counts as holding is in `overlap`. Searched is the prompt of a row as `schema.prompt_text` says, and, where the
assistant speaks in it, the user's turns alone, one after the other: an item may be spread over them. The answers are
searched when that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from prefmix.benchmarks import Benchmark
from prefmix.ledger import ALIVE, Drop, mark
from prefmix.overlap import Index
from prefmix.schema import CONTENT, ROLE, Kind, answers, prompt_text, prompt_turns

#: The rules of `overlap`, the surest first.
RULES = pl.Enum(["ngram", "whole", "containment"])
#: The parts of a row, the prompt first: what is in both is in the prompt.
PARTS = pl.Enum(["prompt", "chosen", "rejected", "answer"])
_WORST = 5


def index_of(benchmarks: Sequence[Benchmark], ngram: int = 13) -> Index:
    """The index of the texts of some benchmarks. Raises SourceError for a file that cannot be read."""
    texts = [each.read().with_columns(benchmark=pl.lit(each.name)) for each in benchmarks]
    return Index(pl.concat(texts).select("benchmark", "item", "field", "text"), ngram)


def find(rows: Mapping[Kind, pl.DataFrame], index: Index, with_answers: bool = False) -> pl.DataFrame:
    """What the living rows hold, the best evidence of a row first.

    A row for each row of `rows`, benchmark text and rule: `kind`, `place` (in the frame), `id`, `source`, `part`
    (`prompt`, `chosen`, `rejected` or `answer`), `benchmark, item, field, rule, coverage, matched`, and `text`, the number
    of the benchmark's text in `index.texts`.
    """
    parts = [part for kind, frame in rows.items() for part in _parts(frame, kind, with_answers)]
    searched = pl.concat(parts)
    keys = searched.select(a=pl.col("text").hash(1), b=pl.col("text").hash(2)).with_row_index("number")
    distinct = keys.unique(["a", "b"], keep="first", maintain_order=True)
    hits = index.search(searched["text"].gather(distinct["number"]))
    hits = hits.hstack(index.evidence(hits)).with_columns(pl.col("rule").cast(RULES))
    first = distinct.select("a", "b", row=pl.int_range(pl.len()))
    owners = searched.drop("text").hstack(keys.join(first, on=["a", "b"], maintain_order="left").select("row"))
    return (
        owners.join(hits.drop("start", "length"), on="row")
        .drop("row")
        .sort("kind", "place", "coverage", "rule", "text", "part", descending=[False, False, True, False, False, False])
        .unique(["kind", "place", "text", "rule"], keep="first", maintain_order=True)
    )


def drop(rows: Mapping[Kind, pl.DataFrame], found: pl.DataFrame) -> dict[Kind, pl.DataFrame]:
    """Marks the rows of `found` (see `find`) as `decontaminate/<benchmark>`, each with its best evidence."""
    best = _best(found)
    detail = pl.struct("item", "field", "part", "rule", "coverage", text="matched")
    marked = {}
    for kind, frame in rows.items():
        own = best.filter(pl.col("kind") == kind)
        held = own.select(_place="place", _benchmark="benchmark", _detail=detail)
        joined = frame.with_row_index("_place").join(
            held.cast({"_place": pl.UInt32}), on="_place", how="left", maintain_order="left"
        )
        drops = [
            Drop(f"decontaminate/{name}", pl.col("_benchmark") == name, pl.col("_detail"))
            for name in own["benchmark"].unique(maintain_order=True)
        ]
        marked[kind] = mark(joined, drops).drop("_place", "_benchmark", "_detail")
    return marked


def report(found: pl.DataFrame, index: Index) -> dict[str, dict[str, Any]]:
    """By benchmark, also those of which nothing was found: the `contamination` part of a mixture's manifest.

        {"gsm8k": {"items": 1319, "sought": 1319, "touched": 9, "rows": 12, "dropped": 11,
                   "rules": {"ngram": 12, "containment": 11}, "sources": {"orca": 12},
                   "worst": [{"item": "main/test:17", "rows": 3, "text": "..."}]}}

    `sought` counts the items that have a text long enough to be looked for, `touched` those of which one was found,
    `rows` the rows that hold one, `dropped` those of them for which this benchmark was the best evidence; `rules` and
    `sources` count rows; `worst` are the items in most rows.
    """
    row = pl.struct("kind", "place")
    dropped = dict(_best(found).group_by("benchmark").len().rows())
    sought = index.texts.filter(pl.Series(index.sought, dtype=pl.Boolean)).select("benchmark", "text")
    reports = {}
    for name in index.items["benchmark"].unique(maintain_order=True):
        own = found.filter(pl.col("benchmark") == name)
        items = index.items.filter(pl.col("benchmark") == name)
        touched = items.filter(pl.col("text").is_in(index.texts["text"].gather(own["text"].unique()).implode()))
        worst = own.group_by("item").agg(rows=row.n_unique(), text=pl.col("matched").first())
        reports[name] = {
            "items": items["item"].n_unique(),
            "sought": items.join(sought, on=["benchmark", "text"], how="semi")["item"].n_unique(),
            "touched": touched["item"].n_unique(),
            "rows": own.select(row.n_unique()).item(),
            "dropped": dropped.get(name, 0),
            "rules": _counts(own, "rule"),
            "sources": _counts(own, "source"),
            "worst": worst.sort("rows", "item", descending=[True, False]).head(_WORST).to_dicts(),
        }
    return reports


def _parts(frame: pl.DataFrame, kind: Kind, with_answers: bool) -> Iterator[pl.DataFrame]:
    """The texts of the living rows: `kind, place, id, source, part, text`."""
    alive = frame.with_row_index("place").filter(ALIVE)
    owner = {
        "kind": pl.lit(kind),
        "place": pl.col("place"),
        "id": pl.col("id"),
        "source": pl.col("source").cast(pl.String),
    }
    yield alive.select(**owner, part=pl.lit("prompt", PARTS), text=prompt_text(kind))
    spoken = prompt_turns(kind).list.eval(ROLE == "assistant").list.any()
    users = prompt_turns(kind).list.eval(CONTENT.filter(ROLE == "user")).list.join("\n")
    yield alive.filter(spoken).select(**owner, part=pl.lit("prompt", PARTS), text=users)
    if with_answers:
        names = ("chosen", "rejected") if kind == "preference" else ("answer",)
        for name, text in zip(names, answers(kind), strict=True):
            yield alive.select(**owner, part=pl.lit(name, PARTS), text=text)


def _best(found: pl.DataFrame) -> pl.DataFrame:
    return found.unique(["kind", "place"], keep="first", maintain_order=True)


def _counts(found: pl.DataFrame, column: str) -> dict[str, int]:
    counts = found.group_by(pl.col(column).cast(pl.String)).agg(rows=pl.struct("kind", "place").n_unique())
    return dict(counts.sort("rows", column, descending=[True, False]).rows())
