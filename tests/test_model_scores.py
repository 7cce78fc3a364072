# ruff: noqa: F811 (fixtures)
"""What becomes of scores: marks on the training data, averages, comparisons of two models, and the model card."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from lm_eval.tasks import TaskManager
from test_model_eval import TASKS, UNKNOWN, asked, data, found, model_folder  # noqa: F401 (fixtures)

from prefmix.errors import MixtureError, ModelError
from prefmix.mixture import Mixture
from prefmix.model.evaluation import compare
from prefmix.model.evaluation import evaluating as evaluate
from prefmix.model.evaluation.decontaminated import TrainingData, run_of, training_data
from prefmix.scores import card as scorecard
from prefmix.scores import results as scores
from prefmix.scores.suites import SUITES, expand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


# Suites, marks, averages.


def test_reference_is_the_four_tables_of_the_card_and_nothing_is_asked_twice():
    assert [suite.name for suite in expand(["reference", "truthfulqa", "arc_easy"])] == [
        "agieval",
        "bbh",
        "gpt4all",
        "truthfulqa",
        "arc_easy",
    ]


def test_the_suites_are_groups_of_the_harness():
    manager = TaskManager(
        include_path=[str(TASKS / "agieval"), str(TASKS / "leaderboard" / "bbh_mc")], include_defaults=False
    )
    groups = {"agieval": "agieval_nous", "bbh": "leaderboard_bbh"}
    for suite, group in groups.items():
        assert set(manager.task_index[group].cfg["task"]) == set(SUITES[suite].tasks)


def test_a_suite_has_what_it_can_and_says_what_is_left_out(found, real_data, tmp_path):
    class Notes(evaluate.Watcher):
        def __init__(self):
            self.texts = []

        def note(self, text):
            self.texts.append(text)

    notes = Notes()
    [results] = asked(found, ["gpt4all"], tmp_path, real_data / "benchmarks", notes, limit=2)
    assert set(results["tasks"]) == set(SUITES["gpt4all"].tasks) - {"boolq"}
    assert list(results["left_out"]) == ["boolq"]
    assert notes.texts == [results["left_out"]["boolq"]]
    assert "6 tasks" in scores.average_line(results)
    with pytest.raises(ModelError, match="no local file for boolq"):
        asked(found, ["boolq"], tmp_path, real_data / "benchmarks", limit=2)


def mixture(**contamination) -> Mixture:
    return Mixture(Path("m"), {"name": "mix", "version": "v1", "digest": "d" * 64, "contamination": contamination})


def test_a_suite_is_marked_by_what_its_mixture_was_searched_for():
    gpt4all, arc, truthfulqa = expand(["gpt4all", "arc_easy", "truthfulqa"])
    searched = TrainingData(mixture(gpt4all={"dropped": 3}))
    assert [searched.mark(suite) for suite in (gpt4all, arc, truthfulqa)] == ["decontaminated"] * 2 + [
        "not decontaminated"
    ]
    assert "3 rows were dropped" in searched.line(gpt4all)
    own = TrainingData(mixture(arc_easy={"dropped": 0}))
    assert [own.mark(suite) for suite in (gpt4all, arc)] == ["not decontaminated", "decontaminated"]
    assert UNKNOWN.mark(arc) == "unknown"
    assert "nobody knows" in UNKNOWN.line(arc)


def test_the_mixture_of_a_run_is_found_by_its_digest(versions):
    manifest = json.loads(next(versions.glob("quickstart/*/mixture.json")).read_text())
    run = {"mixture": {key: manifest[key] for key in ("name", "version", "digest")}}
    assert training_data(run, None, versions).mixture.digest == manifest["digest"]
    gone = {"mixture": {**run["mixture"], "digest": "0" * 64}}
    assert "is not in the store" in training_data(gone, None, versions).why
    with pytest.raises(ModelError, match="the run was trained on quickstart 000000000000"):
        training_data(gone, f"quickstart@{manifest['version']}", versions)
    with pytest.raises(MixtureError):
        training_data(run, "nothing@v1", versions)


def test_a_merge_is_of_the_run_that_it_lies_in_and_goes_by_its_name(tmp_path):
    merged = tmp_path / "mix" / "eos" / "merged"
    merged.mkdir(parents=True)
    (merged.parent / "run.json").write_text(json.dumps({"adapter_sha256": "a", "mixture": {"name": "mix"}}))
    assert run_of(merged) is None
    (merged / "merge.json").write_text('{"adapter_sha256": "a"}')
    assert run_of(merged)["mixture"] == {"name": "mix"}
    assert scores.results_folder(str(merged)) == Path("eval/mix--eos--merged")
    (merged / "merge.json").write_text('{"adapter_sha256": "b"}')
    assert run_of(merged) is None
    assert scores.results_folder(str(tmp_path / "mix")) == Path("eval/mix")
    assert scores.results_folder("user/model@v1") == Path("eval/user--model@v1")


def task_of(value: float, stderr: float | None = 0.1, name: str = "acc_norm", **others) -> dict:
    metric = {"name": name, "filter": None, "value": value, "stderr": stderr, "higher_is_better": True}
    places = {"version": 1.0, "fewshot": 0, "n": 10, "of": 10, "dataset": {"id": "a/b", "config": "c", "split": "test"}}
    return {**places, "metrics": [metric], "counted": name, "record": "none.json", **others}


def test_the_average_is_of_the_counted_metrics_each_task_as_one():
    tasks = {"a": task_of(0.2, 0.3), "b": task_of(0.6, 0.4), "c": task_of(1.0)}
    assert scores.average(tasks, ["a", "b"]) == {
        "value": pytest.approx(0.4),
        "stderr": pytest.approx(0.25),
        "of": ["a", "b"],
    }
    assert scores.average({}, ["a"]) is None
    assert scores.average({"a": task_of(0.2, None)}, ["a"])["stderr"] is None


def test_acc_norm_counts_where_it_is_then_acc_then_the_strict_match():
    def metrics(*names):
        return [{"name": name, "filter": filtered} for name, filtered in names]

    assert scores.counted(metrics(("acc", None), ("acc_norm", None)))["name"] == "acc_norm"
    assert scores.counted(metrics(("f1", None), ("acc", None)))["name"] == "acc"
    both = metrics(("exact_match", "flexible-extract"), ("exact_match", "strict-match"))
    assert scores.counted(both)["filter"] == "strict-match"
    assert scores.counted(metrics(("rouge", None)))["name"] == "rouge"


# The reference card.


def test_the_reference_card_ships_as_it_was_published(real_data):
    text = (real_data.parent / "reference_card.md").read_text(encoding="utf-8")
    card = compare.reference_card().results
    published = {}
    name = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 6 and re.fullmatch(r"0\.\d{4}", cells[3]):
            name = cells[0] or name
            published[name, cells[2]] = (float(cells[3]), float(cells[5]))
    shipped = {}
    for suite, results in card.items():
        for task, entry in results["tasks"].items():
            for metric in entry["metrics"]:
                old = task.replace("leaderboard_bbh_", "bigbench_")
                key = ("truthfulqa_mc", task[-3:]) if suite == "truthfulqa" else (old, metric["name"])
                shipped[key] = (metric["value"], metric["stderr"])
    assert shipped == published
    averages = [float(value) for value in re.findall(r"^Average: (.*)$", text, re.MULTILINE)]
    assert averages == [card[suite]["average"]["value"] for suite in ("agieval", "bbh", "gpt4all")]


@pytest.mark.parametrize("suite", ["bbh", "gpt4all", "truthfulqa"])
def test_our_averages_are_the_cards(suite):
    card = compare.reference_card().results[suite]
    averaged = [task for task in SUITES[suite].averaged if task in card["tasks"]]
    assert round(scores.average(card["tasks"], averaged)["value"], 4) == card["average"]["value"]


# Two models.


def record(folder: Path, name: str, answers: dict[str, float]) -> None:
    path = folder / "tasks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    items = {"acc_norm": {"ids": list(answers), "values": list(answers.values())}}
    path.write_text(json.dumps({"items": items}))


def results_of(folder: Path, answers: dict[str, float], suite="arc_easy") -> dict:
    record(folder, "r.json", answers)
    mean = sum(answers.values()) / len(answers)
    stderr = math.sqrt(mean * (1 - mean) / (len(answers) - 1))
    return {"suite": suite, "tasks": {"arc_easy": task_of(mean, stderr, record="r.json")}, "average": None}


def test_the_same_items_are_compared_item_by_item(tmp_path):
    """Of 100 items both know 80; the first knows five more: certain by pairs, not by the two standard errors."""
    before = {f"{n}": float(n < 80) for n in range(100)}
    after = {f"{n}": float(n < 85) for n in range(100)}
    mine, other = results_of(tmp_path / "a", after), results_of(tmp_path / "b", dict(reversed(before.items())))
    [paired] = compare.compare([mine], tmp_path / "a", compare.Other("b", {"arc_easy": other}, tmp_path / "b"))
    assert paired.how == "paired"
    assert paired.difference == pytest.approx(0.05)
    assert paired.stderr == pytest.approx(math.sqrt(0.05 * 0.95 / 99))
    assert paired.verdict == "better"
    [unpaired] = compare.compare([mine], tmp_path / "a", compare.Other("b", {"arc_easy": other}, tmp_path / "gone"))
    assert (unpaired.how, unpaired.verdict) == ("unpaired", "within noise")
    assert unpaired.stderr == pytest.approx(math.hypot(mine["tasks"]["arc_easy"]["metrics"][0]["stderr"],
                                                       other["tasks"]["arc_easy"]["metrics"][0]["stderr"]))  # fmt: skip


def test_a_model_does_not_differ_from_itself(tmp_path):
    mine = results_of(tmp_path, {f"{n}": float(n % 3 == 0) for n in range(30)})
    [same] = compare.compare([mine], tmp_path, compare.Other("itself", {"arc_easy": mine}, tmp_path))
    assert (same.difference, same.stderr, same.beyond_noise) == (0.0, 0.0, False)


def test_nothing_is_concluded_from_items_that_are_all_alike(tmp_path):
    mine, other = (results_of(tmp_path / name, dict.fromkeys("abc", value)) for name, value in (("a", 1.0), ("b", 0.0)))
    for folder in (tmp_path / "b", None):
        [alike] = compare.compare([mine], tmp_path / "a", compare.Other("b", {"arc_easy": other}, folder))
        assert (alike.difference, alike.stderr, alike.beyond_noise) == (1.0, None, None)


def test_a_task_is_found_in_the_table_of_its_suite_and_other_tasks_are_not_judged(tmp_path):
    mine = results_of(tmp_path, {f"{n}": float(n % 2) for n in range(50)})
    [arc] = compare.compare([mine], tmp_path, compare.reference_card())
    assert (arc.other, arc.how, arc.verdict) == (0.8321, "unpaired", "worse")
    bbh = {"suite": "bbh", "tasks": {"leaderboard_bbh_snarks": task_of(0.5), "leaderboard_bbh_navigate": task_of(0.1)}}
    bbh["average"] = scores.average(bbh["tasks"], SUITES["bbh"].averaged)
    judged = compare.compare([bbh], tmp_path, compare.reference_card())
    assert [each.verdict for each in judged] == ["other task"] * 3
    assert judged[-1].other == pytest.approx((0.7238 + 0.5) / 2)


def test_results_to_compare_with_are_found_or_it_is_said_how_to_get_them(found, data, tmp_path):
    asked(found, ["arc_easy"], tmp_path / "run" / "dpo" / "eval", data, limit=1)
    for reference in ("run", "run/dpo", "run/dpo/eval"):
        assert list(compare.open_other(str(tmp_path / reference)).results) == ["arc_easy"]
    with pytest.raises(ModelError, match=r"there are no results of an evaluation\. Run `prefmix eval"):
        compare.open_other(str(tmp_path / "nowhere"))
    shutil.copytree(tmp_path / "run" / "dpo", tmp_path / "run" / "eos")
    with pytest.raises(ModelError, match="several stages have results"):
        compare.open_other(str(tmp_path / "run"))


# The card.

CARD = """---
license: mit
tags:
- dpo
---

# Ours

## Does it end its turn?

Yes.

## Training data

None.

## Limits

- No benchmark, and nothing about safety, was measured here.
"""


@pytest.fixture
def stage(found, data, tmp_path) -> Path:
    folder = tmp_path / "run" / "dpo"
    asked(
        found,
        ["truthfulqa", "arc_easy"],
        folder / "eval",
        data,
        trained_on=TrainingData(mixture(truthfulqa={"dropped": 1})),
    )
    (folder / "README.md").write_text(CARD)
    scorecard.complete_card(folder)
    return folder


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_has_the_tables_and_is_otherwise_as_it_was(stage):
    text = (stage / "README.md").read_text()
    assert "|truthfulqa_mc2|    3.0|acc   |" in text
    assert text.count("|decontaminated|") == 2
    assert text.count("|not decontaminated|") == 1
    assert text.index("## Evaluation") < text.index("## Training data")
    rest = re.sub(r"## Evaluation.*(?=## Training data)", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    assert rest == CARD.split("---\n", 2)[2].replace("No benchmark, and nothing about safety,", "Nothing about safety")
    assert {key: value for key, value in front(stage).items() if key != "model-index"} == {
        "license": "mit",
        "tags": ["dpo"],
    }


def test_completing_a_card_twice_changes_nothing(stage):
    before = (stage / "README.md").read_text()
    scorecard.complete_card(stage)
    assert (stage / "README.md").read_text() == before
    assert before.count("## Evaluation") == 1


def test_model_index_is_as_huggingface_hub_makes_it(stage):
    index = front(stage)["model-index"]
    name, entries = model_index_to_eval_results(index)
    assert name == "run"
    assert eval_results_to_model_index(name, entries) == index
    assert {(entry.dataset_type, entry.metric_name) for entry in entries} == {
        ("truthfulqa/truthful_qa", "truthfulqa_mc1 acc"),
        ("truthfulqa/truthful_qa", "truthfulqa_mc2 acc"),
        ("allenai/ai2_arc", "arc_easy acc"),
        ("allenai/ai2_arc", "arc_easy acc_norm"),
    }


def test_eval_results_are_as_huggingface_hub_makes_them(stage):
    entries = yaml.safe_load((stage / ".eval_results" / "truthfulqa.yaml").read_text())
    parsed = parse_eval_result_entries(entries)
    assert all(isinstance(entry, EvalResultEntry) for entry in parsed)
    assert eval_result_entries_to_yaml(parsed) == entries
    assert [entry.task_id for entry in parsed] == ["truthfulqa_mc1", "truthfulqa_mc2"]
    assert parsed[0].notes == "acc, 0-shot; training data: decontaminated"


def test_what_was_asked_of_some_items_is_in_the_text_alone(found, data, stage):
    asked(found, ["truthfulqa", "arc_easy"], stage / "eval", data, limit=1)
    scorecard.complete_card(stage)
    assert "the first 1 items of each task" in (stage / "README.md").read_text()
    assert "model-index" not in front(stage)
    assert not list((stage / ".eval_results").iterdir())


def test_a_card_without_front_matter_is_refused(stage):
    (stage / "README.md").write_text("# Mine\n")
    with pytest.raises(ModelError, match="has no YAML front matter"):
        scorecard.complete_card(stage)


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "truthfulqa.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"truthfulqa\.json is not what an evaluation leaves"):
        scores.read_results(tmp_path)
