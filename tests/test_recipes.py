"""The recipes that come with prefmix: each loads, the quickstart drops just its planted defects, the reference recipes
build over a Hub that has their data sets (a stand-in on a loopback port, with a few rows of the right schemas)."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest
from hub.loopback import LoopbackHub
from tokenizers import Tokenizer, models, pre_tokenizers

from prefmix.build import curate, plan
from prefmix.manifest import Curated
from prefmix.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
#: What the audit calls the defects that are reported and not dropped.
REPORTED = {
    "report/disclaimer": "filter/disclaimer",
    "report/placeholder": "filter/placeholder",
    "report/cut_off": "filter/cut_off",
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_is_found_by_its_name(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert shipped_recipes()[path.stem].read_bytes() == path.read_bytes()


def test_the_recipes_page_names_every_shipped_recipe() -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in page for path in RECIPES)


@pytest.fixture(scope="module")
def quickstart() -> Curated:
    return curate(plan(load_recipe(QUICKSTART)))


@pytest.fixture(scope="module")
def planted() -> list[dict[str, object]]:
    return json.loads((ROOT / "recipes" / "quickstart" / "defects.json").read_text(encoding="utf-8"))


def test_the_quickstart_drops_its_planted_defects_and_nothing_else(
    quickstart: Curated, planted: list[dict[str, object]]
) -> None:
    dropped = {
        (Path(file).name, row): reason
        for frame in quickstart.rows.values()
        for file, row, reason in frame.filter(pl.col("reason").is_not_null())
        .select("source_file", "source_row", "reason")
        .rows()
    }
    expected = {
        (each["file"], each["row"]): each["expected"]
        for each in planted
        if not str(each["expected"]).startswith("report/")
    }
    assert dropped == expected


def test_the_quickstart_reports_its_other_planted_defects(
    quickstart: Curated, planted: list[dict[str, object]]
) -> None:
    stem = {name: Path(str(source.spec.path)).name for name, source in quickstart.plan.sources.items()}
    for source, entry in quickstart.audit.items():
        own = [str(each["expected"]) for each in planted if each["file"] == stem[source]]
        counts = {literal: own.count(name) for name, literal in REPORTED.items() if name in own}
        assert entry["reported"] == counts, source
    repeated = [each for each in planted if each["expected"] == "report/duplicate_prompt"]
    assert {(each["file"], each["row"]) for each in repeated} <= repeated_prompts(quickstart)


def repeated_prompts(curated: Curated) -> set[tuple[str, int]]:
    """File and row of the kept pairs whose prompt another kept pair has, as the audit counts them."""
    from prefmix.schema import prompt_text

    rows = curated.kept["preference"].with_columns(prompt=prompt_text("preference"))
    again = rows.filter(pl.len().over("prompt") > 1)
    counted = sum(entry["repeated_prompts"] for entry in curated.audit.values())
    elsewhere = sum(entry["prompts_in_other_sources"] for entry in curated.audit.values())
    assert counted <= again.height <= counted + elsewhere
    return {(Path(file).name, row) for file, row in again.select("source_file", "source_row").rows()}


def test_the_recipes_page_has_the_numbers_of_the_quickstart(quickstart: Curated) -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    read, kept = quickstart.funnel()[0]["out"], quickstart.funnel()[-1]["out"]
    assert f"{read - kept} rows are dropped and {kept} are kept" in page
    for stage in quickstart.funnel():
        for reason, count in stage["dropped"].items():
            assert f"| `{reason}` | {count} |" in page


def parquet(rows: Mapping[str, list[object]]) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer)
    return buffer.getvalue()


def word_tokenizer() -> bytes:
    """A tokenizer.json that knows a few words; it has no ChatML tokens, so that they are added."""
    words = ["<unk>", "user", "assistant", "system", "what", "is", "the", "answer"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str().encode()


@pytest.fixture
def seed_data_sets(loopback_hub: LoopbackHub) -> LoopbackHub:
    """The three data sets of the reference run and its tokenizer, 20 rows each; two pairs are ties, one is a copy."""
    questions = [f"What is the answer to question {number}?" for number in range(20)]
    right, wrong = ([f"The {word} answer is {number}." for number in range(20)] for word in ("right", "wrong"))
    orca = {"system": [""] * 20, "question": questions, "chosen": right, "rejected": wrong}
    orca = {column: [*values[:19], values[0]] for column, values in orca.items()}
    loopback_hub.commit("Intel/orca_dpo_pairs", {"README.md": b"# Orca", "orca_rlhf.jsonl": json_lines(orca)})
    ratings = {"chosen_avg_rating": [4.5] * 20, "rejected_avg_rating": [4.5, 4.5, *[2.0] * 18]}
    pairs = {
        "instruction": [f"{text} Explain." for text in questions],
        "chosen_response": right,
        "rejected_response": wrong,
    }
    ultrafeedback = {"source": ["made_up"] * 20, **pairs, **ratings, "chosen_model": ["none"] * 20}
    loopback_hub.commit(
        "argilla/ultrafeedback-binarized-preferences",
        {"README.md": b"# UltraFeedback", "data/train-00000-of-00001.parquet": parquet(ultrafeedback)},
    )
    sft = {"instruction": questions, "input": [""] * 20, "output": right}
    loopback_hub.commit("teknium/openhermes", {"README.md": b"# OpenHermes", "openhermes.json": json_array(sft)})
    model = {"tokenizer.json": word_tokenizer(), "config.json": b"{}"}
    loopback_hub.commit("teknium/OpenHermes-2.5-Mistral-7B", model, repo_type="model")
    return loopback_hub


def records(columns: Mapping[str, list[object]]) -> list[dict[str, object]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def json_lines(columns: Mapping[str, list[object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records(columns)).encode()


def json_array(columns: Mapping[str, list[object]]) -> bytes:
    return json.dumps(records(columns)).encode()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("dpopenhermes", {"orca": 19, "ultrafeedback": 18, "openhermes": 20}),
        ("dpopenhermes-original", {"orca": 20, "ultrafeedback": 20, "openhermes": 20}),
    ],
)
def test_the_reference_recipes_build_over_the_hub(seed_data_sets: LoopbackHub, name: str, kept: dict[str, int]) -> None:
    curated = curate(plan(load_recipe(ROOT / "recipes" / f"{name}.toml")))
    by_source = {
        str(source): rows for frame in curated.kept.values() for source, rows in frame.group_by("source").len().rows()
    }
    assert by_source == kept
    assert set(curated.plan.revisions) == {"orca", "ultrafeedback", "openhermes", "tokenizer"}
    assert all(len(commit) == 40 for commit in curated.plan.revisions.values())
    assert (curated.kept["preference"]["prompt_tokens"] > 0).all()
    assert (curated.kept["sft"]["tokens"] > curated.kept["sft"]["prompt_tokens"]).all()


def test_the_original_recipe_says_what_curation_changes() -> None:
    """The two reference recipes read the same data in the same way, with the same training but for the loss."""
    curated, original = (
        load_recipe(ROOT / "recipes" / f"{name}.toml") for name in ("dpopenhermes", "dpopenhermes-original")
    )
    assert (curated.sources, curated.format, curated.splits, curated.seed) == (
        original.sources,
        original.format,
        original.splits,
        original.seed,
    )
    assert curated.filter != original.filter
    assert curated.dedupe.exact == "pair"
    assert original.dedupe.exact == "off"
