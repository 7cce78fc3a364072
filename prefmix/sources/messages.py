"""Message lists {role, content} and ChatML text: TRL's forms, OpenAI's DPO form, and prefmix's own mixtures read back.

Preference: `prompt`, `chosen` and `rejected`, each a message list or text; without `prompt`, chosen and rejected are
whole conversations that share all but their last turn. SFT: `messages`, or `prompt` and `completion`, or `text`.
Text is ChatML where it (or its prompt) begins with `<|im_start|>`; else it is the content of one turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from prefmix import chatml
from prefmix.schema import CONTENT, ROLE, ROLES
from prefmix.sources.layout import MESSAGES, NUMBER, TEXT, Layout, Read, mark_invalid
from prefmix.sources.layout import messages as turns

NAME = "messages"
DESCRIPTION = "TRL's and OpenAI's forms and prefmix mixtures: lists of {role, content} messages, or ChatML text"
OPTIONS: dict[str, Any] = {}

_ROLE_NAMES = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_ROLE = ROLE.str.to_lowercase()
_IS_CHATML = pl.col("prompt").str.starts_with(chatml.START)


def preference(scores: Sequence[str] = ("chosen_score", "rejected_score")) -> tuple[Layout, ...]:
    """The layouts of pairs; `scores` are the names of the (optional) scores."""
    optional = dict.fromkeys(scores, NUMBER)
    rename = dict(zip(scores, ("chosen_score", "rejected_score"), strict=True))

    def layout(prompt: pl.DataType | None, answer: pl.DataType) -> Layout:
        columns = {"prompt": prompt} if prompt is not None else {}
        columns |= {"chosen": answer, "rejected": answer}

        def read(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
            return _pairs(rows.rename(rename), columns)

        return Layout("preference", columns, read, optional)

    return (
        layout(MESSAGES, MESSAGES),
        layout(TEXT, MESSAGES),
        layout(MESSAGES, TEXT),
        layout(TEXT, TEXT),
        layout(None, MESSAGES),
        layout(None, TEXT),
    )


def with_roles(rows: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """Brings the roles of MESSAGES columns into prefmix's words and marks the rows that have an unknown one."""
    unknown = {column: pl.col(column).list.eval(ROLE.filter(~_ROLE.is_in(list(_ROLE_NAMES)))) for column in columns}
    rules = [
        (names.list.len() > 0, pl.format('unknown role "{}" in {}', names.list.first(), pl.lit(column)))
        for column, names in unknown.items()
    ]
    message = pl.struct(role=_ROLE.replace(_ROLE_NAMES), content=CONTENT)
    return mark_invalid(rows, rules).with_columns(pl.col(column).list.eval(message) for column in columns)


def _pairs(rows: pl.LazyFrame, columns: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """`prompt`, `chosen` and `rejected` of any of the layouts, as MESSAGES."""
    if columns["chosen"] == TEXT:
        rows = _answers_from_text(rows, columns.get("prompt"))
    if columns.get("prompt") == TEXT:
        rows = _prompt_from_text(rows)
    rows = with_roles(rows, list(columns))
    whole, answers = {}, {}
    for side in ("chosen", "rejected"):
        column = pl.col(side)
        whole[side] = column.list.head(column.list.len() - 1)
        answers[side] = column.list.tail(1)
    diverge = "chosen and rejected diverge before the last answer"
    if "prompt" not in columns:
        rows = mark_invalid(rows, [(whole["chosen"] != whole["rejected"], diverge)])
        return rows.with_columns(prompt=whole["chosen"], **answers)
    first_role = pl.col("chosen").list.first().struct.field("role")
    is_whole = first_role.is_in(["system", "user"])  # else the answer alone
    continues = whole["chosen"].list.tail(pl.col("prompt").list.len()) == pl.col("prompt")
    rows = mark_invalid(
        rows,
        [
            (is_whole & (whole["chosen"] != whole["rejected"]), diverge),
            (is_whole & ~continues, "chosen is a conversation that does not continue the prompt"),
        ],
    )
    return rows.with_columns(
        prompt=pl.when(is_whole).then(whole["chosen"]).otherwise("prompt"),
        **{side: pl.when(is_whole).then(answer).otherwise(side) for side, answer in answers.items()},
    )


def _answers_from_text(rows: pl.LazyFrame, prompt: pl.DataType | None) -> pl.LazyFrame:
    """`chosen` and `rejected` from text; they are ChatML where the prompt is, or (without one) must be."""
    parsed, rules = {}, []
    for side in ("chosen", "rejected"):
        text = pl.col(side)
        if prompt is None:
            parsed[side] = _conversation(text)
            rules.append((parsed[side].is_null(), f"{side} is not ChatML, and there is no prompt beside it"))
        elif prompt == TEXT:
            parsed[side] = _answer(text)
            rules.append((parsed[side].is_null(), f"{side} is not ChatML, but the prompt is"))
        else:
            parsed[side] = turns(("assistant", text))
    return mark_invalid(rows, rules).with_columns(**parsed)


def _prompt_from_text(rows: pl.LazyFrame) -> pl.LazyFrame:
    text = pl.col("prompt")
    prompt = pl.when(_IS_CHATML).then(_conversation(text)).otherwise(turns(("user", text)))
    return mark_invalid(rows, [(prompt.is_null(), "prompt begins as ChatML but is not well-formed")]).with_columns(
        prompt
    )


def _answer(text: pl.Expr) -> pl.Expr:
    """MESSAGES of an answer, or of a whole conversation, beside a `prompt` that may be ChatML."""
    is_whole = text.str.starts_with(chatml.START)
    alone = pl.when(_IS_CHATML & ~is_whole).then(text)  # null elsewhere: parsing all other text would take long
    answer = pl.when(is_whole).then(_conversation(text)).otherwise(chatml.parse_answer(alone))
    return pl.when(_IS_CHATML).then(answer).otherwise(turns(("assistant", text)))


def _conversation(text: pl.Expr) -> pl.Expr:
    """MESSAGES of ChatML text, with or without the header of an answer at its end; null if it is not ChatML."""
    text = pl.when(text.str.starts_with(chatml.START)).then(text)
    return pl.coalesce(chatml.parse_prompt(text), chatml.parse(text.str.strip_suffix("\n")))


def _read_messages(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    return with_roles(rows, ["messages"])


def _read_text(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    conversation = _conversation(pl.col("text"))
    rules = [(conversation.is_null(), "text is not ChatML: prefmix cannot tell the turns of other text")]
    return with_roles(mark_invalid(rows, rules).with_columns(messages=conversation), ["messages"])


def _read_completion(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    answer = pl.col("completion")
    parsed = _answer(answer)
    rows = mark_invalid(rows, [(parsed.is_null(), "completion is not ChatML, but the prompt is")])
    return _read_completion_messages(_prompt_from_text(rows.with_columns(completion=parsed)), options, seed)


def _read_completion_messages(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    return with_roles(rows.with_columns(messages=pl.concat_list("prompt", "completion")), ["messages"])


def _read_openai(rows: pl.LazyFrame, options: Mapping[str, Any], seed: int) -> pl.LazyFrame:
    parts = {"prompt": pl.col("input").struct.field("messages")}
    parts |= {"chosen": pl.col("preferred_output"), "rejected": pl.col("non_preferred_output")}
    return with_roles(rows.with_columns(**parts), list(parts))


def _sft(columns: Mapping[str, pl.DataType], read: Read) -> Layout:
    return Layout("sft", columns, read)


LAYOUTS = (
    *preference(),
    Layout(
        "preference",
        {
            "input": pl.Struct({"messages": MESSAGES}),
            "preferred_output": MESSAGES,
            "non_preferred_output": MESSAGES,
        },
        _read_openai,
    ),
    _sft({"messages": MESSAGES}, _read_messages),
    _sft({"prompt": MESSAGES, "completion": MESSAGES}, _read_completion_messages),
    _sft({"prompt": TEXT, "completion": TEXT}, _read_completion),
    _sft({"text": TEXT}, _read_text),
)
