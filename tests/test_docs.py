"""The documentation is what the code says: generated parts are up to date, examples do what is shown."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from prefmix.cli.main import run
from prefmix.errors import RecipeError
from prefmix.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def make_docs():
    """scripts/make_docs.py as a module."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_docs"] = module
    spec.loader.exec_module(module)
    return module


MAKE_DOCS = make_docs()


def blocks(page, language):
    """The fenced blocks of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", MAKE_DOCS.PAGES)
def test_generated_parts_are_up_to_date(page):
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert MAKE_DOCS.PAGES[page](written) == written, "run python scripts/make_docs.py"


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="no marks for 'reference'"):
        MAKE_DOCS.recipes("# Recipes\n")


def test_the_example_recipe_loads_and_the_wrong_one_is_told_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, tables, wrong = blocks("recipes.md", "toml")
    (output,) = blocks("recipes.md", "text")
    Path("mymix.toml").write_text(good)
    assert (
        load_recipe("mymix.toml", ["sources.mine.take=100", "filter.min_margin=report"]).filter.min_margin == "report"
    )
    Path("mymix.toml").write_text(good + tables)
    recipe = load_recipe("mymix.toml")
    assert recipe.dedupe.near == load_recipe("mymix.toml", ["dedupe.near={}"]).dedupe.near
    assert (recipe.decontaminate.suites, list(recipe.decontaminate.against)) == (["truthfulqa", "gsm8k"], ["exam"])
    Path("mymix.toml").write_text(wrong)
    with pytest.raises(RecipeError) as caught:
        load_recipe("mymix.toml")
    assert str(caught.value) == output.strip()


def test_the_reference_names_every_key_and_table():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for heading in (
        "Top level",
        "`[sources.<name>]`",
        "`[dedupe.near]`",
        "`[decontaminate.against.<name>]`",
        "`[[train.stages]]`",
    ):
        assert f"### {heading}" in text
    for key in ("seed", "where", "max_answer_tokens", "shingle_unit", "fields", "min_stop_rate", "label_smoothing"):
        assert f"| `{key}` |" in text


def documented_keys(command):
    """The keys that docs/cli.md gives for the JSON of a command."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `{command}"))
    return re.findall(r"`(\w+)`", row.split(" | ")[1].partition(";")[0])


RECIPE = str(ROOT / "recipes" / "quickstart.toml")
BENCHMARK = str(ROOT / "recipes" / "quickstart" / "benchmark.csv")


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("build --json", ["build", RECIPE, "--store", "."]),
        ("build --dry-run --json", ["build", RECIPE, "--dry-run"]),
        ("check --json", ["check", RECIPE]),
        ("show MIXTURE --json", ["show", "quickstart"]),
        ("show MIXTURE --sample N --json", ["show", "quickstart", "--sample", "2"]),
        ("diff A B --json", ["diff", "quickstart@v1", "quickstart@v2"]),
        ("drops MIXTURE --json", ["drops", "quickstart"]),
        ("why MIXTURE ID-OR-TEXT --json", ["why", "quickstart", "egg"]),
        ("contamination --json", ["contamination", "quickstart", "--against", BENCHMARK]),
        ("list --json", ["list"]),
        ("sources --json", ["sources"]),
        ("sources NAME --json", ["sources", "orca_dpo_pairs"]),
    ],
)
def test_json_documents_have_the_keys_that_the_page_gives(shown, words, versions, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFMIX_STORE", str(versions))
    assert run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document[0] if isinstance(document, list) else document) == documented_keys(shown)


def test_the_report_on_benchmarks_of_the_python_page_is_what_is_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = (block for block in blocks("python.md", "python") if "contamination" in block)
    names = {}
    exec(example, names)
    assert names["report"]["rows"] == 2
    assert names["found"].found.height == 3
    assert (
        f"# {names['report']['items']} items, {names['report']['touched']} of them in {names['report']['rows']} rows"
        in example
    )
