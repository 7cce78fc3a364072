"""Intel/orca_dpo_pairs: a system prompt, a question, and two answers as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from prefmix.sources.layout import TEXT, conversation, messages

NAME = "orca_dpo_pairs"
KIND = "preference"
DESCRIPTION = "Intel/orca_dpo_pairs: system, question and two answers as text; no scores"
COLUMNS = {"question": TEXT, "chosen": TEXT, "rejected": TEXT}
OPTIONAL = {"system": TEXT}
OPTIONS: dict[str, Any] = {}


def read(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    """An empty or missing system prompt is no system message."""
    return rows.with_columns(
        prompt=conversation(pl.col("system"), ("user", pl.col("question"))),
        chosen=messages(("assistant", pl.col("chosen"))),
        rejected=messages(("assistant", pl.col("rejected"))),
    )
