"""Token counts by pieces: a text is cut where no token reaches across, and each distinct piece is tokenised once.

There are millions of pieces in a data set, and few distinct ones. Two kinds of tokenizers allow that:

- Byte-pair encoding of the whole text (Llama 2, Mistral), with blanks for spaces, merges neighbours into longer and
  longer tokens of its vocabulary. Where two characters stand side by side in no token nothing is ever merged.
- Byte-level encoding (GPT-2, Llama 3, Qwen, SmolLM) splits a text into words first: always between a word and the space
  behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence, Sized
from operator import attrgetter
from threading import Lock
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from tokenizers import Tokenizer

from prefmix.schema import utf8

Tokenise = Callable[[list[str]], Sequence[Sized]]

_BLOCK_BYTES = 1 << 16  # with what is made of it, so much text stays in the cache of a core
_BLANK = "▁"
#: Texts on which tokenizers differ in what they do before the encoding.
_TRICKY = ("a  b", " a", "a\n\nb \n c\t", "It's 12,345.67 – né ▁ﬁ ＡÅ", "中文 字\u00a0😀", "", "x" * 40 + "1" * 40)


class PieceCounter:
    """Counts tokens as the tokenizer does that it was made from by `piece_counter`. Threads may share it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        parts: np.ndarray,
        tokenise: Tokenise,
        ids: Callable[[Any], list[int]],
        spelled: pl.Expr,
    ) -> None:
        """`parts`: where to cut, for each pair of bytes; `tokenise`: the tokens of pieces, and `ids` of those of one;
        `spelled`: a `text` as it is cut."""
        self._tokenizer, self._parts, self._spelled = tokenizer, parts, spelled
        self._tokenise, self._ids = tokenise, ids
        self._added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._pieces = pl.Categorical(pl.Categories.random())
        self._codes = pl.Series(dtype=self._pieces)  # Polars forgets categories that no series has
        self._counts = np.zeros(0, np.int64)
        self._growing = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it counts anew."""
        return PieceCounter, (self._tokenizer, self._parts, self._tokenise, self._ids, self._spelled)

    def agrees(self, texts: pl.Series) -> bool:
        """Whether the ids of the texts, by their pieces, are those of the tokenizer."""
        texts = texts.filter(~texts.str.contains_any(self._added))
        pieces, ends = self._cut(texts)
        distinct = pieces.unique().to_list()
        ids = dict(zip(distinct, map(self._ids, self._tokenise(distinct)), strict=True))
        spelled, start = pieces.to_list(), 0
        for encoding, end in zip(self._whole(texts), ends.tolist(), strict=True):
            if [number for piece in spelled[start:end] for number in ids[piece]] != encoding.ids:
                return False
            start = end
        return True

    def __call__(self, texts: pl.Series) -> np.ndarray:
        """int64, the number of tokens of each text. One that holds an added token is tokenised as a whole."""
        pieces, ends = self._cut(texts)
        codes = pieces.cast(self._pieces).to_physical().to_numpy()
        with self._growing:
            self._count_new(pieces, codes)
            counts = self._counts
        tokens = np.diff(np.append(0, np.cumsum(counts[codes]))[ends], prepend=0)
        whole = texts.str.contains_any(self._added).arg_true()
        tokens[whole.to_numpy()] = [len(encoding) for encoding in self._whole(texts.gather(whole))]
        return tokens

    def _whole(self, texts: pl.Series) -> list[Any]:
        return self._tokenizer.encode_batch_fast(texts.to_list(), add_special_tokens=False)

    def _count_new(self, pieces: pl.Series, codes: np.ndarray) -> None:
        missing = max(int(codes.max()) + 1 - len(self._counts), 0) if codes.size else 0
        counts = np.append(self._counts, np.full(missing, -1))  # a copy: another thread may be reading
        places = np.flatnonzero(counts[codes] < 0)
        if places.size:
            new, first = np.unique(codes[places], return_index=True)
            counts[new] = [len(tokens) for tokens in self._tokenise(pieces.gather(places[first]).to_list())]
            self._counts = counts

    def _cut(self, texts: pl.Series) -> tuple[pl.Series, np.ndarray]:
        """The pieces of all texts, and the number of pieces up to the end of each text."""
        spelled = texts.alias("text").to_frame().select(self._spelled).to_series()
        data, ends = utf8(spelled)
        cuts = np.zeros(len(data) + 1, bool)
        for start in range(1, len(data), _BLOCK_BYTES):
            stop = min(start + _BLOCK_BYTES, len(data))
            pairs = data[start - 1 : stop - 1].astype(np.intp) << 8 | data[start:stop]
            np.take(self._parts, pairs, out=cuts[start:stop], mode="clip")
        cuts[ends] = True
        places = np.flatnonzero(cuts)
        pieces = pa.LargeStringArray.from_buffers(len(places) - 1, pa.py_buffer(places), pa.py_buffer(data))
        return pl.Series(pieces), np.searchsorted(places, ends[1:])


def piece_counter(tokenizer: Tokenizer) -> PieceCounter | None:
    """The counter for a tokenizer of one of the two kinds; None for any other."""
    settings = json.loads(tokenizer.to_str())
    model = settings["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(key) for key in odd):
        return None
    counter = _of_words(tokenizer, settings) or _of_blanks(tokenizer, model)
    return counter if counter is not None and counter.agrees(pl.Series(_TRICKY)) else None


def _of_words(tokenizer: Tokenizer, settings: dict[str, Any]) -> PieceCounter | None:
    before = settings["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    if not any(step.get("type") == "ByteLevel" and not step.get("add_prefix_space") for step in steps):
        return None
    parts = np.zeros((256, 256), bool)
    parts[0x21:0x7F, ord(" ")] = True

    def tokenise(pieces: list[str]) -> Sequence[Sized]:
        return tokenizer.encode_batch_fast(pieces, add_special_tokens=False)

    return PieceCounter(tokenizer, parts.ravel(), tokenise, attrgetter("ids"), pl.col("text"))


def _of_blanks(tokenizer: Tokenizer, model: dict[str, Any]) -> PieceCounter | None:
    if model.get("ignore_merges"):
        return None
    if model.get("fuse_unk") and not model.get("byte_fallback"):  # unknown characters are one token, however many
        return None
    prepared = [_prepared(tokenizer, text) for text in _TRICKY]
    plain = pl.col("text").str.replace_all(_BLANK, " ", literal=True)
    for always in (True, False):  # a blank is put in front of every text, or of those that begin with none
        if prepared == [_blanks(text, always) for text in _TRICKY]:
            as_it_is = (plain == "") if always else (plain == "") | plain.str.starts_with(" ")
            spelled = pl.when(as_it_is).then(plain).otherwise(pl.lit(" ") + plain)
            break
    else:
        return None
    bare = tokenizer.model

    def tokenise(pieces: list[str]) -> Sequence[Sized]:
        return [bare.tokenize(piece.replace(" ", _BLANK)) for piece in pieces]

    def ids(tokens: list[Any]) -> list[int]:
        return [token.id for token in tokens]

    parts = _never_neighbours(tokenizer.get_vocab(with_added_tokens=False))
    return PieceCounter(tokenizer, parts, tokenise, ids, spelled)


def _prepared(tokenizer: Tokenizer, text: str) -> list[str]:
    """What a tokenizer gives to its model."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    split = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer else [(normal, None)]
    return [piece for piece, _ in split if piece]


def _blanks(text: str, always: bool) -> list[str]:
    spelled = text.replace(" ", _BLANK)
    return [_BLANK * (always or not spelled.startswith(_BLANK)) + spelled] if text else []


def _never_neighbours(vocabulary: Iterable[str]) -> np.ndarray:
    """bool, 65,536: whether no token has two bytes (256 times the first one plus the second one) side by side, of which
    the second one begins a character."""
    data = np.frombuffer("\0".join(vocabulary).replace(_BLANK, " ").encode(), np.uint8).astype(np.intp)
    parts = np.ones((256, 256), bool)
    parts[data[:-1], data[1:]] = False
    parts[0] = parts[:, 0] = False  # which parts the tokens here
    parts[:, 0x80:0xC0] = False
    return parts.ravel()
