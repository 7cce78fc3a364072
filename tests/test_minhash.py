"""Near-duplicates: against datasketch, against brute force over all pairs, and on texts made to be slow or wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasketch
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from polars.testing import assert_frame_equal

from prefmix import minhash
from prefmix.minhash import Index, bands_for, near_clusters, near_duplicates, permutations_of, signatures
from prefmix.shingles import normalise, slices

#: A pair at the threshold is missed once in ten thousand: on the corpora here, which are fixed, none is.
SURE = 0.9999
Pairs = list[tuple[int, int, float]]


# Brute force, in plain Python.


def shingle_sets(texts: Sequence[str | None], n: int = 5, unit: str = "word") -> list[set]:
    found = []
    for text in normalise(pl.Series(texts, dtype=pl.String).fill_null("")):
        units = text.split() if unit == "word" else text
        runs = {tuple(units[start : start + n]) for start in range(len(units) - n + 1)}
        found.append(runs or ({tuple(units)} if units else set()))
    return found


def near_pairs(sets: Sequence[set], threshold: float) -> Pairs:
    """(earlier, later, jaccard) of all pairs that reach the threshold, by the later, then the earlier one."""
    having = defaultdict(list)
    found = []
    for later, own in enumerate(sets):
        shared = Counter(earlier for shingle in own for earlier in having[shingle])
        for earlier, count in sorted(shared.items()):
            jaccard = count / (len(own) + len(sets[earlier]) - count)
            if jaccard >= threshold:
                found.append((earlier, later, jaccard))
        for shingle in own:
            having[shingle].append(later)
    return found


def components(size: int, pairs: Pairs) -> list[int]:
    """The least member of the component of each text."""
    names = list(range(size))
    for one, other, _ in pairs:
        low, high = sorted((names[one], names[other]))
        names = [low if name == high else name for name in names]
    return names


def greedy(size: int, pairs: Pairs) -> pl.DataFrame:
    """Text after text: one that is near an earlier kept one is dropped for the first such one."""
    found: dict[int, tuple[int, float]] = {}
    for earlier, later, jaccard in pairs:
        if earlier not in found and later not in found:
            found[later] = earlier, jaccard
    clusters = components(size, [pair for pair in pairs if pair[0] not in found])
    rows = [(row, *found[row], clusters[row]) for row in sorted(found)]
    schema = {"row": pl.UInt32, "kept": pl.UInt32, "jaccard": pl.Float64, "cluster": pl.UInt32}
    return pl.DataFrame(rows, schema, orient="row")


# Corpora.


def series(texts: Sequence[str | None]) -> pl.Series:
    return pl.Series(texts, dtype=pl.String)


def index(texts: Sequence[str | None], shingle: int = 5, permutations: int = 128, recall: float = 0.99) -> Index:
    return Index(series(texts), 0.8, shingle, "word", permutations, recall)


def some_words(draw: random.Random, number: int, vocabulary: int = 10**6) -> list[str]:
    return [f"w{draw.randrange(vocabulary)}" for _ in range(number)]


def edited(text: str, draw: random.Random) -> str:
    """A copy with up to five edits."""
    words = text.split(" ")
    for _ in range(draw.randrange(6)):
        at = draw.randrange(len(words))
        match draw.randrange(5):
            case 0:
                words[at] = draw.choice(some_words(draw, 1))
            case 1:
                words.insert(at, draw.choice(words))
            case 2 if len(words) > 1:
                del words[at]
            case 3:
                words[at] = words[at].upper() + draw.choice(["!", ",", " —", "…"])
            case 4:
                words.append(words.pop(at))
    return draw.choice([" ", "\n", " - "]).join(words)


def corpus(seed: int, size: int = 250) -> list[str]:
    """Texts of few different words, edited copies of them and of copies, and some without a word, in any order."""
    draw = random.Random(seed)
    texts = [" ".join(some_words(draw, draw.choice([2, 6, 12, 30, 80]), 300)) for _ in range(size // 3)]
    while len(texts) < size:
        texts.append(edited(draw.choice(texts), draw))
    texts += ["", "...", " \n", "!"]
    draw.shuffle(texts)
    return texts


# Signatures and bands.


@pytest.mark.parametrize("number", [1, 2, 16, 100, 128, 256])
def test_the_permutations_are_those_of_datasketch(number):
    assert_array_equal(permutations_of(number), datasketch.MinHash(num_perm=number, seed=1).permutations)


shingle_hashes = st.lists(
    st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1]), min_size=1, max_size=50
)


@given(st.lists(shingle_hashes, max_size=6), st.sampled_from([1, 5, 16, 128]))
def test_signatures_are_those_of_datasketch(texts, permutations):
    flat = np.array([value for hashes in texts for value in hashes], np.uint32)
    signed = signatures(flat, np.cumsum([0, *map(len, texts)]), permutations)
    assert (signed.dtype, signed.shape) == (np.uint32, (len(texts), permutations))
    for row, hashes in zip(signed, texts, strict=True):
        expected = datasketch.MinHash(num_perm=permutations, seed=1, hashfunc=int)
        expected.update_batch(hashes)
        assert_array_equal(row, expected.hashvalues)


@given(st.floats(0.05, 1), st.integers(1, 256), st.floats(0.01, 0.9999))
def test_bands_have_most_rows_with_the_wanted_chance_of_a_shared_bucket(threshold, permutations, recall):
    bands, rows = bands_for(threshold, permutations, recall)
    assert rows >= 1
    assert bands == permutations // rows

    def chance(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (permutations // rows)

    assert chance(rows) >= recall or rows == 1
    assert all(chance(more) < recall for more in range(rows + 1, permutations + 1))


def test_a_bucket_is_shared_as_often_as_the_formula_says():
    draw = random.Random(5)
    pairs = []
    for _ in range(1500):
        words = some_words(draw, 100)
        pairs += [" ".join(words), " ".join(words[:80] + some_words(draw, 20))]  # 80 of 120 words: J = 2/3
    bands, rows = bands_for(0.8, 32, 0.9)
    built = index(pairs, shingle=1, permutations=32, recall=0.9)
    met = {tuple(pair) for pair in zip(*built_pairs(built), strict=True)}
    share = sum((at, at + 1) in met for at in range(0, 3000, 2)) / 1500
    assert share == pytest.approx(1 - (1 - (2 / 3) ** rows) ** bands, abs=0.03)


def built_pairs(built: Index) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of texts that share a bucket."""
    text, bucket, _ = built.memberships(np.arange(len(built.sharing)))
    same = np.flatnonzero(bucket[1:] == bucket[:-1])
    return built.sharing[text[same]], built.sharing[text[same + 1]]


# Against brute force.

SETTINGS = [
    {"threshold": 0.8, "shingle": 5},
    {"threshold": 0.8, "shingle": 1},
    {"threshold": 0.5, "shingle": 3},
    {"threshold": 0.9, "shingle": 13, "permutations": 256},
    {"threshold": 0.7, "shingle": 7, "unit": "char"},
    {"threshold": 0.1, "shingle": 2},
    {"threshold": 1.0, "shingle": 5},
    {"threshold": 1.0, "shingle": 1, "permutations": 16},
]


def named(settings: dict) -> str:
    return "-".join(str(value) for value in settings.values())


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
@pytest.mark.parametrize("seed", range(3))
def test_the_drops_their_evidence_and_the_clusters_are_those_of_brute_force(seed, settings):
    texts = corpus(seed)
    pairs = near_pairs(shingle_sets(texts, settings["shingle"], settings.get("unit", "word")), settings["threshold"])
    found = near_duplicates(series(texts), recall=SURE, **settings)
    assert found.height > 30
    assert_frame_equal(found, greedy(len(texts), pairs), check_exact=True)
    clusters = near_clusters(series(texts), recall=SURE, **settings)
    assert clusters.tolist() == components(len(texts), pairs)


@pytest.mark.parametrize("seed", range(10, 14))
def test_with_few_permutations_drops_are_missed_but_none_is_wrong(seed):
    texts = corpus(seed)
    sets = shingle_sets(texts)
    for permutations in (1, 16):
        found = near_duplicates(series(texts), permutations=permutations)
        assert_drops_are_true(found, sets, 0.8)
        assert 0 < found.height <= len(greedy(len(texts), near_pairs(sets, 0.8))) + 5


def assert_drops_are_true(found: pl.DataFrame, sets: Sequence[set], threshold: float) -> None:
    """Each names an earlier text that stays, with their true Jaccard similarity, and that reaches the threshold."""
    rows, kept = found["row"].to_list(), found["kept"].to_list()
    assert rows == sorted(set(rows))
    assert not set(rows) & set(kept)
    for row, other, jaccard, cluster in found.iter_rows():
        assert cluster <= other < row
        assert jaccard == len(sets[row] & sets[other]) / len(sets[row] | sets[other]) >= threshold


def real_texts(real_data: Path, seed: int) -> list[str]:
    """Real answers and prompts, some of them near duplicates as they are, some copied with edits."""
    pairs = pl.read_parquet(real_data / "orca_dpo_pairs" / "converted.parquet").sample(1000, seed=seed)
    sft = pl.read_parquet(real_data / "openhermes" / "converted_hermes_sources.parquet").sample(1000, seed=seed)
    texts = [*pairs["chosen"], *pairs["rejected"], *pairs["question"], *sft["output"]]
    draw = random.Random(seed)
    texts += [edited(edited(draw.choice(texts), draw), draw) for _ in range(500)]
    draw.shuffle(texts)
    return texts


def test_on_real_texts_almost_all_drops_of_brute_force_are_found_and_no_other(real_data):
    texts = real_texts(real_data, seed=1)
    sets = shingle_sets(texts)
    pairs = near_pairs(sets, 0.8)
    expected = greedy(len(texts), pairs)
    found = near_duplicates(series(texts))
    assert_drops_are_true(found, sets, 0.8)
    assert expected.height > 400
    assert len(set(found["row"]) & set(expected["row"])) >= 0.99 * expected.height
    near = {(earlier, later) for earlier, later, _ in pairs}
    stays = sorted(set(range(len(texts))) - set(found["row"]))
    first = [next(kept for kept in stays if (kept, row) in near) for row in found["row"]]
    assert sum(a == b for a, b in zip(first, found["kept"], strict=True)) >= 0.99 * found.height


def test_a_text_is_not_dropped_because_its_like_has_a_like():
    words = [f"w{number}" for number in range(40)]
    chain = [" ".join(words[start : start + 30]) for start in (0, 2, 4, 6)]
    found = near_duplicates(series(chain), shingle=1, recall=SURE)  # neighbours: 28 of 32; over one: 26 of 34
    assert found.rows() == [(1, 0, 28 / 32, 0), (3, 2, 28 / 32, 2)]
    assert near_clusters(series(chain), shingle=1, recall=SURE).tolist() == [0, 0, 0, 0]
    assert near_clusters(series(chain[::-1]), shingle=1, recall=SURE).tolist() == [0, 0, 0, 0]
    assert near_clusters(series([chain[0], "x", chain[3]]), shingle=1, recall=SURE).tolist() == [0, 1, 2]


# Of the order of the texts alone.


@pytest.mark.parametrize(
    "sizes",
    [
        {"_BLOCK_TEXTS": 1},
        {"_BLOCK_TEXTS": 7},
        {"_BLOCK_TEXTS": 100},
        {"_PAIRS_A_TEXT": 1},
        {"_COMPARED_PAIRS": 1},
        {"_COMPARED_PAIRS": 7, "_COMPARED_HASHES": 500},
        {"_COMPARED_HASHES": 1},
        {"_SIGNED_TEXTS": 1, "_SIGNED_ROWS": 3},
        {"_SIGNED_TEXTS": 10**6, "_SIGNED_ROWS": 128},
    ],
    ids=named,
)
def test_sizes_of_blocks_change_nothing(monkeypatch, sizes):
    texts = series(corpus(20))
    found, clusters = near_duplicates(texts), near_clusters(texts)
    for name, value in sizes.items():
        monkeypatch.setattr(minhash, name, value)
    assert_frame_equal(near_duplicates(texts), found, check_exact=True)
    assert_array_equal(near_clusters(texts), clusters)


@pytest.mark.parametrize("size", [1, 100, 5000, 100_000])
def test_sizes_of_slices_change_nothing(monkeypatch, size):
    texts = series(corpus(20))
    found, clusters = near_duplicates(texts), near_clusters(texts)
    monkeypatch.setattr(minhash, "slices", partial(slices, size=size))
    assert_frame_equal(near_duplicates(texts), found, check_exact=True)
    assert_array_equal(near_clusters(texts), clusters)


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_the_key_of_the_hashes_changes_nothing(monkeypatch, key):
    texts = series(corpus(23))
    found = near_duplicates(texts)
    monkeypatch.setattr(minhash.secrets, "randbits", lambda bits: key)
    assert_frame_equal(near_duplicates(texts), found, check_exact=True)


def test_threads_change_nothing():
    code = (
        "import test_minhash as t, polars as pl; from functools import partial;"
        "t.minhash.slices = partial(t.slices, size=2000); texts = t.series(t.corpus(22, 600));"
        "print(pl.thread_pool_size(), t.near_duplicates(texts).write_csv(), t.near_clusters(texts).tolist())"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(minhash.__file__).parents[1])])
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    runs = [
        subprocess.Popen(
            command, stdout=pipe, text=True, env=os.environ | {"POLARS_MAX_THREADS": n, "PYTHONPATH": paths}
        )
        for n in "12"
    ]
    numbers, printed = zip(*(run.communicate()[0].split(" ", 1) for run in runs), strict=True)
    assert numbers == ("1", "2")
    assert printed[0] == printed[1]
    assert printed[0].count("\n") > 100


@pytest.mark.parametrize("seed", range(30, 34))
def test_texts_of_lower_rank_change_no_drop(seed):
    texts = series(corpus(seed))
    found = near_duplicates(texts).drop("cluster")
    for size in (0, 1, 2, 60, 170):
        assert_frame_equal(near_duplicates(texts[:size]).drop("cluster"), found.filter(pl.col("row") < size))


@pytest.mark.parametrize("seed", range(40, 44))
def test_texts_that_are_near_to_none_change_nothing_for_the_others(seed):
    draw, mixed, place = random.Random(seed), [], []
    texts = corpus(seed)
    for text in texts:
        mixed += [" ".join(some_words(draw, draw.randrange(30))) or None for _ in range(draw.randrange(4))]
        place.append(len(mixed))
        mixed.append(text)
    where = np.array(place, np.uint32)
    found = near_duplicates(series(texts))
    moved = found.with_columns(pl.Series(name, where[found[name].to_numpy()]) for name in ("row", "kept", "cluster"))
    assert_frame_equal(near_duplicates(series(mixed)), moved, check_exact=True)


# No text, one text, short texts.


@pytest.mark.parametrize(
    "texts", [[], [""], [None], ["one two"], ["", None, " ", "...", "👍", "\u0301"], ["a", "", "b"]]
)
def test_nothing_to_compare(texts):
    found = near_duplicates(series(texts))
    assert (found.height, found.columns) == (0, ["row", "kept", "jaccard", "cluster"])
    assert found.dtypes == [pl.UInt32, pl.UInt32, pl.Float64, pl.UInt32]
    assert near_clusters(series(texts)).tolist() == list(range(len(texts)))


def test_a_text_without_a_word_is_never_dropped():
    texts = ["", "same text", "!", None, "", "Same, text!", "!", "..."]
    assert near_duplicates(series(texts)).rows() == [(5, 1, 1.0, 1)]
    assert near_clusters(series(texts)).tolist() == [0, 1, 2, 3, 4, 1, 6, 7]


@pytest.mark.parametrize("threshold", [0.1, 0.8, 1.0])
def test_texts_shorter_than_a_shingle_go_only_when_all_words_are_equal(threshold):
    texts = ["Yes.", "yes it is", "no", "Yes!", "it is", "Yes, it IS", "yes it is so", "is it yes", "yes it is so, sir"]
    found = near_duplicates(series(texts), threshold)
    assert found.rows() == [(3, 0, 1.0, 0), (5, 1, 1.0, 1)]


def test_texts_without_spaces_are_compared_by_their_letters():
    chinese = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 2 + "床前明月光疑是地上霜举头望明月低头思故乡"
    thai = "ที่นี่มีอาหารไทยอร่อยมากและราคาไม่แพงเลยสักนิดเดียว"
    texts = [chinese, thai, chinese[:-1] + "。", thai + "!", chinese[::-1], chinese[:20] + "，" + chinese[20:]]
    found = near_duplicates(series(texts), recall=SURE)
    assert_frame_equal(found, greedy(len(texts), near_pairs(shingle_sets(texts), 0.8)), check_exact=True)
    assert found.select("row", "kept").rows() == [(2, 0), (3, 1), (5, 0)]


# Texts made to be slow. The bound is on the pairs of texts that are compared, for each text; all pairs would be thousands.


def one_text(draw: random.Random, size: int) -> list[str]:
    return [" ".join(some_words(draw, 60))] * size


def one_word_differs(draw: random.Random, size: int) -> list[str]:
    words = some_words(draw, 70)
    return [" ".join([*words[:30], f"x{number}", *words[30:]]) for number in range(size)]


def one_word_of_a_short_text_differs(draw: random.Random, size: int) -> list[str]:
    words = some_words(draw, 20)  # J = 12 / 22
    return [" ".join([*words[:10], f"x{number}", *words[10:]]) for number in range(size)]


def half_is_shared(draw: random.Random, size: int) -> list[str]:
    shared = " ".join(some_words(draw, 40))
    return [shared + " " + " ".join(some_words(draw, 20)) for _ in range(size)]


def families(draw: random.Random, size: int, members: int) -> list[str]:
    return [text for _ in range(size // members) for text in [" ".join(some_words(draw, 30))] * members]


def families_come_first(draw: random.Random, size: int) -> list[str]:
    return families(draw, size // 4, 10) + families(draw, size * 3 // 4, 1)


def families_in_any_order(draw: random.Random, size: int) -> list[str]:
    texts = families(draw, size, 100)
    draw.shuffle(texts)
    return texts


def families_come_last(draw: random.Random, size: int) -> list[str]:
    return families(draw, size // 2, 1) + families(draw, size // 2, 100)


def short_texts(draw: random.Random, size: int) -> list[str]:
    return [" ".join(some_words(draw, draw.randrange(1, 4), 20)) for _ in range(size)]


def no_words(draw: random.Random, size: int) -> list[str]:
    return [draw.choice(["", "...", "\n", "?!"]) for _ in range(size)]


SLOW_TEXTS = {
    # name: (texts, share that must go: least and most, pairs compared a text)
    "one text": (one_text, 1, 1, 1.1),
    "one word differs": (one_word_differs, 0.999, 1, 3.5),
    "one word of a short text differs": (one_word_of_a_short_text_differs, 0, 0, 250),
    "half is shared": (half_is_shared, 0, 0, 250),
    "families of 10 come first": (families_come_first, 0.225, 0.225, 1),
    "families in any order": (families_in_any_order, 0.99, 0.99, 1.1),
    "families come last": (families_come_last, 0.495, 0.495, 1),
    "short texts": (short_texts, 0.5, 1, 1),
    "no words": (no_words, 0, 0, 0),
}


@pytest.mark.parametrize("name", SLOW_TEXTS)
@pytest.mark.parametrize("size", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_work_is_linear_whatever_the_texts(monkeypatch, name, size):
    if size < 100_000:  # big buckets are as full as among 100,000
        monkeypatch.setattr(minhash, "MOST_PAIRS", minhash.MOST_PAIRS >> 4)
    make, least, most, pairs = SLOW_TEXTS[name]
    built = index(make(random.Random(9), size))
    found = built.duplicates()
    assert least * size - 1 <= found.height <= most * size
    assert built.compared <= pairs * size
    assert built.verified <= 5 * size
    built.compared = 0
    clusters = built.clusters()
    assert built.compared <= pairs * size
    assert len(np.unique(clusters)) <= size - found.height


def test_copies_are_found_in_a_crowd_whose_buckets_are_full():
    draw = random.Random(10)
    texts = half_is_shared(draw, 3000)
    copied = draw.sample(range(3000), 200)
    built = index(texts + [texts[at].title() for at in copied])
    found = built.duplicates()
    assert found["row"].to_list() == list(range(3000, 3200))
    assert found["kept"].to_list() == copied
    assert built.compared < 3200 * 3200 / 4  # half of all pairs
    clusters = built.clusters()
    assert clusters[3000:].tolist() == copied


def test_many_copies_in_one_block_leave_one_text():
    """In a block of texts that are near to none a hundred copies are compared at once, each with all earlier ones."""
    draw = random.Random(11)
    others = [" ".join(some_words(draw, 30)) for _ in range(minhash._BLOCK_TEXTS)]
    copy = " ".join(some_words(draw, 30))
    first = others.copy()
    for at in sorted(draw.sample(range(len(others)), 100)):
        first.insert(at, copy)
    found = near_duplicates(series(first + others))  # the others come again, for they have to share buckets too
    kept = Counter(found["kept"].to_list())
    assert kept.pop(first.index(copy)) == 99
    assert (len(kept), set(kept.values())) == (len(others), {1})


def test_clusters_join_over_a_text_near_one_kept_before_its_block_and_one_in_it(monkeypatch):
    words = [f"w{number}" for number in range(40)]
    before, between, in_it = (" ".join(words[start : start + 30]) for start in (0, 2, 4))
    for size in (1, 2, 3, 4096):
        monkeypatch.setattr(minhash, "_BLOCK_TEXTS", size)
        found = near_duplicates(series([before, before, in_it, between, in_it]), shingle=1, recall=SURE)
        assert found.rows() == [(1, 0, 1.0, 0), (3, 0, 28 / 32, 0), (4, 2, 1.0, 0)]


def test_a_text_of_ten_megabytes_beside_others():
    draw = random.Random(12)
    big, word = " ".join(map(str, draw.choices(range(10**8), k=1_200_000))), "x" * 10_000_000
    assert len(big) > 10_000_000
    small = [" ".join(some_words(draw, 50)) for _ in range(50)]
    built = index([*small, big, word, big.replace("1 ", "1, "), word + "y", word.upper(), *small])
    found = built.duplicates()
    expected = [(52, 50, 1.0), (54, 51, 1.0), *((55 + at, at, 1.0) for at in range(50))]
    assert found.select("row", "kept", "jaccard").rows() == expected
    assert built.compared == built.verified == len(expected)


def test_two_big_texts_that_differ_in_some_places_are_compared_exactly():
    numbers = [f"w{number}" for number in range(200_000)]
    other = numbers.copy()
    other[::100] = ["changed"] * 2000  # each is in five shingles, but the first one in one
    found = near_duplicates(series([" ".join(numbers), " ".join(other)]), recall=SURE)
    shared = 200_000 - 4 - (5 * 1999 + 1)
    assert found["jaccard"].to_list() == [shared / (2 * (200_000 - 4) - shared)]
