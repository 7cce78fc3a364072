"""ShareGPT conversations [{from, value}], as OpenHermes-2.5 has them, and pairs of answers to them (LLaMA-Factory)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from prefmix.schema import MESSAGES, ROLE
from prefmix.sources.layout import CONVERSATION, TEXT, TURN, Layout, mark_invalid, messages

NAME = "sharegpt"
DESCRIPTION = "ShareGPT and OpenHermes-2.5: conversations of {from, value} turns; with chosen and rejected, pairs"
OPTIONS: dict[str, Any] = {}

_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # what the assistant wrote to a tool
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
_FROM = pl.element().struct.field("from").str.to_lowercase()
_TURN = pl.struct(role=_FROM.replace_strict(_ROLES, default=None), content=pl.element().struct.field("value"))


def _read_sft(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    return _known(rows, ["conversations"]).with_columns(messages=_with_system(pl.col("conversations")))


def _read_preference(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    sides = ("chosen", "rejected")
    rows = rows.with_columns(pl.concat_arr(side).arr.to_list() for side in sides)
    return _known(rows, ["conversations", *sides]).with_columns(prompt=_with_system(pl.col("conversations")))


def _known(rows: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """Turns CONVERSATION columns into MESSAGES; marks the rows with a role that is not known."""
    unknown = {
        column: pl.col(column).list.eval(pl.element().struct.field("from").filter(~_FROM.is_in(list(_ROLES))))
        for column in columns
    }
    rules = [
        (names.list.len() > 0, pl.format('unknown role "{}" in {}', names.list.first(), pl.lit(column)))
        for column, names in unknown.items()
    ]
    return mark_invalid(rows, rules).with_columns(pl.col(column).list.eval(_TURN) for column in columns)


def _with_system(conversation: pl.Expr) -> pl.Expr:
    """The `system` column as the first message, unless it is empty or the conversation has a system turn."""
    system = pl.col("system")
    has_system = conversation.list.eval(ROLE == "system").list.any()
    needed = (system.fill_null("") != "") & ~has_system
    return (
        pl.when(needed).then(pl.concat_list(messages(("system", system)), conversation)).otherwise(conversation)
    ).cast(MESSAGES)


LAYOUTS = (
    Layout(
        "preference",
        {"conversations": CONVERSATION, "chosen": TURN, "rejected": TURN},
        _read_preference,
        {"system": TEXT},
    ),
    Layout("sft", {"conversations": CONVERSATION}, _read_sft, {"system": TEXT}),
)
