"""openbmb/UltraFeedback as released: an instruction and several completions, each with an overall score from 1 to 10.

The completion with the best score is chosen; rejected is one of those with a lower score: a seeded choice, or the
lowest. If all scores are equal the pair is a tie, for `[filter]` to judge. Which of several equal completions is taken
follows from a hash of (seed, instruction, response), so neither their order nor that of the rows matters.

**The score of 10 that was a 1.** The release of 2023 multiplied scores up to 1 by ten, so a critique rating of 1 was
stored as 10: 2,628 completions have a 10, many of them bad (found by argilla, corrected upstream on 2023-12-29). A 10
is held against the mean of the aspect ratings (1 to 5) of the same completion by upstream's rule: a mean of at most 2
means that the score was 1, above 4 that it was 10. In between upstream asked GPT-4 again; here such a completion has no
known score and is left out of the pair. Without aspect ratings a 10 is taken as it is. `meta` says what was changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import polars as pl

from prefmix.sources.layout import NUMBER, TEXT, mark_invalid, messages

NAME = "ultrafeedback"
KIND = "preference"
DESCRIPTION = "openbmb/UltraFeedback: an instruction and scored completions; pairs the best with a lower one"
_RATING = pl.Struct({"Rating": TEXT})
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
COLUMNS = {
    "instruction": TEXT,
    "completions": pl.List(
        pl.Struct(
            {
                "response": TEXT,
                "overall_score": NUMBER,
                "fine-grained_score": NUMBER,
                "annotations": pl.Struct(dict.fromkeys(ASPECTS, _RATING)),
            }
        )
    ),
}
LOOSE = {"overall_score", "fine-grained_score", "annotations", *ASPECTS, "Rating"}
OPTIONAL: dict[str, pl.DataType] = {}
OPTIONS = {"rejected": ("random", "lowest")}

_SCORE_BOUNDS = (2.0, 4.0)  # of the mean aspect rating, for a stored score of 10


def read(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    """`chosen_score` and `rejected_score` are the (corrected) overall scores."""
    table = rows.with_row_index("_row").collect()
    scored = _completions(table, seed).filter(pl.col("score").is_not_null() & pl.col("response").is_not_null())
    scored = scored.sort("_row", "score", "rank", descending=[False, True, False])
    best = scored.unique("_row", keep="first", maintain_order=True)
    others = scored.join(best.select("_row", "place", best_score="score"), on="_row", maintain_order="left")
    others = others.filter(pl.col("place") != pl.col("place_right"))
    # among the lower ones if there are any, else among the equal ones
    tied = pl.col("score") == pl.col("best_score")
    by = ["_row", tied, pl.col("score")] if options["rejected"] == "lowest" else ["_row", tied]
    worse = others.sort(*by, "rank").unique("_row", keep="first", maintain_order=True)
    pairs = best.select("_row", "meta", _chosen="response", chosen_score="score").join(
        worse.select("_row", _rejected="response", rejected_score="score"), on="_row", how="left"
    )
    paired = table.lazy().join(pairs.lazy(), on="_row", how="left", maintain_order="left")
    too_few = (pl.col("_rejected").is_null(), "fewer than 2 completions with a response and a known score")
    return mark_invalid(paired, [too_few]).with_columns(
        prompt=messages(("user", pl.col("instruction"))),
        chosen=messages(("assistant", pl.col("_chosen"))),
        rejected=messages(("assistant", pl.col("_rejected"))),
    )


def _completions(table: pl.DataFrame, seed: int) -> pl.DataFrame:
    """One row a completion: `_row, place, response, score, rank, meta`."""
    exploded = (
        table.select("_row", "instruction", "completions")
        .explode("completions")
        .with_columns(pl.col("completions").struct.unnest(), place=pl.int_range(pl.len()))
    )
    ratings = pl.concat_list(
        pl.col("annotations").struct.field(aspect).struct.field("Rating").cast(NUMBER, strict=False)
        for aspect in ASPECTS
    )
    mean = pl.coalesce("fine-grained_score", ratings.list.mean())
    stored = pl.col("overall_score")
    doubtful = (stored == 10) & mean.is_not_null()
    low, high = _SCORE_BOUNDS
    score = pl.when(doubtful & (mean <= low)).then(1.0).when(doubtful & (mean <= high)).then(None).otherwise(stored)
    changed = pl.when(doubtful & (mean <= low)).then(1).otherwise(0)
    unknown = pl.when(doubtful & (mean > low) & (mean <= high)).then(1).otherwise(0)
    exploded = exploded.with_columns(
        score=score, changed=changed.sum().over("_row"), unknown=unknown.sum().over("_row")
    )
    counts = pl.struct(scores_of_10_read_as_1="changed", scores_of_10_left_out="unknown")
    note = pl.struct(prefmix=counts).struct.json_encode()
    ranks = [
        blake2b(f"{seed}\0{instruction}\0{response}".encode(), digest_size=8).digest()
        for instruction, response in exploded.select("instruction", "response").iter_rows()
    ]
    return exploded.with_columns(
        rank=pl.Series(ranks, dtype=pl.Binary),
        meta=pl.when((pl.col("changed") > 0) | (pl.col("unknown") > 0)).then(note),
    )
