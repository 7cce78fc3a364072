"""teknium/openhermes and other Alpaca-shaped instruction data: instruction, input, output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from prefmix.sources.layout import TEXT, conversation

NAME = "openhermes"
KIND = "sft"
DESCRIPTION = "teknium/openhermes and Alpaca: instruction, input and output as text"
COLUMNS = {"instruction": TEXT, "output": TEXT}
OPTIONAL = {"input": TEXT, "system": TEXT}
OPTIONS: dict[str, Any] = {}


def read(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    """The user's turn is the instruction, with the input on the next line where there is one.

    One newline is LLaMA-Factory's convention for Alpaca-shaped data in a chat template; the Alpaca prompt with its
    "### Input:" headings is of no use behind a chat template.
    """
    alone = pl.col("input").fill_null("") == ""
    both = pl.concat_str("instruction", pl.lit("\n"), "input")
    user = pl.when(alone).then(pl.col("instruction")).otherwise(both)
    return rows.with_columns(messages=conversation(pl.col("system"), ("user", user), ("assistant", pl.col("output"))))
