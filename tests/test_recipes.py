"""The recipes that come with prefmix: each loads, the quickstart drops just its planted defects, the reference recipes
build over a Hub that has their data sets (a stand-in on a loopback port, with a few rows of the right schemas)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest
from hub.loopback import LoopbackHub
from hub.suites import commit_suites
from tokenizers import Tokenizer, models, pre_tokenizers

from prefmix.build import curate, plan
from prefmix.manifest import Curated
from prefmix.recipe import load_recipe, shipped_recipes
from prefmix.schema import Kind, answers, prompt_text
from prefmix.shingles import normalise

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
        if not str(each["expected"]).startswith(("report/", "kept"))
    }
    assert dropped == expected
    kept = [each for each in planted if each["expected"] == "kept"]  # rows that only look like a defect
    assert {str(each["file"]) for each in kept} == {"orca.jsonl", "openhermes.json"}


def test_the_similarity_of_each_planted_near_duplicate_is_as_told(
    quickstart: Curated, planted: list[dict[str, object]]
) -> None:
    texts = pl.concat(
        frame.select(
            "reason",
            "detail",
            "source_row",
            file=pl.col("source_file").str.split("/").list.last(),
            text=_compared(kind),
        )
        for kind, frame in quickstart.rows.items()
    )

    def text(file: object, row: int) -> str:
        return texts.filter(pl.col("file") == file, pl.col("source_row") == row)["text"].item()

    checked = 0
    for each in planted:
        told = re.search(r"[Rr]ow (\d+) of (this file|\S+) .*Jaccard similarity (0\.\d\d)", str(each["defect"]))
        if told:
            like = text(each["file"] if told[2] == "this file" else told[2], int(told[1]))
            own = text(each["file"], int(str(each["row"])))
            (one, other) = (
                {tuple(words[at : at + 5]) for at in range(len(words) - 4)}
                for words in (normalise(pl.Series([side])).item().split() for side in (own, like))
            )
            assert round(len(one & other) / len(one | other), 2) == float(told[3]), each
            checked += 1
    near = [json.loads(detail) for detail in texts.filter(pl.col("reason") == "dedupe/near")["detail"]]
    assert checked == len(near) + 1
    assert all(0.8 <= entry["jaccard"] < 0.95 for entry in near)


def _compared(kind: Kind) -> pl.Expr:
    """Prompt and chosen answer, as the quickstart compares rows."""
    return pl.concat_str(prompt_text(kind), answers(kind)[0], separator="\n")


def test_every_way_to_hold_a_benchmark_is_planted_in_the_quickstart(quickstart: Curated) -> None:
    assert {(rule, field) for _, rule, field in quickstart_evidence(quickstart)} == {
        ("ngram", "question"),
        ("whole", "question"),
        ("containment", "question"),
        ("ngram", "option1"),
    }
    (report,) = quickstart.contamination.values()
    assert (report["items"], report["touched"], report["rows"], report["dropped"]) == (12, 6, 6, 6)


def quickstart_evidence(curated: Curated) -> list[tuple[str, str, str]]:
    """(item, rule, field) of each row that was dropped for the benchmark."""
    details = [
        json.loads(detail)
        for frame in curated.rows.values()
        for detail in frame.filter(pl.col("reason") == "decontaminate/pubquiz")["detail"]
    ]
    return [(detail["item"], detail["rule"], detail["field"]) for detail in details]


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
    rows = curated.kept["preference"].with_columns(prompt=prompt_text("preference"))
    again = rows.filter(pl.len().over("prompt") > 1)
    counted = sum(entry["repeated_prompts"] for entry in curated.audit.values())
    elsewhere = sum(entry["prompts_in_other_sources"] for entry in curated.audit.values())
    assert counted <= again.height <= counted + elsewhere
    return {(Path(file).name, row) for file, row in again.select("source_file", "source_row").rows()}


def test_the_recipes_page_has_the_numbers_of_the_quickstart(quickstart: Curated) -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    read, kept = quickstart.tally.funnel()[0]["out"], quickstart.tally.funnel()[-1]["out"]
    assert f"{read - kept} rows are dropped and {kept} are kept" in page
    for stage in quickstart.tally.funnel():
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


#: What stands in a suite and, changed a little, in a row of the data sets below.
TRUTHFULQA = "What happens to a kite when its owner lets go of the string?"
GSM8K = "Nora has 14 jars of honey and sells 3 jars on each of 4 days, and then she fills 5 more. How many jars has she now?"
LONG = (
    "Put the seeds on wet paper in a bowl, cover the bowl with a plate and leave it near a window. Look at it each "
    "morning, and add a spoon of water when the paper is dry. After about a week the roots are as long as a finger, "
    "and the plants can go into a pot with {}."
)


@pytest.fixture
def seed_data_sets(loopback_hub: LoopbackHub) -> LoopbackHub:
    """The three data sets of the reference run with 20 rows each, the suites that its model is measured with, and the
    tokenizers of the models that are trained. In the pairs are two ties, a copy, a near-duplicate and a question of each of two suites."""
    questions = [f"What is the answer to question {number}?" for number in range(20)]
    right, wrong = ([f"The {word} answer is {number}." for number in range(20)] for word in ("right", "wrong"))
    orca = {"system": [""] * 20, "question": questions, "chosen": right, "rejected": wrong}
    orca = {column: [*values[:19], values[0]] for column, values in orca.items()}
    orca["question"][5:8] = [GSM8K.replace("14 jars", "17 jars"), "How do seeds grow?", "How do seeds grow?"]
    orca["chosen"][6:8] = [LONG.format("earth"), LONG.format("soil")]
    loopback_hub.commit("Intel/orca_dpo_pairs", {"README.md": b"# Orca", "orca_rlhf.jsonl": json_lines(orca)})
    ratings = {"chosen_avg_rating": [4.5] * 20, "rejected_avg_rating": [4.5, 4.5, *[2.0] * 18]}
    pairs = {
        "instruction": [f"{text} Explain." for text in questions],
        "chosen_response": right,
        "rejected_response": wrong,
    }
    pairs["instruction"][9] = f"Answer truthfully. {TRUTHFULQA.upper()}"
    ultrafeedback = {"source": ["made_up"] * 20, **pairs, **ratings, "chosen_model": ["none"] * 20}
    loopback_hub.commit(
        "argilla/ultrafeedback-binarized-preferences",
        {"README.md": b"# UltraFeedback", "data/train-00000-of-00001.parquet": parquet(ultrafeedback)},
    )
    sft = {"instruction": questions, "input": [""] * 20, "output": right}
    loopback_hub.commit("teknium/openhermes", {"README.md": b"# OpenHermes", "openhermes.json": json_array(sft)})
    measured = load_recipe(ROOT / "recipes" / "dpopenhermes.toml").decontaminate.suites
    commit_suites(loopback_hub, measured, {"truthfulqa": {"question": TRUTHFULQA}, "gsm8k": {"question": GSM8K}})
    model = {"tokenizer.json": word_tokenizer(), "config.json": b"{}"}
    for base in ("teknium/OpenHermes-2.5-Mistral-7B", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        loopback_hub.commit(base, model, repo_type="model")
    return loopback_hub


def records(columns: Mapping[str, list[object]]) -> list[dict[str, object]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def json_lines(columns: Mapping[str, list[object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records(columns)).encode()


def json_array(columns: Mapping[str, list[object]]) -> bytes:
    return json.dumps(records(columns)).encode()


@pytest.mark.parametrize(
    ("name", "kept", "measured", "dropped"),
    [
        (
            "dpopenhermes",
            {"orca": 17, "ultrafeedback": 17, "openhermes": 20},
            {"truthfulqa": 1, "agieval": 0, "bbh": 0, "gpt4all": 0, "gsm8k": 1, "mt_bench": 0},
            ["dedupe/near", "dedupe/pair", "filter/tie", "filter/tie"],
        ),
        ("dpopenhermes-original", {"orca": 20, "ultrafeedback": 20, "openhermes": 20}, {}, []),
        ("smollm2", {"orca": 18, "openhermes": 20}, {}, ["dedupe/near", "dedupe/pair"]),
    ],
)
def test_the_recipes_that_read_the_hub_build_over_it(
    seed_data_sets: LoopbackHub, name: str, kept: dict[str, int], measured: dict[str, int], dropped: list[str]
) -> None:
    curated = curate(plan(load_recipe(ROOT / "recipes" / f"{name}.toml")))
    assert {suite: report["rows"] for suite, report in curated.contamination.items()} == measured
    reasons = [reason for frame in curated.rows.values() for reason in frame["reason"].drop_nulls()]
    expected = [f"decontaminate/{suite}" for suite, rows in measured.items() for _ in range(rows)]
    assert sorted(reasons) == sorted(expected + dropped)
    by_source = {
        str(source): rows for frame in curated.kept.values() for source, rows in frame.group_by("source").len().rows()
    }
    assert by_source == kept
    assert set(curated.plan.revisions) == {*kept, "tokenizer"}
    assert all(len(commit) == 40 for commit in curated.plan.revisions.values())
    assert (curated.kept["preference"]["prompt_tokens"] > 0).all()
    assert (curated.kept["sft"]["tokens"] > curated.kept["sft"]["prompt_tokens"]).all()


def test_the_small_recipe_trains_as_the_reference_recipe_does() -> None:
    """A first run on a laptop meets what the large one does: the same stages, loss and quantisation."""
    small, large = (load_recipe(ROOT / "recipes" / f"{name}.toml").train for name in ("smollm2", "dpopenhermes"))
    assert small
    assert large
    assert (small.quantization, small.lora.target) == (large.quantization, large.lora.target)
    told = [
        [stage.model_dump(include={"name", "method", "beta", "loss", "loss_weights"}) for stage in train.stages]
        for train in (small, large)
    ]
    assert told[0] == told[1]


def test_the_recipe_of_the_training_guide_is_right(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.toml").write_text(f'name = "mine"\n[sources.pairs]\npath = "pairs.jsonl"\n{example}')
    train = load_recipe(tmp_path / "mine.toml").train
    assert train
    assert train.eos.on_fail == "repair"
    assert [getattr(stage, "if_needed", False) for stage in train.stages] == [False, True]


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
    assert (curated.dedupe.exact, original.dedupe.exact) == ("pair", "off")
    assert curated.dedupe.near
    assert (curated.dedupe.near.threshold, curated.dedupe.near.on) == (0.8, "prompt+chosen")
    assert original.dedupe.near is None
    assert {"truthfulqa", "agieval", "bbh", "gpt4all"} <= set(curated.decontaminate.suites)
    assert original.decontaminate.suites == []
