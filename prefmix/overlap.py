"""Texts of benchmarks in other texts: an index of them, and the search.

A benchmark has items, an item has texts (its question, its choices). A text is found in another one by these rules, all
on words as `shingles.normalise` writes them:

- `ngram`: of a text of `ngram` words or more, so many words in a row, and at least a third of its words (`COVERAGE`):
  one sentence of a long passage may be a quotation of what the benchmark quotes too. Runs of words that more than
  `COMMON` texts of the benchmarks have are their boilerplate; they count only when nearly all of the text is there
  (`NEARLY_ALL`).
- `whole`: of a shorter text all words in a row. With fewer than `SHORT` words ("What is the capital of Peru?") it must be
  a question that no other item has, and where it is found a sentence of its own; with fewer than `SHORTEST` words ("Who
  are you?") it is not looked for. A short text of more than `COMMON` items ("all of the above") belongs to none of them.
- `containment`: of a text of `ngram` words or more at least the share `CONTAINMENT` of its distinct shingles of five
  words, in whatever order. It finds items that were edited lightly.
"""

from __future__ import annotations

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from prefmix.shingles import distinct, ngrams, normalise, slices, words

COVERAGE = 1 / 3
NEARLY_ALL = 0.8
CONTAINMENT = 0.6
COMMON = 10
SHORT = 8
SHORTEST = 5

_SHINGLE = 5
_MOST_TEXTS = 512  # a run of words in more texts of the benchmarks is no evidence for any of them
_SHOWN_WORDS = 40
_SENTENCE_END = re.compile(r"[.!?:;()\"“”«»\n]+")
_HITS = {
    "row": pl.Int64,
    "text": pl.Int64,
    "rule": pl.String,
    "coverage": pl.Float64,
    "start": pl.Int64,
    "length": pl.Int64,
}


class Index:
    """The texts of benchmarks, to be found in other texts."""

    def __init__(self, items: pl.DataFrame, ngram: int = 13) -> None:
        """`items`: `benchmark, item, field, text`, all strings; of equal evidence that of the earlier text is given."""
        self.ngram = ngram
        #: Every text of every item, normalised, and its number in `texts`.
        self.items = items.with_columns(text=normalise(items["text"])).filter(pl.col("text") != "")
        #: The distinct texts of each benchmark: its first item and field, how many items have it.
        self.texts = self.items.group_by("benchmark", "text", maintain_order=True).agg(
            pl.col("item").first(),
            pl.col("field").first(),
            items=pl.col("item").n_unique(),
            question=(~pl.col("field").str.contains(r"\[\d+\]$")).any(),
        )
        self._words, self._offsets = words(self.texts["text"])
        self.sizes = np.diff(self._offsets)
        self._shingle = min(_SHINGLE, ngram)
        items_, question = self.texts["items"].to_numpy(), self.texts["question"].to_numpy()
        long = self.sizes >= ngram
        short = np.where(self.sizes >= SHORT, items_ <= COMMON, (self.sizes >= SHORTEST) & question & (items_ == 1))
        self._runs = _Postings(*self._grams(np.flatnonzero(long), ngram))
        self._shingles = _Postings(*self._grams(np.flatnonzero(long), self._shingle))
        text, at, gram = self._grams(np.flatnonzero(short & ~long), self._shingle)
        self._openings = _Postings(text[at == 0], at[at == 0], gram[at == 0])
        self._filter = _Filter(np.concatenate([self._shingles.grams, self._openings.grams]))

    def search(self, texts: pl.Series) -> pl.DataFrame:
        """Which benchmark texts are found in which of the texts, a row for each pair and rule.

        `row` is the place in `texts`, `text` that in `self.texts`; `coverage` the share of the benchmark text's words,
        or of its shingles (containment), that was found; `start` and `length` say which words of it are the evidence.
        """
        parts = list(slices(texts))
        starts = itertools.accumulate((len(part) for part in parts), initial=0)
        with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
            found = list(pool.map(self._search, parts, starts))
        return pl.concat([pl.DataFrame(schema=_HITS), *found])

    def evidence(self, hits: pl.DataFrame) -> pl.DataFrame:
        """For each hit the `benchmark`, the `item`, its `field` and the `matched` words (the first 40)."""
        named = self.texts[hits["text"]].with_columns(hits["start"], hits["length"].clip(upper_bound=_SHOWN_WORDS))
        matched = pl.col("text").str.split(" ").list.slice("start", "length").list.join(" ")
        return named.select("benchmark", "item", "field", matched=matched)

    def _grams(self, texts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, place in it, hash) of every run of n words of some of the texts."""
        grams, offsets = ngrams(self._words, self._offsets, n, whole=False)
        sizes = np.diff(offsets)[texts]
        at = _places(sizes)
        return np.repeat(texts, sizes), at, grams[np.repeat(offsets[texts], sizes) + at]

    def _search(self, texts: pl.Series, first: int) -> pl.DataFrame:
        hashes, offsets = words(texts)
        grams, starts = ngrams(hashes, offsets, self._shingle, whole=False)
        passed = np.flatnonzero(self._filter.may_hold(grams))
        row = np.searchsorted(starts, passed, side="right") - 1
        at = passed - starts[row]  # the word of its row with which the shingle starts
        gram = grams[passed]
        shingle = self._shingles.number(gram)
        known = shingle >= 0
        hits = [
            self._whole(texts, hashes, offsets, row, at, self._openings.number(gram)),
            self._ngrams(hashes, offsets, row[known], at[known]),
            self._contained(row[known], shingle[known]),
        ]
        return pl.concat(hits).with_columns(pl.col("row") + first)

    def _whole(
        self,
        texts: pl.Series,
        hashes: np.ndarray,
        offsets: np.ndarray,
        row: np.ndarray,
        at: np.ndarray,
        opening: np.ndarray,
    ) -> pl.DataFrame:
        """Short texts, found by their first shingle."""
        hit, text, _ = self._openings.expanded(opening)
        row, word = row[hit], offsets[row[hit]] + at[hit]
        found = []
        for size in distinct(self.sizes[text]).tolist():
            fits = np.flatnonzero((self.sizes[text] == size) & (word + size <= offsets[row + 1]))
            along = np.arange(size)
            own = self._words[self._offsets[text[fits], None] + along]
            fits = fits[(hashes[word[fits, None] + along] == own).all(axis=1)]
            pairs = sorted(set(zip(row[fits].tolist(), text[fits].tolist(), strict=True)))
            if size < SHORT:
                pairs = [(r, t) for r, t in pairs if _is_sentence(texts[r], self.texts["text"][t])]
            found += [(r, t, size) for r, t in pairs]
        frame = pl.DataFrame(found, schema={"row": pl.Int64, "text": pl.Int64, "length": pl.Int64}, orient="row")
        return _hits(frame.with_columns(start=pl.lit(0), coverage=pl.lit(1.0)), "whole")

    def _ngrams(self, hashes: np.ndarray, offsets: np.ndarray, row: np.ndarray, at: np.ndarray) -> pl.DataFrame:
        """Long texts by runs of `ngram` words: each starts where known shingles follow one another to make one up."""
        span = self.ngram - self._shingle
        follow = at[span:] - at[: len(at) - span] == span
        starts = np.flatnonzero(follow & (row[span:] == row[: len(row) - span]))
        row, at = row[starts], at[starts]
        rows, place = np.unique(row, return_inverse=True)
        sizes = np.diff(offsets)[rows]
        grams, first = ngrams(
            hashes[np.repeat(offsets[rows], sizes) + _places(sizes)],
            np.concatenate([[0], np.cumsum(sizes)]),
            self.ngram,
            whole=False,
        )
        number = self._runs.number(grams[first[place] + at])
        hit, text, begin = self._runs.expanded(number)
        gap = pl.col("start").diff().over("row", "text").fill_null(self.ngram)
        runs = (
            pl.DataFrame(
                {"row": row[hit], "text": text, "start": begin, "rare": self._runs.counts[number[hit]] <= COMMON}
            )
            .unique(["row", "text", "start"])
            .sort("row", "text", "start")
            .with_columns(new=gap.clip(upper_bound=self.ngram), run=(gap != 1).cum_sum())
            .group_by("row", "text", "run", maintain_order=True)
            .agg(pl.col("start").first(), pl.col("new").sum(), pl.col("rare").any(), length=pl.len() + self.ngram - 1)
        )
        best = (
            runs.sort("length", descending=True, maintain_order=True)
            .group_by("row", "text", maintain_order=True)
            .agg(pl.col("start", "length").first(), pl.col("new").sum(), pl.col("rare").any())
        )
        best = best.with_columns(coverage=best["new"] / pl.Series(self.sizes[best["text"].to_numpy()]))
        enough = (pl.col("coverage") >= NEARLY_ALL) | (pl.col("rare") & (pl.col("coverage") >= COVERAGE))
        return _hits(best.filter(enough), "ngram")

    def _contained(self, row: np.ndarray, shingle: np.ndarray) -> pl.DataFrame:
        """Long texts most of whose shingles are in a row. A text is tried where one of its rarer shingles is."""
        grams = len(self._shingles.grams)
        present = distinct(row * grams + shingle)
        row, shingle = present // grams, present % grams
        least = CONTAINMENT * (self.ngram - self._shingle + 1)
        rich = np.bincount(row)[row] >= least if len(row) else np.zeros(0, bool)
        row, shingle = row[rich], shingle[rich]
        rare = self._shingles.counts[shingle] <= COMMON
        hit, text, _ = self._shingles.expanded(np.where(rare, shingle, -1))
        votes = (
            pl.DataFrame({"row": row[hit], "text": text, "shingle": shingle[hit]})
            .unique()
            .group_by("row", "text")
            .agg(votes=pl.len())
            .sort("row", "text")
        )
        tried, texts = votes["row"].to_numpy(), votes["text"].to_numpy()
        shingles = np.diff(self._shingles.of_text)
        promising = votes["votes"].to_numpy() + self._shingles.common[texts] >= CONTAINMENT * shingles[texts]
        tried, texts = tried[promising], texts[promising]
        sizes = shingles[texts]
        own = self._shingles.distinct[np.repeat(self._shingles.of_text[texts], sizes) + _places(sizes)]
        key = np.repeat(tried, sizes) * grams + own
        place = np.minimum(np.searchsorted(present, key), max(len(present) - 1, 0))
        there = present[place] == key if len(present) else np.zeros(0, bool)
        pair = np.repeat(np.arange(len(texts)), sizes)
        coverage = np.bincount(pair[there], minlength=len(texts)) / np.maximum(sizes, 1)
        found = pl.DataFrame(
            {
                "row": tried,
                "text": texts,
                "coverage": coverage,
                "start": np.zeros(len(texts), np.int64),
                "length": self.sizes[texts],
            }
        )
        return _hits(found.filter(pl.col("coverage") >= CONTAINMENT), "containment")


class _Postings:
    """Where in the texts each gram is."""

    def __init__(self, text: np.ndarray, at: np.ndarray, gram: np.ndarray) -> None:
        order = np.argsort(gram, kind="stable")
        self.text, self.at = text[order], at[order]
        gram = gram[order]
        new = np.append(True, gram[1:] != gram[:-1])[: len(gram)]
        self.grams = gram[new]
        self.first = np.append(np.flatnonzero(new), len(gram))
        self.counts = np.diff(self.first)
        #: The distinct grams (their numbers) of text number `i`: `distinct[of_text[i]:of_text[i + 1]]`.
        number = np.empty(len(gram), np.int64)
        number[order] = np.cumsum(new) - 1
        owned = distinct(text * len(self.grams) + number)
        owner, self.distinct = owned // max(len(self.grams), 1), owned % max(len(self.grams), 1)
        texts = int(text.max()) + 1 if len(text) else 0
        self.of_text = np.searchsorted(owner, np.arange(texts + 1))
        #: How many of them are in more than `COMMON` places.
        self.common = np.bincount(owner[self.counts[self.distinct] > COMMON], minlength=texts)

    def number(self, grams: np.ndarray) -> np.ndarray:
        """int64, the place of each gram in `self.grams`, -1 for one that is not there."""
        if not len(self.grams):
            return np.full(len(grams), -1)
        place = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        return np.where(self.grams[place] == grams, place, -1)

    def expanded(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in `numbers`, text, place in the text) for each place of each gram that is not in too many."""
        known = np.flatnonzero(numbers >= 0)
        known = known[self.counts[numbers[known]] <= _MOST_TEXTS]
        sizes = self.counts[numbers[known]]
        where = np.repeat(self.first[numbers[known]], sizes) + _places(sizes)
        return np.repeat(known, sizes), self.text[where], self.at[where]


class _Filter:
    """Tells most hashes that are not in a set: one bit for each of its hashes, in 32 to 64 times as many."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.shift = np.uint64(64 - max(len(hashes), 1 << 10).bit_length() - 5)
        bits = np.zeros(1 << (64 - int(self.shift)), bool)
        bits[hashes >> self.shift] = True
        self.bits = np.packbits(bits, bitorder="little")

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        place = hashes >> self.shift
        return (self.bits[place >> np.uint64(3)] >> (place & np.uint64(7)).astype(np.uint8)) & 1 == 1


def _hits(found: pl.DataFrame, rule: str) -> pl.DataFrame:
    return found.with_columns(rule=pl.lit(rule)).select(pl.col(name).cast(dtype) for name, dtype in _HITS.items())


def _places(sizes: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... up to each of the sizes, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def _is_sentence(text: str, wanted: str) -> bool:
    """Whether `wanted`, normalised, is a sentence of the text, or several that follow one another."""
    sentences = [each for each in normalise(pl.Series(_SENTENCE_END.split(text))).to_list() if each]
    for start in range(len(sentences)):
        for joined in itertools.accumulate(sentences[start:], "{} {}".format):
            if joined == wanted:
                return True
            if not wanted.startswith(joined):
                break
    return False
