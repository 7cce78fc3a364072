"""Starter recipes: they load, build, and read just the files that were named."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmix.build import curate, plan
from prefmix.errors import SourceError, UsageError
from prefmix.recipe import load_recipe, shipped_recipes
from prefmix.sources import FORMATS
from prefmix.starter import Starter, data_cards, shipped_files, starter_recipe
from prefmix.starter.lines import one_line, toml
from prefmix.starter.nearest import nearest_formats

#: One row in each format, as upstream has it.
ROWS: dict[str, dict[str, object]] = {
    "orca_dpo_pairs": {"system": "", "question": "What is 1 + 1?", "chosen": "It is 2.", "rejected": "It is 3."},
    "ultrafeedback": {
        "instruction": "What is 1 + 1?",
        "completions": [{"response": "2", "overall_score": 9.0}, {"response": "3", "overall_score": 2.0}],
    },
    "openhermes": {"instruction": "Say hi.", "input": "", "output": "Hi."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}]},
    "hh_rlhf": {
        "chosen": "\n\nHuman: What is 1 + 1?\n\nAssistant: It is 2.",
        "rejected": "\n\nHuman: What is 1 + 1?\n\nAssistant: It is 3.",
    },
    "messages": {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
    "ultrafeedback_binarized": {
        "instruction": "What is 1 + 1?",
        "chosen_response": "It is 2.",
        "rejected_response": "It is 3.",
        "chosen_avg_rating": 5.0,
        "rejected_avg_rating": 1.0,
    },
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, row: Mapping[str, object] = ROWS["openhermes"]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def tables(starter: Starter) -> dict[str, dict[str, object]]:
    return tomllib.loads(starter.text)["sources"]


def files_read(text: str, folder: str = ".") -> list[str]:
    """The files that a recipe reads, relative to the current folder."""
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder, "starter.toml")
    path.write_text(text, encoding="utf-8")
    found = [each.path.resolve() for source in plan(load_recipe(path)).sources.values() for each in source.files]
    return sorted(each.relative_to(Path.cwd().resolve()).as_posix() for each in found)


def test_every_format_has_an_example_here() -> None:
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_starter_recipe_names_the_format_of_its_file_and_builds(name: str) -> None:
    starter = starter_recipe([write(f"{name}.jsonl", ROWS[name])], Path())
    assert tables(starter)[name]["format"] == name
    Path("starter.toml").write_text(starter.text)
    curated = curate(plan(load_recipe("starter.toml")))
    assert sum(frame.height for frame in curated.kept.values()) == 1


def test_every_option_of_a_starter_recipe_is_valid_when_its_mark_is_removed() -> None:
    names = ["orca_dpo_pairs", "ultrafeedback_binarized", "openhermes", "messages"]
    starter = starter_recipe([write(f"{name}.jsonl", ROWS[name]) for name in names], Path())
    options = re.findall(r"^#(?=[^ ]).*", starter.text, re.MULTILINE)
    assert len(options) > 15
    Path("starter.toml").write_text(re.sub(r"^#(?=[^ ])", "", starter.text, flags=re.MULTILINE))
    recipe = load_recipe("starter.toml")
    assert recipe.mix.preference == {"orca_dpo_pairs": 1, "ultrafeedback_binarized": 1}
    assert (recipe.filter.max_tokens, recipe.dedupe.prompt_cap, recipe.sources["orca_dpo_pairs"].take) == (
        2048,
        4,
        5000,
    )
    where = recipe.sources["orca_dpo_pairs"].where
    assert where
    assert pl.DataFrame(ROWS["orca_dpo_pairs"]).filter(pl.sql_expr(where)).height == 1


def test_what_is_not_named_has_the_defaults() -> None:
    Path("starter.toml").write_text(starter_recipe([write("a.jsonl")], Path()).text)
    Path("bare.toml").write_text('name = "a"\n[sources.a]\nformat = "openhermes"\npath = "a.jsonl"\n')
    assert load_recipe("starter.toml").digest() == load_recipe("bare.toml").digest()


def test_the_comments_say_what_was_seen() -> None:
    pl.DataFrame([{**ROWS["openhermes"], "topic": "hello"}] * 1234).write_parquet("a.parquet")
    text = starter_recipe(["a.parquet"], Path()).text
    assert "# sft rows; columns that are read: instruction, input, output\n" in text
    assert text.count("# columns that are not read: topic\n") == 1
    assert "# 1,234 rows\n" in text


@pytest.mark.parametrize(
    ("given_names", "sources"),
    [
        (["a.jsonl", "b.jsonl"], {"a": "a.jsonl", "b": "b.jsonl"}),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], {"part": "part*.jsonl"}),
        (
            ["d/train-0.jsonl", "d/train-1.jsonl", "d/test-0.jsonl"],
            {"train": "d/train*.jsonl", "d": "d/test-0.jsonl"},
        ),
        (["x/a.jsonl", "y/a.jsonl"], {"a": "x/a.jsonl", "a_2": "y/a.jsonl"}),
        (["t0_p3.jsonl"], {"t0_p3": "t0_p3.jsonl"}),
        (["pairs/data/train-00000-of-00001.jsonl"], {"pairs": "pairs/data/train-00000-of-00001.jsonl"}),
        (["tokenizer.jsonl"], {"tokenizer_2": "tokenizer.jsonl"}),
        (["my data.v2.jsonl"], {"my_data_v2": "my data.v2.jsonl"}),
    ],
)
def test_files_that_differ_only_in_numbers_are_one_source(given_names: list[str], sources: dict[str, str]) -> None:
    starter = starter_recipe([write(name) for name in given_names], Path())
    assert {name: table["path"] for name, table in tables(starter).items()} == sources
    assert files_read(starter.text) == sorted(given_names)


def test_a_pattern_is_written_only_where_it_means_just_the_files_that_were_named() -> None:
    for number in range(3):
        write(f"part-{number}.jsonl")
    starter = starter_recipe(["part-0.jsonl", "part-2.jsonl"], Path())
    assert tables(starter)["part"]["path"] == ["part-0.jsonl", "part-2.jsonl"]
    assert files_read(starter.text) == ["part-0.jsonl", "part-2.jsonl"]


@pytest.mark.parametrize("named", ["data", "data/**/*.jsonl"])
def test_of_a_folder_with_splits_the_train_split_is_taken_and_the_others_are_named(named: str) -> None:
    kept = [write(f"data/{name}") for name in ("train-0.jsonl", "train-1.jsonl", "more/extra.jsonl")]
    for name in ("test-0.jsonl", "validation.jsonl"):
        write(f"data/{name}")
    starter = starter_recipe([named], Path())
    assert files_read(starter.text) == sorted(kept)
    assert [each.beside for each in starter.found if each.beside] == [("test-0.jsonl", "validation.jsonl")]
    assert "# other splits, left aside: test-0.jsonl, validation.jsonl\n" in starter.text


def test_paths_are_relative_to_the_recipe_unless_they_were_named_absolutely() -> None:
    write("data/a.jsonl")
    relative = starter_recipe(["data/a.jsonl"], Path("recipes"))
    assert tables(relative)["a"]["path"] == "../data/a.jsonl"
    assert files_read(relative.text, "recipes") == ["data/a.jsonl"]
    absolute = starter_recipe([str(Path("data/a.jsonl").resolve())], Path("recipes"))
    assert tables(absolute)["a"]["path"] == Path("data/a.jsonl").resolve().as_posix()


def test_a_mixture_is_read_back_by_its_train_splits(versions: Path) -> None:
    (folder,) = {path.parent for path in (versions / "quickstart").glob("*/mixture.json") if has_label(path, "v1")}
    starter = starter_recipe([str(folder)], Path())
    assert {name: table["format"] for name, table in tables(starter).items()} == {
        "preference": "messages",
        "sft": "messages",
    }
    assert all("train-" in str(table["path"]) for table in tables(starter).values())


def has_label(manifest: Path, label: str) -> bool:
    return json.loads(manifest.read_text())["version"] == label


def test_a_file_that_no_format_fits_stays_as_a_comment_with_a_suggestion() -> None:
    write("a.jsonl")
    write("odd.jsonl", {"query": "What is 1 + 1?", "good": "2", "bad": "3", "id": "x\ny"})
    starter = starter_recipe(["a.jsonl", "odd.jsonl"], Path())
    (left,) = starter.left_out
    assert left.reason.startswith("odd.jsonl: no format fits the columns query, good, bad, id. Nearest: format = ")
    Path("starter.toml").write_text(starter.text)
    assert list(load_recipe("starter.toml").sources) == ["a"]
    Path("starter.toml").write_text(
        re.sub(r"^#(?=\[sources.odd|format|columns|path)", "", starter.text, flags=re.MULTILINE)
    )
    curated = curate(plan(load_recipe("starter.toml")))
    assert sum(frame.height for frame in curated.kept.values()) == 2


def test_a_file_that_cannot_be_read_is_left_out_with_the_reason() -> None:
    write("a.jsonl")
    Path("b.parquet").write_bytes(b"PAR1 not really")
    starter = starter_recipe(["a.jsonl", "b.parquet"], Path())
    assert "b.parquet: the file is truncated, corrupt or not what its name says" in starter.left_out[0].reason
    with pytest.raises(SourceError, match=r"b\.parquet: the file is truncated"):
        starter_recipe(["b.parquet"], Path())


@pytest.mark.parametrize(
    ("columns", "first"),
    [
        (["query", "good", "bad"], ("orca_dpo_pairs", {"question": "query", "chosen": "good", "rejected": "bad"})),
        (["prompt", "Chosen", "Rejected"], ("messages", {"chosen": "Chosen", "rejected": "Rejected"})),
        (["prompt", "response"], ("messages", {"completion": "response"})),
        (["question", "answer"], ("openhermes", {"instruction": "question", "output": "answer"})),
        (["conversation"], None),
        (["a", "b", "c"], None),
    ],
)
def test_the_nearest_format_needs_the_fewest_new_names(
    columns: Sequence[str], first: tuple[str, dict[str, str]] | None
) -> None:
    nearest = nearest_formats({name: pl.String() for name in columns})
    assert (nearest[0] if nearest else None) == first


def test_a_suggestion_never_names_a_column_of_another_type_or_one_twice() -> None:
    turn = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    (name, renames), *_ = nearest_formats({"conversation": turn, "prompt": pl.Int64()})
    assert (name, renames) == ("messages", {"messages": "conversation"})
    for _, renames in nearest_formats({"prompt": pl.String(), "answer": pl.String(), "chosen": pl.String()}):
        there = [column for column in renames.values() if column != "..."]
        assert len(there) == len(set(there))


@given(st.text())
def test_any_text_is_a_toml_string_and_fits_on_a_line(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    assert tomllib.loads(f"key = {toml(text)} # {one_line(text)}") == {"key": text}


def test_data_cards_are_found_and_speak_of_formats_that_exist() -> None:
    cards = data_cards()
    assert {card.name for card in cards} == {
        path.stem for path in (Path(__file__).parents[1] / "data_cards").glob("*.md")
    }
    for card in cards:
        assert set(card.formats) <= FORMATS.keys()
        assert card.text.startswith("# ")


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_files_of_a_shipped_recipe_are_all_that_it_needs(name: str) -> None:
    files = shipped_files(name)
    recipe = load_recipe(files[f"{name}.toml"])
    assert {source.path for source in recipe.sources.values() if source.path} <= files.keys()


def test_an_unknown_recipe_is_told_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"Did you mean quickstart\? There are: dpopenhermes, "):
        shipped_files("quick-start")
