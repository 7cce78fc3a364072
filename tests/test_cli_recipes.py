"""`prefmix check`, `schema`, `sources` and `init` as a user meets them."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hub.loopback import LoopbackHub

from prefmix.cli.main import run
from prefmix.cli.plans import rules_in_force
from prefmix.recipe import Filter, json_schema
from prefmix.sources import FORMATS

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"

Prefmix = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prefmix(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Prefmix:
    """Runs a command line in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def proposed(out: str) -> list[list[str]]:
    """The commands under "Next:"; on a wide screen two blanks part them from what they are for."""
    lines = out.splitlines()
    return [shlex.split(line.strip().partition("  ")[0]) for line in lines[lines.index("Next:") + 1 :]]


FIVE_MISTAKES = """\
name = "My Mix"

[sources.orca]
format = "orca_dpo_pair"
path = "data/*.jsonl"
tak = 100

[filter]
refusals = "remove"

[dedupe]
exact = "pairs"
"""


def test_five_mistakes_are_five_errors_with_lines_and_suggestions(prefmix: Prefmix, tmp_path: Path) -> None:
    Path("mix.toml").write_text(FIVE_MISTAKES)
    for command in ("check", "build"):
        code, out, err = prefmix(command, "mix.toml")
        assert (code, out) == (2, "")
        assert err.splitlines() == [
            "error: mix.toml has 5 problems",
            """mix.toml:1: name: expected a name of lower-case letters, digits, '.', '_' and '-', got "My Mix\"""",
            'mix.toml:4: sources.orca.format: no format is called "orca_dpo_pair" (did you mean `orca_dpo_pairs`?)',
            "mix.toml:6: sources.orca.tak: unknown key (did you mean `take`?)",
            'mix.toml:9: filter.refusals: expected "drop", "report" or "off", got "remove"',
            'mix.toml:12: dedupe.exact: expected "pair", "prompt" or "off", got "pairs" (did you mean "pair"?)',
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["mix.toml"]


def test_problems_as_json_have_key_line_message_and_hint(prefmix: Prefmix) -> None:
    Path("mix.toml").write_text(FIVE_MISTAKES)
    code, out, err = prefmix("check", "mix.toml", "--json")
    assert (code, err) == (2, "")
    told = json.loads(out)
    assert (told["ok"], len(told["problems"])) == (False, 5)
    assert told["problems"][2] == {
        "key": "sources.orca.tak",
        "line": 6,
        "message": "unknown key",
        "hint": "did you mean `take`?",
    }


def test_a_format_that_does_not_exist_is_the_only_problem_of_a_recipe_that_is_right_otherwise(prefmix: Prefmix) -> None:
    Path("mix.toml").write_text('name = "mix"\n[sources.a]\nformat = "alpaca"\npath = "a.jsonl"\n')
    code, _, err = prefmix("check", "mix.toml")
    assert code == 2
    assert err.startswith(
        'error: mix.toml:3: sources.a.format: no format is called "alpaca" (there are: orca_dpo_pairs'
    )


def test_inputs_that_are_not_there_are_told_together(prefmix: Prefmix) -> None:
    Path("good.jsonl").write_text('{"instruction": "Say hi.", "output": "Hi."}\n')
    Path("odd.jsonl").write_text('{"a": "b"}\n')
    Path("mix.toml").write_text(
        'name = "mix"\n[sources.gone]\npath = "gone.jsonl"\n[sources.good]\npath = "good.jsonl"\n'
        '[sources.odd]\npath = "odd.jsonl"\n[format]\ntokenizer = "good.jsonl/none"\n'
    )
    code, _, err = prefmix("check", "mix.toml", "--set", "format.tokenizer=.")
    assert code == 1
    first, gone, odd, tokenizer = err.splitlines()
    assert first == "error: mix.toml has 3 problems"
    assert gone.startswith("mix.toml:2: sources.gone: gone.jsonl: no such file")
    assert odd.startswith("mix.toml:6: sources.odd: no format fits the columns a of odd.jsonl")
    assert tokenizer.startswith("mix.toml:9: format.tokenizer: ")
    assert "has no tokenizer.json" in tokenizer


def test_a_system_prompt_with_a_special_token_is_a_problem_of_the_recipe(prefmix: Prefmix) -> None:
    text = QUICKSTART.read_text() + '\n[format]\nsystem = "<|im_end|>"\n'
    Path("mix.toml").write_text(f"root = {json.dumps(str(QUICKSTART.parent))}\n{text}")
    code, _, err = prefmix("check", "mix.toml")
    lines = Path("mix.toml").read_text().splitlines()
    assert code == 2
    assert err.splitlines()[0].startswith(f"error: mix.toml:{len(lines)}: format.system: ")


def test_a_good_recipe_is_answered_with_its_plan(prefmix: Prefmix, tmp_path: Path) -> None:
    code, out, err = prefmix("check", QUICKSTART, "--set", "filter.max_chars=9000")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert text.startswith(f"quickstart {QUICKSTART} can be built 3 sources, ")
    assert "orca preference orca_dpo_pairs 42.5 kB" in text
    assert "orca quickstart/orca.jsonl" in text
    assert "languages (en), max_chars (answer 9,000) report disclaimers, placeholders, cut_off off min_score," in text
    assert "prompts that hold text of pubquiz quickstart/benchmark.csv: question, option1, option2 dedupe" in text
    assert "near-duplicates by prompt+chosen, Jaccard similarity from 0.8 mix" in text
    assert "splits test 0.05, the rest is train" in text
    assert proposed(out)[-1] == ["prefmix", "build", str(QUICKSTART), "--set", "filter.max_chars=9000"]
    assert list(tmp_path.iterdir()) == []


def test_the_plan_as_json_has_files_with_bytes_and_rows_where_they_are_cheap(prefmix: Prefmix) -> None:
    pl.DataFrame({"instruction": ["Say hi.", "Say yes."], "output": ["Hi.", "Yes."]}).write_parquet("a.parquet")
    Path("mix.toml").write_text(
        'name = "mix"\n[sources.a]\npath = "a.parquet"\ntake = 1\n[sources.b]\npath = "b.jsonl"\n'
    )
    Path("b.jsonl").write_text('{"prompt": "Say no.", "completion": "No."}\n')
    code, out, _ = prefmix("check", "mix.toml", "--json")
    plan = json.loads(out)
    assert (code, plan["ok"], plan["problems"]) == (0, True, [])
    a, b = plan["sources"]["a"], plan["sources"]["b"]
    assert (a["format"], a["sniffed"], a["kind"], a["rows"], a["take"]) == ("openhermes", True, "sft", 2, 1)
    assert a["files"] == [{"path": "a.parquet", "bytes": Path("a.parquet").stat().st_size}]
    assert (b["format"], b["rows"], b["bytes"]) == ("messages", None, Path("b.jsonl").stat().st_size)


def test_the_plan_of_a_recipe_over_the_hub_names_the_commit(prefmix: Prefmix, loopback_hub: LoopbackHub) -> None:
    rows = b'{"question": "What is 1 + 1?", "chosen": "2", "rejected": "3"}\n'
    commit = loopback_hub.commit("someone/pairs", {"README.md": b"# Pairs", "train.jsonl": rows})
    Path("mix.toml").write_text('name = "mix"\n[sources.a]\nhub = "someone/pairs"\n')
    code, out, _ = prefmix("check", "mix.toml")
    assert code == 0
    assert f"someone/pairs at {commit[:12]}: train.jsonl" in out
    code, _, err = prefmix("check", "mix.toml", "--set", "sources.a.hub=someone/else")
    assert code == 1
    assert err.startswith("error: mix.toml:2: sources.a: someone/else: no such repository")


@pytest.mark.parametrize(
    "settings",
    [
        Filter(),
        Filter(default="off"),
        Filter.model_validate({"min_margin": "report", "on_inverted": "swap", "injection": "strip", "max_tokens": 20}),
        Filter.model_validate({"min_chars": 5, "max_chars": {"prompt": 10, "total": 20}, "max_length_ratio": 2.5}),
    ],
)
def test_every_filter_key_stands_once_in_the_rules_in_force(settings: Filter) -> None:
    rules = rules_in_force(settings)
    named = [rule.partition(" ")[0] for group in rules.values() for rule in group]
    assert sorted(named) == sorted(key for key in Filter.model_fields if key != "default")


def test_rules_in_force_say_what_they_do() -> None:
    rules = rules_in_force(
        Filter.model_validate(
            {"default": "off", "empty": "drop", "on_inverted": "swap", "cut_off": "report", "max_tokens": 2048}
        )
    )
    assert (rules["drop"], rules["change"], rules["report"]) == (
        ["empty", "max_tokens (2,048)"],
        ["on_inverted (swap)"],
        ["cut_off"],
    )


def test_the_schema_is_printed_or_written(prefmix: Prefmix) -> None:
    code, out, _ = prefmix("schema")
    assert (code, json.loads(out)) == (0, json_schema())
    code, out, err = prefmix("schema", "--out", "schema.json")
    assert (code, out, err) == (0, "", "wrote schema.json\n")
    assert json.loads(Path("schema.json").read_text()) == json_schema()
    code, _, err = prefmix("schema", "--out", "no/folder/schema.json")
    assert code == 2
    assert "cannot be written" in err


def test_the_list_of_formats_has_every_format_with_its_columns(prefmix: Prefmix) -> None:
    code, out, _ = prefmix("sources")
    assert code == 0
    for name in FORMATS:
        assert name in out
    assert "question, chosen, rejected (system)" in out
    listed = json.loads(prefmix("sources", "--json")[1])
    assert [entry["name"] for entry in listed] == list(FORMATS)
    openhermes = next(entry for entry in listed if entry["name"] == "openhermes")
    assert openhermes["layouts"] == [
        {
            "kind": "sft",
            "columns": {"instruction": "text", "output": "text"},
            "optional": {"input": "text", "system": "text"},
        }
    ]


@pytest.mark.parametrize(
    ("name", "formats", "card"),
    [
        ("orca_dpo_pairs", ["orca_dpo_pairs"], "orca_dpo_pairs"),
        ("Intel/orca_dpo_pairs", ["orca_dpo_pairs"], "orca_dpo_pairs"),
        ("ultrafeedback_binarized", ["ultrafeedback_binarized"], "ultrafeedback"),
        ("openbmb/UltraFeedback", ["ultrafeedback_binarized", "ultrafeedback"], "ultrafeedback"),
        ("messages", ["messages"], None),
    ],
)
def test_a_format_or_a_data_set_is_shown_with_its_data_card(
    prefmix: Prefmix, name: str, formats: list[str], card: str | None
) -> None:
    code, out, _ = prefmix("sources", name)
    assert code == 0
    text = (ROOT / "data_cards" / f"{card}.md").read_text().partition("\n---\n")[2].strip() if card else ""
    assert text in out
    told = json.loads(prefmix("sources", name, "--json")[1])
    assert [entry["name"] for entry in told["formats"]] == formats
    assert [entry["name"] for entry in told["cards"]] == ([card] if card else [])


def test_an_unknown_format_is_told_the_nearest_name(prefmix: Prefmix) -> None:
    code, _, err = prefmix("sources", "Intel/orca_pairs")
    assert code == 2
    assert "Did you mean Intel/orca_dpo_pairs?" in err
    assert "options.rejected" in prefmix("sources", "ultrafeedback")[1]


def test_init_copies_a_shipped_recipe_with_its_data_and_overwrites_nothing(prefmix: Prefmix) -> None:
    code, out, err = prefmix("init", "--recipe", "quickstart")
    assert (code, err) == (0, "")
    assert out.startswith("wrote quickstart.toml and its data, 5 files in quickstart\n")
    assert Path("quickstart.toml").read_bytes() == QUICKSTART.read_bytes()
    Path("quickstart/orca.jsonl").write_text("mine")
    code, _, err = prefmix("init", "--recipe", "quickstart")
    assert code == 2
    assert "quickstart.toml and 5 more are there already" in err
    assert Path("quickstart/orca.jsonl").read_text() == "mine"
    assert prefmix("init", "--recipe", "quickstart", "--force", "-q") == (0, "", "")
    assert prefmix("build", "quickstart.toml", "-q")[1] == "quickstart@v1\n"


def test_init_puts_the_data_of_a_shipped_recipe_beside_it(prefmix: Prefmix) -> None:
    assert prefmix("init", "--recipe", "quickstart", "--out", "sub/mine.toml")[0] == 0
    assert prefmix("build", "sub/mine.toml", "-q")[1] == "quickstart@v1\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--recipe", "quikstart"],
            "Did you mean quickstart? There are: dpopenhermes, dpopenhermes-original, quickstart, smollm2.",
        ),
        (["--recipe", "quickstart", "a.jsonl"], "either DATA or --recipe, not both."),
        (
            ["--out", "there.toml", "a.jsonl"],
            "there.toml is there already. Give another --out, or --force to overwrite.",
        ),
    ],
)
def test_init_refuses_what_cannot_be_meant(prefmix: Prefmix, arguments: list[str], said: str) -> None:
    Path("there.toml").write_text("")
    code, _, err = prefmix("init", *arguments)
    assert code == 2
    assert said in err


def test_init_writes_a_recipe_for_the_files_of_the_current_folder(prefmix: Prefmix) -> None:
    prefmix("init", "--recipe", "quickstart", "-q")
    Path("quickstart").rename("data")
    Path("quickstart.toml").unlink()
    code, out, err = prefmix("init", "--out", "mine.toml")
    assert code == 0
    assert out.startswith("wrote mine.toml  3 sources\n")
    left_out = [line.split(" no format fits")[0] for line in err.splitlines()]
    assert left_out == [f"warning: left out: data/{name}:" for name in ("benchmark.csv", "defects.json")]
    assert list(tomllib.loads(Path("mine.toml").read_text())["sources"]) == ["openhermes", "orca", "ultrafeedback"]
    assert [command[:2] for command in proposed(out)] == [["prefmix", name] for name in ("check", "build", "build")]
    for command in proposed(out):
        assert prefmix(*command[1:])[0] == 0, command


def test_init_without_any_data_says_what_can_be_given(prefmix: Prefmix) -> None:
    code, _, err = prefmix("init")
    assert code == 1
    assert "no data files in" in err
    assert "--recipe" in err


def test_init_names_the_recipe_after_its_only_source(prefmix: Prefmix) -> None:
    Path("Hello World.jsonl").write_text('{"prompt": "Say hi.", "completion": "Hi."}\n')
    code, out, _ = prefmix("init", "Hello World.jsonl")
    assert code == 0
    assert out.startswith("wrote hello_world.toml  1 source\n")
    assert tomllib.loads(Path("hello_world.toml").read_text())["sources"]["Hello_World"]["path"] == "Hello World.jsonl"


def test_init_reads_data_sets_on_the_hub(prefmix: Prefmix, loopback_hub: LoopbackHub) -> None:
    rows = b'{"question": "What is 1 + 1?", "chosen": "2", "rejected": "3"}\n'
    commit = loopback_hub.commit("Intel/orca_dpo_pairs", {"README.md": b"# Pairs", "train.jsonl": rows})
    code, _, err = prefmix("init", "Intel/orca_dpo_pairs")
    assert (code, err) == (0, "")
    text = Path("orca_dpo_pairs.toml").read_text()
    assert tomllib.loads(text)["sources"]["orca_dpo_pairs"]["hub"] == "Intel/orca_dpo_pairs"
    assert commit in text
    assert prefmix("build", "orca_dpo_pairs.toml", "-q", "--dry-run")[0] == 0


def test_init_says_of_a_file_that_no_format_fits_what_comes_nearest(prefmix: Prefmix) -> None:
    Path("mine.csv").write_text("id,query,good,bad\n1,What is 1 + 1?,2,3\n")
    code, _, err = prefmix("init", "mine.csv")
    assert code == 1
    assert err.startswith("error: mine.csv: no format fits the columns id, query, good, bad. Nearest: format = ")
    assert 'format = "orca_dpo_pairs", columns = { question = "query", chosen = "good", rejected = "bad" }' in err
    assert not Path("mine.toml").exists()
