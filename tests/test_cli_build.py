"""`prefmix build` as a user meets it: pages, exit codes, streams, Ctrl-C, two builds at once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest

from prefmix.cli.main import COMMANDS, run

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
PREFMIX = (sys.executable, "-m", "prefmix")


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.lines = out.splitlines()


@pytest.fixture
def prefmix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Said]:
    """Runs a command line in an empty folder; its store is `store` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFMIX_STORE", "store")

    def call(*arguments: object) -> Said:
        code = run([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return call


def write_recipe(folder: Path, rows: pl.DataFrame, text: str = "") -> Path:
    """A recipe of one source, `pairs`, with its rows."""
    rows.write_parquet(folder / "pairs.parquet")
    recipe = folder / "pairs.toml"
    recipe.write_text(f'name = "pairs"\n[sources.pairs]\npath = "pairs.parquet"\n{text}')
    return recipe


def pairs(count: int, ties: int = 0) -> pl.DataFrame:
    numbers = range(count)
    return pl.DataFrame(
        {
            "prompt": [f"What is {number} + 1?" for number in numbers],
            "chosen": [f"It is {number + 1}." for number in numbers],
            "rejected": [f"It is {number}." for number in numbers],
            "chosen_score": [2.0] * count,
            "rejected_score": [2.0 if number < ties else 1.0 for number in numbers],
        }
    )


def test_a_build_ends_with_its_funnel_and_what_to_do_next(prefmix: Callable[..., Said]) -> None:
    said = prefmix("build", QUICKSTART)
    assert said.code == 0
    assert re.fullmatch(r"quickstart@v1  digest [0-9a-f]{12}  built in \d+\.\d s", said.lines[0])
    assert Path(said.lines[1], "mixture.json").is_file()
    text = " ".join(said.out.split())
    assert "read 344" in text
    assert "in the mixture 302 87.8%" in text
    for reason, count in (("source/invalid", 4), ("filter/tie", 3), ("decontaminate/pubquiz", 6), ("dedupe/near", 5)):
        assert f"{reason} −{count}" in text
    for source, read, kept in (("orca", 124, 112), ("ultrafeedback", 114, 97), ("openhermes", 106, 93)):
        assert f"{source} {read} {kept}" in text
    assert "pubquiz 12 6 6 1.7% ━━━━━━━━━━━━ openhermes 2, orca 2, ultrafeedback 2" in text
    assert "Next:" in said.lines
    assert said.err == ""


def test_every_command_that_a_build_proposes_can_be_run(prefmix: Callable[..., Said]) -> None:
    said = prefmix("build", QUICKSTART, "--store", "else where")
    proposed = [shlex.split(line) for line in said.lines[said.lines.index("Next:") + 1 :]]
    proposed = [words[: words.index("else where") + 1] for words in proposed]
    assert [words[:2] for words in proposed] == [["prefmix", name] for name in ("show", "drops", "why")]
    for words in proposed:
        assert prefmix(*words[1:]).code == 0, words


def test_building_again_says_up_to_date_in_one_line(prefmix: Callable[..., Said]) -> None:
    first = prefmix("build", QUICKSTART)
    again = prefmix("build", QUICKSTART)
    assert again.code == 0
    assert again.lines == [f"quickstart@v1 is up to date  {first.lines[1]}"]


def test_a_dry_run_shows_what_the_build_would_and_writes_nothing(prefmix: Callable[..., Said], tmp_path: Path) -> None:
    dry = prefmix("build", QUICKSTART, "--dry-run")
    assert dry.code == 0
    assert "a dry run: nothing was written" in dry.lines[0]
    assert list(tmp_path.iterdir()) == []
    built = prefmix("build", QUICKSTART)
    pages = [said.lines[said.lines.index("From rows read to rows in the mixture") :] for said in (dry, built)]
    shown, written = (page[: page.index("Next:")] for page in pages)
    assert shown == written


def test_a_limit_gives_a_first_look_at_some_rows(prefmix: Callable[..., Said], tmp_path: Path) -> None:
    said = prefmix("build", QUICKSTART, "--limit", 20, "--set", "splits.test=0.5")
    assert said.code == 0
    assert "a look at 20 rows of each source: nothing was written" in said.lines[0]
    assert "read 60" in " ".join(said.out.split())
    assert len(re.findall(r"^[0-9a-f]{12}  ", said.out, re.MULTILINE)) == 2
    assert f"  prefmix build {QUICKSTART} --set splits.test=0.5" in said.out
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_few_rows_does_not_need_those_that_the_mix_asks_for(
    prefmix: Callable[..., Said], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, pairs(30), "[mix]\npreference_rows = 30\n")
    said = prefmix("build", recipe, "--limit", 5)
    assert said.code == 0
    assert "[mix] is left out" in said.out
    assert prefmix("build", recipe).code == 0


def test_json_is_one_document_with_the_keys_of_the_manifest(prefmix: Callable[..., Said]) -> None:
    dry, built, again = (prefmix("build", QUICKSTART, "--json", *more) for more in (["--dry-run"], [], []))
    look, result, known = (json.loads(said.out) for said in (dry, built, again))
    manifest = json.loads(Path(result["folder"], "mixture.json").read_text())
    for key in ("name", "version", "build", "digest", "recipe_digest", "funnel", "sources", "subsets", "audit"):
        assert result[key] == manifest[key]
    for key in ("name", "recipe_digest", "funnel", "sources", "audit"):
        assert look[key] == manifest[key]
    sizes = {
        kind: {split: entry["rows"] for split, entry in splits.items()} for kind, splits in look["subsets"].items()
    }
    assert sizes == {
        kind: {split: entry["rows"] for split, entry in splits.items()} for kind, splits in manifest["subsets"].items()
    }
    assert (result["up_to_date"], known["up_to_date"]) == (False, True)
    assert [sample["kind"] for sample in look["samples"]] == ["preference", "sft"]
    assert dry.err == built.err == again.err == ""


def test_token_counts_of_a_dry_run_are_those_of_the_build(prefmix: Callable[..., Said], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "What": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    recipe = write_recipe(tmp_path, pairs(40), '[format]\ntokenizer = "words"\n')
    look = json.loads(prefmix("build", recipe, "--dry-run", "--json").out)
    built = json.loads(prefmix("build", recipe, "--json").out)
    assert look["subsets"]["preference"]["train"]["tokens"] == built["subsets"]["preference"]["train"]["tokens"] > 0


def test_quiet_prints_the_reference_only(prefmix: Callable[..., Said]) -> None:
    dry, built, again = (prefmix("build", QUICKSTART, "-q", *more) for more in (["--dry-run"], [], []))
    assert dry.out == "quickstart: 302 of 344 rows kept; nothing was written\n"
    assert built.out == again.out == "quickstart@v1\n"


def test_a_format_that_was_found_from_the_columns_is_said(prefmix: Callable[..., Said], tmp_path: Path) -> None:
    said = prefmix("build", write_recipe(tmp_path, pairs(3)))
    assert "pairs: format messages (from its columns)" in said.err.splitlines()


def test_a_source_that_loses_most_of_its_rows_is_warned_about(prefmix: Callable[..., Said], tmp_path: Path) -> None:
    said = prefmix("build", write_recipe(tmp_path, pairs(10, ties=6)))
    assert "warning: pairs: only 4 of 10 rows are kept; 6 of the others are filter/tie" in said.err
    taken = prefmix("build", write_recipe(tmp_path, pairs(10), "take = 2\nwhere = \"prompt != 'x'\"\n"))
    assert "warning" not in taken.err


def test_a_build_of_which_nothing_is_left_fails_and_a_dry_run_shows_why(
    prefmix: Callable[..., Said], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, pairs(5, ties=5))
    said = prefmix("build", recipe)
    assert said.code == 1
    assert said.err.startswith("error: No row is left to write. Dropped: filter/tie 5")
    dry = prefmix("build", recipe, "--dry-run")
    assert dry.code == 0
    assert "warning: pairs: none of 5 rows is kept; 5 of the others are filter/tie" in dry.err
    assert "Next:" not in dry.out


def test_names_and_texts_with_markup_are_printed_as_they_are(prefmix: Callable[..., Said], tmp_path: Path) -> None:
    folder = tmp_path / "[bold]odd[red] folder"
    folder.mkdir()
    rows = pairs(3).with_columns(chosen=pl.lit("[red]as it is[/red]"))
    said = prefmix("build", write_recipe(folder, rows), "--limit", 2)
    assert said.code == 0
    assert "[red]as it is[/red]" in said.out
    assert "'" + str(folder / "pairs.toml") + "'" in said.out


@pytest.mark.parametrize("name", ["quickstart", "quickstart.tom"])
def test_a_recipe_that_is_not_there_is_an_error_that_names_the_shipped_one(
    prefmix: Callable[..., Said], name: str
) -> None:
    said = prefmix("build", name)
    assert said.code == 2
    assert "no such file" in said.err
    assert "quickstart.toml" in said.err


def prefmix_process(arguments: Sequence[object], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PREFMIX, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PREFMIX_STORE": "store", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_nothing_but_text_goes_to_a_pipe(tmp_path: Path) -> None:
    process = prefmix_process(["build", QUICKSTART], tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0
    assert "\x1b" not in out + err
    assert err == ""
    assert not [line for line in out.splitlines() if line != line.rstrip()]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_progress_is_drawn_on_a_terminal_and_gone_afterwards(tmp_path: Path, no_color: str) -> None:
    import pty

    master, slave = pty.openpty()
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "NO_COLOR": no_color,
        "PREFMIX_STORE": "store",
    }
    with subprocess.Popen(
        [*PREFMIX, "build", str(QUICKSTART)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=slave
    ) as process:
        os.close(slave)
        shown = b""
        try:
            while chunk := os.read(master, 65536):
                shown += chunk
        except OSError:  # how Linux says that the other side is closed
            pass
        out = process.stdout.read() if process.stdout else b""
    os.close(master)
    assert process.returncode == 0
    assert b"\x1b" not in out
    assert b"looking at the inputs" in shown
    assert b"reading" in shown
    assert shown.rstrip().endswith((b"\x1b[?25h", b"\x1b[2K"))  # the cursor is back, the lines are cleared
    assert (re.search(rb"\x1b\[[0-9;]*3[0-9]m", shown) is None) == bool(no_color)


def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path) -> None:
    for arguments in (["build", QUICKSTART, "--dry-run"], ["build", QUICKSTART, "--dry-run", "--json"], ["schema"]):
        process = prefmix_process(arguments, tmp_path)
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert (process.stderr.read(), process.wait()) == ("", 0), arguments
        process.stderr.close()


def test_two_builds_at_once_give_the_same_version(tmp_path: Path) -> None:
    processes = [prefmix_process(["build", QUICKSTART, "--json"], tmp_path) for _ in range(2)]
    results = [(process.communicate(), process.returncode) for process in processes]
    assert [code for _, code in results] == [0, 0], results
    one, two = (json.loads(out) for (out, _), _ in results)
    assert (one["version"], one["digest"], one["folder"]) == (two["version"], two["digest"], two["folder"])
    assert json.loads((tmp_path / "store" / "quickstart" / "versions.json").read_text()).keys() == {"v1"}


SLOW_BUILD = """
import sys, time
import prefmix.manifest, prefmix.build, prefmix.sources, prefmix.store
from prefmix.__main__ import main

def slow(function):
    def wrapped(*arguments):
        print("here", flush=True)
        time.sleep(60)
        return function(*arguments)
    return wrapped

module, name = sys.argv.pop(1).split(":")
*owners, name = name.split(".")
home = sys.modules[module] if not owners else getattr(sys.modules[module], owners[0])
setattr(home, name, slow(getattr(home, name)))
main()
"""


def interrupted(arguments: Sequence[object], folder: Path) -> tuple[float, int, str]:
    """Sends SIGINT when the program says "here", and a second one at once; gives seconds, exit code, stderr."""
    command = [sys.executable, "-c", SLOW_BUILD, *map(str, arguments)]
    environment = {**os.environ, "PREFMIX_STORE": "store"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    return time.monotonic() - started, process.returncode, err


@pytest.mark.parametrize("stage", ["prefmix.plan:unsupported", "prefmix.build:_read", "prefmix.manifest:ledger"])
def test_ctrl_c_ends_a_build_at_once_and_leaves_nothing(tmp_path: Path, stage: str) -> None:
    seconds, code, err = interrupted([stage, "build", QUICKSTART], tmp_path)
    assert (code, err) == (130, "interrupted: nothing was written\n")
    assert seconds < 1
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in left] in ([], [".lock"])
    assert not list(tmp_path.rglob(".staging-*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prefmix.plan:unsupported", "build", QUICKSTART, "--dry-run"], "interrupted\n"),
        (["prefmix.plan:unsupported", "check", QUICKSTART], "interrupted\n"),
        (["prefmix.sources:resolve", "init", QUICKSTART.with_suffix("")], "interrupted: nothing was written\n"),
    ],
)
def test_only_a_command_that_would_have_written_says_that_nothing_was_written(
    tmp_path: Path, words: list[object], said: str
) -> None:
    assert interrupted(words, tmp_path)[1:] == (130, said)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_after_the_mixture_is_complete_says_so(tmp_path: Path) -> None:
    """Between the rename that makes the version and the writing of its label: the next build finds it."""
    _, code, err = interrupted(["prefmix.store:Store._write_labels", "build", QUICKSTART], tmp_path)
    assert (code, err) == (130, "interrupted: the mixture was complete, and is in the store\n")
    again = prefmix_process(["build", QUICKSTART, "-q"], tmp_path)
    assert again.communicate()[0] == "quickstart@v1\n"


def test_ctrl_c_ends_a_large_build_within_a_second_at_any_moment(tmp_path: Path, real_data: Path) -> None:
    recipe = tmp_path / "large.toml"
    files = ("orca_dpo_pairs/converted", "ultrafeedback_binarized/converted_alpaca_eval", "openhermes/converted_t0_p3")
    tables = [f'[sources.s{n}]\npath = "{(real_data / file).as_posix()}.parquet"\n' for n, file in enumerate(files)]
    recipe.write_text('name = "large"\n' + "".join(tables))
    codes = []
    for delay in (0.5, 0.9, 1.3, 1.8):
        process = prefmix_process(["build", recipe], tmp_path)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate()
        assert time.monotonic() - started < 1
        codes.append(process.returncode)
        assert "Traceback" not in err
        assert not list(tmp_path.rglob(".staging-*"))
    assert codes[0] == 130
    assert set(codes) <= {130, 0}  # a fast machine is done before the last moments
    assert run(["build", str(recipe), "--store", str(tmp_path / "store"), "-q"]) == 0


def test_an_unexpected_error_is_a_line_and_a_traceback_only_when_asked_for(
    prefmix: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the roof leaks")

    monkeypatch.setattr("prefmix.plan.unsupported", broken)
    said = prefmix("build", QUICKSTART)
    assert said.code == 1
    assert said.err.startswith("error: unexpected RuntimeError: the roof leaks\n")
    assert "PREFMIX_DEBUG=1" in said.err
    assert "Traceback" not in said.err
    monkeypatch.setenv("PREFMIX_DEBUG", "1")
    with pytest.raises(RuntimeError, match="the roof leaks"):
        prefmix("build", QUICKSTART)


def test_a_wrong_command_is_told_the_nearest_one(prefmix: Callable[..., Said]) -> None:
    said = prefmix("biuld", "x.toml")
    assert said.code == 2
    assert "No such command 'biuld'. Did you mean build?" in said.err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there_for_every_command_and_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    code = (
        "import sys; from prefmix.cli.main import run; code = run(sys.argv[1:]); "
        "heavy = sys.modules.keys() & {'polars', 'pyarrow', 'pydantic', 'datasets', 'huggingface_hub', 'rich'}; "
        "sys.exit(code or f'imported {heavy}' if heavy else code)"
    )
    words = [command] if command else []
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(" ".join(["Usage: prefmix", *words]))


def test_help_takes_less_than_a_third_of_a_second(tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([*PREFMIX, "--help"], capture_output=True, cwd=tmp_path, check=True)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.3
