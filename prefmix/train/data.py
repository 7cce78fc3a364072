"""From a mixture to token ids, once: a split is tokenised into an Arrow file beside the mixture and opened from there.

A prompt and its answer are tokenised as one text, so their ids are those that the model meets. The answer starts where
that text leaves the ids of `<|im_start|>assistant\\n`: a token that reaches over this boundary (a newline of the header
that is one with a newline of the answer) belongs to the answer, on both sides of a pair.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
from datasets.table import MemoryMappedTable
from filelock import FileLock
from tokenizers import Tokenizer

from prefmix.chatml import ANSWER_HEADER, END, START, render, render_answer, render_prompt
from prefmix.digest import SplitDigest
from prefmix.errors import TrainError
from prefmix.mixture import Mixture
from prefmix.schema import Kind
from prefmix.store import TOKENS
from prefmix.train.tokenizer import ChatTokenizer

Progress = Callable[[int, int], None]
Ids = list[int]

#: Part of every cache key: a change of what the ids are needs another number.
DATA_VERSION = 1
#: The label of a token that is not trained on.
IGNORED = -100

#: Longer than `max_length`, and would be with nothing but the last question before the answer.
TOO_LONG = "tokens/too_long"
#: An answer that does not have `<|im_end|>` exactly once, as its last token.
NO_EOS = "tokens/no_eos"
#: The two sides of a pair do not have the ids of their prompt in common.
BOUNDARY = "tokens/boundary"
#: Text that is not ChatML turn by turn: special tokens inside a content.
NOT_CHATML = "tokens/not_chatml"
#: A conversation that does not end on an answer.
NO_ANSWER = "tokens/no_answer"

_IDS = pa.list_(pa.int32())
_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "sft": ("input_ids", "labels"),
}
_AS_CHATML: dict[Kind, dict[str, pl.Expr]] = {
    "preference": {
        "prompt": render_prompt(pl.col("prompt")),
        "chosen": render_answer(pl.col("chosen")),
        "rejected": render_answer(pl.col("rejected")),
    },
    "sft": {"messages": render(pl.col("messages"))},
}
_BATCH_ROWS = 512  # an encoding takes about 100 bytes a token while it lives
_SUMMARY, _SHA256 = b"prefmix", b"prefmix.sha256"
_TURN = re.compile(rf"{re.escape(START)}([a-z_]+)\n.*{re.escape(END)}", re.DOTALL)


@dataclass(frozen=True)
class TokenRows:
    """One split as token ids, memory-mapped, in the mixture's order.

    `table` has `id` and lists of int32: `prompt_ids, chosen_ids, rejected_ids`, or `input_ids, labels` (IGNORED except
    on the answers and their `<|im_end|>`). `left_out` counts the rows that are not in it by reason, `shortened` those
    whose prompt gave way to `max_length`. `tokens` is the number of ids in `table`, labels not counted. `key` names
    what the ids depend on: equal keys, equal tables.
    """

    table: datasets.Dataset
    left_out: dict[str, int]
    shortened: int
    tokens: int
    path: Path
    key: str


def tokenize(
    mixture: Mixture,
    subset: Kind,
    split: str,
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    progress: Progress | None = None,
    fallback: Path | None = None,
) -> TokenRows:
    """The token ids of one split, from the cache beside the mixture, or from one in `fallback` where that folder cannot
    be written. `max_length` is the longest prompt + answer, or conversation, in tokens.

    Processes that ask for the same rows at the same time wait for the one that tokenises them.

    Raises:
        MixtureError: the mixture has no such subset or split.
        TrainError: neither folder can be written.
    """
    mixture.scan(subset, split)  # says what there is when there is no such split
    settings = [mixture.digest, tokenizer.sha256, subset, split, max_length, DATA_VERSION]
    key = sha256(json.dumps(settings).encode()).hexdigest()
    name = f"{mixture.digest[:12]}-{key[:12]}.arrow"
    folders = [mixture.folder.resolve().parent / TOKENS, *([fallback] if fallback else [])]
    for folder in folders:
        if found := _opened(folder / name, key):
            return found
    table = mixture.dataset_dict(subset)[split].data.table
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                if found := _opened(folder / name, key):  # another process was quicker
                    return found
                batches = _tokenized(_parts(table, subset), subset, tokenizer, max_length)
                _write(folder / name, key, subset, batches, table.num_rows, progress)
        except OSError as error:
            problems.append(f"{folder} ({error.strerror or error})")
            continue
        if found := _opened(folder / name, key):
            return found
        problems.append(f"{folder} (what was written there reads differently)")
    raise TrainError(f"The tokens of {mixture} cannot be kept in {' or '.join(problems)}. Copy the mixture to a folder "
                     f"that can be written, with room for four bytes a token.")  # fmt: skip


def _parts(table: pa.Table, subset: Kind) -> Iterator[pl.DataFrame]:
    """Batches of `id` and ChatML texts, whichever layout the mixture has."""
    content = next(name for name in ("prompt", "text", "messages") if name in table.column_names)
    as_text = table.schema.field(content).type == pa.string()
    columns = list(_AS_CHATML[subset])
    if subset == "sft" and as_text:
        columns = ["text"]
    texts = columns if as_text else [text.alias(name) for name, text in _AS_CHATML[subset].items()]
    for batch in table.select(["id", *columns]).to_batches(max_chunksize=_BATCH_ROWS):
        if batch.num_rows:
            yield pl.DataFrame(pa.Table.from_batches([batch])).select("id", *texts)


@dataclass(frozen=True)
class _Batch:
    ids: list[str]
    columns: tuple[list[Ids], ...]
    left_out: Counter[str]
    shortened: int
    read: int


def _tokenized(
    parts: Iterator[pl.DataFrame], subset: Kind, tokenizer: ChatTokenizer, max_length: int
) -> Iterator[_Batch]:
    backend = tokenizer.tokenizer.backend_tokenizer
    backend.no_padding()  # transformers leaves its last call's settings behind
    backend.no_truncation()
    header = tuple(backend.encode(ANSWER_HEADER, add_special_tokens=False).ids[1:])
    marks = _Marks(tokenizer.start_id, tokenizer.end_id, header)
    rows_of = _pairs if subset == "preference" else _conversations
    for part in parts:
        ids, columns, left_out, shortened = [], [], Counter(), 0
        for name, (row, is_shortened) in zip(part["id"], rows_of(part, backend, marks, max_length), strict=True):
            if isinstance(row, str):
                left_out[row] += 1
                continue
            ids.append(name)
            columns.append(row)
            shortened += is_shortened
        yield _Batch(ids, tuple(map(list, zip(*columns, strict=True))), left_out, shortened, part.height)


@dataclass(frozen=True)
class _Marks:
    """The ids of `<|im_start|>`, of `<|im_end|>`, and of `assistant\\n` behind an `<|im_start|>`."""

    start: int
    end: int
    header: tuple[int, ...]

    def answer_from(self, ids: Ids, start: int) -> int:
        """Where the answer begins whose `<|im_start|>` is at `start`: where the ids leave those of the header."""
        at = start + 1
        for token, other in zip(ids[at : at + len(self.header)], self.header, strict=False):
            if token != other:
                break
            at += 1
        return at


#: A row, or the reason why it is left out; whether its prompt gave way.
_Row = tuple[tuple[Ids, ...] | str, bool]


def _pairs(part: pl.DataFrame, backend: Tokenizer, marks: _Marks, max_length: int) -> Iterator[_Row]:
    """`(prompt_ids, chosen_ids, rejected_ids)` of each pair."""

    def encoded(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Iterator[tuple | str]:
        texts = [
            prompt + answer for answers in (chosen, rejected) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        ids = _encode(backend, texts)
        for prompt, one, other in zip(prompts, ids[: len(prompts)], ids[len(prompts) :], strict=True):
            yield _parted(one, other, prompt.count(START), marks)

    texts = (part["prompt"].to_list(), part["chosen"].to_list(), part["rejected"].to_list())
    for row, prompt, chosen, rejected in zip(encoded(*texts), *texts, strict=True):
        if isinstance(row, str) or _pair_length(row) <= max_length:
            yield row, False
            continue
        turns = _turns(prompt.removesuffix(ANSWER_HEADER).removesuffix("\n"))
        shorter = ["\n".join([*fewer, ANSWER_HEADER]) for fewer in _fewer(turns or [])]

        def of(prompt: str, chosen: str = chosen, rejected: str = rejected) -> tuple | str:
            return next(encoded([prompt], [chosen], [rejected]))

        yield _first_that_fits(shorter, of, lambda row: _pair_length(row) <= max_length)


def _parted(chosen: Ids, rejected: Ids, turns: int, marks: _Marks) -> tuple[Ids, Ids, Ids] | str:
    """The ids of prompt + answer of both sides, parted where they are still those of a prompt of so many turns."""
    start = _nth(chosen, marks.start, turns)
    if start is None or chosen[: start + 1] != rejected[: start + 1]:
        return BOUNDARY
    at = min(marks.answer_from(chosen, start), marks.answer_from(rejected, start))
    sides = (chosen[at:], rejected[at:])
    if any(side.count(marks.end) != 1 or side[-1] != marks.end for side in sides):
        return NO_EOS
    return chosen[:at], *sides


def _pair_length(row: tuple[Ids, Ids, Ids]) -> int:
    return len(row[0]) + max(len(row[1]), len(row[2]))


def _conversations(part: pl.DataFrame, backend: Tokenizer, marks: _Marks, max_length: int) -> Iterator[_Row]:
    """`(input_ids, labels)` of each conversation."""
    texts = part.to_series(1).to_list()
    for text, ids in zip(texts, _encode(backend, texts), strict=True):
        turns = _turns(text)
        if not turns:
            yield NOT_CHATML if turns is None else NO_ANSWER, False
        elif _role(turns[-1]) != "assistant":
            yield NO_ANSWER, False
        elif len(ids) <= max_length:
            yield _labelled(ids, turns, marks), False
        else:

            def of(fewer: list[str]) -> tuple | str:
                return _labelled(_encode(backend, ["\n".join(fewer)])[0], fewer, marks)

            yield _first_that_fits(_fewer(turns), of, lambda row: len(row[0]) <= max_length)


def _labelled(ids: Ids, turns: Sequence[str], marks: _Marks) -> tuple[Ids, Ids] | str:
    """The ids with their labels: the answers and their `<|im_end|>`."""
    tokens = np.asarray(ids)
    starts, ends = np.flatnonzero(tokens == marks.start).tolist(), np.flatnonzero(tokens == marks.end).tolist()
    if not len(starts) == len(ends) == len(turns) or ids[-1] != marks.end:
        return NO_EOS
    labels = [IGNORED] * len(ids)
    for turn, start, end in zip(turns, starts, ends, strict=True):
        if _role(turn) == "assistant":
            at = marks.answer_from(ids, start)
            labels[at : end + 1] = ids[at : end + 1]
    return ids, labels


def _turns(text: str) -> list[str] | None:
    """The turns of a ChatML text, each from `<|im_start|>` to `<|im_end|>`; None where `chatml.parse` finds none."""
    if not text:
        return []
    first, *others = text.split(f"\n{START}")
    turns = [first, *(START + other for other in others)]
    clean = all(_TURN.fullmatch(turn) and turn.count(START) == turn.count(END) == 1 for turn in turns)
    return turns if clean else None


def _role(turn: str) -> str:
    return turn[len(START) : turn.index("\n")]


def _fewer(turns: Sequence[str]) -> list[list[str]]:
    """The same conversation with ever fewer turns: the oldest questions go first, each with all that was said until the
    next one; then the system turn. What stands behind the last question stays."""
    system = [turn for turn in turns[:1] if _role(turn) == "system"]
    asked = [number for number, turn in enumerate(turns) if _role(turn) == "user"] or [len(system)]
    kept = [[*system, *turns[number:]] for number in asked] + ([list(turns[asked[-1] :])] if system else [])
    return [fewer for fewer in kept if len(fewer) < len(turns)]


def _first_that_fits(shorter: Sequence[Any], of: Callable[[Any], tuple | str], fits: Callable[[Any], bool]) -> _Row:
    """The row of the first of ever shorter texts that fits, or why there is none."""

    def settled(text: Any) -> bool:
        row = of(text)
        return isinstance(row, str) or fits(row)

    found = bisect_left(range(len(shorter)), True, key=lambda number: settled(shorter[number]))
    return (of(shorter[found]), True) if found < len(shorter) else (TOO_LONG, False)


def _nth(ids: Ids, token: int, count: int) -> int | None:
    """Where a token stands for the n-th time."""
    at = -1
    for _ in range(count):
        try:
            at = ids.index(token, at + 1)
        except ValueError:
            return None
    return at if count else None


def _encode(backend: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _write(path: Path, key: str, subset: Kind, batches: Iterator[_Batch], rows: int, progress: Progress | None) -> None:
    """Writes the batches as they come, then an empty one that carries the counts and the digest of what was written."""
    names = _COLUMNS[subset]
    schema = pa.schema([("id", pa.string()), *((name, _IDS) for name in names)])
    digest, left_out, shortened, tokens, read = SplitDigest(schema), Counter(), 0, 0, 0
    part = path.with_suffix(".part")
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                columns = batch.columns or ([],) * len(names)
                arrays = [pa.array(batch.ids, pa.string()), *(pa.array(column, _IDS) for column in columns)]
                record = pa.RecordBatch.from_arrays(arrays, schema=schema)
                if record.num_rows:
                    digest.update(record)
                    writer.write_batch(record)
                counted = columns[:1] if subset == "sft" else columns
                tokens += sum(len(ids) for column in counted for ids in column)
                left_out, shortened, read = left_out + batch.left_out, shortened + batch.shortened, read + batch.read
                if progress:
                    progress(read, rows)
            counts = {"left_out": dict(sorted(left_out.items())), "shortened": shortened, "tokens": tokens}
            summary = json.dumps({"key": key, "content": _content(schema, digest), **counts})
            carried = {_SUMMARY: summary, _SHA256: sha256(summary.encode()).hexdigest()}
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema), carried)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _content(schema: pa.Schema, digest: SplitDigest) -> dict[str, Any]:
    return {"schema": [[field.name, str(field.type)] for field in schema], **digest.summary()}


def _opened(path: Path, key: str) -> TokenRows | None:
    """What was written at `path`; None where there is nothing, or not all of it, or something else."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            digest, carried = SplitDigest(reader.schema), None
            while True:
                try:
                    batch, carried = reader.read_next_batch_with_custom_metadata()
                except StopIteration:
                    break
                if batch.num_rows:
                    batch.validate()
                    digest.update(batch)
            content = _content(reader.schema, digest)
        metadata = dict(carried or {})
        if sha256(metadata[_SUMMARY]).hexdigest().encode() != metadata[_SHA256]:
            return None
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException):
        return None
    summary = json.loads(metadata[_SUMMARY])
    if summary["key"] != key or summary["content"] != content:
        return None
    table = datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key[:16])
    return TokenRows(table, summary["left_out"], summary["shortened"], summary["tokens"], path, key)
