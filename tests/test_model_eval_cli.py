# ruff: noqa: F811 (fixtures)
"""`prefmix eval` as a user meets it: tables, notes, JSON, errors with their remedies, Ctrl-C, and `eval` of a stage."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_model_eval import ITEMS, data, model_folder, olmes, write_lines  # noqa: F401 (fixtures)
from test_train_run import changed, home  # noqa: F401 (a fixture)

from prefmix.cli.main import run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture
def evaluated(model_folder, data, tmp_path, monkeypatch, capsys):
    """Runs `prefmix eval` on the micro model and our own items, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*words):
        code = run(["eval", str(model_folder), *words, "--data", str(data)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_it_prints_the_tables_of_the_card_and_what_is_known_of_the_training_data(evaluated, tmp_path):
    code, out, err = evaluated("truthfulqa", "arc_easy", "--limit", "2")
    assert code == 0, err
    assert "## TruthfulQA\n\n|Task          |Version|Metric| Value|   |Stderr|Training data|\n|" in out
    assert "(of truthfulqa_mc2)\n" in out
    assert "prefmix eval " in out
    assert "--compare reference" in out
    assert err.splitlines()[:2] == [
        f"note: {name}: whether its text was in the training data is unknown: no run.json says what it was trained on "
        "(--mixture names it)"
        for name in ("truthfulqa", "arc_easy")
    ]
    folder = tmp_path / "eval" / "micro"
    assert sorted(path.name for path in folder.iterdir()) == ["arc_easy.json", "tasks", "truthfulqa.json"]
    assert evaluated("truthfulqa", "arc_easy", "--limit", "2") == (code, out, err)


def test_json_is_one_document_and_quiet_a_line_for_each_suite(evaluated):
    code, out, err = evaluated("truthfulqa", "arc_easy", "--json", "--compare", "reference")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert [each["suite"] for each in document["results"]] == ["truthfulqa", "arc_easy"]
    assert document["folder"] == "eval/micro"
    first = document["compared"]["differences"][0]
    assert (first["task"], first["other"], first["how"]) == ("truthfulqa_mc1", 0.3941, "unpaired")
    assert evaluated("arc_easy", "-q")[1].startswith("arc_easy: Average: 0.")


def test_two_results_stand_side_by_side(evaluated, tmp_path):
    evaluated("arc_easy", "--out", "before")
    code, out, _ = evaluated("arc_easy", "--compare", "before")
    assert code == 0
    assert "|paired|within noise|" in out
    assert "0 of 1 differences are beyond noise  at 1.96 standard errors, item by item\n" in out
    assert evaluated("truthfulqa", "--compare", "before")[2].endswith(
        "before has no result of these suites: nothing can be compared\n"
    )
    code, _, err = evaluated("arc_easy", "--compare", "after")
    assert code == 1
    assert "--compare after: there are no results of an evaluation." in err


def test_what_cannot_be_asked_is_said_with_a_remedy(evaluated, model_folder, capsys):
    for words, told in (
        (["piqa"], "error: no local file for piqa: "),
        (["arc_easy", "--chat"], "has no chat template: leave --chat out"),
        (["arc_easy", "--mixture", "nothing"], "error: There is no mixture nothing in the store mixtures."),
        (["arc_easy", "--base", "x"], "is no adapter, so it has no base: leave --base out."),
    ):
        code, out, err = evaluated(*words)
        assert (code, out) == (1, "")
        assert told in err
    assert run(["eval", str(model_folder)]) == 2
    assert "Missing argument 'SUITE...'" in capsys.readouterr().err


def test_a_missing_harness_is_said_with_the_command_that_installs_it(evaluated, monkeypatch):
    import prefmix.model.evaluation.evaluating

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("harness", "evaluating"):
        monkeypatch.delitem(sys.modules, f"prefmix.model.evaluation.{name}")
        monkeypatch.delattr(prefmix.model.evaluation, name)
    code, _, err = evaluated("arc_easy")
    assert code == 1
    assert 'needs lm_eval, which is not installed. Install it: pip install "prefmix[train,eval]"' in err


def test_a_stage_that_asks_for_it_is_evaluated_after_training(home, data, tmp_path, capsys):
    recipe = changed(home, tmp_path / "runs", ('name = "eos"\n', 'name = "eos"\neval = ["arc_easy"]\n'))
    words = ["train", str(recipe.path), "--store", str(home / "store"), "--mixture", "tiny", "--eval-data"]
    assert run([*words, str(tmp_path / "nowhere")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()  # nothing was trained before it was said
    assert run([*words, str(data)]) == 0
    assert "## arc_easy\n" in capsys.readouterr().out
    stage = tmp_path / "runs" / "tiny" / "eos"
    results = json.loads((stage / "eval" / "arc_easy.json").read_text())
    digest = json.loads((stage / "run.json").read_text())["mixture"]["digest"]
    assert (results["mixture"]["digest"], results["training_data"]) == (digest, "not decontaminated")
    card = (stage / "README.md").read_text()
    assert "## Evaluation\n\n### arc_easy\n" in card
    assert (
        yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["dataset"]["type"] == "allenai/ai2_arc"
    )
    assert not (stage.parent / "dpo" / "eval").exists()
    # What is asked of a stage may change: it is no other training.
    other = recipe.path.with_name("other.toml")
    other.write_text(recipe.path.read_text().replace('["arc_easy"]', '["arc_easy", "arc_challenge"]'))
    assert run(["train", str(other), *words[2:], str(data), "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [each["was_there"] for each in document["stages"]] == [True, True]
    assert [each["suite"] for each in document["eval"]["eos"]] == ["arc_easy", "arc_challenge"]
    # By hand, its last stage is meant, and the mixture is found by its digest.
    words = ["--data", str(data), "--store", str(home / "store"), "--base", str(home / "base")]
    assert run(["eval", str(stage.parent), "arc_easy", *words]) == 0
    said = capsys.readouterr()
    assert "note: arc_easy: tiny@v1 was not decontaminated against it" in said.err
    assert f"{stage / 'eval'}\n" in said.out


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_and_a_second_run_goes_on(model_folder, tmp_path):
    items = [olmes(f"{number}: {question}", *rest) for number in range(120) for question, *rest in ITEMS]
    requests = sum(len(item["choices"]) for item in items)
    write_lines(tmp_path / "gpt4all" / "arc_easy.test.jsonl", items)
    command = [sys.executable, "-m", "prefmix", "eval", str(model_folder), "arc_easy", "--data", str(tmp_path)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    journal: list[Path] = []
    while not journal or journal[0].read_text().count("\n") < 30:
        assert process.poll() is None
        time.sleep(0.05)
        journal = list(tmp_path.glob("eval/micro/tasks/*.jsonl"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    told = re.search(
        r"^interrupted: in arc_easy, ([\d,]+) of ([\d,]+) requests are answered and kept: `prefmix eval .* goes on$",
        err,
        re.MULTILINE,
    )
    assert told
    assert int(told[2].replace(",", "")) == requests
    assert 29 <= int(told[1].replace(",", "")) < requests
    kept = journal[0].read_text()
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    [results] = json.loads(done.stdout)["results"]
    assert results["tasks"]["arc_easy"]["n"] == len(items)
    before = sum(json.loads(line)["seconds"] for line in kept.splitlines()[1:])
    assert results["tasks"]["arc_easy"]["seconds"] > before  # the time of both
