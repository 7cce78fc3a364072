"""What the README shows is what happens."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import datasets
import polars as pl
import pytest

import prefmix
from prefmix.cli.main import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder with the recipes, as the README's reader has them, and some data of their own."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "recipes" / "quickstart" / "orca.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs(clone, loopback_hub, monkeypatch, capsys):
    """All but those of the small model, which tests/test_walkthrough.py runs."""
    loopback_hub.user = "user"
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    lines = [line.split("#")[0].strip() for block in blocks("console") for line in block.splitlines()]
    lines = [line for line in lines if "recipes/smollm2.toml" not in line and " runs/" not in line]
    commands = [
        line.partition(".venv/bin/prefmix")[2] or line.removeprefix("prefmix") for line in lines if "prefmix " in line
    ]
    assert len(commands) >= 10
    for command in commands:
        words = []
        for word in shlex.split(command):  # as a shell would
            words += sorted(str(path.relative_to(clone)) for path in clone.glob(word)) if "*" in word else [word]
        assert run(words) == 0, (command, capsys.readouterr().err)


def test_the_output_that_the_readme_shows_is_real(clone, capsys):
    assert run(["build", "recipes/quickstart.toml"]) == 0
    real = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = [line.rstrip() for line in blocks("text")[0].splitlines() if line != "..."]
    shown[0], real[0] = (re.sub(r"built in .*", "", line) for line in (shown[0], real[0]))
    assert [line for line in shown if line not in real] == []


def test_the_report_on_benchmarks_that_the_readme_shows_is_real(clone, capsys):
    (command,) = (line for block in blocks("console") for line in block.splitlines() if "orca.jsonl --against" in line)
    assert run(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == blocks("text")[1]


def test_the_python_of_the_readme_and_its_recipe_are_right(clone, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", clone / "cache")
    prefmix.build("recipes/quickstart.toml")
    names: dict = {}
    exec(blocks("python")[0], names)
    assert names["rows"].num_rows == names["frame"].select(pl.len()).collect().item()
    assert str(names["mixture"]) == "quickstart@v1"
    (clone / "mine.toml").write_text(blocks("toml")[0])
    assert prefmix.load_recipe("mine.toml").sources["mine"].take == 5000
