"""Anthropic/hh-rlhf: two transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") that share all but the last answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from prefmix.sources.layout import TEXT, mark_invalid

NAME = "hh_rlhf"
KIND = "preference"
DESCRIPTION = "Anthropic/hh-rlhf: chosen and rejected transcripts (Human: ... Assistant: ...)"
COLUMNS = {"chosen": TEXT, "rejected": TEXT}
OPTIONAL: dict[str, pl.DataType] = {}
OPTIONS: dict[str, Any] = {}

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    """The prompt is what the transcripts share; white space around a turn belongs to the transcript and is cut off."""
    sides = ("chosen", "rejected")
    rows = rows.with_columns(turns(pl.col(side)).alias(f"_{side}") for side in sides)
    broken = [(~pl.col(side).str.starts_with(_HUMAN), f'{side} does not begin with "Human:"') for side in sides]
    broken += [(pl.col(f"_{side}").list.len() < 2, f"{side} has no answer after its first turn") for side in sides]
    before = [pl.col(f"_{side}").list.head(pl.col(f"_{side}").list.len() - 1) for side in sides]
    diverge = (before[0] != before[1], "chosen and rejected diverge before the last answer")
    return mark_invalid(rows, [*broken, diverge]).with_columns(
        prompt=before[0], chosen=pl.col("_chosen").list.tail(1), rejected=pl.col("_rejected").list.tail(1)
    )


def turns(transcript: pl.Expr) -> pl.Expr:
    """MESSAGES of a transcript."""
    of_one_human = pl.element().str.split(_ASSISTANT)
    first = pl.int_range(pl.len()) == 0
    role = pl.when(first).then(pl.lit("user")).otherwise(pl.lit("assistant"))
    message = pl.struct(role=role, content=pl.element().str.strip_chars())
    return transcript.str.split(_HUMAN).list.slice(1).list.eval(of_one_human.list.eval(message).explode())
