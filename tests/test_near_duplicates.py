"""Near-duplicates in whole builds: small ones of known content, and one of all real rows, checked by plain Python."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest
from canonical import chat, frame, pair

from prefmix import dedupe, mix
from prefmix.build import curate, plan
from prefmix.ledger import ALIVE
from prefmix.manifest import Curated
from prefmix.recipe import Near, Recipe
from prefmix.schema import Kind, answers, prompt_text
from prefmix.shingles import normalise

#: As in test_build.py: the files of `../shared/data` that hold rows.
REAL = {
    "intel": "orca_dpo_pairs/real_intel_rows.parquet",
    "orca": "orca_dpo_pairs/converted.parquet",
    "hh": "orca_dpo_pairs/converted_hh_harmless.parquet",
    "uf": "ultrafeedback_binarized/real_ultrafeedback_rows.parquet",
    "alpaca_eval": "ultrafeedback_binarized/converted_alpaca_eval.parquet",
    "other": "ultrafeedback_binarized/converted_other_scored.parquet",
    "hermes": "openhermes/converted_hermes_sources.parquet",
    "t0": "openhermes/converted_t0_p3.parquet",
}


def shingle_set(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + n]) for at in range(max(len(words) - n + 1, 1))} if words else set()


def jaccard(one: str, other: str) -> float:
    left, right = shingle_set(one), shingle_set(other)
    return len(left & right) / len(left | right)


def words(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).sample([a + b + c for a in "bdfgklmnp" for b in "aeiou" for c in "rstvz"], count)


def edited(text: list[str], *places: int) -> str:
    return " ".join("changed" if place in places else word for place, word in enumerate(text))


def reasons(rows: Mapping[Kind, pl.DataFrame], kind: Kind = "preference") -> list[tuple[str | None, str | None]]:
    return [(row["reason"], row["kept_id"]) for row in rows[kind].iter_rows(named=True)]


def test_the_survivor_follows_source_then_margin_then_id():
    text = words(100)
    rows = [
        pair("What?", edited(text, 3), "no", (3.0, 1.0), "b"),
        pair("What?", edited(text, 50), "no", (5.0, 1.0), "b"),
        pair("What?", edited(text, 90), "no", (2.0, 1.0), "a"),
    ]
    for order in itertools.permutations(range(3)):
        marked = dedupe.near({"preference": frame([rows[i] for i in order])}, Near(), across=False)["preference"]
        kept = marked.filter(ALIVE)
        assert kept["source"].to_list() == ["a"]
        lost = marked.filter(~ALIVE)
        assert set(lost["reason"]) == {"dedupe/near"}
        assert set(lost["kept_id"]) == set(kept["id"])
        best = rows[2]["chosen"][0]["content"]
        similar = sorted(jaccard(f"what {best}", f"what {row['chosen'][0]['content']}") for row in rows[:2])
        found = [json.loads(detail) for detail in lost["detail"]]
        assert sorted(detail["jaccard"] for detail in found) == pytest.approx(similar)
        assert {detail["cluster"] for detail in found} == set(kept["id"])


def test_a_row_is_dropped_for_a_row_that_stays_never_along_a_chain():
    text = words(120)
    first, second, third = edited(text), edited(text, 10), edited(text, 10, 60, 110)
    assert jaccard(second, third) >= 0.8 > jaccard(first, third)
    rows = [pair("What?", answer, "no", (float(9 - n), 1.0)) for n, answer in enumerate((first, second, third))]
    marked = reasons(dedupe.near({"preference": frame(rows)}, Near(), across=False))
    ids = frame(rows)["id"]
    assert marked == [(None, None), ("dedupe/near", ids[0]), (None, None)]


@pytest.mark.parametrize(
    ("on", "dropped"),
    [("prompt", {1, 4}), ("chosen", {2, 4}), ("prompt+chosen", {3, 4}), ("messages", {4})],
)
def test_what_is_compared_is_what_the_recipe_says(on, dropped):
    prompt, answer, other, third = (words(n, seed) for seed, n in enumerate((40, 60, 60, 200)))
    rows = [
        pair(edited(prompt), edited(answer), " ".join(other), (9.0, 1.0)),
        pair(edited(prompt, 3), " ".join(third), "no", (8.0, 1.0)),  # the prompt alone
        pair("Something else entirely?", edited(answer, 5), "no", (7.0, 1.0)),  # the answer alone
        pair(edited(prompt, 3), edited(answer, 5), " ".join(third), (6.0, 1.0)),  # both, but not the rejected one
        pair(edited(prompt, 3), edited(answer, 5), edited(other, 5), (5.0, 1.0)),  # all of it
    ]
    marked = reasons(dedupe.near({"preference": frame(rows)}, Near(on=on), across=False))
    found = {n for n, (reason, _) in enumerate(marked) if reason}
    assert dropped <= found
    assert found <= dropped | {3, 4}  # the third repeats prompt and answer too


def test_sft_rows_that_repeat_a_pair_go_only_when_that_is_asked_for():
    prompt, answer = words(20), words(60, 1)
    rows = {
        "preference": frame([pair(edited(prompt), edited(answer), "no", source="a")]),
        "sft": frame([chat(("user", edited(prompt)), ("assistant", edited(answer, 30)), source="b")], "sft"),
    }
    assert reasons(dedupe.near(rows, Near(), across=False), "sft") == [(None, None)]
    assert reasons(dedupe.near(rows, Near(), across=True), "sft") == [("dedupe/near", rows["preference"]["id"][0])]


def test_rows_that_are_dropped_already_are_not_compared():
    text = words(100)
    rows = frame([pair("What?", edited(text), "no", (9.0, 1.0)), pair("What?", edited(text, 7), "no", (8.0, 1.0))])
    rows = rows.with_columns(reason=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit("filter/tie")))
    assert reasons(dedupe.near({"preference": rows}, Near(), across=False)) == [("filter/tie", None), (None, None)]


def test_near_prompts_are_in_one_split_along_chains_and_in_both_subsets():
    text = words(200)
    chain = [edited(text, *range(0, 10 * n, 10)) for n in range(8)]
    assert jaccard(chain[0], chain[7]) < 0.8
    prompts = chain + [" ".join(words(60, seed)) for seed in range(1, 200)]
    rows = {
        "preference": frame([pair(prompt, "yes", "no") for prompt in prompts[::2]]),
        "sft": frame([chat(("user", prompt), ("assistant", "yes")) for prompt in prompts[1::2]], "sft"),
    }
    joined = mix.near_prompts(rows, Near())
    assert len(joined) == 7
    assert len(set(joined.values())) == 1
    splits = {}
    for kind, kept in rows.items():
        parted = mix.split(kept, kind, {"test": 0.5}, 1, joined)
        splits |= dict(zip(parted.select(prompt_text(kind)).to_series(), parted["split"], strict=True))
    assert len({splits[prompt] for prompt in chain}) == 1
    assert set(splits.values()) == {"train", "test"}


@pytest.fixture(scope="module")
def real(real_data: Path) -> Curated:
    """All real rows, near-duplicates dropped, never written."""
    sources = {name: {"path": str(real_data / path)} for name, path in REAL.items()}
    recipe = Recipe.model_validate({"name": "real", "sources": sources, "dedupe": {"near": {}, "across": True}})
    return curate(plan(recipe))


def texts_of(frame: pl.DataFrame, kind: Kind) -> pl.Series:
    compared = frame.select(pl.concat_str([prompt_text(kind), answers(kind)[0]], separator="\n"))
    return normalise(compared.to_series())


def test_every_real_row_dropped_as_a_near_duplicate_is_one_of_a_row_that_stays(real: Curated):
    stays: dict[str, str] = {}
    for kind, rows in real.rows.items():
        later = ALIVE | pl.col("reason").str.starts_with("mix/")
        kept = rows.filter(later)
        stays |= dict(zip(kept["id"], texts_of(kept, kind), strict=True))
    checked = 0
    for kind, rows in real.rows.items():
        lost = rows.filter(pl.col("reason") == "dedupe/near")
        for text, detail, kept_id in zip(texts_of(lost, kind), lost["detail"], lost["kept_id"], strict=True):
            similarity = jaccard(text, stays[kept_id])
            assert similarity >= 0.8
            assert json.loads(detail)["jaccard"] == pytest.approx(similarity, abs=1e-12)
            checked += 1
    assert checked > 10_000


def test_no_real_prompt_is_near_one_of_another_split(real: Curated):
    prompts: dict[str, set[str]] = defaultdict(set)
    for kind, kept in real.kept.items():
        for text, split in zip(normalise(kept.select(prompt_text(kind)).to_series()), kept["split"], strict=True):
            prompts[text].add(split)
    assert all(len(splits) == 1 for splits in prompts.values())
    held_out = {text: shingle_set(text) for text, splits in prompts.items() if splits == {"test"} and text}
    by_shingle = defaultdict(list)
    for text, own in held_out.items():
        for shingle in own:
            by_shingle[shingle].append(text)
    assert len(held_out) > 500
    for text, splits in prompts.items():
        if splits != {"train"}:
            continue
        own, shared = shingle_set(text), defaultdict(int)
        for shingle in own:
            for other in by_shingle.get(shingle, ()):
                shared[other] += 1
        for other, count in shared.items():
            assert count < 0.8 * (len(own) + len(held_out[other]) - count), (text, other)
