"""The ledger: how a row is marked as dropped, what is written of it, and the check that no row was lost.

While building, every row carries `reason`, `detail` and `kept_id` (null = alive). A stage fills them and never removes
a row, and the first reason wins. `reason` is `<stage>/<rule>`: a stable literal that people filter on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from prefmix.errors import BuildError
from prefmix.schema import ORIGIN, Kind

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


def mark(rows: pl.LazyFrame, drops: Sequence[Drop]) -> pl.LazyFrame:
    """Marks the living rows that a rule drops. Of several rules the first one in `drops` is the reason."""
    if not drops:
        return rows
    rows = rows.with_columns(_first(drops).alias("_rule"))
    reasons = {number: drop.reason for number, drop in enumerate(drops)}
    new = ALIVE & pl.col("_rule").is_not_null()

    def filled(column: str, values: Sequence[pl.Expr | None]) -> pl.Expr:
        chosen = pl.col(column)
        for number, value in enumerate(values):
            if value is not None:
                chosen = pl.when(new & (pl.col("_rule") == number)).then(value).otherwise(chosen)
        return chosen.alias(column)

    return rows.with_columns(
        filled("detail", [None if drop.detail is None else drop.detail.struct.json_encode() for drop in drops]),
        filled("kept_id", [drop.kept_id for drop in drops]),
        pl.when(new).then(pl.col("_rule").replace_strict(reasons, return_dtype=pl.String)).otherwise("reason").alias("reason"),
    ).drop("_rule")


def _first(drops: Sequence[Drop]) -> pl.Expr:
    """int32: the number of the first rule that holds, null if none does."""
    return pl.coalesce(
        pl.when(drop.when).then(pl.lit(number, dtype=pl.Int32)) for number, drop in enumerate(drops)
    )


def ledger(rows: pl.LazyFrame, kind: Kind) -> pl.LazyFrame:
    """One ledger row for every dropped row, in the order of `LEDGER`."""
    stage = pl.col("reason").str.split("/").list.first()
    return (
        rows.filter(~ALIVE)
        .with_columns(pl.col("source").cast(pl.String), kind=pl.lit(kind), stage=stage)
        .select(pl.col(name).cast(dtype) for name, dtype in LEDGER.items())
    )


def count_reasons(rows: pl.LazyFrame) -> pl.DataFrame:
    """`source, reason, rows`: how many rows of each source carry each reason (null = alive)."""
    return rows.group_by("source", "reason").len("rows").collect()


def check_conservation(read: dict[str, int], kept: dict[str, int], dropped: dict[str, int]) -> None:
    """Raises BuildError unless, for every source, rows read = distinct rows kept + rows in the ledger."""
    for source, rows in read.items():
        accounted = kept.get(source, 0) + dropped.get(source, 0)
        if accounted != rows:
            raise BuildError(
                f"source {source}: {rows:,} rows were read, but {kept.get(source, 0):,} were kept and "
                f"{dropped.get(source, 0):,} are in the ledger. This is a defect of prefmix: please report it."
            )
