"""Texts of benchmarks in other texts: an index of them, and the search.

A benchmark has items, an item has texts (its question, its choices). A text is found in another one by these rules, all
on words as `shingles.normalise` writes them:

- `ngram`: of a text of `ngram` words or more, so many words in a row, and by such runs at least a third of its words
  (`COVERAGE`): one sentence of a long passage may be a quotation of what the benchmark quotes too. Runs that more than
  `COMMON` texts of the benchmarks have are their boilerplate; they count only when nearly all of the text is there
  (`NEARLY_ALL`).
- `whole`: of a shorter text all words in a row. With fewer than `SHORT` words ("What is the capital of Peru?") it must be a
  question that no other item of its benchmark has, and where it is found a sentence of its own, or several; with fewer
  than `SHORTEST` words ("Who are you?") it is not looked for. A short text of more than `COMMON` items ("all of the
  above") belongs to none of them.
- `containment`: of a text of `ngram` words or more at least the share `CONTAINMENT` of its distinct shingles of five
  words, in whatever order, and no fewer than this share of what `ngram` different words have; also a third (`COVERAGE`)
  of its shingles that at most `COMMON` texts have. It finds items that were edited lightly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from prefmix.shingles import changes, distinct, ngrams, normalise, ranges, slices, words

COVERAGE = 1 / 3
NEARLY_ALL = 0.8
CONTAINMENT = 0.6
COMMON = 10
SHORT = 8
SHORTEST = 5

#: What the field of a choice or an answer is called; any other text is a question.
CHOICE = r"(?i)\[\d+\]$|(?:^|[ _.])(?:answers?|choices?|options?|endings?|sol)_?\d*$"

_SHINGLE = 5
_MOST_TEXTS = 512  # a run of words in more texts of the benchmarks is no evidence for any of them
_SHOWN_WORDS = 40
_SENTENCE_END = re.compile('[.!?:;()"“”«»\n。！？：；（）「」『』｡।؟؛۔]+')
_LOW = 0xFFFFFFFF  # two numbers below 2**32 are packed into one: `one << 32 | other`
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
            question=(~pl.col("field").str.contains(CHOICE)).any(),
        )
        self._words, self._offsets = words(self.texts["text"])
        self.sizes = np.diff(self._offsets)
        self._shingle = min(_SHINGLE, ngram)
        items_, question = self.texts["items"].to_numpy(), self.texts["question"].to_numpy()
        long = self.sizes >= ngram
        short = np.where(self.sizes >= SHORT, items_ <= COMMON, (self.sizes >= SHORTEST) & question & (items_ == 1))
        short &= ~long
        #: bool, for each text: whether it is looked for.
        self.sought = short | long
        self._runs = _Postings(*self._grams(np.flatnonzero(long), ngram))
        text, at, gram = self._grams(np.flatnonzero(self.sought), self._shingle)
        self._shingles = _Postings(text[long[text]], at[long[text]], gram[long[text]])
        self._openings = distinct(gram[(at == 0) & short[text]])
        #: Short texts by all their words, for each number of words.
        self._wholes = {
            size: _Postings(*self._grams(np.flatnonzero(short & (self.sizes == size)), size))
            for size in distinct(self.sizes[short]).tolist()
        }
        #: The distinct shingles (their numbers) of text `i`: `_owned[_of_text[i]:_of_text[i + 1]]`.
        self._owned, self._of_text = self._shingles.by_text(len(self.texts))
        common = np.append(0, np.cumsum(self._shingles.texts[self._owned] > COMMON))
        #: How many of them are in more than `COMMON` texts.
        self._common = np.diff(common[self._of_text])
        self._filter = _Filter(np.concatenate([self._shingles.grams, self._openings]))

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
        where = ranges(offsets[texts], sizes)
        return np.repeat(texts, sizes), where - np.repeat(offsets[texts], sizes), grams[where]

    def _search(self, texts: pl.Series, first: int) -> pl.DataFrame:
        hashes, offsets = words(texts)
        grams, starts = ngrams(hashes, offsets, self._shingle, whole=False)
        passed = np.flatnonzero(self._filter.may_hold(grams))
        row = np.searchsorted(starts, passed, side="right") - 1
        at = passed - starts[row]  # the word of its row with which the shingle starts
        gram = grams[passed]
        shingle = _numbers(self._shingles.grams, gram)
        known, opens = shingle >= 0, _numbers(self._openings, gram) >= 0
        hits = [
            self._whole(texts, hashes, offsets, row[opens], at[opens]),
            self._ngrams(hashes, offsets, row[known], at[known]),
            self._contained(row[known], shingle[known]),
        ]
        return pl.concat(hits).with_columns(pl.col("row") + first)

    def _whole(
        self, texts: pl.Series, hashes: np.ndarray, offsets: np.ndarray, row: np.ndarray, at: np.ndarray
    ) -> pl.DataFrame:
        """Short texts, which may begin where their first shingles are."""
        word = offsets[row] + at
        found = []
        for size, wholes in self._wholes.items():
            fits = np.flatnonzero(word + size <= offsets[row + 1])
            candidates = hashes[ranges(word[fits], np.full(len(fits), size))]
            grams, _ = ngrams(candidates, np.arange(len(fits) + 1) * size, size, whole=False)
            hit, text, _ = wholes.expanded(_numbers(wholes.grams, grams))
            places = zip(row[fits[hit]].tolist(), at[fits[hit]].tolist(), text.tolist(), strict=True)
            if size < SHORT:
                places = _sentences(texts, places, size)
            found += [(r, t, size) for r, t in sorted({(r, t) for r, _, t in places})]
        frame = pl.DataFrame(found, schema={"row": pl.Int64, "text": pl.Int64, "length": pl.Int64}, orient="row")
        return _hits(frame.with_columns(start=pl.lit(0), coverage=pl.lit(1.0)), "whole")

    def _ngrams(self, hashes: np.ndarray, offsets: np.ndarray, row: np.ndarray, at: np.ndarray) -> pl.DataFrame:
        """Long texts by runs of `ngram` words: each starts where known shingles follow one another to make one up."""
        word, n = offsets[row] + at, self.ngram
        span = n - self._shingle  # so many words after the first shingle of a run its last one starts
        last = np.arange(span, max(len(word), span))
        starts = last[word[last] - word[last - span] == span] - span  # never over the end of a row: there is a gap
        row, word = row[starts], word[starts]
        # Runs that overlap are hashed as one stretch of words; in another row a run starts n words later at least.
        stretch = np.flatnonzero(np.diff(word, prepend=-2) != 1)
        sizes = np.diff(np.append(stretch, len(word))) + n - 1
        grams, _ = ngrams(hashes[ranges(word[stretch], sizes)], np.append(0, np.cumsum(sizes)), n, whole=False)
        number = _numbers(self._runs.grams, grams)
        known = number >= 0
        there = distinct(row[known] << 32 | number[known])
        hit, text, start = self._runs.expanded(there & _LOW)
        row, rare = there[hit] >> 32, self._runs.texts[there[hit] & _LOW] <= COMMON
        order = np.lexsort((start, text, row))
        row, text, start, rare = row[order], text[order], start[order], rare[order]
        new = changes(row) | changes(text)
        pair, size = np.cumsum(new) - 1, self.sizes[text[new]]
        coverage = _covered(pair, start, n, len(size)) / size
        rarely = _covered(pair[rare], start[rare], n, len(size)) / size
        begin = np.flatnonzero(new | (np.diff(start, prepend=-2) != 1))
        length = np.diff(np.append(begin, len(start))) + n - 1
        longest = np.lexsort((-length, pair[begin]))[changes(pair[begin])]
        found = pl.DataFrame(
            {
                "row": row[new],
                "text": text[new],
                "coverage": coverage,
                "start": start[begin[longest]],
                "length": length[longest],
            }
        )
        return _hits(found.filter((coverage >= NEARLY_ALL) | (rarely >= COVERAGE)), "ngram")

    def _contained(self, row: np.ndarray, shingle: np.ndarray) -> pl.DataFrame:
        """Long texts most of whose shingles are in a row. A text is tried where one of its rarer shingles is."""
        fewest = self.ngram - self._shingle + 1
        present = distinct(row << 32 | shingle)
        row, shingle = present >> 32, present & _LOW
        rich = np.bincount(row)[row] / fewest >= CONTAINMENT
        wanted = np.flatnonzero(rich & (self._shingles.texts[shingle] <= COMMON))
        hit, text, _ = self._shingles.expanded(shingle[wanted])
        votes = distinct(wanted[hit] << 32 | text)  # a text may have a shingle in several places
        pairs = np.sort(row[votes >> 32] << 32 | (votes & _LOW))
        first = np.flatnonzero(changes(pairs))
        votes = np.diff(np.append(first, len(pairs)))
        row, text = pairs[first] >> 32, pairs[first] & _LOW
        sizes, common = np.diff(self._of_text)[text], self._common[text]
        enough = (votes + common) / np.maximum(sizes, fewest) >= CONTAINMENT  # there may be as much as that
        tried = enough & (votes / (sizes - common) >= COVERAGE)
        row, text, sizes = row[tried], text[tried], sizes[tried]
        own = np.repeat(row, sizes) << 32 | self._owned[ranges(self._of_text[text], sizes)]
        there = present[np.minimum(np.searchsorted(present, own), len(present) - 1)] == own
        found = np.bincount(np.repeat(np.arange(len(text)), sizes)[there], minlength=len(text))
        frame = pl.DataFrame(
            {"row": row, "text": text, "coverage": found / sizes, "start": 0 * text, "length": self.sizes[text]}
        )
        return _hits(frame.filter(found / np.maximum(sizes, fewest) >= CONTAINMENT), "containment")


class _Postings:
    """Where in the texts each gram is."""

    def __init__(self, text: np.ndarray, at: np.ndarray, gram: np.ndarray) -> None:
        """`text`, ascending, and the place `at` in it of every gram."""
        order = np.argsort(gram)
        number = np.cumsum(changes(gram[order])) - 1
        # Equal grams in the order of the texts: sorting twice, and not stably, takes half the time.
        order = np.sort(number << 32 | order) & _LOW
        new = changes(number)
        self.text, self.at, self.grams = text[order], at[order], gram[order[new]]
        self.first = np.append(np.flatnonzero(new), len(number))
        #: In how many texts each gram is.
        self.texts = np.bincount(number[new | changes(self.text)], minlength=len(self.grams))

    def expanded(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in `numbers`, text, place in the text) for each place of each gram that is not in too many texts."""
        few = np.flatnonzero(numbers >= 0)
        few = few[self.texts[numbers[few]] <= _MOST_TEXTS]
        first, sizes = self.first[numbers[few]], np.diff(self.first)[numbers[few]]
        where = ranges(first, sizes)
        return np.repeat(few, sizes), self.text[where], self.at[where]

    def by_text(self, texts: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct grams of each text, as their numbers: (flat int64, int64 offsets of the texts in it)."""
        number = np.repeat(np.arange(len(self.grams)), np.diff(self.first))
        owned = distinct(self.text << 32 | number)
        return owned & _LOW, np.searchsorted(owned, np.arange(texts + 1) << 32)


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


def _numbers(known: np.ndarray, grams: np.ndarray) -> np.ndarray:
    """int64, the place of each gram in `known`, ascending, or -1 for one that is not there."""
    if not len(known):
        return np.full(len(grams), -1)
    order = np.argsort(grams)  # looked up in ascending order most of what is read is in the cache
    place = np.empty(len(grams), np.int64)
    place[order] = np.minimum(np.searchsorted(known, grams[order]), len(known) - 1)
    return np.where(known[place] == grams, place, -1)


def _covered(pair: np.ndarray, start: np.ndarray, n: int, pairs: int) -> np.ndarray:
    """How many words the runs of n words cover in each of the pairs, given in order, and in each by ascending starts."""
    fresh = np.where(changes(pair), n, np.minimum(np.diff(start, prepend=0), n))
    return np.bincount(pair, fresh, minlength=pairs)


def _sentences(texts: pl.Series, places: Iterable[tuple[int, int, int]], size: int) -> Iterator[tuple[int, int, int]]:
    """The places (row, number of its word, text) at which `size` words are a sentence, or several that follow another."""
    for row, own in itertools.groupby(sorted(places), key=lambda place: place[0]):
        _, bounds = words(pl.Series(_SENTENCE_END.split(texts[row])))
        ends = set(bounds.tolist())
        yield from (place for place in own if place[1] in ends and place[1] + size in ends)
