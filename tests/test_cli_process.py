"""The command line as a process: Ctrl-C while it starts, and terminals that are not UTF-8."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

INTERRUPTED_IMPORT = """
import signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("as NumPy answers it")

module = sys.argv.pop(1)
assert module not in sys.modules
sys.meta_path.insert(0, Interrupt())
from prefmix.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "module",
    ["prefmix.cli", "prefmix.cli.main", "click", "prefmix.errors", "prefmix.cli.mixtures", "prefmix.store", "polars"],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, "show", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, "polars", "show", "nothing"]
    in_background = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=in_background)
    assert done.returncode == 1
    assert done.stderr.startswith("error: There is no mixture nothing")


def test_next_to_nothing_is_imported_before_ctrl_c_is_answered() -> None:
    code = "import sys; before = {*sys.modules}; import prefmix.__main__; print(*sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"__future__", "prefmix", "prefmix.__main__"}


def test_the_entry_point_is_there() -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["prefmix"].partition(
        ":"
    )
    assert callable(getattr(import_module(module), name))


ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]

SEVERAL = """
import json, sys
from prefmix.cli.main import run
from prefmix.cli.screen import replace_unwritable
replace_unwritable()
for words in json.loads(sys.argv[1]):
    print(">>", *words, run(words))
"""


def in_encoding(environment: dict[str, str], folder: Path, *command: str) -> tuple[int, str, str]:
    settings = {**os.environ, "PREFMIX_STORE": "store", **environment}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=settings, capture_output=True, check=False)
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its mixture, twice, whose texts are in many scripts."""
    from prefmix.build import build
    from prefmix.recipe import load_recipe

    folder = tmp_path_factory.mktemp("foreign")
    texts = ["Où est la gare…?", "駅はどこですか。", "“Where” – is it → there?", "Где вокзал?"]
    rows = [{"prompt": text, "chosen": f"{text} ✓", "rejected": f"{text} ✗"} for text in texts]
    rows.append({**rows[0], "rejected": rows[0]["chosen"]})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "mix.toml").write_text(
        'name = "mix"\n[sources.rows]\npath = "rows.jsonl"\nformat = "messages"\n[filter]\nlanguages = []\n'
    )
    build(folder / "mix.toml", store=folder / "store")
    build(load_recipe(folder / "mix.toml", ["sources.rows.take=2"]), store=folder / "store")
    return folder


@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda environment: next(iter(environment.values())))
def test_every_page_can_be_written_in_any_encoding(environment: dict[str, str], foreign: Path) -> None:
    commands: Sequence[Sequence[str]] = [
        ["show", "mix"],
        ["show", "mix", "--sample", "4"],
        ["show", "mix", "--sample", "4", "--reason", "filter"],
        ["diff", "mix@v1", "mix@v2"],
        ["drops", "mix"],
        ["drops", "mix", "--reason", "filter"],
        ["why", "mix@v1", "gare"],
        ["list"],
        ["check", "mix.toml"],
        ["build", "mix.toml", "--limit", "3"],
        ["sources"],
        ["sources", "ultrafeedback"],
        ["schema"],
    ]
    code, out, err = in_encoding(environment, foreign, "-c", SEVERAL, json.dumps(commands))
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith(">> ")] == [
        f">> {' '.join(words)} 0" for words in commands
    ]
    assert re.search(r"^read +5 +#+$", out, re.MULTILINE)
    assert re.search(r"^  filter/identical +-1 +20\.0%  =+$", out, re.MULTILINE)
    assert "mix@v1 4 rows > mix@v2 2 rows" in out
    assert ("Où" in out) == (environment.get("PYTHONIOENCODING") == "latin-1")


@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda environment: next(iter(environment.values())))
def test_json_loses_nothing_in_any_encoding(environment: dict[str, str], foreign: Path) -> None:
    code, out, err = in_encoding(environment, foreign, "-m", "prefmix", "show", "mix@v1", "--sample", "4", "--json")
    assert (code, err) == (0, "")
    assert "駅はどこですか。" in [row["parts"]["prompt"][0]["content"] for row in json.loads(out)["rows"]]


def test_an_error_can_be_written_in_any_encoding(tmp_path: Path) -> None:
    for environment in ENCODINGS:
        code, _, err = in_encoding(environment, tmp_path, "-m", "prefmix", "show", "gare → 駅")
        assert (code, "Traceback" in err) == (1, False)
        assert err.startswith("error: gare ")
        assert "is neither a mixture's folder" in err
