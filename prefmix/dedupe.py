"""Duplicates: the same pair, the same prompt, too many pairs of one prompt, and texts that are nearly the same.

Rows compete by rank: the source that the recipe names first, then the higher margin, then the id, then the scores. Rank
never looks at where a row stood in a file, so the survivor does not depend on order, files or threads. Content is
compared as it is now (after a swap or a strip): exact duplicates character by character, near ones as `minhash` says.
A prompt is what `schema.prompt_text` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from prefmix.ledger import ALIVE, Drop, mark
from prefmix.minhash import near_duplicates
from prefmix.recipe import Dedupe, Near
from prefmix.schema import KINDS, PARTS, Kind, answers, contents, prompt_text

#: The columns by which rows compete, best first. `source` is an Enum in the order of the recipe.
RANK = ("source", "margin", "id", "chosen_score", "rejected_score", "source_row")
_RANK_DESCENDING = [False, True, False, False, False, False]


def exact(rows: dict[Kind, pl.DataFrame], settings: Dedupe) -> dict[Kind, pl.DataFrame]:
    """Marks the rows that repeat another one, with the survivor in `kept_id`."""
    rows = {kind: frame.with_row_index("_index") for kind, frame in rows.items()}
    lazy = [_keys(frame.filter(ALIVE), kind) for kind, frame in rows.items()]
    keys = dict(zip(rows, pl.collect_all(lazy), strict=True))
    if settings.exact != "off":
        for kind in rows:
            keys[kind], rows[kind] = _drop_beyond(keys[kind], rows[kind], _PAIR, 1, "dedupe/pair")
        if settings.across and len(rows) == 2:
            keys["sft"], rows["sft"] = _across(keys["preference"], keys["sft"], rows["sft"])
    if settings.exact == "prompt":
        for kind in rows:
            keys[kind], rows[kind] = _drop_beyond(keys[kind], rows[kind], _PROMPT, 1, "dedupe/prompt")
        if settings.across and len(rows) == 2:
            keys["sft"], rows["sft"] = _across(keys["preference"], keys["sft"], rows["sft"], _PROMPT, "dedupe/prompt")
    if settings.prompt_cap is not None:
        for kind in rows:
            _, rows[kind] = _drop_beyond(keys[kind], rows[kind], _PROMPT, settings.prompt_cap, "dedupe/prompt_cap")
    return {kind: frame.drop("_index") for kind, frame in rows.items()}


def near(rows: dict[Kind, pl.DataFrame], settings: Near, across: bool) -> dict[Kind, pl.DataFrame]:
    """Marks the rows whose text nearly repeats that of a row of higher rank which stays; pairs rank above sft rows.

    The evidence is the Jaccard similarity with the survivor (`kept_id`) and the cluster: the id of the best row of all
    those that near pairs of a dropped row and a kept one above it connect.
    """
    rows = {kind: rows[kind].with_row_index("_index") for kind in KINDS if kind in rows}
    for kinds in [list(rows)] if across else [[kind] for kind in rows]:
        ranked = pl.collect_all([_ranked(rows[kind].filter(ALIVE), kind) for kind in kinds])
        texts = [
            rows[kind][part["_index"]].select(text=_compared(settings.on, kind))
            for kind, part in zip(kinds, ranked, strict=True)
        ]
        found = near_duplicates(
            pl.concat(texts)["text"],
            settings.threshold,
            settings.shingle,
            settings.shingle_unit,
            settings.permutations,
            settings.recall,
        )
        order = pl.concat(
            part.select("_index", "id", kind=pl.lit(kind)) for kind, part in zip(kinds, ranked, strict=True)
        )
        dropped = order[found["row"]].with_columns(
            found["jaccard"], kept=order["id"].gather(found["kept"]), cluster=order["id"].gather(found["cluster"])
        )
        for kind in kinds:
            own = dropped.filter(pl.col("kind") == kind).select("_index", "kept", "jaccard", "cluster")
            rows[kind] = _mark(rows[kind], own, "dedupe/near")
    return {kind: frame.drop("_index") for kind, frame in rows.items()}


def _compared(on: str, kind: Kind) -> pl.Expr:
    """string: the text of a row by which near-duplicates are found; `messages` is all of it."""
    if on == "messages":
        return pl.concat_str([contents(part).list.join("\n") for part in PARTS[kind]], separator="\n")
    parts = {"prompt": prompt_text(kind), "chosen": answers(kind)[0].fill_null("")}
    return pl.concat_str([parts[name] for name in on.split("+")], separator="\n")


# Two texts are taken as equal when two 64-bit hashes with different seeds agree (2**-128 a pair). The hashes live and
# die with the process: nothing that is written depends on their values.
_PROMPT = ("prompt_a", "prompt_b")
_CHOSEN = ("chosen_a", "chosen_b")
_PAIR = ("pair_a", "pair_b")


def _ranked(rows: pl.DataFrame, kind: Kind, **columns: pl.Expr) -> pl.LazyFrame:
    """`_index`, the columns of `RANK` and those asked for, in the order of rank."""
    none = pl.lit(None, pl.Float64)
    scores = [pl.col(name) if kind == "preference" else none.alias(name) for name in ("chosen_score", "rejected_score")]
    return (
        rows.lazy()
        .select("_index", "id", "source", "source_row", *scores, **columns)
        .with_columns(margin=pl.col("chosen_score") - pl.col("rejected_score"))
        .select("_index", *RANK, *columns)
        .sort(RANK, descending=_RANK_DESCENDING, nulls_last=True)
    )


def _keys(rows: pl.DataFrame, kind: Kind) -> pl.LazyFrame:
    """Rows as hashes, in the order of their rank."""
    if kind == "preference":
        best, other = contents("chosen"), contents("rejected")
    else:
        best = other = contents("messages").list.tail(1)
    hashes = {
        f"{name}_{suffix}": text.hash(seed)
        for seed, suffix in enumerate("ab", 1)
        for name, text in {"prompt": prompt_text(kind), "best": best, "other": other}.items()
    }
    return (
        _ranked(rows, kind, **hashes)
        .with_columns(
            pl.struct(f"{name}_{suffix}" for name in names).hash(seed).alias(f"{key}_{suffix}")
            for seed, suffix in enumerate("ab", 1)
            for key, names in {"chosen": ("prompt", "best"), "pair": ("prompt", "best", "other")}.items()
        )
        .select("_index", *RANK, *_PROMPT, *_CHOSEN, *_PAIR)
    )


def _drop_beyond(
    keys: pl.DataFrame, rows: pl.DataFrame, group: Sequence[str], most: int, reason: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Keeps the first `most` rows of every group; the others name the first one."""
    crowded = keys.filter(pl.len().over(group) > most)
    ranked = crowded.with_columns(
        place=pl.int_range(pl.len()).over(group), kept=pl.col("id").first().over(group), copies=pl.len().over(group)
    )
    dropped = ranked.filter(pl.col("place") >= most).select("_index", "kept", "copies")
    alive = keys.join(dropped, on="_index", how="anti", maintain_order="left")
    return alive, _mark(rows, dropped, reason)


def _across(
    preference: pl.DataFrame,
    sft: pl.DataFrame,
    rows: pl.DataFrame,
    group: Sequence[str] = _CHOSEN,
    reason: str = "dedupe/pair",
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Drops the sft rows whose prompt and answer are those of a kept pair (of its chosen side)."""
    kept = preference.unique(group, keep="first", maintain_order=True).select(*group, kept="id", copies=pl.lit(2))
    dropped = sft.join(kept, on=group).select("_index", "kept", "copies")
    return sft.join(dropped, on="_index", how="anti", maintain_order="left"), _mark(rows, dropped, reason)


def _mark(rows: pl.DataFrame, dropped: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Drops the rows of `dropped`: `_index`, the `kept` row, and the evidence."""
    if dropped.is_empty():
        return rows
    joined = rows.join(dropped, on="_index", how="left", maintain_order="left")
    evidence = pl.struct(dropped.columns[2:])
    return mark(joined, [Drop(reason, pl.col("kept").is_not_null(), evidence, pl.col("kept"))]).drop(
        dropped.columns[1:]
    )
