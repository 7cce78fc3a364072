"""The ledger on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from prefmix.cli.charts import Bar, Trimmed, clipped, grid, percent
from prefmix.cli.pages import by_count
from prefmix.cli.texts import one_line, place
from prefmix.inspect import evidence, sentence
from prefmix.mixture import Mixture


def counts_page(mixture: Mixture, counts: pl.DataFrame, source: str | None = None) -> RenderableType:
    """How many rows went for each reason, and from which sources; or how many of one source."""
    by_reason: dict[str, dict[str, int]] = {}
    for reason, name, rows in counts.select("reason", "source", "rows").rows():
        by_reason.setdefault(reason, {})[name] = rows
    totals = {reason: sum(rows.values()) for reason, rows in by_reason.items()}
    dropped = sum(totals.values())
    read = mixture.manifest["sources"][source]["read"] if source else mixture.funnel[0]["out"]
    table = grid("", ">rows", ">of read", "~", "~", header=True)
    for reason, rows in by_count(totals):
        names = ", ".join(f"{name} {count:,}" for name, count in by_count(by_reason[reason]))
        bar = Bar(rows, dropped, "yellow", 10, thin=True)
        table.add_row(reason, Text(f"{rows:,}", "yellow"), Text(percent(rows, read), "dim"), bar, clipped(names, "dim"))
    what = f": {sentence(*totals)}" if len(totals) == 1 else " are not in it"
    where = f" from {source}" if source else ""
    head = Text.assemble((str(mixture), "bold"), f"  {dropped:,} of {read:,} rows read{where}{what}")
    return Group(head, Trimmed(table))


def rows_page(rows: pl.DataFrame, several_reasons: bool) -> RenderableType:
    """One line for each row of the ledger: id, file and row, evidence in words, the row that was kept instead."""
    pages: list[RenderableType] = []
    for (reason,), group in rows.group_by("reason", maintain_order=True):
        heading = Text.assemble((reason, "yellow"), f"  {sentence(reason)}") if several_reasons else None
        held = reason.startswith("decontaminate/")
        columns = (">held", "~words of the benchmark") if held else ("~evidence",)
        table = grid("id", "file:row", *columns, header=not several_reasons)
        for entry in group.iter_rows(named=True):
            facts = _held(entry) if held else (_facts(entry),)
            table.add_row(Text(entry["id"][:12], "bold"), Text(place(entry)), *(clipped(fact, "dim") for fact in facts))
        pages += ["", *([heading] if heading else []), Trimmed(table)]
    return Group(*pages)


def _facts(entry: Mapping[str, Any]) -> str:
    facts = one_line(evidence(entry["reason"], entry["detail"]))
    kept = f"kept {entry['kept_id'][:12]}" if entry["kept_id"] else ""
    return ", ".join(part for part in (facts, kept) if part)


def _held(entry: Mapping[str, Any]) -> tuple[str, str]:
    """How much of a benchmark's text a row holds, and the words: they say more than the number of the item."""
    detail = json.loads(entry["detail"])
    return percent(detail["coverage"], 1), one_line(detail["text"])
