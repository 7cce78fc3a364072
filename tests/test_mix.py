from __future__ import annotations

import polars as pl
import pytest
from canonical import chat, frame, pair
from hypothesis import given
from hypothesis import strategies as st

from prefmix import mix
from prefmix.errors import BuildError
from prefmix.recipe import Mix, Source
from prefmix.shingles import normalise

NUMBERS = st.integers(0, 40)


def rows(**counts: int) -> pl.DataFrame:
    return frame(
        [pair(f"{source}{n}", "yes", "no", source=source) for source, count in counts.items() for n in range(count)]
    )


def sources(**settings: dict) -> dict[str, Source]:
    return {name: Source(path="x", **settings.get(name, {})) for name in "abc"}


def sampled(frame_: pl.DataFrame, mix_: Mix | None = None, seed: int = 1, **settings: dict) -> pl.DataFrame:
    return mix.sample(frame_, "preference", sources(**settings), mix_ or Mix(), seed)


def taken(result: pl.DataFrame) -> dict[str, int]:
    return dict(result.filter(pl.col("copies") > 0).select("id", "copies").rows())


def by_source(result: pl.DataFrame) -> dict[str, int]:
    return dict(result.group_by(pl.col("source").cast(pl.String)).agg(pl.col("copies").sum()).rows())


@given(NUMBERS, NUMBERS, st.integers(0, 5))
def test_a_larger_take_is_a_superset_of_a_smaller_one(one, other, seed):
    few, many = sorted((one, other))
    smaller = taken(sampled(rows(a=30, b=5), seed=seed, a={"take": few}))
    larger = taken(sampled(rows(a=30, b=5), seed=seed, a={"take": many}))
    assert smaller.keys() <= larger.keys()
    assert len(smaller) == min(few, 30) + 5


def test_adding_a_source_or_shuffling_moves_no_row():
    alone = taken(sampled(rows(a=30), a={"take": 10}))
    beside = taken(sampled(rows(a=30, b=30), a={"take": 10}))
    shuffled = taken(sampled(rows(a=30).sample(fraction=1, shuffle=True, seed=3), a={"take": 10}))
    assert alone.keys() <= beside.keys()
    assert alone == shuffled


def test_a_fraction_takes_that_share_of_the_rows_that_are_alive_and_another_seed_takes_others():
    half = rows(a=40).with_columns(reason=pl.when(pl.int_range(pl.len()) < 20).then(pl.lit("filter/tie")))
    first = sampled(half, a={"take": 0.5})
    assert by_source(first.filter(pl.col("reason").is_null())) == {"a": 10}
    assert first["reason"].value_counts().sort("reason").rows() == [
        (None, 10),
        ("filter/tie", 20),
        ("mix/not_sampled", 10),
    ]
    assert taken(first) != taken(sampled(half, seed=2, a={"take": 0.5}))


def test_shares_are_as_large_as_the_scarcest_source_allows():
    assert by_source(sampled(rows(a=10, b=100), Mix(preference={"a": 1, "b": 5}))) == {"a": 10, "b": 50}
    assert by_source(sampled(rows(a=10, b=20), Mix(preference={"a": 1, "b": 5}))) == {"a": 4, "b": 20}
    assert by_source(sampled(rows(a=10, b=20), Mix(preference={"a": 1, "b": 0}))) == {"a": 10, "b": 0}


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 9))
def test_a_number_of_rows_is_met_exactly(total, share_a, share_b):
    result = sampled(rows(a=60, b=60), Mix(preference={"a": share_a, "b": share_b}, preference_rows=total))
    assert sum(by_source(result).values()) == total


def test_repeating_is_even_and_needs_to_be_allowed():
    shares = {"preference": {"a": 1, "b": 1}, "preference_rows": 20}
    with pytest.raises(BuildError, match=r"a has 4 rows, the mix needs 10.*allow_repeat"):
        sampled(rows(a=4, b=10), Mix(**shares))
    result = sampled(rows(a=4, b=10), Mix(**shares, allow_repeat=True))
    assert by_source(result) == {"a": 10, "b": 10}
    assert sorted(result.filter(pl.col("source") == "a")["copies"]) == [2, 2, 3, 3]
    assert by_source(sampled(rows(a=4), a={"repeat": 3, "take": 2})) == {"a": 6}


def test_shares_that_name_an_empty_source_or_leave_one_out_are_errors():
    with pytest.raises(BuildError, match="no row of b is left"):
        sampled(rows(a=4), Mix(preference={"a": 1, "b": 1}))
    with pytest.raises(BuildError, match="gives no share to b"):
        sampled(rows(a=4, b=4), Mix(preference={"a": 1}))


def split_of(frame_: pl.DataFrame, kind="preference", splits=None, seed=1) -> dict[str, str]:
    kept = frame_.with_columns(copies=pl.lit(1))
    return dict(mix.split(kept, kind, splits or {"test": 0.3}, seed, {}).select("id", "split").rows())


def test_rows_with_the_same_normalised_prompt_are_in_the_same_split_in_both_subsets():
    prompts = [f"What is the number {n}?" for n in range(200)]
    pairs = split_of(frame([pair(p, "x", "y") for p in prompts]))
    shouted = split_of(frame([pair(p.upper().replace("?", " ?!"), "z", "y") for p in prompts]))
    chats = split_of(frame([chat(("system", "s"), ("user", p), ("assistant", "x")) for p in prompts], "sft"), "sft")
    assert list(pairs.values()) == list(shouted.values()) == list(chats.values())
    assert 30 < list(pairs.values()).count("test") < 90


texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.text("aZ09 .,!-_\n\té’“…€\u00a0\u200b", max_size=30),
    max_size=8,
)


@given(texts)
def test_prompts_are_a_cluster_when_their_words_are_the_same(values):
    words = normalise(pl.Series(values, dtype=pl.String)).to_list()

    def partition(clusters: list) -> list[int]:
        return [clusters.index(cluster) for cluster in clusters]

    keys = [key or f" {text}" for key, text in zip(words, values, strict=True)]
    assert partition(mix.clusters_of(pl.Series(values, dtype=pl.String)).tolist()) == partition(keys)


def test_case_punctuation_spacing_and_compatibility_forms_do_not_make_another_cluster():
    same = ["Hello,  World!", "hello world", "ＨＥＬＬＯ world", "hello\u200b world…"]
    assert len(set(mix.clusters_of(pl.Series(same)))) == 1
    assert len(set(mix.clusters_of(pl.Series(["नमस्ते", "नमसत", "नमस्ते दुनिया"])))) == 3


def test_prompts_without_a_letter_are_not_one_cluster():
    splits = split_of(frame([pair("?" * n, "x", "y") for n in range(1, 60)]))
    assert set(splits.values()) == {"train", "test"}


def test_splits_partition_the_rows_and_a_split_of_zero_is_empty():
    rows_ = frame([pair(f"prompt {n}", "x", "y") for n in range(400)])
    three = split_of(rows_, splits={"test": 0.25, "validation": 0.25})
    assert set(three.values()) == {"train", "test", "validation"}
    assert set(split_of(rows_, splits={"test": 0.0}).values()) == {"train"}
    only_test = split_of(rows_, splits={"test": 0.25})
    assert {i for i, s in only_test.items() if s == "test"} == {i for i, s in three.items() if s == "test"}


def test_draws_are_uniform_and_the_same_on_every_machine():
    keys = pl.Series([f"{n:032x}" for n in range(3)])
    assert mix.draws(keys, 42, 0).to_list() == mix.draws(keys, 42, 0).to_list()
    ids = frame([pair(str(n), "x", "y") for n in range(4000)])["id"]
    points = mix.draws(ids, 42, 0).cast(pl.Float64) / 2.0**64
    counts = [((points >= n / 10) & (points < (n + 1) / 10)).sum() for n in range(10)]
    assert sum((count - 400) ** 2 / 400 for count in counts) < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert mix.draws(ids, 42, 0).to_list() != mix.draws(ids, 42, 1).to_list()


def test_every_copy_has_its_own_place():
    rows_ = frame([pair(str(n), "x", "y") for n in range(50)]).with_columns(copies=pl.lit(2, pl.Int32))
    order = mix.ordered(rows_, "preference", 1)["id"].to_list()
    assert sorted(order) == sorted(rows_["id"].to_list() * 2)
    assert order == mix.ordered(rows_.reverse(), "preference", 1)["id"].to_list()
    assert any(order[n] != order[n + 1] for n in range(0, 100, 2))
