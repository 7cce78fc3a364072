"""What is done to rows by themselves: filters, system messages, token counts. Any batch of rows will do."""

from __future__ import annotations

import polars as pl

from prefmix import chatml, filters, tokens
from prefmix.ledger import ALIVE, mark
from prefmix.mixture import token_columns
from prefmix.plan import Plan
from prefmix.schema import Kind


def filtered(rows: pl.DataFrame, kind: Kind, planned: Plan, progress: tokens.Progress | None = None) -> pl.DataFrame:
    """Rows as read, changed and marked as the recipe's `[filter]` and `[format] system` say; with token counts where the
    filter has limits in tokens."""
    recipe = planned.recipe
    marked = filters.apply(rows, recipe.filter, kind)
    marked = chatml.with_system(marked, kind, recipe.format.system)
    limits = filters.in_tokens(recipe.filter, kind)
    return mark(counted(marked, kind, planned, progress), limits) if limits else marked


def counted(rows: pl.DataFrame, kind: Kind, planned: Plan, progress: tokens.Progress | None = None) -> pl.DataFrame:
    """The rows with their token counts, null for those that are dropped; without any where the recipe names no tokenizer."""
    if planned.tokenizer is None or set(token_columns(kind)) <= set(rows.columns):
        return rows
    indexed = rows.with_row_index("_index")
    found = tokens.count(indexed.filter(ALIVE), kind, planned.tokenizer, progress)
    names = [name for name in found.columns if name not in indexed.columns]
    return indexed.join(found.select("_index", *names), on="_index", how="left", maintain_order="left").drop("_index")
