"""ChatML: rendering and parsing (inverse on every row without special tokens in its contents), and the tokens to look for.

    <|im_start|>user
    What is 2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>

Turns are separated by one newline. A prompt ends with the header of the answer, `<|im_start|>assistant\\n`; an answer
is what follows that header and ends exactly on `<|im_end|>`, so that prompt + answer is the whole conversation.
"""

from __future__ import annotations

import polars as pl

from prefmix.schema import CONTENT, MESSAGES, PARTS, ROLE, Kind

START, END = "<|im_start|>", "<|im_end|>"
ANSWER_HEADER = f"{START}assistant\n"

#: Special tokens of the common chat templates. A tokenizer turns them into control ids wherever they stand, so inside a
#: content they would end or open a turn. In order: ChatML, Llama 3, Phi, Zephyr, GPT-2 and Command-R (all `<|...|>`);
#: Llama 2 and Mistral; Gemma; DeepSeek.
SPECIAL_TOKENS = (
    r"<\|[A-Za-z0-9_]+\|>"
    r"|</?s>|\[/?INST\]|<</?SYS>>|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|<unk>"
    r"|<(?:start|end)_of_turn>|<bos>|<eos>|<pad>"
    r"|<｜[^｜\s]{1,40}｜>"
)


def render(messages: pl.Expr) -> pl.Expr:
    """string: a MESSAGES column as ChatML text; ends on `<|im_end|>`, empty for an empty list."""
    return messages.list.eval(pl.format(f"{START}{{}}\n{{}}{END}", ROLE, CONTENT)).list.join("\n")


def render_prompt(messages: pl.Expr) -> pl.Expr:
    """string: a prompt with the header of the answer behind it."""
    turns = pl.concat_str(render(messages), pl.lit("\n" + ANSWER_HEADER))
    return pl.when(messages.list.len() == 0).then(pl.lit(ANSWER_HEADER)).otherwise(turns)


def render_answer(messages: pl.Expr) -> pl.Expr:
    """string: an answer without the header that its prompt already has."""
    return render(messages).str.strip_prefix(ANSWER_HEADER)


def parse(text: pl.Expr) -> pl.Expr:
    """MESSAGES of ChatML text; null where the text is not exactly what `render` would write."""
    lines = pl.element().str.splitn("\n", 2)
    turn = pl.struct(
        role=lines.struct.field("field_0"),
        content=lines.struct.field("field_1").str.strip_suffix("\n").str.strip_suffix(END),
    )
    last = pl.struct(role=lines.struct.field("field_0"), content=lines.struct.field("field_1").str.strip_suffix(END))
    pieces = text.str.split(START).list.slice(1)
    messages = pl.concat_list(
        pieces.list.head(pieces.list.len() - 1).list.eval(turn), pieces.list.tail(1).list.eval(last)
    )
    clean = ~messages.list.eval(CONTENT.str.contains(END, literal=True) | ~ROLE.str.contains("^[a-z_]+$")).list.any()
    return pl.when((render(messages) == text) & clean).then(messages).otherwise(pl.lit(None, dtype=MESSAGES))


def parse_prompt(text: pl.Expr) -> pl.Expr:
    """MESSAGES of a rendered prompt; null where it does not end with the header of the answer."""
    body = text.str.strip_suffix(ANSWER_HEADER)
    messages = parse(body.str.strip_suffix("\n"))
    return pl.when(render_prompt(messages) == text).then(messages).otherwise(pl.lit(None, dtype=MESSAGES))


def parse_answer(text: pl.Expr) -> pl.Expr:
    """MESSAGES of a rendered answer; null where it does not end on `<|im_end|>`."""
    return parse(pl.concat_str(pl.lit(ANSWER_HEADER), text))


def with_system(rows: pl.DataFrame, kind: Kind, system: str) -> pl.DataFrame:
    """Applies `[format] system`: "keep" leaves the system messages, "drop" removes them, any other text is the system
    message of the rows that have none."""
    if system == "keep":
        return rows
    first = PARTS[kind][0]
    column = pl.col(first)
    if system == "drop":
        return rows.with_columns(column.list.filter(ROLE != "system"))
    default = pl.lit([{"role": "system", "content": system}], dtype=MESSAGES)
    has_system = column.list.eval(ROLE == "system").list.any()
    return rows.with_columns(
        pl.when(has_system | column.is_null()).then(column).otherwise(pl.concat_list(default, column))
    )


def has_special_tokens(column: str) -> pl.Expr:
    """bool: whether any content of a MESSAGES column holds a special token."""
    return pl.col(column).list.eval(CONTENT.str.contains(SPECIAL_TOKENS)).list.any()


def strip_special_tokens(messages: pl.Series) -> pl.Series:
    """A MESSAGES series without special tokens in its contents.

    Runs until nothing is left to remove: taking `<s>` out of `<<s>s>` leaves another one.
    """
    column = messages.name
    frame = messages.to_frame()
    cleaned = pl.struct(role=ROLE, content=CONTENT.str.replace_all(SPECIAL_TOKENS, ""))
    while frame.select(has_special_tokens(column).any()).item():
        frame = frame.with_columns(pl.col(column).list.eval(cleaned))
    return frame.to_series()
