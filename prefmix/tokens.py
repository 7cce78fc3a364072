"""Token counts with the tokenizer of the model that will be trained.

A special token splits the text that is tokenised, so ChatML text falls into one segment per message (`user\\nHello`)
between `<|im_start|>` and `<|im_end|>`. Each distinct segment is tokenised once: the count of a whole conversation is
the sum over its segments, exactly, which is checked on a sample of the very rows before it is relied on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tokenizers import AddedToken, Tokenizer

from prefmix.chatml import END, START, render_answer, render_prompt
from prefmix.errors import SourceError
from prefmix.schema import Kind, prompt_turns

Progress = Callable[[int, int], None]
Counter = Callable[[list[str]], np.ndarray]
_BATCH = 2048
_SAMPLE_ROWS = 64
_SAMPLE_TEXTS = 512


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, where it came from, and what was done to it.

    `revision` is the commit on the Hub (None for a folder), `sha256` the digest of tokenizer.json. `added` names the
    ChatML tokens that it did not have: they count as one token each, as they will once training has added them.
    """

    name: str
    revision: str | None
    sha256: str
    tokenizer: Tokenizer
    added: tuple[str, ...]


def load(name: str, revision: str, root: Path) -> LoadedTokenizer:
    """The tokenizer in the folder `name` (relative to `root`), else of the Hub repository `name`.

    Raises SourceError for a folder without a tokenizer.json, or one that cannot be read; HubError.
    """
    folder = root / name
    commit = None
    if folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise SourceError(f"{folder} has no tokenizer.json. Save it with transformers: "
                              f"AutoTokenizer.from_pretrained(...).save_pretrained(folder).")  # fmt: skip
    else:
        from prefmix import hub

        commit = hub.resolve_revision(name, revision, repo_type="model")
        (path,) = hub.download(name, commit, ["tokenizer.json"], repo_type="model")
    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises a bare Exception
        raise SourceError(f"{path}: not a tokenizer that can be read ({error}).") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    added = tuple(token for token in (START, END) if not _is_special(tokenizer, token))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return LoadedTokenizer(name, commit, sha256(data).hexdigest(), tokenizer, added)


def _is_special(tokenizer: Tokenizer, token: str) -> bool:
    return token in {added.content for added in tokenizer.get_added_tokens_decoder().values()}


def count(rows: pl.DataFrame, kind: Kind, loaded: LoadedTokenizer, progress: Progress | None = None) -> pl.DataFrame:
    """Adds the token counts of the rendered rows, int32.

    preference: `prompt_tokens`, `chosen_tokens`, `rejected_tokens` (prompt + answer tokenised as one text, less the
    prompt); sft: `tokens` of the whole text, `prompt_tokens` of what stands before the last answer.
    """
    answers = ["chosen", "rejected"] if kind == "preference" else [pl.col("messages").list.tail(1).alias("answer")]
    parts = rows.select(prompt_turns(kind).alias("prompt"), *answers)
    counts = _by_segment(parts, loaded.tokenizer, _counter(loaded.tokenizer, parts), progress)
    sample = parts.head(_SAMPLE_ROWS)
    if not counts.head(_SAMPLE_ROWS).equals(_whole(sample, loaded.tokenizer)):
        counts = _whole(parts, loaded.tokenizer)
    if kind == "sft":
        counts = counts.select("prompt_tokens", tokens=pl.col("prompt_tokens") + pl.col("answer_tokens"))
    return rows.hstack(counts)


def _by_segment(parts: pl.DataFrame, tokenizer: Tokenizer, counter: Counter, progress: Progress | None) -> pl.DataFrame:
    """`<part>_tokens` of every row, each distinct message tokenised once."""
    flat = {name: parts[name].list.explode(empty_as_null=False) for name in parts.columns}
    messages = pl.concat(flat.values()).rename("message").to_frame().unnest("message")
    distinct = messages.unique()
    segments = distinct.lazy().select(pl.format("{}\n{}", "role", "content"))
    found = []
    for start in range(0, distinct.height, _BATCH):
        found.append(counter(segments.slice(start, _BATCH).collect().to_series().to_list()))
        if progress:
            progress(min(start + _BATCH, distinct.height), distinct.height)
    tokens = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    by_message = messages.join(
        distinct.with_columns(tokens=pl.Series(tokens, dtype=pl.Int64)), on=["role", "content"], maintain_order="left"
    )["tokens"].to_numpy()
    header, newline = (len(tokenizer.encode(text, add_special_tokens=False)) for text in ("assistant\n", "\n"))
    counts, offset = {}, 0
    for name, column in flat.items():
        turns = parts[name].list.len().to_numpy().astype(np.int64)
        ends = np.cumsum(turns)
        running = np.append(0, np.cumsum(by_message[offset : offset + len(column)]))
        offset += len(column)
        # A message is <|im_start|>, its segment and <|im_end|>; messages are separated by a newline.
        total = running[ends] - running[ends - turns] + 2 * turns + newline * turns
        counts[f"{name}_tokens"] = total + 1 + header if name == "prompt" else total - newline - 1 - header
    return pl.DataFrame(counts).cast(pl.Int32)


def _whole(parts: pl.DataFrame, tokenizer: Tokenizer) -> pl.DataFrame:
    """The same by tokenising each rendered text as a whole: the definition, and the way for odd tokenizers."""
    texts = parts.select(
        prompt=render_prompt(pl.col("prompt")),
        **{name: render_answer(pl.col(name)) for name in parts.columns if name != "prompt"},
    )
    counter = _HuggingFace(tokenizer)
    prompt = np.concatenate(
        [counter(batch["prompt"].to_list()) for batch in texts.iter_slices(_BATCH)] or [np.empty(0)]
    )
    counts = {"prompt_tokens": prompt}
    for name in texts.columns[1:]:
        whole = [counter((batch["prompt"] + batch[name]).to_list()) for batch in texts.iter_slices(_BATCH)]
        counts[f"{name}_tokens"] = np.concatenate(whole or [np.empty(0)]) - prompt
    return pl.DataFrame(counts).cast(pl.Int32)


def _counter(tokenizer: Tokenizer, parts: pl.DataFrame) -> Counter:
    """gigatoken where it is installed and gives the ids of `tokenizer` on a sample of these rows, else `tokenizer`."""
    slow = _HuggingFace(tokenizer)
    if find_spec("gigatoken") is None:
        return slow
    step = max(1, parts.height // _SAMPLE_TEXTS)
    sample = [
        f"{message['role']}\n{message['content']}"
        for row in parts.gather_every(step).iter_rows()
        for messages in row
        for message in messages
    ]
    try:
        fast = _Gigatoken(tokenizer)
        same = fast.ids(sample) == slow.ids(sample)
    except Exception:  # a tokenizer that gigatoken does not know: it raises several kinds of errors
        same = False
    return fast if same else slow


class _HuggingFace:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def __call__(self, texts: list[str]) -> np.ndarray:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.fromiter(map(len, encodings), dtype=np.int64, count=len(texts))


class _Gigatoken:
    def __init__(self, tokenizer: Tokenizer) -> None:
        import gigatoken

        self._tokenizer: Any = gigatoken.Tokenizer.from_json(tokenizer.to_str())

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts).to_list()

    def __call__(self, texts: list[str]) -> np.ndarray:
        import awkward

        return np.asarray(awkward.num(self._tokenizer.encode_batch(texts)), dtype=np.int64)
