"""Texts as words, and the hashes of their shingles (word or character n-grams): kernels on Arrow buffers.

Two texts are compared as `normalise` writes them. The kernels come to the same without writing it: text in ASCII, which
is most of it, goes through a table of bytes; only the rest is normalised by Polars first. A word of up to eight bytes
is the 64-bit number that its bytes spell, so the hashes of words and shingles are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal

import numpy as np
import polars as pl

from prefmix.schema import utf8

Unit = Literal["word", "char"]

#: Texts are worked on in slices of about this many bytes, so that memory does not grow with their number.
SLICE_BYTES = 1 << 23
_BLOCK_BYTES = 1 << 19  # with all that is made of it, this much text stays in the cache of a core
# Characters that separate words and are in most texts that are not ASCII: without them half of those are.
_COMMON = "“”‘’–—…•·«»°£€→←✓≈×÷−\u00a0"
# Scripts that put no space between words: there every letter, with its marks, is a word.
_UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"
# A mark that follows no letter or digit belongs to what separates: that of ❤️, or of ´, which is a space with a mark.
_SEPARATED = r"(?:[^\p{L}\p{M}\p{N}]|^)[^\p{L}\p{N}]*"
# The same without what the table of ASCII tells: few places of a text, which is why it is fast.
_ODDLY_SEPARATED = r"[^\x00-\x7F\p{L}\p{M}\p{N}][^\p{L}\p{N}]*|(?:[^\p{L}\p{M}\p{N}]|^)\p{M}[^\p{L}\p{N}]*"
_LONGEST = 64  # bytes; longer words are hashed by blake2b
_LETTERS = bytes(ord(chr(b).lower()) if b < 128 and chr(b).isalnum() else b & 128 and b for b in range(256))
_LOW_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
_BASE = np.array([0x9E3779B97F4A7C15], np.uint64)  # an array: NumPy warns when a scalar overflows


def normalise(texts: pl.Series) -> pl.Series:
    """string: lower case, Unicode NFKC, words separated by one space.

    Words are runs of letters, marks and digits (marks stay: without them Hindi and Thai fall apart); zero-width
    characters are taken out, they split no word. Chinese, Japanese and South-East Asian letters are words of their own.
    """
    return _folded(texts).str.replace_all(_SEPARATED, " ").str.strip_chars(" ")


def plain(texts: pl.Series) -> pl.Series:
    """string: texts of the same words, of which only those that are not ASCII are made anew, with less work than
    `normalise` has. A null is an empty text."""
    texts = texts.fill_null("")
    wide = (texts.str.len_bytes() != texts.str.len_chars()).arg_true()
    if wide.is_empty():
        return texts
    texts_wide = texts.gather(wide)
    rest = texts_wide.str.replace_many(list(_COMMON), [" "] * len(_COMMON))
    # Not of `rest`: a mark or a final sigma may belong to what was replaced.
    still = (rest.str.len_bytes() != rest.str.len_chars()).arg_true()
    made = _folded(texts_wide.gather(still)).str.replace_all(_ODDLY_SEPARATED, " ")
    return texts.clone().scatter(wide, rest.scatter(still, made))


def slices(texts: pl.Series, size: int = SLICE_BYTES) -> Iterator[pl.Series]:
    """The texts in order, in runs of about `size` bytes; a longer text is a run of its own."""
    ends = texts.str.len_bytes().cast(pl.Int64).fill_null(0).cum_sum().to_numpy()
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + size, side="right")))
        yield texts.slice(start, end - start)
        start = end


def shingles(
    texts: pl.Series, n: int, unit: Unit = "word", key: int = 0, is_plain: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every run of `n` words or characters: (flat uint64, int64 offsets of the texts in it).

    A text shorter than `n` is one shingle as a whole; one without any word has none. Repeats stay. Without a `key`
    (64 bits) somebody may write two shingles of equal hash; with a random one that nobody knows he has to guess.
    `is_plain`: the texts come from `plain`, which need not be done again.
    """
    blocks = _blocks(texts if is_plain else plain(texts), key) if unit == "word" else [_characters(texts, key)]
    return _joined(ngrams(hashes, offsets, n) for hashes, offsets in blocks)


def words(texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of every text: (flat uint64, int64 offsets of the texts in it). A null is an empty text."""
    return _joined(_blocks(plain(texts)))


def sequence_hashes(texts: pl.Series) -> np.ndarray:
    """uint64, a hash of the words of each text in their order; 0 for a text without a word."""
    found = [np.zeros(0, np.uint64)]
    for hashes, offsets in _blocks(plain(texts)):
        sizes = np.diff(offsets)
        powers = np.cumprod(np.append(np.ones(1, np.uint64), np.repeat(_BASE, sizes.max(initial=0))))
        terms = hashes * powers[np.arange(len(hashes)) - np.repeat(offsets[:-1], sizes)]
        some = np.flatnonzero(sizes)
        sums = np.zeros(len(sizes), np.uint64)
        if some.size:
            sums[some] = _mix64(np.add.reduceat(terms, offsets[some])) | np.uint64(1)
        found.append(sums)
    return np.concatenate(found)


def ngrams(hashes: np.ndarray, offsets: np.ndarray, n: int, whole: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every run of `n` hashes inside a text: (flat uint64, int64 offsets).

    `whole`: a text that is shorter than `n` counts as one run. Otherwise it has none.
    """
    counts = np.diff(offsets)
    found = np.zeros(len(hashes), np.uint64)
    runs = _runs_of(hashes, n)
    found[: len(runs)] = runs
    kept = np.ones(len(hashes), bool)
    if whole:
        for size in range(1, n):
            short = offsets[:-1][counts == size]
            if short.size:
                found[short] = _runs_of(hashes, size)[short] + np.uint64(size)
    for back in range(1, n):  # the last n - 1 starts of a text reach beyond its end
        last = offsets[1:] - back
        kept[last[last > offsets[:-1]] if whole else last[last >= offsets[:-1]]] = False
    sizes = np.maximum(counts - (n - 1), np.minimum(counts, 1) if whole else 0)
    return _mix64(found[kept]), np.concatenate([[0], np.cumsum(sizes)])


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending. `numpy.unique` (2.3) does it with a hash table, a hundred times as slowly."""
    ordered = np.sort(values)
    return ordered[changes(ordered)]


def changes(values: np.ndarray) -> np.ndarray:
    """bool: which values are others than the one before."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each of the ranges, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


def _folded(texts: pl.Series) -> pl.Series:
    # Lower case first, some letters are one with their mark in lower case only (ẗ); and after, NFKC may give capitals.
    lower = texts.str.replace_all(r"\p{Cf}+", "").str.to_lowercase()
    return lower.str.normalize("NFKC").str.to_lowercase().str.replace_all(_UNSPACED, " $1 ")


def _joined(blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of (flat, offsets) as one."""
    flat, sizes = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
    for hashes, offsets in blocks:
        flat.append(hashes)
        sizes.append(np.diff(offsets))
    return np.concatenate(flat), np.cumsum(np.concatenate(sizes))


def _blocks(texts: pl.Series, key: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes of the words of plain texts, and offsets, of about `_BLOCK_BYTES` of text at a time."""
    data, ends = utf8(texts)
    for start, stop in _block_bounds(ends):
        yield _words(data[ends[start] : ends[stop]], ends[start : stop + 1] - ends[start], key)


def _block_bounds(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """The first text of each block, and the first one behind it."""
    start = 0
    while start < len(ends) - 1:
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + _BLOCK_BYTES, side="right")) - 1)
        yield start, stop
        start = stop


def _words(text: np.ndarray, ends: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of a block of texts, and their offsets."""
    # Eight more bytes: a word is read in pieces of eight.
    data = np.frombuffer(text.tobytes().translate(_LETTERS) + bytes(8), np.uint8)
    starts, stops = _runs(data, ends)
    lengths = stops - starts
    values = _spelled(data, starts, lengths, 0) ^ np.uint64(key)
    at, longer = 8, np.flatnonzero(lengths > 8)
    while longer.size and at < _LONGEST:
        values[longer] = _mix64(values[longer]) ^ _spelled(data, starts[longer], lengths[longer], at)
        at += 8
        longer = longer[lengths[longer] > at]
    for place in longer:
        word = data[starts[place] : stops[place]].tobytes()
        digest = blake2b(word, digest_size=8, key=key.to_bytes(8, "little")).digest()
        values[place] = int.from_bytes(digest, "little")
    return _mix64(values), np.searchsorted(starts, ends)


def _runs(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and stop; texts lie end to end, and no word reaches over the end of one."""
    size = len(data) - 8
    inside = np.zeros(size + 2, bool)
    np.not_equal(data[:size], 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, stops = edges[::2], edges[1::2]
    over = distinct(ends[inside[ends] & inside[ends + 1]])
    return np.insert(starts, np.searchsorted(starts, over), over), np.insert(stops, np.searchsorted(stops, over), over)


def _spelled(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, at: int) -> np.ndarray:
    """uint64: up to eight bytes of each word, from its byte `at`."""
    unaligned = np.ndarray((len(data) - 7,), "<u8", data, 0, (1,))
    return unaligned[starts + at] & _LOW_BYTES[np.minimum(lengths - at, 8)]


def _characters(texts: pl.Series, key: int) -> tuple[np.ndarray, np.ndarray]:
    spelled = normalise(texts.fill_null(""))
    points = np.frombuffer("".join(spelled.to_list()).encode("utf-32-le"), np.uint32)
    lengths = spelled.str.len_chars().to_numpy().astype(np.int64)
    return _mix64(points.astype(np.uint64) ^ np.uint64(key)), np.concatenate([[0], np.cumsum(lengths)])


def _runs_of(hashes: np.ndarray, n: int) -> np.ndarray:
    """For every place the polynomial sum of the n hashes from there, mod 2**64, by doubling the length of the runs."""
    result, length = hashes[:0], 0
    power, run, base = 1, hashes, _BASE  # `run`: sums of `power` hashes; `base`: _BASE ** power
    while True:
        if n & power:
            if length:
                size = max(len(hashes) - length - power + 1, 0)
                result = result[:size] * base + run[length : length + size]
            else:
                result = run
            length += power
        if length == n:
            return result
        size = max(len(run) - power, 0)
        run = run[:size] * base + run[power:]
        base = base * base
        power *= 2


def _mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (Appleby 2011): a bijection of uint64."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values
