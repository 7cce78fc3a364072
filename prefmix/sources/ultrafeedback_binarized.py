"""UltraFeedback with one chosen and one rejected answer, in the shapes in which it is published.

argilla/ultrafeedback-binarized-preferences: instruction, chosen_response, rejected_response as text, mean ratings.
argilla/...-cleaned: prompt as text, chosen and rejected as whole conversations, `chosen-rating`, `rejected-rating`.
HuggingFaceH4/ultrafeedback_binarized: the same with `score_chosen`, `score_rejected`; trl-lib's copy has no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from prefmix.sources.layout import NUMBER, TEXT, Layout, messages
from prefmix.sources.messages import preference

NAME = "ultrafeedback_binarized"
DESCRIPTION = "UltraFeedback as pairs: argilla's, HuggingFaceH4's and trl-lib's columns; scores of both answers"
OPTIONS: dict[str, Any] = {}


def _read(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    return rows.with_columns(
        prompt=messages(("user", pl.col("instruction"))),
        chosen=messages(("assistant", pl.col("chosen_response"))),
        rejected=messages(("assistant", pl.col("rejected_response"))),
        chosen_score="chosen_avg_rating",
        rejected_score="rejected_avg_rating",
    )


LAYOUTS = (
    Layout(
        "preference",
        {"instruction": TEXT, "chosen_response": TEXT, "rejected_response": TEXT},
        _read,
        {"chosen_avg_rating": NUMBER, "rejected_avg_rating": NUMBER},
    ),
    *preference(("score_chosen", "score_rejected")),
    *preference(("chosen-rating", "rejected-rating")),
)
