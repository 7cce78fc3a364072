"""Exact duplicates: the same pair, the same prompt, too many pairs of one prompt.

Rows compete by rank: the source that the recipe names first, then the higher margin, then the id, then the scores. Rank
never looks at where a row stood in a file, so the survivor does not depend on order, files or threads. Content is
compared as it is now (after a swap or a strip), character by character; a prompt is what `schema.prompt_text` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from prefmix.ledger import ALIVE, Drop, mark
from prefmix.recipe import Dedupe
from prefmix.schema import Kind, contents, last_content, prompt_text

#: The columns by which rows compete, best first. `source` is an Enum in the order of the recipe.
RANK = ("source", "margin", "id", "chosen_score", "rejected_score", "source_row")
_RANK_DESCENDING = [False, True, False, False, False, False]


def exact(rows: dict[Kind, pl.LazyFrame], settings: Dedupe) -> dict[Kind, pl.LazyFrame]:
    """Marks the rows that repeat another one, with the survivor in `kept_id`."""
    rows = {kind: frame.with_row_index("_index") for kind, frame in rows.items()}
    keys = {kind: _keys(frame.filter(ALIVE).collect().lazy(), kind) for kind, frame in rows.items()}
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


# Two texts are taken as equal when two 64-bit hashes with different seeds agree (2**-128 a pair). The hashes live and
# die with the process: nothing that is written depends on their values.
_PROMPT = ("prompt_a", "prompt_b")
_PAIR = (*_PROMPT, "answers_a", "answers_b")


def _keys(rows: pl.LazyFrame, kind: Kind) -> pl.DataFrame:
    """Rows as hashes, in the order of their rank.

    `rows` must not filter: where a filter leaves nothing of a batch, Polars 2.1 streams an empty one into `format`,
    which then panics on `list.last()`.
    """
    parts = ("chosen", "rejected") if kind == "preference" else ("messages",)
    if kind == "preference":
        answers = [contents(part) for part in parts]
        scores = [pl.col("chosen_score"), pl.col("rejected_score")]
    else:
        answers = [contents("messages").list.tail(1)]
        scores = [pl.lit(None, pl.Float64).alias("chosen_score"), pl.lit(None, pl.Float64).alias("rejected_score")]
    # The number of messages keeps ["a", "b"] apart from ["a\x00b"]: contents may hold any character.
    texts = [pl.format("{}\x00{}", answer.list.len(), answer.list.join("\x00")) for answer in answers]
    best = last_content("chosen" if kind == "preference" else "messages")
    return (
        rows.select(
            "_index", "id", "source", "source_row", *scores,
            prompt_a=prompt_text(kind).hash(1), prompt_b=prompt_text(kind).hash(2),
            answers_a=pl.struct([text.hash(1).alias(str(n)) for n, text in enumerate(texts)]).hash(3),
            answers_b=pl.struct([text.hash(2).alias(str(n)) for n, text in enumerate(texts)]).hash(4),
            best_a=best.hash(1), best_b=best.hash(2),
        )  # fmt: skip
        .with_columns(margin=pl.col("chosen_score") - pl.col("rejected_score"))
        .sort(RANK, descending=_RANK_DESCENDING, nulls_last=True)
        .collect()
    )


def _drop_beyond(
    keys: pl.DataFrame, rows: pl.LazyFrame, group: Sequence[str], most: int, reason: str
) -> tuple[pl.DataFrame, pl.LazyFrame]:
    """Keeps the first `most` rows of every group; the others name the first one."""
    ranked = keys.with_columns(
        place=pl.int_range(pl.len()).over(group), kept=pl.col("id").first().over(group), rows=pl.len().over(group)
    )
    dropped = ranked.filter(pl.col("place") >= most).select("_index", "kept", "rows")
    alive = ranked.filter(pl.col("place") < most).drop("place", "kept", "rows")
    return alive, _mark(rows, dropped, reason)


def _across(
    preference: pl.DataFrame,
    sft: pl.DataFrame,
    rows: pl.LazyFrame,
    group: Sequence[str] = (*_PROMPT, "best_a", "best_b"),
    reason: str = "dedupe/pair",
) -> tuple[pl.DataFrame, pl.LazyFrame]:
    """Drops the sft rows whose prompt and answer are those of a kept pair (of its chosen side)."""
    kept = preference.unique(group, keep="first", maintain_order=True).select(*group, kept="id", rows=pl.lit(2))
    dropped = sft.join(kept, on=group).select("_index", "kept", "rows")
    return sft.join(dropped, on="_index", how="anti", maintain_order="left"), _mark(rows, dropped, reason)


def _mark(rows: pl.LazyFrame, dropped: pl.DataFrame, reason: str) -> pl.LazyFrame:
    if dropped.is_empty():
        return rows
    joined = rows.join(dropped.lazy(), on="_index", how="left", maintain_order="left")
    drop = Drop(reason, pl.col("kept").is_not_null(), pl.struct(copies=pl.col("rows")), pl.col("kept"))
    return mark(joined, [drop]).drop("kept", "rows")
