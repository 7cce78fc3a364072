"""Words and shingles from the kernels are those of `normalise` and of plain Python, for any Unicode and any cutting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from unicodedata import category

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from prefmix import shingles as kernels
from prefmix.shingles import distinct, ngrams, normalise, shingles, slices, words

#: Where the kernels take different ways: case, marks, ligatures, zero-width, no spaces, separators that are not ASCII.
TRICKY = "aZz09_ -'.\n\t\x00\x7f" + "ÉéßΣσςΑ" + kernels._COMMON + "\u0301\u0308\u0338\u200b\u200d\ufeff\u00ad\u2028"
TRICKY += "中文かタｶﾞーไทยกำ한국हिन्दीلله" + "😀👩🇨🇭\ufe0f" + "ﬁİıŉK𝐀①½ſ" + "…≠≉"
text = st.text(st.sampled_from(TRICKY) | st.characters(codec="utf-8"), max_size=40)
texts = st.lists(st.none() | text, max_size=8)
Hashes = tuple[np.ndarray, np.ndarray]


def string(values: Sequence[str | None]) -> pl.Series:
    return pl.Series(values, dtype=pl.String)


def plain_words(values: Sequence[str | None]) -> list[list[str]]:
    return [text.split() for text in normalise(string([value or "" for value in values]))]


def plain_shingles(units: Sequence[str], n: int, whole: bool = True) -> list[tuple[str, ...]]:
    found = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return [tuple(units)] if whole and units and not found else found


def assert_stand_for(hashes: Hashes, expected: Sequence[Sequence]) -> None:
    """Every text has as many hashes as things; equal things have equal hashes, different ones different hashes."""
    flat, offsets = hashes
    assert (flat.dtype, offsets.dtype) == (np.uint64, np.int64)
    assert offsets[0] == 0
    assert np.diff(offsets).tolist() == [len(things) for things in expected]
    found = set(zip(flat.tolist(), chain.from_iterable(expected), strict=True))
    assert len(found) == len({value for value, _ in found}) == len({thing for _, thing in found})


def same(one: Hashes, other: Hashes) -> bool:
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


# Texts as they are compared.


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("The  Quick,\n\tbrown—FOX!", "the quick brown fox"),
        ("don’t don't DON´T", "don t don t don t"),
        ("snake_case x2=3.14", "snake case x2 3 14"),
        ("ﬁne ＡＢＣ ①½", "fine abc 11 2"),
        ("zero\u200bwidth so\u00adft \ufeffmark", "zerowidth soft mark"),
        ("a👩\u200d👩\u200d👧b", "a b"),
        ("a\x00b", "a b"),
        ("I ❤\ufe0f it", "i it"),
        ("\u0301a -\u0301b", "a b"),
        ("हिन्दी में", "हिन्दी में"),
        ("中文字,かな", "中 文 字 か な"),
        ("ｶﾞｷ", "ガ キ"),
        ("ที่นี่", "ที่ นี่"),
        ("한국어 text", "한국어 text"),
        ("T\u0308 H\u0331 \u0399\u0308\u0301", "ẗ ẖ ΐ"),
        ("!?… 👍", ""),
        ("", ""),
    ],
)
def test_a_text_is_compared_in_this_form(raw, expected):
    assert normalise(string([raw])).to_list() == [expected]
    assert same(words(string([raw])), words(string([expected])))


@given(texts)
def test_a_normalised_text_is_words_that_start_with_a_letter_or_digit_with_one_space_between(values):
    for value, found in zip(normalise(string(values).fill_null("")), plain_words(values), strict=True):
        assert value == " ".join(found) == value.lower()
        # Cn: the kernel may know letters of a newer Unicode than Python.
        assert all(category(word[0])[0] in "LN" or category(word[0]) == "Cn" for word in found)
        assert all(category(character)[0] in "LMN" or category(character) == "Cn" for character in "".join(found))


@pytest.mark.parametrize("character", kernels._COMMON, ids=ascii)
def test_the_common_characters_that_become_spaces_are_separators_when_normalised(character):
    assert normalise(string([character, f"a{character}B", f"{character}a{character}"])).to_list() == ["", "a b", "a"]


# Words.


@given(texts)
@example(["≈\u0338 a", "→\u0338"])  # a mark that makes one character with what separates words
@example(["ΑΣ’Α", "ΑΣ Α"])  # whether a sigma is a final one depends on what comes after it
@example(["ab", "cd", "", None, "ab", "abcd", "abc", "d"])
def test_words_are_those_of_the_normalised_text(values):
    assert_stand_for(words(string(values)), plain_words(values))


@given(texts)
def test_normalising_before_changes_no_word(values):
    once = normalise(string(values))
    assume(once.equals(normalise(once)))  # it is not for a few: 𝐓 with a mark becomes t with a mark
    assert same(words(string(values)), words(once))


@given(st.lists(st.text("abAB c\u200b\u00e9中", max_size=12), min_size=1, max_size=5))
def test_a_text_ends_where_it_ends_whatever_comes_after_it(values):
    flat, offsets = words(string(values))
    alone = [words(string([value]))[0] for value in values]
    assert [flat[a:b].tolist() for a, b in pairwise(offsets)] == [a.tolist() for a in alone]


@given(texts, st.integers(1, 60), st.integers(0, 9), st.integers(0, 9))
def test_blocks_and_slices_change_nothing(values, size, begin, end):
    series = string(values)
    whole, cut = words(series), series.slice(begin, end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_BYTES", size)
        assert same(words(series), whole)
    assert same(words(cut), words(string(cut.to_list())))


@given(st.lists(st.none() | text, max_size=12), st.integers(1, 80))
def test_slices_are_all_texts_in_order_each_of_about_the_size(values, size):
    parts = list(slices(string(values), size))
    assert [value for part in parts for value in part] == values
    assert all(len(part) == 1 or part.str.len_bytes().fill_null(0).sum() <= size for part in parts)


def test_slices_of_more_than_four_gigabytes():
    assert [len(part) for part in slices(string(["x" * (1 << 20)]).gather([0] * 5000), 1 << 30)] == [1024] * 4 + [904]


LENGTHS = [1, 7, 8, 9, 15, 16, 17, 56, 57, 63, 64, 65, 72, 73, 200]


def test_long_words_that_differ_in_one_byte_differ():
    found = []
    for length in LENGTHS:
        word = ("abcdefg0" * 25)[:length]
        found += [word] + [word[:at] + "x" + word[at + 1 :] for at in range(length)]
    found += ["é" * length for length in LENGTHS] + ["é" * (length - 1) + "è" for length in LENGTHS]
    assert len(found) == len(set(found))
    flat, offsets = words(string([" ".join(found)]))
    assert (len(set(flat.tolist())), offsets.tolist()) == (len(found), [0, len(found)])
    assert same(words(string([word.upper() for word in found])), (flat, np.arange(len(found) + 1)))


def test_a_word_of_ten_megabytes_is_one_word():
    big = "x" * 10_000_000
    assert_stand_for(words(string([big, "y", big + "x", big])), [["big"], ["y"], ["bigger"], ["big"]])


def test_the_hashes_of_words_are_the_same_on_every_machine():
    flat, _ = words(string(["a hello", "internationalisation", "x" * 64, "x" * 65]))
    short = [7520975441266452855, 11776842213488240031]
    assert flat.tolist() == [*short, 9024460347607887245, 7897005286269331795, 6327393538458620286]
    assert shingles(string(["a b c d e"]), 5)[0].tolist() == [2003332555377044311]


# Shingles.


@given(texts, st.integers(1, 13), st.sampled_from(["word", "char"]), st.integers(0, 2**64 - 1))
def test_shingles_are_those_of_plain_python(values, n, unit, key):
    units = plain_words(values) if unit == "word" else [" ".join(each) for each in plain_words(values)]
    assert_stand_for(shingles(string(values), n, unit, key), [plain_shingles(each, n) for each in units])


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=30), max_size=6), st.integers(1, 13), st.booleans())
def test_ngrams_are_those_of_plain_python(values, n, whole):
    found = ngrams(*words(string([" ".join(each) for each in values])), n, whole)
    assert_stand_for(found, [plain_shingles(each, n, whole) for each in values])


@given(texts, st.integers(1, 13), st.sampled_from(["word", "char"]), st.integers(1, 40))
def test_shingles_reach_over_the_cuts_between_blocks(values, n, unit, size):
    whole = shingles(string(values), n, unit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_BYTES", size)
        assert same(shingles(string(values), n, unit), whole)


KEYS = st.sampled_from([0x5B1F7A93C2D0E864, 0xE9C46A1705F3B82D])  # under a small key, 1, f and g change places


@given(text, st.integers(1, 5), st.sampled_from(["word", "char"]), KEYS)
def test_a_key_changes_every_hash_and_no_equality(value, n, unit, key):
    # That equality stays is in test_shingles_are_those_of_plain_python.
    plain, keyed = (shingles(string([value]), n, unit, each)[0] for each in (0, key))
    assert len(plain) == len(keyed)
    assert not set(plain.tolist()) & set(keyed.tolist())


def test_a_long_word_is_hashed_under_the_key(monkeypatch):
    """Else the eight letters that its hash spells would be equal to it under every key."""
    monkeypatch.setattr(kernels, "blake2b", lambda word, digest_size, key=b"": Digest(key or b"abcdefgh"))
    assert len(set(words(string(["abcdefgh", "x" * 65]))[0].tolist())) == 2


class Digest:
    def __init__(self, key: bytes) -> None:
        self.key = key

    def digest(self) -> bytes:
        return self.key


def test_the_order_of_words_counts_and_a_short_text_is_no_part_of_a_long_one():
    rows = ["a b c", "c b a", "a b", "a", "b", "a b c d", "a a", "a a a", ""]
    assert_stand_for(shingles(string(rows), 3), [plain_shingles(row.split(), 3) for row in rows])


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5)))
def test_distinct_values_are_ascending(values):
    assert distinct(np.array(values, np.uint64)).tolist() == sorted(set(values))


# Real text.


def real_texts(real_data: Path) -> Iterable[pl.Series]:
    yield pl.read_parquet(real_data / "orca_dpo_pairs" / "converted.parquet")["chosen"].gather_every(10)
    yield pl.read_parquet(real_data / "openhermes" / "converted_hermes_sources.parquet")["output"].gather_every(20)
    for name in ("gaokao-chinese", "logiqa-zh"):
        yield pl.read_ndjson(real_data / "benchmarks" / "agieval" / f"{name}.jsonl")["question"].head(300)


def test_words_and_shingles_of_real_texts(real_data):
    for values in real_texts(real_data):
        units = plain_words(values.to_list())
        assert sum(map(len, units)) > 4000
        assert_stand_for(words(values), units)
        assert_stand_for(shingles(values, 5), [plain_shingles(each, 5) for each in units])
