"""Texts of benchmarks in other texts, against the rules of `overlap` written down once more in plain Python."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix import overlap
from prefmix.overlap import CHOICE, Index
from prefmix.shingles import slices


class Item(NamedTuple):
    text: str
    item: str = "0"
    field: str = "question"
    benchmark: str = "quiz"


class Hit(NamedTuple):
    row: int
    benchmark: str
    item: str
    field: str
    rule: str
    coverage: float
    matched: str


def index(items: Sequence[Item], ngram: int = 13) -> Index:
    columns = ("benchmark", "item", "field", "text")
    rows = [tuple(getattr(each, name) for name in columns) for each in items]
    return Index(pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row"), ngram)


def hits(of: Index, rows: Sequence[str | None]) -> list[Hit]:
    """What a search finds, in an order of its own."""
    found = of.search(pl.Series(rows, dtype=pl.String))
    named = found.hstack(of.evidence(found))
    return sorted(Hit(*row) for row in named.select(Hit._fields).rows())


def rules(items: Sequence[Item], row: str, ngram: int = 13) -> list[str]:
    return [hit.rule for hit in hits(index(items, ngram), [row])]


# The rules, in plain Python

UNSPACED = ("CJK UNIFIED", "HIRAGANA LETTER", "KATAKANA LETTER", "THAI CHARACTER")


def words_of(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", "".join(c for c in text if unicodedata.category(c) != "Cf")).lower()
    spaced = "".join(f" {c} " if unicodedata.name(c, "").startswith(UNSPACED) else c for c in plain)
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in spaced).split()


def sentences_of(text: str) -> list[list[str]]:
    return [found for part in re.split('[.!?:;()"“”«»\n。！？：；（）「」『』।؟؛۔]', text) if (found := words_of(part))]


def grams_of(found: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


def longest_run(starts: list[int]) -> tuple[int, int]:
    """(first start, number of starts) of the longest run of starts that follow one another, the earliest of several."""
    runs: list[list[int]] = []
    for start in sorted(starts):
        if runs and runs[-1][-1] == start - 1:
            runs[-1].append(start)
        else:
            runs.append([start])
    best = max(runs, key=len)
    return best[0], len(best)


def expected(items: Sequence[Item], rows: Sequence[str | None], ngram: int) -> list[Hit]:
    owners: dict[tuple[str, tuple[str, ...]], list[Item]] = {}
    for each in items:
        if found := words_of(each.text):
            owners.setdefault((each.benchmark, tuple(found)), []).append(each)
    shingle = min(5, ngram)
    texts_with: dict[tuple[str, ...], int] = {}
    for _, text in owners:
        if len(text) >= ngram:
            for gram in {
                *grams_of(list(text), ngram),
                ("shingle",),
                *(("5", *g) for g in grams_of(list(text), shingle)),
            }:
                texts_with[gram] = texts_with.get(gram, 0) + 1

    def is_whole(text: list[str], own: list[Item], row: str) -> bool:
        names = {each.item for each in own}
        if len(text) >= 8:
            return len(names) <= 10 and text in map(list, grams_of(words_of(row), len(text)))
        is_question = any(not re.search(CHOICE, each.field) for each in own)
        if len(text) < 5 or not is_question or len(names) > 1:
            return False
        parts = sentences_of(row)
        return any(
            text == [word for part in parts[start:end] for word in part]
            for start in range(len(parts))
            for end in range(start + 1, len(parts) + 1)
        )

    def evidence(text: list[str], own: list[Item], row: str) -> list[tuple[str, float, int, int]]:
        """(rule, coverage, first word, words) of everything that is found."""
        if len(text) < ngram:
            return [("whole", 1.0, 0, len(text))] if is_whole(text, own, row) else []
        found = []

        def covered(starts: list[int]) -> float:
            return len({start + nth for start in starts for nth in range(ngram)}) / len(text)

        grams, there = grams_of(text, ngram), set(grams_of(words_of(row), ngram))
        starts = [start for start, gram in enumerate(grams) if gram in there and texts_with[gram] <= 512]
        rare = [start for start in starts if texts_with[grams[start]] <= 10]
        if covered(starts) >= 0.8 or covered(rare) >= 1 / 3:
            first, length = longest_run(starts)
            found.append(("ngram", covered(starts), first, length + ngram - 1))
        members, there = set(grams_of(text, shingle)), set(grams_of(words_of(row), shingle))
        rarer = {gram for gram in members if texts_with["5", *gram] <= 10}
        enough = len(members & there) / max(len(members), ngram - shingle + 1) >= 0.6
        if enough and rarer and len(rarer & there) / len(rarer) >= 1 / 3:
            found.append(("containment", len(members & there) / len(members), 0, len(text)))
        return found

    return sorted(
        Hit(number, benchmark, own[0].item, own[0].field, rule, coverage, " ".join(text[first:][: min(length, 40)]))
        for number, row in enumerate(rows)
        for (benchmark, text), own in owners.items()
        for rule, coverage, first, length in evidence(list(text), own, row or "")
    )


# Generated benchmarks and rows

WORDS = ["a", "B", "Über", "ÜBER", "d'e", "日本", "e\u0301", "é", "7", "so\u200bft", "Ｗ"]
JOINTS = [" ", " ", " ", ", ", ". ", "? ", "\n", "。", ' "', " — "]

Corpus = tuple[list[Item], list[str | None], int]


def corpus(seed: int) -> Corpus:
    """Items, rows of their pieces, and the length of the n-grams: matches and near misses are as frequent."""
    chance = random.Random(seed)
    ngram = chance.choice([3, 8, 13])
    vocabulary = [
        *chance.sample(WORDS, chance.choice([1, 2, 11])),
        *(f"w{n}" for n in range(chance.choice([0, 9, 99]))),
    ]

    def some(words: int) -> list[str]:
        return chance.choices(vocabulary, k=words)

    def written(words: list[str]) -> str:
        text = "".join(word + chance.choice(JOINTS[: chance.choice([1, 1, 4, 10])]) for word in words)
        return text.strip(" ") if chance.random() < 0.7 else text.upper()

    items, spoken = [], []
    for group in range(chance.randint(0, 8)):
        opening = some(chance.choice([0, 3, 5, 6, 8, 11, ngram - 1, ngram, ngram + 3, 2 * ngram, 3 * ngram + 1]))
        for nth in range(chance.choice([1, 1, 1, 2, 9, 10, 11, 12])):
            spoken.append([*opening, *some(chance.choice([0, 0, 1, 2, 4, 7]))])
            name = chance.choice([f"{group}.{nth}", f"{group}.{nth}", "same"])
            field, benchmark = (
                chance.choice(["question", "choices[1]", "option2"]),
                chance.choice(["quiz", "quiz", "exam"]),
            )
            items.append(Item(written(spoken[-1]), name, field, benchmark))
    rows: list[str | None] = [None, " ?"]
    for _ in range(20 if items else 1):
        pieces = []
        for _ in range(chance.randint(1, 3)):
            piece = list(chance.choice(spoken)) if items else some(ngram)
            piece = piece[chance.choice([0, 0, 0, 1, 3]) : len(piece) - chance.choice([0, 0, 0, 1, 5])]
            if piece and chance.random() < 0.3:
                piece[chance.randrange(len(piece))] = chance.choice(vocabulary)
            pieces += [" ".join(some(chance.choice([0, 0, 2]))), written(piece)]
        rows.append(chance.choice(JOINTS).join(pieces))
    return items, rows, ngram


corpora = st.integers(0, 2**32).map(corpus)


@settings(max_examples=100)
@given(corpora)
def test_what_is_found_is_what_the_rules_say(made: Corpus) -> None:
    items, rows, ngram = made
    assert hits(index(items, ngram), rows) == expected(items, rows, ngram)


@settings(max_examples=20)
@given(corpora, st.randoms(use_true_random=False))
def test_what_is_found_in_a_row_has_nothing_to_do_with_the_other_rows_or_their_order(
    made: Corpus, shuffle: random.Random
) -> None:
    items, rows, ngram = made
    of = index(items, ngram)
    together = hits(of, rows)
    assert sorted(hit._replace(row=n) for n, row in enumerate(rows) for hit in hits(of, [row])) == together
    places = shuffle.sample(range(len(rows)), len(rows))
    assert sorted(h._replace(row=places[h.row]) for h in hits(of, [rows[place] for place in places])) == together


@settings(max_examples=20)
@given(corpora, st.randoms(use_true_random=False))
def test_the_order_of_the_items_decides_only_which_of_equal_texts_is_named(
    made: Corpus, shuffle: random.Random
) -> None:
    items, rows, ngram = made
    shuffled = shuffle.sample(items, len(items))

    def nameless(found: list[Hit]) -> list[Hit]:
        return sorted(hit._replace(item="", field="") for hit in found)

    assert nameless(hits(index(items, ngram), rows)) == nameless(hits(index(shuffled, ngram), rows))


def test_slices_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item(numbered(30, f"t{n}w"), str(n)) for n in range(40)] + [
        Item(f"Is {n} as it is told to us here?", f"s{n}") for n in range(40)
    ]
    rows = [f"Now {items[n % 80].text} {numbered(n % 7)}" if n % 3 else None for n in range(300)]
    of = index(items)
    found = of.search(pl.Series(rows))
    assert found["row"].n_unique() == 200
    for size in (1, 1000):
        monkeypatch.setattr(overlap, "slices", partial(slices, size=size))
        for threads in (1, 5):
            monkeypatch.setattr(pl, "thread_pool_size", lambda threads=threads: threads)
            again = of.search(pl.Series(rows))
            assert again.sort(again.columns).equals(found.sort(found.columns))


# The rules at their edges


def numbered(count: int, name: str = "n") -> str:
    """So many different words."""
    return " ".join(f"{name}{number}" for number in range(count))


@pytest.mark.parametrize(("words", "found"), [(39, ["ngram"]), (40, [])])
def test_thirteen_words_in_a_row_are_evidence_when_they_are_a_third_of_the_text(words: int, found: list[str]) -> None:
    assert rules([Item(numbered(words))], f"See {numbered(13)} and no more") == found


def test_two_runs_of_words_cover_a_text_together() -> None:
    text = numbered(60).split()
    row = " ".join([*text[5:18], "but", *text[40:53]])
    (hit,) = hits(index([Item(" ".join(text))]), [row])
    assert (hit.rule, hit.coverage, hit.matched) == ("ngram", 26 / 60, " ".join(text[5:18]))
    assert rules([Item(" ".join(text))], " ".join(text[5:18])) == []


def test_runs_that_overlap_cover_their_words_once_and_the_longest_is_the_evidence() -> None:
    text = numbered(50).split()
    row = " ".join([*text[25:38], "but", *text[20:35], "and", *text[0:14]])
    (hit,) = hits(index([Item(" ".join(text))]), [row])
    assert (hit.coverage, hit.matched) == ((18 + 14) / 50, " ".join(text[20:35]))


def test_no_more_than_forty_words_are_shown() -> None:
    assert {hit.matched for hit in hits(index([Item(numbered(90))]), [numbered(90)])} == {numbered(40)}


@pytest.mark.parametrize(("words", "found"), [(12, []), (13, ["containment", "ngram"])])
def test_twelve_words_in_a_row_of_a_text_of_twenty_are_none_of_its_runs(words: int, found: list[str]) -> None:
    assert rules([Item(numbered(19))], numbered(words)) == found


def test_a_text_that_goes_on_in_the_next_row_is_in_neither() -> None:
    text = numbered(36).split()
    assert hits(index([Item(" ".join(text))]), [" ".join(text[start : start + 12]) for start in (0, 12, 24)]) == []


@pytest.mark.parametrize(("words", "found"), [(9, []), (10, ["containment"])])
def test_six_tenths_of_the_shingles_are_contained(words: int, found: list[str]) -> None:
    """14 words have 10 shingles of five; so many of the words in a row have 5 or 6 of them."""
    assert rules([Item(numbered(14))], f"so {numbered(words)} then") == found


def test_shingles_are_contained_in_whatever_order_and_however_often() -> None:
    text = numbered(60).split()
    blocks = [text[start : start + 12] for start in range(0, 60, 12)]
    assert rules([Item(" ".join(text))], " or ".join(" ".join(block) for block in reversed(blocks))) == ["containment"]
    assert rules([Item(" ".join(text))], " or ".join(" ".join(block) for block in blocks[:2] * 9)) == []


def test_one_word_changed_in_the_middle_of_a_text_is_found_by_what_it_contains() -> None:
    text = [
        "Natalia",
        "sold",
        "clips",
        "to",
        "48",
        "of",
        "her",
        "friends",
        "in",
        "April",
        "and",
        "then",
        "half",
        "as",
        "many",
        "in",
        "May",
    ]
    assert rules([Item(" ".join(text))], " ".join(text).replace("48", "52")) == ["containment"]


def test_a_text_that_repeats_few_words_is_not_contained_in_a_few_words() -> None:
    assert rules([Item("ha " * 13)], "ha " * 12) == []
    assert rules([Item("ha " * 13)], "ha " * 13) == ["ngram"]
    other = numbered(20)
    assert [hit.item for hit in hits(index([Item("ha " * 13), Item(other, "1")]), [f"{other} {'ha ' * 12}"])] == [
        "1",
        "1",
    ]


WHOLE = {  # by the number of words: the text itself as a sentence, inside a sentence, as two sentences, as a part of two
    4: ([], [], [], []),
    5: (["whole"], [], ["whole"], []),
    7: (["whole"], [], ["whole"], []),
    8: (["whole"], ["whole"], ["whole"], ["whole"]),
    12: (["whole"], ["whole"], ["whole"], ["whole"]),
}


@pytest.mark.parametrize("words", WHOLE)
def test_short_texts_are_found_as_a_whole_and_the_shortest_as_sentences_only(words: int) -> None:
    text = numbered(words)
    head, tail = numbered(2), " ".join(text.split()[2:])
    rows = (
        f"Read this. {text.capitalize()}? Say why.",
        f"Read this: tell us {text}, or not.",
        f"Read this. {head}! {tail}.",
        f"Read this {head}. {tail}, or not.",
    )
    for row, found in zip(rows, WHOLE[words], strict=True):
        assert rules([Item(text)], row) == found, row
        assert rules([Item(text)], row.replace(f"n{words - 1}", "other")) == []


@pytest.mark.parametrize(
    "row",
    [
        "Where is Lake Titicaca found",
        "Q: Where is Lake Titicaca found?\nA:",
        "Say it (where is Lake Titicaca found) in Spanish",
        "He asked, “Where is Lake Titicaca found”, and left",
        "where is LAKE Titicaca -- found !?",
        "Where is Lake Titicaca found? Where is it?",
    ],
)
def test_what_makes_a_sentence(row: str) -> None:
    assert rules([Item("Where is Lake Titicaca found?")], row) == ["whole"]


def test_a_sentence_is_found_behind_the_same_words_inside_another() -> None:
    question = "Where is Lake Titicaca found?"
    assert rules([Item(question)], f"Ask where is Lake Titicaca found now. {question}") == ["whole"]
    assert rules([Item(question)], "Where is Lake. Titicaca found? Where is. Lake Titicaca found") == ["whole"]
    assert rules([Item(question)], "Where is Lake Titicaca. Found where? Is Lake Titicaca found?") == []


def test_short_texts_are_found_however_many_begin_alike() -> None:
    items = [Item(f"Which of the following is {n} times seven?", str(n)) for n in range(700)]
    items += [Item(f"Which of the following is {n}?", f"x{n}") for n in range(700)]
    of = index(items)
    rows = [f"Well. {items[699].text} Really", items[1399].text, " ".join(item.text for item in items)]
    found = hits(of, rows)
    assert [(hit.row, hit.item) for hit in found][:2] == [(0, "699"), (1, "x699")]
    assert Counter(hit.row for hit in found) == {0: 1, 1: 1, 2: 1400}


def test_a_short_question_of_two_items_is_nobody_s() -> None:
    capital, row = "What is the capital of Peru?", "Tell me: What is the capital of Peru?"
    assert rules([Item(capital, "0")], row) == ["whole"]
    assert rules([Item(capital, "0"), Item(capital.upper(), "1")], row) == []
    assert rules([Item(capital, "0"), Item(capital, "0", "goal")], row) == ["whole"]
    apart = [Item(capital, "0"), Item(capital, "1", benchmark="exam")]
    assert [hit.benchmark for hit in hits(index(apart), [row])] == ["exam", "quiz"]


@pytest.mark.parametrize(("words", "found"), [(7, []), (8, ["whole"])])
def test_a_choice_of_fewer_than_eight_words_is_never_found_alone(words: int, found: list[str]) -> None:
    text = numbered(words)
    assert rules([Item(text, field="choices[2]")], text) == found
    assert rules([Item(text, field="choices[2]"), Item(text)], text) == ["whole"]


@pytest.mark.parametrize(("items", "found"), [(10, ["whole"]), (11, [])])
def test_a_short_text_of_more_than_ten_items_belongs_to_none(items: int, found: list[str]) -> None:
    every = [Item(numbered(9), str(number), "choices[3]") for number in range(items)]
    assert rules(every, numbered(9)) == found


def with_boilerplate(texts: int, common: int, own: int) -> list[Item]:
    """Items that begin with the same words, so many, and go on with others."""
    return [Item(f"{numbered(common)} {numbered(own, f'own{n}x')}", str(n)) for n in range(texts)]


@pytest.mark.parametrize(("texts", "found"), [(10, 10), (11, 0)])
def test_words_that_more_than_ten_texts_share_are_no_evidence(texts: int, found: int) -> None:
    items = with_boilerplate(texts, 25, 25)
    assert len(hits(index(items), [f"{numbered(25)} and something else"])) == found
    assert {(hit.item, hit.rule) for hit in hits(index(items), [items[7].text])} >= {
        ("7", "ngram"),
        ("7", "containment"),
    }


def test_boilerplate_and_the_first_words_of_an_item_are_no_evidence_for_it() -> None:
    """Runs that reach from the boilerplate into the item are rare, but they are not a third of it."""
    items = with_boilerplate(11, 40, 20)
    begun = " ".join(items[3].text.split()[:42])
    assert hits(index(items), [begun]) == []
    assert {hit.item for hit in hits(index(items), [items[3].text])} == {"3"}


@pytest.mark.parametrize(("common", "found"), [(84, {"ngram"}), (83, set())])
def test_boilerplate_that_is_four_fifths_of_a_text_counts(common: int, found: set[str]) -> None:
    assert {hit.rule for hit in hits(index(with_boilerplate(11, common, 21)), [numbered(common)])} == found


def test_a_run_that_one_text_repeats_is_a_run_of_one_text() -> None:
    chorus = f"{numbered(14)} " * 20
    assert rules([Item(chorus)], numbered(14) + " " + numbered(14)) == ["containment", "ngram"]


def test_a_verbatim_copy_is_found_where_hundreds_of_texts_share_their_words() -> None:
    items = with_boilerplate(600, 30, 8)
    of = index(items)
    assert hits(of, [numbered(30)]) == []
    assert [(hit.item, hit.rule) for hit in hits(of, [items[77].text])] == [("77", "containment"), ("77", "ngram")]
    mostly = with_boilerplate(600, 90, 5)
    assert [(hit.item, hit.rule) for hit in hits(index(mostly), [mostly[77].text])] == [("77", "containment")]


# Texts of all sorts


@pytest.mark.parametrize("words", range(16))
def test_any_number_of_words_may_be_the_same(words: int) -> None:
    found = {hit.rule for hit in hits(index([Item(numbered(16))]), [f"{numbered(words)} and", None])}
    assert found == {*(["containment"] if words >= 12 else []), *(["ngram"] if words >= 13 else [])}


LONG, SHORT = Item(numbered(20), "long"), Item(numbered(9, "s"), "short")


@pytest.mark.parametrize("items", [[], [LONG], [SHORT], [Item("?! …"), Item("", "1")], [Item("a b")]])
def test_a_benchmark_may_lack_long_texts_short_texts_or_all(items: list[Item]) -> None:
    rows = [LONG.text, None, "", SHORT.text, " \n", "?", "one"]
    named = [(hit.row, hit.item) for hit in hits(index(items), rows) if hit.rule != "containment"]
    assert named == [(rows.index(item.text), item.item) for item in items if item in (LONG, SHORT)]
    assert hits(index(items), []) == hits(index(items), [None, None]) == hits(index(items), ["", ""]) == []


def test_a_text_is_named_after_the_first_item_that_has_it_in_each_benchmark() -> None:
    items = [Item(LONG.text, "3", "passage"), Item(LONG.text.upper(), "4"), Item(LONG.text, "9", benchmark="exam")]
    of = index(items)
    found = hits(of, [f"{LONG.text}. {LONG.text}!"] * 2)
    assert {(hit.row, hit.benchmark, hit.item, hit.field) for hit in found} == {
        (row, *owner) for row in (0, 1) for owner in (("quiz", "3", "passage"), ("exam", "9", "question"))
    }
    assert of.texts["items"].to_list() == [2, 1]


@pytest.mark.parametrize(
    "row",
    [
        "Ｗｈｏ wrote “Don Quixote”, THE NOVEL, in the year 1605 — and where did he live?",
        "who\u200b wrote\n\nDon  Quixote; the no\u00advel - in the year １６０５, and where did he live",
        "**Who** wrote _Don Quixote_ (the novel) in the year ①605 and where did he live",
        "Answer: who wrote don quixote the novel in the year 1605 and where did he live Cervantes",
    ],
)
def test_case_punctuation_and_the_forms_of_characters_do_not_matter(row: str) -> None:
    item = Item("Who wrote Don Quixote, the novel, in the year 1605, and where did he live?")
    assert rules([item], row) == ["containment", "ngram"]


def test_accents_and_digits_do() -> None:
    item = Item("Où est né le père de René ?")
    assert rules([item], "Ou\u0300 EST NE\u0301 le pe\u0300re de Rene\u0301 !") == ["whole"]
    assert rules([item], "Ou est ne le pere de Rene ?") == []


def test_chinese_letters_are_words_and_chinese_points_end_sentences() -> None:
    short, long = Item("谁写了红楼梦？", "short"), Item("小明有五个苹果，他又买了三个，一共有几个？", "long")
    of = index([short, long])
    rows = [
        "请回答。谁写了红楼梦？谢谢。",
        "他问：「谁写了红楼梦」",
        "你知道谁写了红楼梦吗",
        f"问题：{long.text}",
        "小明有五个苹果",
    ]
    assert [(hit.row, hit.item, hit.rule) for hit in hits(of, rows)] == [
        (0, "short", "whole"),
        (1, "short", "whole"),
        (3, "long", "containment"),
        (3, "long", "ngram"),
    ]


@pytest.mark.parametrize("ngram", [1, 2, 3, 4, 5, 6, 8, 30])
def test_any_length_of_n_grams_finds_a_copy_and_not_another_text(ngram: int) -> None:
    items = [Item(numbered(12, "x"), "short"), Item(numbered(30, "y"), "long")]
    of = index(items, ngram)
    rows = [f"Now {item.text} and so on" for item in items]
    assert {(hit.row, hit.item) for hit in hits(of, [*rows, numbered(40, "z")])} == {(0, "short"), (1, "long")}


def test_a_text_that_repeats_one_word_is_searched_in_time() -> None:
    of = index([Item("la " * 2000), Item("la " * 1500 + "end", "1")])
    assert {hit.item for hit in hits(of, ["la " * 30_000])} == {"0", "1"}


# The real benchmarks


def test_every_text_of_eight_words_or_more_is_found_in_itself(real_data: Any) -> None:
    questions = pl.read_parquet(real_data / "benchmarks" / "mmlu" / "test.parquet")["question"]
    of = index([Item(text, str(number)) for number, text in enumerate(questions)])
    found = of.search(of.texts["text"])
    own = found.filter(pl.col("row") == pl.col("text"))
    never = of.texts.with_row_index("row").join(own.cast({"row": pl.UInt32}), on="row", how="anti")
    words = never["text"].str.count_matches(" ") + 1
    assert never.filter(words >= 8).is_empty()
    assert never.filter((words >= 5) & (words < 8))["items"].min() == 2
    assert never.height < 0.1 * of.texts.height


@pytest.mark.parametrize(
    ("field", "choice"),
    [("question", False), ("Question", False), ("question_stem", False), ("turns[0]", True), ("choices[2]", True),
     ("choices.text[1]", True), ("option1", True), ("sol2", True), ("Best Answer", True), ("correct_answer", True),
     ("solution", False), ("goal", False), ("optional", False)],
)  # fmt: skip
def test_what_a_choice_is_called(field: str, choice: bool) -> None:
    assert bool(re.search(CHOICE, field)) is choice
    question = "Where is Lake Titicaca found?"
    assert rules([Item(question, field=field)], f"So tell me. {question}") == ([] if choice else ["whole"])
