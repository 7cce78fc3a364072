"""Message lists {role, content} and ChatML text: the forms that TRL reads, OpenAI's DPO form, and prefmix's own mixtures.

Preference: `prompt`, `chosen`, `rejected`, each a message list or text; without `prompt`, chosen and rejected are whole
conversations that share all but their last turn. SFT: `messages`, or `prompt` and `completion`, or ChatML in `text`.
Text is ChatML where it holds a ChatML token, else the content of one turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from prefmix import chatml
from prefmix.ledger import Drop, mark
from prefmix.schema import ROLES
from prefmix.sources.layout import MESSAGES, NUMBER, TEXT, Layout, invalid
from prefmix.sources.layout import messages as turns

NAME = "messages"
DESCRIPTION = "TRL's and OpenAI's forms and prefmix's own: message lists {role, content}, or ChatML text"
OPTIONS: dict[str, Any] = {}

SCORES = {"chosen_score": NUMBER, "rejected_score": NUMBER}
_ROLE_NAMES = {**dict.fromkeys(ROLES), "developer": "system", "function": "tool"}

PartsOf = Callable[[], tuple[dict[str, pl.Expr], list[Drop]]]


def text_messages(column: str, role: str, parse: Callable[[pl.Expr], pl.Expr]) -> tuple[pl.Expr, Drop]:
    """MESSAGES of a text column, with the rule that marks broken ChatML."""
    is_chatml = pl.col(column).str.contains_any([chatml.START, chatml.END])
    parsed = pl.when(is_chatml).then(parse(pl.col(column))).otherwise(turns((role, pl.col(column))))
    return parsed, invalid(is_chatml & parse(pl.col(column)).is_null(), f"{column} is not well-formed ChatML")
