"""What is reported of the rows that stay: rules set to "report", length bias, scores, repeated prompts, changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    alive = rows.lazy().filter(ALIVE)
    prompts = alive.select("source", prompt=prompt_text(kind).hash())
    return entries([tally(pl.concat([prompts, facts(alive, settings, kind)], how="horizontal").collect())])


def facts(rows: pl.LazyFrame, settings: Filter, kind: Kind) -> pl.LazyFrame:
    """What is to be counted of each row, all numbers or booleans: `filter/...` (a rule that is set to "report" holds),
    `strip`, `swap`, and of a pair the lengths of its answers, its scores and their margin."""
    columns = {rule.reason: rule.when.fill_null(False) for rule in filters.rules(settings, kind, "report")}
    for change in ("strip", "swap"):
        columns[change] = pl.col("changes").list.eval(pl.element().struct.field("change") == change).list.any()
    if kind == "preference":
        chosen, rejected = (answer.str.len_chars() for answer in answers(kind))
        columns |= {"chosen_chars": chosen, "rejected_chars": rejected}
        columns |= {f"{side}_score": pl.col(f"{side}_score") for side in ("chosen", "rejected")}
        columns["margin_score"] = pl.col("chosen_score") - pl.col("rejected_score")
    return rows.select(**columns)


def tally(facts: pl.DataFrame) -> pl.DataFrame:
    """The facts of rows, with their `source` and `prompt` (a hash), counted: `source, what, value, rows`.

    Tallies of parts add up to that of the whole (`entries` does it), as long as all rows of one prompt are in one part.
    A `value` is null where `rows` is all there is to say; lengths are summed up in it.
    """
    here, anywhere = pl.len().over("source", "prompt"), pl.len().over("prompt")
    rows = facts.with_columns(repeated=here > 1, elsewhere=anywhere > here, rows=True).drop("prompt")
    if "chosen_chars" in rows.columns:
        rows = rows.with_columns(chosen_longer=pl.col("chosen_chars") > pl.col("rejected_chars"))
    found = []
    for name, dtype in rows.drop("source").schema.items():
        what = {"what": pl.lit(name)}
        column = pl.col(name)
        by_source = rows.group_by(pl.col("source").cast(pl.String))
        if dtype == pl.Boolean:
            counted = by_source.agg(value=column.count().cast(pl.Float64), rows=column.sum().cast(pl.Int64))
        elif name.endswith("_chars"):
            counted = by_source.agg(value=column.sum().cast(pl.Float64), rows=column.count().cast(pl.Int64))
        else:
            values = rows.select(pl.col("source").cast(pl.String), value=column).drop_nulls()
            counted = values.group_by("source", "value").agg(rows=pl.len().cast(pl.Int64))
        found.append(counted.select("source", "value", "rows", **what))
    return pl.concat(found)


def entries(tallies: Sequence[pl.DataFrame]) -> dict[str, dict[str, Any]]:
    """What `report` gives, of tallies of all rows of one kind."""
    whole = pl.concat(tallies)
    scores = pl.col("what").str.ends_with("_score")
    sums = whole.filter(~scores).group_by("source", "what").agg(pl.col("value", "rows").sum()).sort("source")
    values = whole.filter(scores).group_by("source", "what", "value").agg(pl.col("rows").sum()).sort("value")
    return {
        source: _entry({row[1]: row[2:] for row in own.rows()}, values.filter(pl.col("source") == source))
        for (source,), own in sums.group_by("source", maintain_order=True)
    }


def _entry(counted: Mapping[str, tuple[float, int]], scores: pl.DataFrame) -> dict[str, Any]:
    """`counted[what]`: of a fact how many rows have it at all, and for how many it holds; of lengths their sum, and rows."""
    entry: dict[str, Any] = {
        "rows": counted["rows"][1],
        "reported": {rule: rows for rule, (_, rows) in sorted(counted.items()) if rule.startswith("filter/") and rows},
        "changed": {change: counted[change][1] for change in ("strip", "swap") if counted[change][1]},
        "repeated_prompts": counted["repeated"][1],
        "prompts_in_other_sources": counted["elsewhere"][1],
    }
    if "chosen_longer" in counted:
        pairs, longer = counted["chosen_longer"]
        means = {name: counted[name] for name in ("chosen_chars", "rejected_chars")}
        entry["length_bias"] = {"chosen_longer": round(longer / max(pairs, 1), 4)} | {
            name: round(chars / max(rows, 1), 1) for name, (chars, rows) in means.items()
        }
        margins = scores.filter(what="margin_score")["rows"].sum()
        if margins:
            entry["scores"] = {"rows": margins} | {
                side: _summary(scores.filter(what=f"{side}_score")) for side in ("chosen", "rejected", "margin")
            }
    return entry


def _summary(counted: pl.DataFrame) -> dict[str, float]:
    """min, median and max of values, ascending, of which each stands for so many `rows`."""
    last = counted["rows"].cum_sum()
    rows = last[-1]
    middle = [counted["value"][int(last.search_sorted(place + 1))] for place in ((rows - 1) // 2, rows // 2)]
    return {"min": counted["value"][0], "median": sum(middle) / 2, "max": counted["value"][-1]}
