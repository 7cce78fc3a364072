from __future__ import annotations

import polars as pl
from canonical import chat, frame, pair
from hypothesis import given
from hypothesis import strategies as st

from prefmix import dedupe
from prefmix.recipe import Dedupe

word = st.sampled_from(["x", "y", "z"])
pairs = st.lists(
    st.builds(pair, word, word, word, st.tuples(st.sampled_from([None, 1.0, 2.0]), st.sampled_from([None, 0.0])), st.sampled_from(["a", "b", "c"])),
    min_size=1, max_size=12,
)  # fmt: skip


def run(rows: list[dict], **settings) -> pl.DataFrame:
    return dedupe.exact({"preference": frame(rows)}, Dedupe(**settings))["preference"]


def survivors(rows: pl.DataFrame) -> list[tuple]:
    columns = ("id", "source", "chosen_score", "rejected_score")
    return sorted(map(str, rows.filter(pl.col("reason").is_null()).select(columns).rows()))


def test_the_earlier_source_wins_then_the_higher_margin():
    rows = run(
        [
            pair("q", "x", "y", (9.0, 1.0), "b"),
            pair("q", "x", "y", (2.0, 1.0), "a"),
            pair("q", "x", "y", (5.0, 1.0), "a"),
        ]
    )
    assert rows["reason"].to_list() == ["dedupe/pair", "dedupe/pair", None]
    assert set(rows["kept_id"].drop_nulls()) == {rows["id"][2]}


def test_a_system_prompt_does_not_make_a_copy_another_row():
    rows = run([pair("q", "x", "y"), pair((("system", "Be kind."), ("user", "q")), "x", "y")])
    assert sorted(rows["reason"].to_list(), key=str) == [None, "dedupe/pair"] or rows["reason"].null_count() == 1


@given(pairs, st.randoms(), st.sampled_from(["pair", "prompt"]), st.none() | st.integers(1, 3))
def test_survivors_do_not_depend_on_the_order_of_the_rows(rows, random, exact, cap):
    shuffled = random.sample(rows, len(rows))
    assert survivors(run(rows, exact=exact, prompt_cap=cap)) == survivors(run(shuffled, exact=exact, prompt_cap=cap))


@given(pairs, st.integers(1, 3))
def test_no_copy_is_left_no_prompt_is_over_its_cap_and_every_drop_names_a_row_that_is_kept_or_was_capped(rows, cap):
    result = run(rows, exact="pair", prompt_cap=cap)
    texts = result.with_columns(
        p=pl.col("prompt").list.first().struct.field("content"),
        c=pl.col("chosen").list.first().struct.field("content"),
        r=pl.col("rejected").list.first().struct.field("content"),
    )
    alive = texts.filter(pl.col("reason").is_null())
    assert alive.select("p", "c", "r").is_duplicated().sum() == 0
    assert all(count <= cap for count in alive.group_by("p").len()["len"])
    for row in texts.filter(pl.col("reason") == "dedupe/pair").iter_rows(named=True):
        kept = texts.filter(pl.col("id") == row["kept_id"])
        assert (row["p"], row["c"], row["r"]) in kept.select("p", "c", "r").rows()
    for row in texts.filter(pl.col("reason") == "dedupe/prompt_cap").iter_rows(named=True):
        assert row["p"] in alive.filter(pl.col("id") == row["kept_id"])["p"].to_list()


def test_one_prompt_keeps_one_pair_when_asked_for():
    rows = run([pair("q", "x", "y"), pair("q", "x", "z"), pair("p", "x", "y")], exact="prompt")
    assert sorted(map(str, rows["reason"])) == ["None", "None", "dedupe/prompt"]


def test_off_keeps_every_copy():
    assert run([pair("q", "x", "y")] * 3, exact="off")["reason"].null_count() == 3


def test_an_sft_row_that_repeats_the_chosen_side_of_a_pair_goes_when_asked_for():
    pairs_, chats = frame([pair("q", "x", "y")]), frame([chat(("user", "q"), ("assistant", a)) for a in "xy"], "sft")

    def reasons(across: bool) -> list:
        done = dedupe.exact({"preference": pairs_, "sft": chats}, Dedupe(across=across))
        assert done["preference"]["reason"].null_count() == 1
        rows = done["sft"]
        assert rows["kept_id"][0] == (pairs_["id"][0] if across else None)
        return rows["reason"].to_list()

    assert reasons(across=False) == [None, None]
    assert reasons(across=True) == ["dedupe/pair", None]


def test_dropped_rows_take_no_part():
    rows = frame([pair("q", "x", "y"), pair("q", "x", "y")])
    rows = rows.with_columns(reason=pl.Series(["filter/tie", None]))
    done = dedupe.exact({"preference": rows}, Dedupe())["preference"]
    assert done["reason"].to_list() == ["filter/tie", None]
