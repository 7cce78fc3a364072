"""The ledger: how a row is marked as dropped, what is written of it, and the check that no row was lost.

While building, every row carries `reason`, `detail` and `kept_id` (null = alive). A stage fills them and never removes
a row, and the first reason wins. `reason` is `<stage>/<rule>`: a stable literal that people filter on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from prefmix.errors import BuildError
from prefmix.schema import MARKS, ORIGIN, Kind

#: What a row must not have to be alive.
ALIVE = pl.col("reason").is_null()

LEDGER = {
    "id": pl.String,
    **ORIGIN,
    "kind": pl.String,
    "stage": pl.String,
    "reason": pl.String,
    "detail": pl.String,
    "kept_id": pl.String,
}

CHANGES = {"id": pl.String, **ORIGIN, "kind": pl.String, "change": pl.String, "detail": pl.String}


class Drop(NamedTuple):
    """A rule: rows for which `when` is true are dropped for `reason`.

    `detail` gives the evidence (a struct, written as JSON), `kept_id` the row that was kept instead.
    """

    reason: str
    when: pl.Expr
    detail: pl.Expr | None = None
    kept_id: pl.Expr | None = None


def mark(rows: pl.DataFrame, drops: Sequence[Drop]) -> pl.DataFrame:
    """Marks the living rows that a rule drops. Of several rules the first one in `drops` is the reason.

    Evidence is worked out for the dropped rows only: they are few, and evidence costs more than the rules.
    """
    if not drops:
        return rows
    rules = [pl.when(drop.when).then(pl.lit(number, pl.Int32)) for number, drop in enumerate(drops)]
    first = rows.lazy().select(pl.when(ALIVE).then(pl.coalesce(rules))).collect().to_series()
    marks = {name: rows[name] for name in MARKS}
    for number, drop in enumerate(drops):
        places = (first == number).arg_true()
        if places.is_empty():
            continue
        values = {"reason": pl.lit(drop.reason), "kept_id": drop.kept_id}
        values["detail"] = None if drop.detail is None else drop.detail.struct.json_encode()
        given = {name: value for name, value in values.items() if value is not None}
        found = rows[places].select(**given)
        for name in given:
            marks[name] = marks[name].scatter(places, found[name])
    return rows.with_columns(marks.values())


#: What became of some rows: `_index` is their place in the frame that they were taken from.
DECISION = {"_index": pl.UInt32, **MARKS}
NONE_DECIDED = pl.DataFrame(schema=DECISION)


def decisions(dropped: pl.DataFrame, reason: str, detail: pl.Expr, kept_id: pl.Expr | None = None) -> pl.DataFrame:
    """Rows (with `_index`) that are dropped for one reason, as `DECISION` has them; `detail` is a struct."""
    kept = pl.lit(None, pl.String) if kept_id is None else kept_id
    marks = {"reason": pl.lit(reason), "detail": detail.struct.json_encode(), "kept_id": kept}
    return dropped.select(pl.col("_index").cast(pl.UInt32), **marks) if dropped.height else NONE_DECIDED


def decided(rows: pl.DataFrame, drops: pl.DataFrame) -> pl.DataFrame:
    """Marks the rows at the places that `drops` (see `DECISION`) names. They are alive."""
    if drops.is_empty():
        return rows
    return rows.with_columns(rows[name].scatter(drops["_index"], drops[name]) for name in MARKS)


def ledger(rows: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """One ledger row for every dropped row, in the order of `LEDGER`."""
    stage = pl.col("reason").str.split("/").list.first()
    return (
        rows.filter(~ALIVE)
        .with_columns(pl.col("source").cast(pl.String), kind=pl.lit(kind), stage=stage)
        .select(pl.col(name).cast(dtype) for name, dtype in LEDGER.items())
    )


def check_conservation(read: dict[str, int], kept: dict[str, int], dropped: dict[str, int]) -> None:
    """Raises BuildError unless, for every source, rows read = distinct rows kept + rows in the ledger."""
    for source, rows in read.items():
        accounted = kept.get(source, 0) + dropped.get(source, 0)
        if accounted != rows:
            raise BuildError(
                f"source {source}: {rows:,} rows were read, but {kept.get(source, 0):,} were kept and "
                f"{dropped.get(source, 0):,} are in the ledger. This is a defect of prefmix: please report it."
            )
