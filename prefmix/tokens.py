"""Token counts with the tokenizer of the model that will be trained.

A special token splits the text that is tokenised, so ChatML text falls into one segment per message (`user\\nHello`)
between `<|im_start|>` and `<|im_end|>`, and the count of a whole conversation is the sum over its segments. Segments are
counted by their pieces (see pieces.py) where the tokenizer allows that, else each distinct one is tokenised once. Both
are exact, and are checked on a sample of the very rows before they are relied on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl
from tokenizers import AddedToken, Tokenizer

from prefmix.chatml import END, START, render_answer, render_prompt
from prefmix.errors import SourceError
from prefmix.pieces import PieceCounter, piece_counter
from prefmix.schema import Kind, prompt_turns

Progress = Callable[[int, int], None]
Counter = Callable[[pl.Series], np.ndarray]
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
    pieces: PieceCounter | None


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
    return LoadedTokenizer(name, commit, sha256(data).hexdigest(), tokenizer, added, piece_counter(tokenizer))


def _is_special(tokenizer: Tokenizer, token: str) -> bool:
    return token in {added.content for added in tokenizer.get_added_tokens_decoder().values()}


def count(rows: pl.DataFrame, kind: Kind, loaded: LoadedTokenizer, progress: Progress | None = None) -> pl.DataFrame:
    """Adds the token counts of the rendered rows, int32.

    preference: `prompt_tokens`, `chosen_tokens`, `rejected_tokens` (prompt + answer tokenised as one text, less the
    prompt); sft: `tokens` of the whole text, `prompt_tokens` of what stands before the last answer.
    """
    answers = ["chosen", "rejected"] if kind == "preference" else [pl.col("messages").list.tail(1).alias("answer")]
    parts = rows.select(prompt_turns(kind).alias("prompt"), *answers)
    counts = _by_segment(parts, loaded, progress)
    sample = parts.head(_SAMPLE_ROWS)
    if not counts.head(_SAMPLE_ROWS).equals(_whole(sample, loaded.tokenizer)):
        counts = _whole(parts, loaded.tokenizer)
    if kind == "sft":
        counts = counts.select("prompt_tokens", tokens=pl.col("prompt_tokens") + pl.col("answer_tokens"))
    return rows.hstack(counts)


def _by_segment(parts: pl.DataFrame, loaded: LoadedTokenizer, progress: Progress | None) -> pl.DataFrame:
    """`<part>_tokens` of every row, by its messages."""
    tokenizer = loaded.tokenizer
    flat = {name: parts[name].list.explode(empty_as_null=False) for name in parts.columns}
    messages = pl.concat(flat.values()).rename("message").to_frame().unnest("message")
    if loaded.pieces is not None and _agrees(loaded.pieces, messages):
        by_message = _counted(messages, loaded.pieces, progress)
    else:
        distinct = messages.unique()
        tokens = pl.Series(_counted(distinct, partial(_lengths, tokenizer), progress), dtype=pl.Int64)
        counted = distinct.with_columns(tokens=tokens)
        by_message = messages.join(counted, on=["role", "content"], maintain_order="left")["tokens"].to_numpy()
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
    prompt = np.concatenate(
        [_lengths(tokenizer, batch["prompt"]) for batch in texts.iter_slices(_BATCH)] or [np.empty(0)]
    )
    counts = {"prompt_tokens": prompt}
    for name in texts.columns[1:]:
        whole = [_lengths(tokenizer, batch["prompt"] + batch[name]) for batch in texts.iter_slices(_BATCH)]
        counts[f"{name}_tokens"] = np.concatenate(whole or [np.empty(0)]) - prompt
    return pl.DataFrame(counts).cast(pl.Int32)


def _counted(messages: pl.DataFrame, counter: Counter, progress: Progress | None) -> np.ndarray:
    """int64, the tokens of the segment of each message."""
    segments = messages.lazy().select(pl.format("{}\n{}", "role", "content"))
    found = []
    for start in range(0, messages.height, _BATCH):
        found.append(counter(segments.slice(start, _BATCH).collect().to_series()))
        if progress:
            progress(min(start + _BATCH, messages.height), messages.height)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _agrees(pieces: PieceCounter, messages: pl.DataFrame) -> bool:
    every = max(1, messages.height // _SAMPLE_TEXTS)
    return pieces.agrees(messages.gather_every(every).select(pl.format("{}\n{}", "role", "content")).to_series())


def _lengths(tokenizer: Tokenizer, texts: pl.Series) -> np.ndarray:
    encodings = tokenizer.encode_batch_fast(texts.to_list(), add_special_tokens=False)
    return np.fromiter(map(len, encodings), dtype=np.int64, count=len(texts))
