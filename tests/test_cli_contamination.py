"""`prefmix contamination` as a user meets it, its agreement with `prefmix build`, and rows that a benchmark or a
near-duplicate took out of a mixture, on the screen."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest
from hub.loopback import LoopbackHub
from hub.suites import commit_suites
from rich.console import Console

from prefmix.cli import texts
from prefmix.cli.main import run
from prefmix.contamination import contamination
from prefmix.store import open_mixture

LONG = "A tram has 45 seats and stops 12 times, and 3 people leave at each stop. How many seats are taken at the end of the line?"
SHORT = "Which fruit ripens faster beside an apple in a bag?"
REASON = "Bananas ripen faster beside an apple because the apple gives off a gas called ethylene all the time."
QUIZ = [
    {"question": LONG, "option1": "nine", "option2": "none", "why": "It is 45 less 36."},
    {"question": SHORT, "option1": "a banana", "option2": "a lemon", "why": REASON},
]
#: A suite of one split with a field that is a list.
TRUTHFULQA = {"question": LONG, "best_answer": REASON}


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def words(self) -> str:
        """The page without its alignment."""
        return " ".join(self.out.split())


Prefmix = Callable[..., Said]


@pytest.fixture
def prefmix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Prefmix:
    """Runs a command line in a folder that has `quiz.csv`; its store is `store` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFMIX_STORE", "store")
    with (tmp_path / "quiz.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(QUIZ[0]))
        writer.writeheader()
        writer.writerows(QUIZ)

    def call(*arguments: object) -> Said:
        code = run([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return call


def pair(question: str, chosen: str = "It depends.", number: int = 0) -> dict[str, object]:
    return {"system": "", "question": question, "chosen": chosen, "rejected": f"Nobody has counted up to {number}."}


def clean(count: int) -> list[dict[str, object]]:
    return [pair(f"What comes after {number}?", f"After it comes {number + 1}.", number) for number in range(count)]


def lines(path: str, rows: Sequence[dict[str, object]]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def found_in(out: str) -> dict[str, tuple[int, int]]:
    """(items found, rows that hold them) by benchmark, of a JSON document."""
    return {name: (entry["touched"], entry["rows"]) for name, entry in json.loads(out)["benchmarks"].items()}


def build(prefmix: Prefmix, recipe: str) -> None:
    Path("mix.toml").write_text(recipe, encoding="utf-8")
    said = prefmix("build", "mix.toml", "-q")
    assert said.code == 0, said.err


# What is searched


def test_a_file_is_answered_with_a_page_of_benchmarks_items_and_what_to_do_next(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [*clean(3), pair(LONG), pair(f"I heard this: {SHORT} Is it true?"), pair(SHORT.upper())])
    said = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("3 of 6 rows hold text of a benchmark\n")
    assert "quiz.csv 2 2 3 50.0% ━━━━━━━━━━━━ rows 3" in said.words
    assert "The items in most rows item rows words quiz.csv:1 2 which fruit ripens faster beside an" in said.words
    assert said.out.endswith("\n\n--out FILE writes the 4 findings, each with its row and the words\n")


def test_nothing_found_is_said_with_what_was_looked_for(prefmix: Prefmix) -> None:
    lines("rows.jsonl", clean(3))
    said = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--fail")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("0 of 3 rows hold text of a benchmark\n")
    assert said.words.endswith("quiz.csv 2 0 0 0.0%")


def test_folders_and_patterns_are_searched_file_by_file_and_each_file_once(prefmix: Prefmix) -> None:
    lines("data/pairs.jsonl", [*clean(2), pair(LONG)])
    lines("data/sft.jsonl", [{"instruction": SHORT, "input": "", "output": "A banana."}])
    for named in (["data"], ["data/*.jsonl"], ["data/pairs.jsonl", "data/sft.jsonl", "./data/pairs.jsonl", "data"]):
        document = json.loads(prefmix("contamination", *named, "--against", "quiz.csv", "--json").out)
        assert document["rows"] == {"pairs": 3, "sft": 1}, named
        assert document["benchmarks"]["quiz.csv"]["sources"] == {"pairs": 1, "sft": 1}, named


def test_files_of_one_name_are_told_apart_by_their_folders(prefmix: Prefmix) -> None:
    lines("a/data.jsonl", [pair(LONG)])
    lines("b/data.jsonl", [pair(LONG), pair(SHORT)])
    lines("c/data.jsonl", [{"instruction": SHORT, "input": "", "output": "A banana."}])
    said = prefmix("contamination", "a/data.jsonl", "b/data.jsonl", "c/data.jsonl", "--against", "quiz.csv", "--json")
    document = json.loads(said.out)
    assert document["rows"] == {"a/data.jsonl": 1, "b/data.jsonl": 2, "c/data.jsonl": 1}
    assert document["benchmarks"]["quiz.csv"]["sources"] == {"b/data.jsonl": 2, "a/data.jsonl": 1, "c/data.jsonl": 1}
    page = prefmix("contamination", "a/data.jsonl", "b/data.jsonl", "c/data.jsonl", "--against", "quiz.csv").out
    assert page.startswith("4 of 4 rows hold text of a benchmark\n")


@pytest.mark.parametrize("layout", ["text", "messages"])
def test_every_split_of_a_mixture_is_searched_by_its_name_and_by_its_folder(prefmix: Prefmix, layout: str) -> None:
    lines(
        "pairs.jsonl",
        [pair(f"{question} {number}", number=number) for number in range(9) for question in (LONG, SHORT)],
    )
    lines("sft.jsonl", [{"instruction": LONG, "input": "", "output": f"{number} of them."} for number in range(3)])
    build(
        prefmix,
        f'name = "mix"\n[sources.pairs]\npath = "pairs.jsonl"\n[sources.sft]\npath = "sft.jsonl"\n'
        f'[format]\nlayout = "{layout}"\n[splits]\ntest = 0.4\n',
    )
    mixture = open_mixture("mix", "store")
    assert {split for splits in mixture.splits.values() for split in splits} == {"train", "test"}
    for named in ("mix", "mix@v1", mixture.folder, mixture.folder.parent):
        document = json.loads(prefmix("contamination", named, "--against", "quiz.csv", "--json").out)
        assert document["rows"] == {"mix@v1/preference": 18, "mix@v1/sft": 3}
        assert document["benchmarks"]["quiz.csv"]["sources"] == {"mix@v1/preference": 18, "mix@v1/sft": 3}
    said = prefmix("contamination", "store", "--against", "quiz.csv")
    assert (said.code, said.err) == (1, "error: store is a store of mixtures: name one of them (mix).\n")


def test_columns_are_searched_in_data_of_no_known_format(prefmix: Prefmix) -> None:
    rows = {"title": ["x", SHORT, "y"], "body": [LONG[:40], "z", None], "tail": [LONG[40:], "z", None]}
    pl.DataFrame(rows).write_parquet("notes.parquet")
    pl.DataFrame(rows).write_csv("notes.csv")
    lines("notes.jsonl", pl.DataFrame(rows).to_dicts())
    for name in ("notes.parquet", "notes.csv", "notes.jsonl"):
        said = prefmix("contamination", name, "--against", "quiz.csv", "--column", "title", "--out", "found.jsonl")
        assert said.out.startswith("1 of 3 rows hold text of a benchmark\n"), name
        (one,) = found_rows("found.jsonl")
        assert (one["source_file"], one["source_row"], one["item"]) == (name, 1, "quiz.csv:1")
        both = ("--column", "body", "--column", "tail")
        found = prefmix("contamination", name, "--against", "quiz.csv", *both, "--json").out
        assert found_in(found) == {"quiz.csv": (1, 1)}, "the columns of a row are read one after the other"


def test_a_data_set_on_the_hub_is_searched(prefmix: Prefmix, loopback_hub: LoopbackHub) -> None:
    lines("rows.jsonl", [pair(LONG), *clean(2)])
    loopback_hub.commit("some/pairs", {"README.md": b"# Pairs", "train.jsonl": Path("rows.jsonl").read_bytes()})
    document = json.loads(prefmix("contamination", "some/pairs", "--against", "quiz.csv", "--json").out)
    assert document["rows"] == {"pairs": 3}
    assert document["benchmarks"]["quiz.csv"]["sources"] == {"pairs": 1}


def test_rows_that_do_not_fit_are_told_and_not_counted(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [*clean(3), pair(LONG), {**pair(SHORT), "chosen": None}])
    said = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv")
    assert said.out.startswith("1 of 4 rows hold text of a benchmark\n")
    assert said.err == "warning: rows: 1 row does not fit its format, and was not searched\n"


# What is looked for


def test_without_fields_those_with_well_known_names_are_looked_for(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [pair(SHORT), pair(f"Is this right? {REASON}")])
    assert found_in(prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--json").out) == {
        "quiz.csv": (1, 1)
    }
    asked = ("--field", "question", "--field", "why")
    found = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", *asked, "--out", "found.jsonl", "--json")
    assert found_in(found.out) == {"quiz.csv": (1, 2)}
    assert {row["field"] for row in found_rows("found.jsonl")} == {"question", "why"}


def test_a_field_may_be_a_key_inside_a_column(prefmix: Prefmix) -> None:
    lines("nested.jsonl", [{"id": "1", "parts": {"text": [LONG]}}, {"id": "2", "parts": {"text": [REASON]}}])
    lines("rows.jsonl", [pair(LONG)])
    said = prefmix("contamination", "rows.jsonl", "--against", "nested.jsonl", "--field", "parts.text", "--json")
    assert found_in(said.out) == {"nested.jsonl": (1, 1)}


def test_a_mixture_on_the_hub_is_pulled_and_searched(
    prefmix: Prefmix, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    lines("pairs.jsonl", [*clean(5), pair(LONG)])
    build(prefmix, 'name = "mix"\n[sources.pairs]\npath = "pairs.jsonl"\n[splits]\ntest = 0\n')
    assert prefmix("push", "mix", "someone/mix", "-q").code == 0
    monkeypatch.setenv("PREFMIX_STORE", "elsewhere")
    said = prefmix("contamination", "hub:someone/mix@v1", "--against", "quiz.csv", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["rows"] == {"mix@v1/preference": 6}
    assert found_in(said.out) == {"quiz.csv": (1, 1)}
    assert str(open_mixture("mix", "elsewhere")) == "mix@v1"


def test_a_mixture_that_is_not_on_the_hub_is_an_error_of_the_hub(prefmix: Prefmix, loopback_hub: LoopbackHub) -> None:
    loopback_hub.commit("some/pairs", {"README.md": b"# Pairs"})
    for reference, words in (
        ("hub:some/nothing@v1", "some/nothing"),
        ("hub:some/pairs", "no mixture"),
        ("hub:x", "user/repo@v2"),
    ):
        said = prefmix("contamination", reference, "--against", "quiz.csv")
        assert said.code in (1, 2)
        assert words in said.err
        assert "No file or folder" not in said.err


def test_several_benchmarks_are_told_apart_and_a_suite_is_read_from_the_hub(
    prefmix: Prefmix, loopback_hub: LoopbackHub
) -> None:
    commit_suites(loopback_hub, ["truthfulqa", "mt_bench"], {"truthfulqa": {"question": LONG}})
    lines("rows.jsonl", [pair(LONG), pair(SHORT)])
    against = [word for name in ("truthfulqa", "quiz.csv", "mt_bench", "truthfulqa") for word in ("--against", name)]
    said = prefmix("contamination", "rows.jsonl", *against, "--json")
    assert found_in(said.out) == {"truthfulqa": (1, 1), "quiz.csv": (2, 2), "mt_bench": (0, 0)}
    assert json.loads(said.out)["benchmarks"]["truthfulqa"]["worst"][0]["item"] == "generation/validation:0"
    refused = prefmix("contamination", "rows.jsonl", "--against", "truthfulqa", "--field", "question")
    assert refused.code == 2
    assert "the suite truthfulqa has fields of its own" in refused.err


def test_answers_are_searched_when_that_is_asked_for(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [pair("Tell me about fruit.", REASON)])
    asked = ("contamination", "rows.jsonl", "--against", "quiz.csv", "--field", "why", "--out", "found.jsonl", "--json")
    assert found_in(prefmix(*asked).out) == {"quiz.csv": (0, 0)}
    assert found_in(prefmix(*asked, "--answers").out) == {"quiz.csv": (1, 1)}
    assert {row["part"] for row in found_rows("found.jsonl")} == {"chosen"}


def test_the_number_of_words_in_a_row_can_be_chosen(prefmix: Prefmix) -> None:
    half = " ".join(LONG.split()[:14])
    lines("rows.jsonl", [pair(f"{half} of the three lines today?")])
    for words, rows in ((13, 1), (14, 1), (15, 0)):
        said = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--ngram", words, "--json")
        assert found_in(said.out)["quiz.csv"] == (rows, rows), words
    assert prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--ngram", 0).code == 2


# What comes out


def found_rows(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_the_findings_are_written_in_three_formats_with_their_rows_and_words(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [*clean(2), pair(LONG), pair(SHORT)])
    for name in ("found.parquet", "found.jsonl", "found.csv"):
        said = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--out", name)
        assert said.code == 0
        assert said.out.endswith(f"\nwrote {name}  3 findings\n")
    table = pl.read_parquet("found.parquet")
    assert table.columns == [
        *("id", "source", "source_file", "source_row", "kind", "part"),
        *("benchmark", "item", "field", "rule", "coverage", "matched"),
    ]
    assert table.to_dicts() == found_rows("found.jsonl")
    assert pl.read_csv("found.csv").to_dicts() == found_rows("found.jsonl")
    assert table.select("source_row", "rule").rows() == [(2, "ngram"), (2, "containment"), (3, "whole")]
    assert not list(Path().glob(".*"))


def test_findings_that_cannot_be_written_leave_what_was_there(
    prefmix: Prefmix, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines("rows.jsonl", [pair(LONG)])
    Path("found.csv").write_text("mine")
    Path("taken.csv").mkdir()
    for path, said in (
        ("found.txt", "the name must end in .parquet, .jsonl, .csv"),
        ("there/is/none.csv", "there is no folder there/is"),
        ("taken.csv", "is a directory"),
    ):
        refused = prefmix("contamination", "rows.jsonl", "--against", "no benchmark", "--out", path)
        assert (refused.code, refused.out) == (2, ""), "before anything is searched"
        assert said in refused.err

    def full(frame: pl.DataFrame, path: Path) -> None:
        path.write_text("id,so")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_csv", full)
    refused = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--out", "found.csv")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "error: found.csv cannot be written: No space left on device.\n"
    assert Path("found.csv").read_text() == "mine"
    assert not list(Path().glob(".*"))


def test_fail_is_exit_code_3_after_the_page_and_names_what_was_found(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [pair(LONG)])
    lines("other.jsonl", [{"question": "Who has ever counted all the leaves of one tree in one day of May?"}])
    against = ("--against", "other.jsonl", "--against", "quiz.csv")
    said = prefmix("contamination", "rows.jsonl", *against, "--fail")
    assert said.code == 3
    assert said.out.startswith("1 of 1 rows hold text of a benchmark\n")
    assert said.err == "error: the data holds text of quiz.csv.\n"
    assert prefmix("contamination", "rows.jsonl", "--against", "other.jsonl", "--fail").code == 0
    as_json = prefmix("contamination", "rows.jsonl", *against, "--fail", "--json")
    assert (as_json.code, found_in(as_json.out)["quiz.csv"]) == (3, (1, 1))


# Errors


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["rows.jsonl"], 2, "Missing option '--against'"),
        (["--against", "quiz.csv"], 2, "Missing argument 'DATA...'"),
        (["rows.jsonl", "--against", "trutfulqa"], 1, "did you mean the suite truthfulqa?"),
        (["rows.jsonl", "--against", "hellaswag"], 1, "it is part of the suite gpt4all"),
        (
            ["rows.jsonl", "--against", "quizz.csv"],
            1,
            "quizz.csv: no such file, searched in . (there: quiz.csv); no suite",
        ),
        (["rows.jsonl", "--against", "quiz.csv", "--field", "Question"], 1, 'quiz.csv: no field "Question" '),
        (["rows.jsonl", "--against", "quiz.csv", "--field", "zz"], 1, "name one of them with --field"),
        (["row.jsonl", "--against", "quiz.csv"], 1, "row.jsonl: no such file, searched in "),
        (["row", "--against", "quiz.csv"], 1, "There is no mixture row in the store store."),
        (["row@v2", "--against", "quiz.csv"], 1, "No file or folder is called row@v2 either."),
        (
            ["quiz.csv", "--against", "quiz.csv"],
            1,
            "no format fits its columns (question, option1, option2, why): leave",
        ),
        (["quiz.csv", "--against", "quiz.csv", "--column", "zz"], 1, "name one of them with --column"),
    ],
)
def test_what_cannot_be_meant_is_told_with_what_can(prefmix: Prefmix, words: list[str], code: int, told: str) -> None:
    lines("rows.jsonl", clean(1))
    said = prefmix("contamination", *words)
    assert (said.code, said.out) == (code, "")
    assert told in said.err
    assert "recipe" not in said.err
    assert "`" not in said.err.replace("`prefmix build`", "")


def test_a_suite_that_is_out_of_reach_is_told_with_the_way_out(
    prefmix: Prefmix, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines("rows.jsonl", clean(1))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = prefmix("contamination", "rows.jsonl", "--against", "truthfulqa")
    assert (said.code, said.out) == (1, "")
    assert said.err.startswith("error: suite truthfulqa: truthfulqa/truthful_qa: offline (HF_HUB_OFFLINE)")
    assert said.err.endswith("a copy of your own can be named in its place\n")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = prefmix("contamination", "rows.jsonl", "--against", "truthfulqa")
    assert "http://127.0.0.1:9 is out of reach" in said.err


# As a build sees it


RECIPE = """\
name = "mix"
[sources.pairs]
path = "pairs.jsonl"
[sources.sft]
path = "sft.jsonl"
[filter]
default = "off"
[dedupe]
exact = "off"
[decontaminate]
suites = ["truthfulqa", "mt_bench"]
"""


@pytest.mark.parametrize("settings", [{}, {"answers": True}, {"ngram": 8}])
def test_what_is_found_is_what_a_build_drops_rows_for(
    prefmix: Prefmix, loopback_hub: LoopbackHub, settings: dict[str, object]
) -> None:
    planted = {"truthfulqa": TRUTHFULQA, "mt_bench": {"turns": SHORT}}
    commit_suites(loopback_hub, ["truthfulqa", "mt_bench"], planted)
    held = [
        LONG,
        LONG.replace("12 times", "11 times"),
        f"Hm. {SHORT}",
        SHORT,
        f"{LONG} {SHORT}",
        " ".join(LONG.split()[:10]),
    ]
    lines("pairs.jsonl", [*clean(5), *(pair(text, REASON, number) for number, text in enumerate([*held, "Fruit?"]))])
    lines("sft.jsonl", [{"instruction": text, "input": "Well?", "output": REASON} for text in [*held, "Why?"]])
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    build(prefmix, RECIPE + keys)
    mixture = open_mixture("mix", "store")

    asked = ["--against", "truthfulqa", "--against", "mt_bench", *(["--answers"] if "answers" in settings else [])]
    asked += ["--ngram", str(settings["ngram"])] if "ngram" in settings else []
    said = prefmix("contamination", "pairs.jsonl", "sft.jsonl", *asked, "--json", "--out", "found.parquet")
    document = json.loads(said.out)
    assert document["benchmarks"] == mixture.manifest["contamination"]
    assert document["rows"] == {name: entry["read"] for name, entry in mixture.manifest["sources"].items()}

    best = pl.read_parquet("found.parquet").unique(["kind", "source_row"], keep="first", maintain_order=True)
    told = {
        (row["source"], row["source_row"], row["id"]): (
            f"decontaminate/{row['benchmark']}",
            {"text": row["matched"], **{key: row[key] for key in ("item", "field", "part", "rule", "coverage")}},
        )
        for row in best.to_dicts()
    }
    ledger = {
        (row["source"], row["source_row"], row["id"]): (row["reason"], json.loads(row["detail"]))
        for row in mixture.drops.collect().to_dicts()
    }
    assert told == ledger
    assert len(ledger) > 8
    clean_ = prefmix("contamination", "mix", *asked, "--fail")
    assert clean_.code == 0, "the mixture has none of it left"


def test_the_function_gives_what_the_command_prints(prefmix: Prefmix) -> None:
    lines("rows.jsonl", [pair(LONG), pair(SHORT)])
    found = contamination("rows.jsonl", "quiz.csv", fields=["question"])
    said = prefmix("contamination", "rows.jsonl", "--against", "quiz.csv", "--field", "question", "--json")
    assert json.loads(said.out) == {"benchmarks": found.report, "rows": found.rows, "invalid": found.invalid}
    assert found.found.height == 3


def test_check_shows_the_benchmarks_with_where_they_are(prefmix: Prefmix, loopback_hub: LoopbackHub) -> None:
    commit_suites(loopback_hub, ["truthfulqa", "agieval"])
    lines("pairs.jsonl", clean(3))
    keys = 'suites = ["truthfulqa", "agieval"]\nagainst.quiz = { path = "quiz.csv", fields = ["question", "why"] }\n'
    Path("mix.toml").write_text(f'name = "mix"\n[sources.pairs]\npath = "pairs.jsonl"\n[decontaminate]\n{keys}')
    said = prefmix("check", "mix.toml")
    assert said.code == 0
    assert re.search(r"^  quiz +quiz\.csv: question, why$", said.out, re.MULTILINE)
    assert re.search(r"^  agieval +8 data sets on the Hub: query, choices$", said.out, re.MULTILINE)
    assert re.search(
        r"^  truthfulqa +truthfulqa/truthful_qa at [0-9a-f]{12}: question, best_answer,", said.out, re.MULTILINE
    )
    plan = json.loads(prefmix("check", "mix.toml", "--json").out)
    measured = plan["decontaminate"]["benchmarks"]
    assert list(measured) == ["truthfulqa", "agieval", "quiz"]
    assert measured["quiz"] == {"files": ["quiz.csv"], "fields": ["question", "why"], "revisions": {}}
    assert list(measured["truthfulqa"]["revisions"]) == ["truthfulqa/truthful_qa"]
    built = json.loads(prefmix("build", "mix.toml", "--dry-run", "--json").out)
    assert plan["recipe_digest"] == built["recipe_digest"]


def test_check_and_build_know_the_commit_of_a_benchmark_on_the_hub(prefmix: Prefmix, loopback_hub: LoopbackHub) -> None:
    commit_suites(loopback_hub, ["gsm8k"])
    lines("pairs.jsonl", clean(3))
    table = 'hub = "openai/gsm8k"\nconfig = "main"\nsplit = "test"\nfields = ["question"]\n'
    Path("mix.toml").write_text(
        f'name = "mix"\n[sources.pairs]\npath = "pairs.jsonl"\n[decontaminate.against.quiz]\n{table}'
    )
    plan, built = (json.loads(prefmix(*words, "mix.toml", "--json").out) for words in (["check"], ["build"]))
    assert plan["recipe_digest"] == built["recipe_digest"]


def test_check_tells_what_is_missing_of_the_benchmarks_with_its_line(
    prefmix: Prefmix, loopback_hub: LoopbackHub
) -> None:
    lines("pairs.jsonl", clean(3))
    Path("mix.toml").write_text(
        'name = "mix"\n[sources.pairs]\npath = "pairs.jsonl"\n\n[decontaminate]\nsuites = ["truthfulqa"]\n'
        '[decontaminate.against.quiz]\npath = "quiz.csv"\nfields = ["question", "choices"]\n'
        '[decontaminate.against.gone]\npath = "gone.csv"\nfields = ["question"]\n'
    )
    said = prefmix("check", "mix.toml")
    assert said.code == 1
    first, *problems = said.err.splitlines()
    assert first == "error: mix.toml has 3 problems"
    assert problems[0].startswith(
        "mix.toml:6: decontaminate.suites: suite truthfulqa: truthfulqa/truthful_qa: no such repo"
    )
    assert problems[0].endswith("name a copy of your own in [decontaminate.against.truthfulqa]")
    assert problems[1].startswith(
        'mix.toml:7: decontaminate.against.quiz: quiz.csv: no field "choices" (it has: question,'
    )
    assert problems[2].startswith("mix.toml:10: decontaminate.against.gone: gone.csv: no such file")
    assert prefmix("build", "mix.toml").code == 1


# Rows that are not in the mixture, on the screen


@pytest.fixture
def quickstart(versions: Path, prefmix: Prefmix, monkeypatch: pytest.MonkeyPatch) -> Prefmix:
    """A command line beside the store with the quickstart in it."""
    monkeypatch.setenv("PREFMIX_STORE", str(versions))
    return prefmix


def test_show_says_what_was_found_of_each_benchmark(quickstart: Prefmix) -> None:
    page = quickstart("show", "quickstart@v1")
    assert page.out.index("\nLengths") < page.out.index("\nText of benchmarks") < page.out.index("\nReported")
    assert "pubquiz 12 6 6 1.7% ━━━━━━━━━━━━ openhermes 2, orca 2, ultrafeedback 2" in page.words


def test_drops_of_a_benchmark_have_how_much_is_held_and_the_words(quickstart: Prefmix) -> None:
    page = quickstart("drops", "quickstart@v1", "--reason", "decontaminate")
    assert "6 of 344 rows read: it holds text of the benchmark pubquiz" in page.out
    assert re.search(r"^id +file:row +held  words of the benchmark$", page.out, re.MULTILINE)
    assert re.search(
        r"^[0-9a-f]{12}  quickstart/orca\.jsonl:123 +73\.7%  a gardener plants 6 rows of", page.out, re.MULTILINE
    )


def test_why_tells_of_a_row_that_held_a_benchmark_which_item_and_words(quickstart: Prefmix) -> None:
    page = quickstart("why", "quickstart@v1", "12 tulips do not come up")
    assert "  is not in quickstart@v1\n" in page.out
    assert "decontaminate/pubquiz it holds text of the benchmark pubquiz" in page.words
    assert "the prompt holds 74% of quickstart/benchmark.csv:2 (containment): “a gardener plants 6 rows" in page.words


def test_why_tells_of_a_near_duplicate_the_similarity_and_the_row_beside_it(quickstart: Prefmix) -> None:
    page = quickstart("why", "quickstart@v1", "work against bacteria but not against")
    assert (
        "dedupe/near its text is nearly that of another row Jaccard similarity 0.873 kept instead: 851019a5bc6b"
        in page.words
    )
    assert "orca · preference/train\n" in page.out
    assert re.search(r"^dropped +kept$", page.out, re.MULTILINE)
    kept = quickstart("why", "quickstart@v1", "851019a5bc6b")
    assert "instead of dedupe/near quickstart/ultrafeedback.jsonl:111" in kept.words


def test_the_words_that_one_of_two_rows_has_are_marked(quickstart: Prefmix) -> None:
    def marked(one: str, other: str) -> list[list[str]]:
        return [
            [page.plain[span.start : span.end] for span in page.spans if str(span.style).startswith("bold")]
            for page in texts._compared(one, other)
        ]

    assert marked("The sea is blue today.", "The sea was blue and calm today.") == [["is"], ["was", "and", "calm"]]
    assert marked("One text.", "Quite another sentence here.") == [[], []]
    start = "The same long beginning of both. " * 40
    assert marked(f"{start}It ends here.", f"{start}It ends there. And a word.")[0] == ["here."]
    assert marked(start + "x", start) == [["x"], []]
    one, _ = texts._compared(f"{start}It ends here.", f"{start}It ends there.")
    assert one.plain.startswith("(1,2")
    assert one.plain.endswith("It ends here.")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_pages_fit_the_width(
    quickstart: Prefmix, monkeypatch: pytest.MonkeyPatch, versions: Path, columns: int
) -> None:
    from prefmix.cli import screen

    shutil.copytree(versions.parent / "recipes", "recipes")
    narrow = Console(width=columns, highlight=False, soft_wrap=False, no_color=True)
    monkeypatch.setattr(
        screen, "_console", lambda stderr: narrow if not stderr else Console(stderr=True, width=columns)
    )
    for cached in (screen.out, screen.err):
        cached.cache_clear()
    try:
        for words in (
            ("drops", "quickstart@v1", "--reason", "decontaminate"),
            ("drops", "quickstart@v1", "--reason", "dedupe"),
            ("show", "quickstart@v1", "--sample", "9", "--reason", "dedupe/near"),
            ("contamination", "recipes/quickstart/orca.jsonl", "--against", "recipes/quickstart/benchmark.csv"),
        ):
            body = quickstart(*words).out.split("\nNext:")[0]
            assert body
            long = [
                line for line in body.splitlines() if len(line) > columns and not line.startswith(("--out", "quickst"))
            ]
            assert long == [], shlex.join(words)
    finally:
        for cached in (screen.out, screen.err):
            cached.cache_clear()
