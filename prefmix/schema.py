"""The data model: canonical rows while building, the columns of a mixture, the id of a row, the prompt of a row.

A canonical row is a preference pair or an SFT conversation. Contents are message lists; `prompt` holds everything
before the answers, `chosen` and `rejected` the answers (one assistant message each, as a rule).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b
from typing import Literal

import numpy as np
import polars as pl

Kind = Literal["preference", "sft"]
KINDS: tuple[Kind, ...] = ("preference", "sft")
ROLES = ("system", "user", "assistant", "tool")

MESSAGE = pl.Struct({"role": pl.String, "content": pl.String})
MESSAGES = pl.List(MESSAGE)

#: Where a row came from: the source's name in the recipe, the file as written, the row's 0-based number in the source.
ORIGIN = {"source": pl.String, "source_file": pl.String, "source_row": pl.Int64}
#: What became of a row: null while it is alive. `detail` is JSON evidence, `kept_id` the row that was kept instead.
MARKS = {"reason": pl.String, "detail": pl.String, "kept_id": pl.String}
#: What was done to a row that stays (a swap, a strip), with JSON evidence.
CHANGE = pl.Struct({"change": pl.String, "detail": pl.String})
NO_CHANGES = pl.lit([], pl.List(CHANGE)).alias("changes")
#: Contents by kind, in the order in which the row id reads them.
PARTS: dict[Kind, tuple[str, ...]] = {"preference": ("prompt", "chosen", "rejected"), "sft": ("messages",)}

CANONICAL: dict[Kind, dict[str, pl.DataType | type[pl.DataType]]] = {
    "preference": {
        "id": pl.String,
        **ORIGIN,
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "chosen_score": pl.Float64,
        "rejected_score": pl.Float64,
        "meta": pl.String,
        **MARKS,
    },
    "sft": {"id": pl.String, **ORIGIN, "messages": MESSAGES, "meta": pl.String, **MARKS},
}

ROLE = pl.element().struct.field("role")
CONTENT = pl.element().struct.field("content")

_CHUNK_ROWS = 4096  # keeps the encoded text of a chunk in memory that is used again for the next one


def contents(column: str) -> pl.Expr:
    """list<string>: the contents of a MESSAGES column."""
    return pl.col(column).list.eval(CONTENT)


def last_content(column: str) -> pl.Expr:
    """string: the content of the last message of a MESSAGES column, null for an empty list."""
    return pl.col(column).list.last().struct.field("content")


def answers(kind: Kind) -> tuple[pl.Expr, ...]:
    """The texts that answer the prompt; the first one is the answer that is trained towards."""
    if kind == "preference":
        return last_content("chosen"), last_content("rejected")
    return (last_content("messages"),)


def prompt_text(kind: Kind) -> pl.Expr:
    """string: the prompt of a row, for dedupe, prompt_cap, clusters and decontamination.

    Its turns before the last answer without system messages, contents joined by a newline, no role names (one
    system prompt shared by a whole source must not make its questions look alike).
    """
    return prompt_turns(kind).list.eval(CONTENT.filter(ROLE != "system")).list.join("\n")


def prompt_turns(kind: Kind) -> pl.Expr:
    """MESSAGES before the last answer."""
    messages = pl.col("messages")
    return pl.col("prompt") if kind == "preference" else messages.list.head(messages.list.len() - 1)


def with_ids(rows: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Adds `id`: 32 hex digits, blake2b-128 of the row as read.

    What is hashed: the kind, then for each part (`prompt`, `chosen`, `rejected` or `messages`) the number of messages
    and each message as `<bytes>:<role><bytes>:<content>`, so that no two rows share an encoding. Scores, source and
    meta are not part of it. A row that lacks a part (null) has the id of what it was, from a column `raw` (which is
    not in the result): its JSON, or the text of its line.
    """

    def part(column: str) -> pl.Expr:
        message = pl.format("{}:{}{}:{}", ROLE.str.len_bytes(), ROLE, CONTENT.str.len_bytes(), CONTENT)
        return pl.format(
            "{} {};{}", pl.lit(column), pl.col(column).list.len(), pl.col(column).list.eval(message).list.join("")
        )

    encoding = pl.concat_str([pl.lit(kind), *(part(column) for column in PARTS[kind])], separator="\n")
    lacks = rows.select(pl.any_horizontal(pl.col(column).is_null() for column in PARTS[kind])).to_series()
    # Polars 2.1 panics on `format` inside `list.eval` when a chunk of the lists holds nothing but nulls.
    whole = rows.filter(~lacks).select(PARTS[kind]).rechunk()
    digests = []
    for start in range(0, whole.height, _CHUNK_ROWS):
        texts = whole.slice(start, _CHUNK_ROWS).select(encoding.alias("encoding")).to_series()
        digests.extend(blake2b(text, digest_size=16).digest() for text in _each(texts))
    if lacks.any():
        raw = rows.filter(lacks).select(
            pl.col("raw").fill_null("") if "raw" in rows.columns else pl.lit("").alias("raw")
        )
        digests.extend(blake2b(text, digest_size=16).digest() for text in _each(raw.to_series()))
    ids = pl.Series("id", digests, dtype=pl.Binary).bin.encode("hex")
    places = pl.concat([(~lacks).arg_true(), lacks.arg_true()])
    return rows.drop("raw", strict=False).with_columns(ids.gather(places.arg_sort()))


def utf8(texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 of all strings, end to end (uint8), and where each begins (int64, one more at the end)."""
    array = texts.to_arrow(compat_level=pl.CompatLevel.oldest())
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(array.buffers()[2] or b"", np.uint8)
    return data[offsets[0] : offsets[-1]], offsets - offsets[0]


def _each(texts: pl.Series) -> Iterator[memoryview]:
    """The UTF-8 bytes of each string, without making Python strings."""
    data, offsets = utf8(texts)
    view = data.data
    return (view[start:end] for start, end in itertools.pairwise(offsets.tolist()))
