"""Near-duplicate texts: MinHash proposes pairs, their sets of shingles decide.

1. Signatures: `permutations` minima of affine hashes of the shingles (datasketch's scheme "affine32").
2. Bands: two texts that agree in all rows of a band share a bucket. A band has as many rows as the wanted recall allows.
3. Texts that share a bucket are compared: first by signature, then by the hashes of their shingles, under a random key.

A text is dropped for one that stays, never for one that was dropped itself, and the order of the texts alone says which
one stays. The work is linear in the number of texts: of a bucket only the first `MOST_MET` texts (more in small
buckets) are met by those behind them. So what becomes of a text depends on nothing but the texts that buckets connect it
with, and the connected ones may be decided anywhere, in parts (`scale` does that).
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import sqrt

import numpy as np
import polars as pl

from prefmix.shingles import Unit, changes, distinct, plain, ranges, shingles, slices

#: Of one bucket (it has one in every band) a text is compared with those of the first so many texts that stay, or of as
#: many as make `MOST_PAIRS` comparisons in the bucket if that is more: all of them, in a bucket of five hundred texts.
MOST_MET = 64
MOST_PAIRS = 1 << 18
_BLOCK_TEXTS = 4096  # texts that are decided together
_BLOCK_PAIRS = 1 << 14  # pairs whose texts are hashed together when their shingles are compared
_PAIRS_A_TEXT = 32  # pairs inside a block, for each text of it; a block with more is made smaller
_DEVIATIONS = 4.0  # one pair at the threshold in 30,000 fails the comparison of signatures
_SIGNED_TEXTS = 100  # texts, and permutations, whose hashes stay in the cache of a core together
_SIGNED_ROWS = 8
_COMPARED_BITS = 54  # of the hash of a shingle; the other bits of a number say whose it is
_COMPARED_PAIRS = 1 << (64 - _COMPARED_BITS)  # likewise pairs, and hashes, when shingles are compared
_COMPARED_HASHES = 1 << 19


def near_duplicates(
    texts: pl.Series,
    threshold: float = 0.8,
    shingle: int = 5,
    unit: Unit = "word",
    permutations: int = 128,
    recall: float = 0.99,
) -> pl.DataFrame:
    """The texts that repeat an earlier one. `texts` are in the order of their rank, the best one first.

    A row for each text to drop: `row, kept, jaccard, cluster` (uint32, uint32, float64, uint32). `kept` is the first
    text that stays with a Jaccard similarity, over the sets of distinct shingles, of at least `threshold`; `cluster` is
    the first text of all those that pairs of a dropped text and an earlier kept one connect. `recall` is the chance that
    a pair just at the threshold is compared at all. A text without a word is near no other.
    """
    return Index(texts, threshold, shingle, unit, permutations, recall).duplicates()


def near_clusters(
    texts: pl.Series,
    threshold: float = 0.8,
    shingle: int = 5,
    unit: Unit = "word",
    permutations: int = 128,
    recall: float = 0.99,
) -> np.ndarray:
    """int64, for each text the first one of its cluster: pairs of at least `threshold` connect, however long the chain."""
    return Index(texts, threshold, shingle, unit, permutations, recall).clusters()


def permutations_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b), uint32 of shape (number,), of h -> a * h + b mod 2**32: those of `datasketch.MinHash(number, seed=1)`."""
    random = np.random.RandomState(1)  # its stream is frozen (NEP 19)
    a = random.randint(0, 1 << 31, number, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, random.randint(0, 1 << 32, number, dtype=np.uint32)


def signatures(hashes: np.ndarray, offsets: np.ndarray, permutations: int = 128) -> np.ndarray:
    """uint32, (texts, permutations): the least value that each permutation takes on a text's shingles.

    `hashes` are uint32, flat; every text has at least one (`offsets`, int64, as `shingles` gives them).
    """
    a, b = (values[:, None] for values in permutations_of(permutations))
    texts = len(offsets) - 1
    signed = np.empty((texts, permutations), np.uint32)
    for start in range(0, texts, _SIGNED_TEXTS):
        stop = min(start + _SIGNED_TEXTS, texts)
        mixed = _mix32(hashes[offsets[start] : offsets[stop]])
        firsts = offsets[start:stop] - offsets[start]
        for row in range(0, permutations, _SIGNED_ROWS):
            values = mixed * a[row : row + _SIGNED_ROWS]
            values += b[row : row + _SIGNED_ROWS]
            signed[start:stop, row : row + _SIGNED_ROWS] = np.minimum.reduceat(values, firsts, axis=1).T
    return signed


def bands_for(threshold: float, permutations: int, recall: float) -> tuple[int, int]:
    """(bands, rows): most rows a band for which a pair at the threshold shares one with a chance of at least `recall`.

    The chance is 1 - (1 - threshold ** rows) ** bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4).
    """
    for rows in range(permutations, 0, -1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= recall:
            return permutations // rows, rows
    return permutations, 1


def band_keys(
    texts: pl.Series, threshold: float, shingle: int, unit: Unit, permutations: int, recall: float
) -> tuple[np.ndarray, np.ndarray]:
    """(places, keys): which texts have a shingle, and their key in each band, uint64 of shape (bands, texts with one).

    Two texts share a bucket where their keys are equal. They are the same on every machine.
    """
    bands, rows = bands_for(threshold, permutations, recall)
    places, signed = _signed(plain(texts) if unit == "word" else texts, shingle, unit, permutations)
    return places, _keys(signed, bands, rows)


def _signed(texts: pl.Series, shingle: int, unit: Unit, permutations: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the texts that have a shingle, and their signatures; texts of words are plain."""
    hashes, offsets = shingles(texts, shingle, unit, is_plain=True)
    some = np.flatnonzero(np.diff(offsets))
    high = (hashes >> np.uint64(32)).astype(np.uint32)
    # Texts without a shingle take no room in `hashes`, so the others' offsets need no change.
    return some, signatures(high, np.append(offsets[some], len(high)), permutations)


def _keys(signed: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64, (bands, texts): a hash of the rows of each band of each signature."""
    keys = np.zeros((bands, len(signed)), np.uint64)
    for at in range(0, len(signed), _BLOCK_TEXTS):
        block = np.ascontiguousarray(signed[at : at + _BLOCK_TEXTS].T)
        for row in range(bands * rows):
            key = keys[row // rows, at : at + _BLOCK_TEXTS]
            key ^= block[row]
            key *= np.uint64(0x9FB21C651E98DF25)
            key ^= key >> np.uint64(32)
    return keys


def buckets_of(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places, starts) of the buckets of one band that hold two texts or more: the places of their texts in `keys`, bucket
    by bucket and ascending, and where in them each bucket starts."""
    order = np.argsort(keys, kind="stable")
    new = changes(keys[order])
    shared = ~(new & np.append(new[1:], True)[: len(new)])
    return order[shared], np.flatnonzero(new[shared])


class Index:
    """The signatures of texts and the buckets that they share."""

    def __init__(
        self, texts: pl.Series, threshold: float, shingle: int, unit: Unit, permutations: int, recall: float
    ) -> None:
        self.texts = texts
        self.threshold = threshold
        self.shingle = shingle
        self.unit: Unit = unit
        self.key = secrets.randbits(64)
        #: Pairs of texts compared by signature, and those of them compared by their shingles.
        self.compared = self.verified = 0
        #: Of each signature the low byte: two that differ in it differ, and of those that agree one in 256 by chance.
        self.signatures = np.zeros((len(texts), permutations), np.uint8)
        self._bands = bands_for(threshold, permutations, recall)
        with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
            if unit == "word":  # texts in ASCII, which most are, are shared with the caller's
                self.texts = pl.concat([texts.head(0), *pool.map(plain, slices(texts))])
            signed = list(pool.map(self._sign, *_starts(slices(self.texts))))
        empty = np.zeros(0, np.int64), np.zeros((self._bands[0], 0), np.uint64)
        places, keys = zip(empty, *signed, strict=True)
        self._share(np.concatenate(places), np.concatenate(keys, axis=1))

    def _sign(self, start: int, texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        """Signs a slice of the texts; gives the places of those that have a shingle, and their keys."""
        some, signed = _signed(texts, self.shingle, self.unit, self.signatures.shape[1])
        self.signatures[start + some] = signed.astype(np.uint8)
        return start + some, _keys(signed, *self._bands)

    def _share(self, signed: np.ndarray, keys: np.ndarray) -> None:
        """Fills in which text is in which bucket, for the buckets of two texts or more."""
        texts, buckets, number = [], [], 0
        for band in keys:
            places, starts = buckets_of(band)
            sizes = np.diff(np.append(starts, len(places)))
            texts.append(signed[places])
            buckets.append(np.repeat(np.arange(len(sizes)) + number, sizes))
            number += len(sizes)
        text, bucket = np.concatenate(texts), np.concatenate(buckets)
        self.buckets = number
        hub = _number_in_run(bucket) < np.maximum(MOST_MET, MOST_PAIRS // np.bincount(bucket, minlength=number))[bucket]
        order = np.argsort(text, kind="stable")
        #: Texts that share a bucket, in order, and the buckets of the text number `i` of them: `[first[i]:first[i + 1]]`.
        self.sharing, first = np.unique(text[order], return_index=True)
        self.first = np.append(first, len(text))
        self.bucket = bucket[order]
        #: bool, for each of these buckets: whether the text is among its first, which the others are compared with.
        self.hub = hub[order]

    def _near(self, others: np.ndarray, texts: np.ndarray) -> pl.DataFrame:
        """The pairs (of numbers in `sharing`) that reach the threshold: `other, text, jaccard`."""
        self.compared += len(texts)
        left, right = self.sharing[others], self.sharing[texts]
        length = self.signatures.shape[1]
        least = length * self.threshold - _DEVIATIONS * sqrt(length * self.threshold * (1 - self.threshold))
        chunks = [slice(at, at + 8192) for at in range(0, len(left), 8192)]
        agree = [(self.signatures[left[at]] == self.signatures[right[at]]).sum(axis=1) for at in chunks]
        places = np.flatnonzero(np.concatenate([np.zeros(0), *agree]) >= least)
        self.verified += len(places)
        threads = pl.thread_pool_size()
        size = min(max(-(-len(places) // threads), _COMPARED_PAIRS), _BLOCK_PAIRS)
        parts = [places[at : at + size] for at in range(0, len(places), size)]
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(self._jaccard, (left[part] for part in parts), (right[part] for part in parts))
        jaccard = np.concatenate([np.zeros(0), *found])
        near = jaccard >= self.threshold
        return pl.DataFrame({"other": others[places][near], "text": texts[places][near], "jaccard": jaccard[near]})

    def _jaccard(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """float64: Jaccard similarity of each pair of texts, over the sets of their shingles.

        Shingles are taken for equal when 54 bits of their keyed hashes are: of texts of 200 words, one pair in 10**12 has
        two different ones of which that is true by chance.
        """
        texts, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        hashes, offsets = _distinct(
            *shingles(self.texts.gather(texts), self.shingle, self.unit, self.key, is_plain=True)
        )
        sizes = np.diff(offsets)
        one, other = places[: len(left)], places[len(left) :]
        shared = np.zeros(len(left), np.int64)
        ends = np.cumsum(sizes[one] + sizes[other])
        start = 0
        while start < len(left):
            before = ends[start - 1] if start else 0
            stop = int(np.searchsorted(ends, before + _COMPARED_HASHES, side="right"))
            stop = min(max(stop, start + 1), start + _COMPARED_PAIRS)
            both = np.concatenate([one[start:stop], other[start:stop]])
            pair = np.tile(np.arange(stop - start, dtype=np.uint64), 2)
            found = hashes[ranges(offsets[both], sizes[both])]
            found |= np.repeat(pair << np.uint64(_COMPARED_BITS), sizes[both])
            found.sort()
            twice = found[1:][found[1:] == found[:-1]] >> np.uint64(_COMPARED_BITS)
            shared[start:stop] = np.bincount(twice.astype(np.int64), minlength=stop - start)
            start = stop
        return shared / np.maximum(sizes[one] + sizes[other] - shared, 1)

    def duplicates(self) -> pl.DataFrame:
        """As `near_duplicates`."""
        kept = _Kept(self)
        found: dict[int, tuple[int, float]] = {}
        dropped = np.zeros(len(self.sharing), bool)
        links: list[pl.DataFrame] = []
        start = met = 0  # texts before `start` are decided, those before `met` have met all that are kept of them
        size = _BLOCK_TEXTS
        near_kept = self._near(*kept.pairs(np.arange(0)))
        while start < len(self.sharing):
            stop = min(start + size, len(self.sharing))
            near_kept = pl.concat(
                [near_kept.filter(pl.col("text") < met), self._near(*kept.pairs(np.arange(met, stop)))]
            )
            left = np.setdiff1d(np.arange(start, stop), near_kept["text"], assume_unique=True)
            fitting = kept.fitting(left)
            block = np.arange(start, left[fitting] if fitting < len(left) else stop)
            in_block = pl.col("text") <= block[-1]
            near = pl.concat([near_kept.filter(in_block), self._near(*kept.inner_pairs(left[:fitting]))])
            for other, text, jaccard in near.sort("text", "other").rows():
                if not dropped[other] and not dropped[text]:
                    found[text] = other, jaccard
                    dropped[text] = True
            kept.add(block[~dropped[block]])
            # These have not met the kept ones of the block: texts after it, and texts of it that are near to one kept
            # before; that they are near to one of it as well joins two clusters.
            size = min(2 * len(block), _BLOCK_TEXTS)  # where one was too big the next one will be
            met = min(start + len(block) + size, stop)
            others = np.append(
                distinct(near_kept.filter(in_block)["text"].to_numpy()), np.arange(start + len(block), met)
            )
            near_kept = pl.concat([near_kept, self._near(*kept.pairs(others, start))])
            near = pl.concat([near, near_kept.filter(in_block)])
            links.append(near.select("other", "text").filter(~dropped[near["other"]]))
            near_kept = near_kept.filter(~in_block)
            start += len(block)
        clusters = np.arange(len(self.sharing))
        if links:
            connect(clusters, *pl.concat(links).to_numpy().T)
        rows = sorted(found)
        others, similarities = zip(*(found[row] for row in rows), strict=True) if rows else ((), ())
        return pl.DataFrame(
            {
                "row": self.sharing[rows],
                "kept": self.sharing[list(others)],
                "jaccard": similarities,
                "cluster": self.sharing[clusters[rows]],
            },
            schema={"row": pl.UInt32, "kept": pl.UInt32, "jaccard": pl.Float64, "cluster": pl.UInt32},
        )

    def clusters(self) -> np.ndarray:
        """As `near_clusters`."""
        clusters = np.arange(len(self.sharing))
        text, bucket, _ = self.memberships(clusters)
        most_met = self.most_met()
        for apart in itertools.count(1):
            if apart.bit_count() == 1:  # now and then the buckets that are done are left behind
                goes_on = np.minimum(np.bincount(bucket, minlength=self.buckets) - 1, most_met) >= apart
                open_ = (clusters[text[1:]] != clusters[text[:-1]]) & (bucket[1:] == bucket[:-1])
                goes_on &= np.bincount(bucket[1:][open_], minlength=self.buckets) > 0
                text, bucket = text[goes_on[bucket]], bucket[goes_on[bucket]]
            same = np.flatnonzero(bucket[apart:] == bucket[:-apart])
            same = same[most_met[bucket[same]] >= apart]
            if not same.size:
                break
            left, right = text[same], text[same + apart]
            open_ = clusters[left] != clusters[right]
            near = self._near(*_unique(left[open_], right[open_]))
            connect(clusters, near["other"].to_numpy(), near["text"].to_numpy())
        everywhere = np.arange(len(self.texts))
        everywhere[self.sharing] = self.sharing[clusters]
        return everywhere

    def most_met(self) -> np.ndarray:
        """int64, for each bucket: how many others a text is compared with."""
        return np.maximum(MOST_MET, MOST_PAIRS // np.bincount(self.bucket, minlength=self.buckets))

    def memberships(self, sharing: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, bucket, hub) of each membership of some of the `sharing` texts (by number, ascending), by bucket, then
        text."""
        sizes = self.first[sharing + 1] - self.first[sharing]
        of_texts = ranges(self.first[sharing], sizes)
        order = np.argsort(self.bucket[of_texts], kind="stable")
        there = of_texts[order]
        return np.repeat(sharing, sizes)[order], self.bucket[there], self.hub[there]


class _Kept:
    """The kept texts among the first ones of every bucket."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.start = np.concatenate([[0], np.cumsum(np.bincount(index.bucket[index.hub], minlength=index.buckets))])
        self.filled = np.zeros(index.buckets, np.int64)
        self.texts = np.zeros(self.start[-1], np.int64)

    def add(self, texts: np.ndarray) -> None:
        text, bucket, hub = self.index.memberships(texts)
        text, bucket = text[hub], bucket[hub]
        self.texts[self.start[bucket] + self.filled[bucket] + _number_in_run(bucket)] = text
        np.add.at(self.filled, bucket, 1)

    def pairs(self, texts: np.ndarray, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Each text with the kept ones of its buckets that are earlier, but not before `first`: (kept, text)."""
        text, bucket, _ = self.index.memberships(texts)
        sizes = self.filled[bucket]
        kept, text = self.texts[ranges(self.start[bucket], sizes)], np.repeat(text, sizes)
        wanted = (kept >= first) & (kept < text)
        return _unique(kept[wanted], text[wanted])

    def inner_pairs(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each text with those of these texts that are earlier and among the first ones of its buckets."""
        text, first, earlier = self._earlier(texts)
        return _unique(text[ranges(first, earlier)], np.repeat(text, earlier))

    def fitting(self, texts: np.ndarray) -> int:
        """How many of the texts, from the first one, have few enough inner pairs to be compared at once."""
        text, _, earlier = self._earlier(texts)
        pairs = np.bincount(np.searchsorted(texts, text), earlier, len(texts)).cumsum()
        number = np.arange(1, len(texts) + 1)
        over = np.flatnonzero(pairs > _PAIRS_A_TEXT * np.maximum(number, MOST_MET))
        return int(over[0]) if over.size else len(texts)

    def _earlier(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The memberships of the texts, bucket by bucket: the text, where its bucket starts, and how many of the bucket's
        first ones are before it."""
        text, bucket, hub = self.index.memberships(texts)
        start = np.arange(len(text)) - _number_in_run(bucket)
        hubs = np.concatenate([[0], np.cumsum(hub)])  # in a bucket they come first
        return text, start, hubs[:-1] - hubs[start]


def _starts(parts: Iterator[pl.Series]) -> tuple[list[int], list[pl.Series]]:
    """The number of the first text of each part, and the parts."""
    found = list(parts)
    return [0, *np.cumsum([len(part) for part in found])[:-1].tolist()] if found else [], found


def _distinct(hashes: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct hashes of each text, ascending, of each its high `_COMPARED_BITS`, and their offsets."""
    bits, texts = np.uint64(_COMPARED_BITS), 1 << (64 - _COMPARED_BITS)
    flat, sizes = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
    for start in range(0, len(offsets) - 1, texts):
        ends = offsets[start : start + texts + 1]
        text = np.repeat(np.arange(len(ends) - 1, dtype=np.uint64) << bits, np.diff(ends))
        packed = distinct(text | hashes[ends[0] : ends[-1]] >> (np.uint64(64) - bits))
        sizes.append(np.bincount((packed >> bits).astype(np.int64), minlength=len(ends) - 1))
        flat.append(packed & np.uint64((1 << _COMPARED_BITS) - 1))
    return np.concatenate(flat), np.cumsum(np.concatenate(sizes))


def _number_in_run(values: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... in each run of equal values."""
    firsts = np.flatnonzero(changes(values))
    return np.arange(len(values)) - np.repeat(firsts, np.diff(np.append(firsts, len(values))))


def _unique(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of two arrays of numbers below 2**31."""
    packed = distinct(left << 32 | right)
    return packed >> 32, packed & 0xFFFFFFFF


def connect(clusters: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Joins, in place, the clusters of the pairs; a cluster is named by its least member."""
    while True:
        one, other = clusters[left], clusters[right]
        apart = one != other
        if not apart.any():
            return
        np.minimum.at(clusters, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while not np.array_equal(jumped := clusters[clusters], clusters):
            clusters[:] = jumped


def _mix32(hashes: np.ndarray) -> np.ndarray:
    """The 32-bit finaliser of MurmurHash3 (Appleby 2011), which datasketch applies before its permutations."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))
