"""What is reported of the rows that stay: rules set to "report", length bias, scores, repeated prompts, changes."""

from __future__ import annotations

from typing import Any

import polars as pl

from prefmix import filters
from prefmix.ledger import ALIVE
from prefmix.recipe import Filter
from prefmix.schema import Kind, answers, prompt_text


def report(rows: pl.DataFrame, settings: Filter, kind: Kind) -> dict[str, dict[str, Any]]:
    """Per source, of its living rows: the `audit` part of a mixture's manifest.

        {"orca": {"rows": 12000, "reported": {"filter/cut_off": 31}, "changed": {"swap": 2},
                  "repeated_prompts": 40, "prompts_in_other_sources": 7,
                  "length_bias": {"chosen_longer": 0.61, "chosen_chars": 812.4, "rejected_chars": 700.2},
                  "scores": {"rows": 12000, "chosen": {...}, "rejected": {...}, "margin": {...}}}}

    `repeated_prompts` counts the rows whose prompt another row of the same source has; lengths are means in characters;
    `chosen_longer` is the share of pairs whose chosen answer is the longer one; score summaries are min, median, max.
    """
    alive = rows.filter(ALIVE).lazy()
    prompt = prompt_text(kind).hash()
    reports = filters.rules(settings, kind, "report")
    columns = [pl.col("source").cast(pl.String), prompt.alias("prompt"), "changes"]
    columns += [rule.when.fill_null(False).alias(rule.reason) for rule in reports]
    if kind == "preference":
        chosen, rejected = (answer.str.len_chars() for answer in answers(kind))
        columns += [chosen.alias("chosen_chars"), rejected.alias("rejected_chars"), "chosen_score", "rejected_score"]
    here, anywhere = pl.len().over("source", "prompt"), pl.len().over("prompt")
    facts = alive.select(columns).with_columns(repeated=here > 1, elsewhere=anywhere > here)
    aggregates = [pl.len().alias("rows"), pl.col("repeated").sum(), pl.col("elsewhere").sum()]
    aggregates += [pl.col(rule.reason).sum() for rule in reports]
    aggregates += [
        pl.col("changes").list.eval(pl.element().struct.field("change") == change).list.any().sum().alias(change)
        for change in ("strip", "swap")
    ]
    if kind == "preference":
        margin = pl.col("chosen_score") - pl.col("rejected_score")
        aggregates += [
            (pl.col("chosen_chars") > pl.col("rejected_chars")).mean().alias("chosen_longer"),
            pl.col("chosen_chars").mean(),
            pl.col("rejected_chars").mean(),
            margin.count().alias("scored"),
            *(
                getattr(score, statistic)().alias(f"{name}_{statistic}")
                for name, score in (
                    ("chosen", pl.col("chosen_score")),
                    ("rejected", pl.col("rejected_score")),
                    ("margin", margin),
                )
                for statistic in ("min", "median", "max")
            ),
        ]
    found = facts.group_by("source").agg(aggregates).sort("source").collect()
    return {row["source"]: _entry(row, [rule.reason for rule in reports], kind) for row in found.iter_rows(named=True)}


def _entry(row: dict[str, Any], reported: list[str], kind: Kind) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "rows": row["rows"],
        "reported": {reason: row[reason] for reason in reported if row[reason]},
        "changed": {change: row[change] for change in ("strip", "swap") if row[change]},
        "repeated_prompts": row["repeated"],
        "prompts_in_other_sources": row["elsewhere"],
    }
    if kind == "preference":
        entry["length_bias"] = {
            "chosen_longer": round(row["chosen_longer"], 4),
            "chosen_chars": round(row["chosen_chars"], 1),
            "rejected_chars": round(row["rejected_chars"], 1),
        }
        if row["scored"]:
            entry["scores"] = {"rows": row["scored"]} | {
                name: {statistic: row[f"{name}_{statistic}"] for statistic in ("min", "median", "max")}
                for name in ("chosen", "rejected", "margin")
            }
    return entry
