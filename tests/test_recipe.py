"""Recipes: what loads, what is refused and in which words, what the digest sees."""

import copy
import doctest
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prefmix.errors import RecipeError
from prefmix.recipe import (
    Chars,
    DpoStage,
    Filter,
    Recipe,
    SftStage,
    Source,
    json_schema,
    load_recipe,
    problems,
    shipped_recipes,
)
from prefmix.recipe.model import RULES
from prefmix.recipe.problems import inlined
from prefmix.recipe.toml_lines import key_lines

ROOT = Path(__file__).parents[1]

#: Every key that a recipe can have (a dpo and an sft stage, a source and a benchmark of each kind).
FULL = """\
name = "dpopenhermes"
seed = 7
license = "apache-2.0"

[sources.orca]
format = "orca_dpo_pairs"
hub = "Intel/orca_dpo_pairs"
revision = "3fb5a1d"
columns = { question = "prompt" }
split = "train"
where = "source != 'truthful_qa'"
exclude = "ids.parquet"
take = 5000
repeat = 2
license = "apache-2.0"
options = { swap = true, system = "You are.", limit = 3, share = 0.5 }

[sources.mine]
path = ["data/*.jsonl.gz", "more.csv"]
take = 0.5

[filter]
default = "on"
empty = "report"
identical = "off"
min_margin = 1.0
on_inverted = "swap"
roles = "report"
injection = "strip"
refusals = "report"
disclaimers = "drop"
placeholders = "drop"
cut_off = "off"
languages = ["en", "de"]
min_score = 6.0
min_chars = 10
max_chars = { prompt = 4000, answer = 8000, total = 10000 }
max_length_ratio = 10
max_prompt_tokens = 1024
max_answer_tokens = 1024
max_tokens = 2048

[dedupe]
exact = "prompt"
prompt_cap = 4
near = { threshold = 0.7, shingle = 3, shingle_unit = "char", permutations = 256, recall = 0.95, on = "prompt" }
across = true

[decontaminate]
ngram = 8
suites = ["truthfulqa", "gsm8k"]
answers = true
[decontaminate.against.mine]
path = "benchmarks/mine/*.csv"
fields = ["Question"]
[decontaminate.against.theirs]
hub = "openai/gsm8k"
revision = "v1"
config = "main"
split = "test"
fields = ["question", "answer"]

[format]
template = "chatml"
layout = "messages"
system = "You are a helpful assistant."
tokenizer = "teknium/OpenHermes-2.5-Mistral-7B"
tokenizer_revision = "abc"

[mix]
preference = { orca = 1, mine = 0.5 }
sft = { mine = 1 }
preference_rows = 40000
sft_rows = 7000
allow_repeat = true

[splits]
test = 0.02
validation = 0.01

[train]
base = "teknium/OpenHermes-2.5-Mistral-7B"
base_revision = "def"
output = "out"
quantization = "none"
dtype = "float32"
adapter = "lora"
add_tokens = true
packing = false
gradient_checkpointing = true
lora = { r = 16, alpha = 32, dropout = 0.0, target = ["q_proj", "v_proj"] }
eos = { min_stop_rate = 0.9, on_fail = "repair", prompts = 16, max_new_tokens = 128 }

[[train.stages]]
name = "dpo"
method = "dpo"
subset = "preference"
epochs = 0.6
max_steps = 100
rows = 1000
batch_size = 16
token_budget = 16384
learning_rate = 5e-7
scheduler = "linear"
warmup_ratio = 0.05
beta = 0.2
loss = ["robust", "sft"]
loss_weights = [1.0, 0.1]
label_smoothing = 0.1
max_length = 1024
eval_every = 50
checkpoint_every = 100
eval = ["truthfulqa"]

[[train.stages]]
name = "eos"
method = "sft"
subset = "sft"
rows = 7000
epochs = 1
learning_rate = 5e-6
if_needed = true
"""
SMALL = 'name = "small"\n[sources.a]\npath = "a.jsonl"\n'

SEED = "expected a whole number of at least 0 and below 9223372036854775808"


@pytest.fixture
def load(tmp_path):
    """Loads a text as a recipe."""

    def load(text, *overrides):
        (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "recipe.toml", overrides)

    return load


@pytest.fixture
def refuse(load):
    """The problems of a text that is refused, as (key, line, message, hint)."""

    def refuse(text, *overrides):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        found = [(p.key, p.line, p.message, p.hint) for p in caught.value.problems]
        assert len({(key, message) for key, _, message, _ in found}) == len(found)
        return found

    return refuse


def every_key(value, path=()):
    """Key paths with array indexes as 0."""
    inner = (
        value.items() if isinstance(value, dict) else ((0, item) for item in value) if isinstance(value, list) else ()
    )
    return {path, *(found for key, item in inner for found in every_key(item, (*path, key)))}


# What loads


def test_every_key_of_the_full_example_arrives(load):
    recipe = load(FULL)
    assert list(recipe.sources) == ["orca", "mine"]
    assert recipe.sources["orca"].options == {"swap": True, "system": "You are.", "limit": 3, "share": 0.5}
    assert recipe.sources["mine"].path == ["data/*.jsonl.gz", "more.csv"]
    assert (recipe.sources["orca"].take, recipe.sources["mine"].take) == (5000, 0.5)
    assert recipe.filter.min_chars == Chars(answer=10)
    assert recipe.filter.max_chars == Chars(prompt=4000, answer=8000, total=10000)
    assert recipe.mix.preference == {"orca": 1.0, "mine": 0.5}
    dpo, sft = recipe.train.stages
    assert isinstance(dpo, DpoStage)
    assert isinstance(sft, SftStage)
    assert dpo.loss == ["robust", "sft"]
    assert (dpo.learning_rate, sft.epochs, sft.if_needed) == (5e-7, 1.0, True)


def test_the_full_example_has_every_key_of_the_model():
    known = {part for path in every_key(json_schema_tree(json_schema())) for part in path}
    written = {part for path in key_lines(FULL) for part in path if isinstance(part, str)}
    names_of_the_user = {"orca", "mine", "theirs", "question", "swap", "system", "limit", "share", "test", "validation"}
    assert written - names_of_the_user - known == set()
    assert known - written == {"root"}


def json_schema_tree(schema):
    """Nested dicts of the keys that a schema describes."""
    schema = inlined(schema)

    def tree(node):
        if isinstance(node, list):
            return {key: value for item in node for key, value in tree(item).items()}
        if not isinstance(node, dict):
            return {}
        own = {key: tree(value) for key, value in node.get("properties", {}).items()}
        inner = [tree(node[key]) for key in ("anyOf", "oneOf", "items", "additionalProperties") if key in node]
        free = [tree(value) for value in node.get("patternProperties", {}).values()]
        return own | {key: value for found in (*inner, *free) for key, value in found.items()}

    return tree(schema)


def test_the_defaults_are_those_of_the_design(load):
    recipe = load(SMALL)
    assert recipe.seed == 42
    assert recipe.splits == {"test": 0.02}
    assert recipe.dedupe.near is None
    assert recipe.train is None
    assert (recipe.filter.empty, recipe.filter.min_margin, recipe.filter.cut_off) == ("drop", 0.0, "report")
    near = load(SMALL + "[dedupe]\nnear = {}").dedupe.near
    assert near.model_dump() == {
        "threshold": 0.8,
        "shingle": 5,
        "shingle_unit": "word",
        "permutations": 128,
        "recall": 0.99,
        "on": "prompt+chosen",
    }


def test_inputs_are_relative_to_the_folder_of_the_file_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path / "recipes")
    near = load_recipe("r.toml")
    monkeypatch.chdir(tmp_path)
    far = load_recipe("recipes/../recipes/r.toml")
    assert near.root == far.root == (tmp_path / "recipes").resolve()
    assert near.path == near.root / "r.toml"


def test_a_root_in_the_file_wins_over_its_folder(load, tmp_path):
    assert load(f"root = {str(tmp_path / 'elsewhere')!r}\n" + SMALL).root == tmp_path / "elsewhere"
    assert load('root = "inner"\n' + SMALL).root == tmp_path.resolve() / "inner"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    assert load_recipe(path).name == path.stem
    assert shipped_recipes()[path.stem].samefile(path)


def test_default_off_turns_off_every_rule_that_is_not_named():
    rules = Filter.model_validate({"default": "off", "empty": "drop", "min_margin": 0.5})
    assert (rules.empty, rules.min_margin) == ("drop", 0.5)
    assert {getattr(rules, rule) for rule in RULES} - {"drop", 0.5} == {"off"}
    assert set(RULES) == {
        name for name, field in Filter.model_fields.items() if "off" in str(field.annotation) and name != "default"
    }


def test_whole_numbers_are_rows_and_fractions_are_shares(load):
    assert type(load(SMALL + "take = 1").sources["a"].take) is int
    assert type(load(SMALL + "take = 1.0").sources["a"].take) is float


def test_a_recipe_is_frozen(load):
    with pytest.raises(ValidationError, match="frozen"):
        load(SMALL).seed = 1


def test_reading_a_recipe_does_not_import_polars():
    code = "import sys, prefmix.recipe; print({'polars', 'pyarrow', 'numpy', 'click'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "set()"


# What is refused


def test_five_mistakes_are_five_problems_with_their_lines(refuse):
    text = """\
name = "five"
seed = "42"

[sources.orca]
hub = "Intel/orca_dpo_pairs"

[filter]
min_margn = 1.0
empty = "delete"

[decontaminate.against.mine]
path = "mine.csv"

[mix]
preference = { orka = 1 }
"""
    assert refuse(text) == [
        ("seed", 2, f'{SEED}, got "42"', "without quotes: 42"),
        ("filter.min_margn", 8, "unknown key", "did you mean `min_margin`?"),
        ("filter.empty", 9, 'expected "drop", "report" or "off", got "delete"', None),
        ("decontaminate.against.mine.fields", 11, "missing", "Columns that hold the benchmark's text"),
        ("mix.preference.orka", 15, "no source is called `orka`", "did you mean `orca`?"),
    ]


WRONG_VALUES = {
    'name = "My Mix"': ("name", "expected a name of lower-case letters, digits, '.', '_' and '-', got \"My Mix\""),
    "seed = -1": ("seed", f"{SEED}, got -1"),
    "seed = 1.0": ("seed", f"{SEED}, got 1.0"),
    "seed = true": ("seed", f"{SEED}, got true"),
    'license = ""': ("license", "must not be empty"),
    "license = 1979-05-27": ("license", 'expected text, got "1979-05-27"'),
    "filter = 3": ("filter", "expected a table, got 3"),
    "filter.empty = true": ("filter.empty", 'expected "drop", "report" or "off", got true'),
    "filter.min_margin = 'high'": ("filter.min_margin", 'expected a number, "report" or "off", got "high"'),
    "filter.min_margin = true": ("filter.min_margin", 'expected a number, "report" or "off", got true'),
    "filter.min_margin = nan": ("filter.min_margin", 'expected a number, "report" or "off", got nan'),
    "filter.languages = 'en'": (
        "filter.languages",
        'expected a list, each item a language code of two lower-case letters such as "en", got "en"',
    ),
    "filter.languages = ['en', 'EN']": (
        "filter.languages.1",
        'expected a language code of two lower-case letters such as "en", got "EN"',
    ),
    "filter.min_chars = -5": ("filter.min_chars", "expected a whole number of at least 0 or a table, got -5"),
    "filter.min_chars = { answr = 3 }": ("filter.min_chars.answr", "unknown key"),
    "filter.min_chars = { answer = '3' }": (
        "filter.min_chars.answer",
        'expected a whole number of at least 0, got "3"',
    ),
    "filter.max_length_ratio = 0": ("filter.max_length_ratio", "expected a number above 0, got 0"),
    "dedupe.near = true": ("dedupe.near", "expected a table, got true"),
    "dedupe.near.threshold = 1.5": ("dedupe.near.threshold", "expected a number above 0 and at most 1, got 1.5"),
    "dedupe.across = 'yes'": ("dedupe.across", 'expected true or false, got "yes"'),
    "decontaminate.suites = [1]": ("decontaminate.suites.0", "expected text, got 1"),
    "splits.test = 2": ("splits.test", "expected a number of at least 0 and below 1, got 2"),
    "splits.Test-1 = 0.1": ("splits.Test-1", "expected a name of lower-case letters, digits and '_' as the key"),
    "mix.preference = { a = -1 }": ("mix.preference.a", "expected a number of at least 0, got -1"),
    "mix = [{ preference = 1 }]": ("mix", "expected a table, got a list"),
    "train = { base = 'b', stages = [] }": ("train.stages", "must not be empty"),
}


@pytest.mark.parametrize(("line", "told"), WRONG_VALUES.items(), ids=list(WRONG_VALUES))
def test_a_wrong_value_is_one_problem_that_says_what_is_right(refuse, line, told):
    ((key, number, message, _),) = refuse(
        SMALL.replace('name = "small"', line if line.startswith("name") else f'name = "a"\n{line}')
    )
    assert (key, message) == told
    assert number == (1 if line.startswith("name") else 2)


def test_a_value_of_another_shape_gets_the_one_that_was_meant(refuse):
    def hint(line):
        ((_, _, _, found),) = refuse(SMALL.replace('name = "small"', f'name = "a"\n{line}'))
        return found

    assert hint("dedupe.near = true") == "{} takes the defaults"
    assert hint("filter = true") is None
    assert hint("decontaminate.suites = 'gsm8k'") == 'as a list: ["gsm8k"]'
    assert hint("filter.min_margin = '1.0'") == "without quotes: 1.0"


WRONG_SOURCES = {
    "take = -1": "expected a whole number of at least 0 or a number above 0 and at most 1, got -1",
    "take = 1.5": "expected a whole number of at least 0 or a number above 0 and at most 1, got 1.5",
    "take = '5'": 'expected a whole number of at least 0 or a number above 0 and at most 1, got "5"',
    "repeat = 0": "expected a whole number of at least 1, got 0",
    "columns = { a = 1 }": "expected text, got 1",
    "options = { a = [1] }": "expected text, a whole number, a number or true or false, got [1]",
    "revision = 'main'": "has a meaning only with `hub`",
}


@pytest.mark.parametrize(("line", "message"), WRONG_SOURCES.items(), ids=list(WRONG_SOURCES))
def test_a_wrong_key_of_a_source_is_told_at_its_line(refuse, line, message):
    ((key, number, told, _),) = refuse(f"{SMALL}{line}")
    assert (number, told) == (4, message)
    assert key.startswith(f"sources.a.{line.split()[0]}")


def test_unknown_keys_get_the_nearest_key_or_the_table_that_has_them(refuse):
    def hint(text):
        ((_, _, message, found),) = refuse(text)
        assert message == "unknown key"
        return found

    assert hint(f'{SMALL}fromat = "x"') == "did you mean `format`?"
    assert hint(f"{SMALL}Take = 3") == "did you mean `take`?"
    assert hint(f"{SMALL}seed = 3") == "it belongs at the top, before the first [table]"
    assert hint(f"{SMALL}allow_repeat = true") == "it belongs in [mix]"
    assert hint(f"{SMALL}[dedupe]\nxyz = 1") == "known: exact, prompt_cap, near, across"
    assert hint('path = "x"\n' + SMALL) == "a source has it: [sources.<name>]"
    assert hint(f"{SMALL}[sources.a.near]\nx = 1") == "it belongs in [dedupe]"


def test_a_misspelt_key_is_not_told_again_as_a_missing_one(refuse):
    found = refuse(
        'name = "x"\n[sources.a]\npth = "x"\n[train]\nbase = "b"\n[[train.stages]]\nnme = "x"\nmethod = "dpo"\n'
    )
    assert [(key, line, hint) for key, line, _, hint in found] == [
        ("sources.a.pth", 3, "did you mean `path`?"),
        ("train.stages.0.nme", 7, "did you mean `name`?"),
    ]


def test_missing_keys_are_told_at_their_table(refuse):
    assert refuse("seed = 1\n[train]\n[[train.stages]]\n") == [
        ("name", None, "missing", "Name of the mixture"),
        ("sources", None, "missing", "The data sets by a name of your choice, in the order of their priority"),
        ("train.base", 2, "missing", "Base model: Hub name or folder (relative to the recipe)"),
        ("train.stages.0.name", 3, "missing", "Name of the stage and of its folder"),
        ("train.stages.0.method", 3, "missing", '"dpo" or "sft"'),
    ]


STAGES = SMALL + '[train]\nbase = "b"\n[[train.stages]]\nname = "one"\nmethod = "dpo"\n'
CONTRADICTIONS = {
    SMALL + 'hub = "a/b"': ("sources.a.path", 3, "either `hub` or `path`, not both"),
    'name = "x"\n[sources.a]\ntake = 1': ("sources.a", 2, "needs `hub` or `path`"),
    SMALL + '[sources.tokenizer]\npath = "x"': ("sources.tokenizer", 4, "this name is taken"),
    SMALL + "[filter]\nmax_tokens = 100": ("filter.max_tokens", 5, "needs a tokenizer to count with"),
    SMALL + "[filter]\nmin_chars = 9\nmax_chars = { answer = 8 }": (
        "filter.min_chars",
        5,
        "above `max_chars`: no answer has 9 to 8 characters",
    ),
    SMALL + '[format]\ntokenizer_revision = "x"': (
        "format.tokenizer_revision",
        5,
        "has a meaning only with `tokenizer`",
    ),
    SMALL + "[mix]\nsft = { a = 0 }": ("mix.sft", 5, "needs a share above 0"),
    SMALL + "[mix]\nsft = {}": ("mix.sft", 5, "needs a share above 0"),
    SMALL + "[splits]\ntrain = 0.5": ("splits.train", 5, "this name is taken"),
    SMALL + "[splits]\na = 0.5\nb = 0.5": ("splits", 4, "the shares add up to 1 and leave nothing for train"),
    SMALL + '[decontaminate.against.b]\nfields = ["q"]': ("decontaminate.against.b", 4, "needs `hub` or `path`"),
    STAGES + '[[train.stages]]\nname = "one"\nmethod = "sft"': (
        "train.stages.1.name",
        10,
        'an earlier stage is called "one" too',
    ),
    STAGES.replace("dpo", "sft") + "beta = 0.1": ("train.stages.0.beta", 9, "only dpo stages have it"),
    STAGES + "if_needed = true": ("train.stages.0.if_needed", 9, "only sft stages have it"),
    STAGES + 'subset = "sft"': ("train.stages.0.subset", 9, "dpo reads the preference subset"),
    STAGES + "loss_weights = [1.0, 2.0]": ("train.stages.0.loss_weights", 9, "2 weights for 1 losses"),
    STAGES + 'loss = ["sft", "sft"]': ("train.stages.0.loss", 9, "a loss is named twice"),
    STAGES + "label_smoothing = 0.1": ("train.stages.0.label_smoothing", 9, "the loss does not read it"),
    STAGES + 'loss = "exo_pair"': ("train.stages.0.loss", 9, "exo_pair needs `label_smoothing` above 0"),
    STAGES.replace("[[", 'adapter = "none"\n[['): ("train.adapter", 6, "weights in 4 bits cannot be trained"),
    STAGES.replace("[[", 'adapter = "none"\nquantization = "nf4"\n[['): (
        "train.adapter",
        6,
        "weights in 4 bits cannot be trained",
    ),
    STAGES.replace("[[", 'adapter = "none"\nquantization = "none"\nlora = { r = 8 }\n[['): (
        "train.lora",
        8,
        'has no meaning with `adapter = "none"`',
    ),
    STAGES.replace("[[", '[train.eos]\non_fail = "repair"\n[['): (
        "train.eos.on_fail",
        7,
        "no sft stage is marked `if_needed = true`",
    ),
}


@pytest.mark.parametrize(
    ("text", "told"), CONTRADICTIONS.items(), ids=[told[0] + ": " + told[2] for told in CONTRADICTIONS.values()]
)
def test_contradictions_between_keys_are_told(refuse, text, told):
    assert [found[:3] for found in refuse(text)] == [told]


def test_all_weights_are_trained_where_they_are_not_in_4_bits(load):
    train = load(STAGES.replace("[[", 'adapter = "none"\nquantization = "none"\n[[')).train
    assert (train.adapter, train.quantization) == ("none", "none")


def test_contradictions_are_told_beside_wrong_values_in_the_same_table(refuse):
    found = refuse(f'{SMALL}take = "x"\nhub = "a/b"\n[filter]\nmax_tokens = 9\nempty = 3\n')
    assert [key for key, *_ in found] == ["sources.a.path", "sources.a.take", "filter.max_tokens", "filter.empty"]


def test_a_stage_with_a_wrong_method_still_has_its_other_keys_checked(refuse):
    found = refuse(STAGES.replace('"dpo"', '"dop"') + "if_needed = true\nepochs = 0\nbata = 1\n")
    assert [(key, hint) for key, _, _, hint in found] == [
        ("train.stages.0.method", 'did you mean "dpo"?'),
        ("train.stages.0.epochs", None),
        ("train.stages.0.bata", "did you mean `beta`?"),
    ]


def test_a_wrong_item_of_a_list_is_told_by_itself(refuse):
    ((key, line, message, hint),) = refuse(STAGES + 'loss = [\n  "sigmoid",\n  "sigmod",\n]\n')
    assert (key, line) == ("train.stages.0.loss.1", 11)
    assert (message, hint) == ('"sigmod" is unknown', 'did you mean "sigmoid"?')


def test_a_recipe_made_in_python_is_checked_for_contradictions_too():
    source = Source(path="a.jsonl")
    assert Recipe(name="a", sources={"a": source}).sources["a"].revision == "main"
    with pytest.raises(ValidationError, match=r"sources\.a\.path: either `hub` or `path`, not both"):
        Recipe(name="a", sources={"a": Source(path="a.jsonl", hub="a/b")})


def test_the_text_of_the_error_names_file_line_and_key(load, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(SMALL + "[filter]\nmin_margn = 1\n")
    assert str(caught.value) == (
        f"{tmp_path / 'recipe.toml'}:5: filter.min_margn: unknown key (did you mean `min_margin`?)"
    )


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ('name = "x"\nformat = orca\n', 2, "Invalid value", 'text needs quotes: "orca"'),
        ("name = 'x'\nname = 'y'\n", 2, "Cannot overwrite a value", None),
        ("name = 'x'\n[a]\n[a]\n", 3, "Cannot declare ('a',) twice", None),
        ("name = 'x'\na = [1,\n2\n", 3, "Unclosed array", None),
        ("name\n", 1, "Expected '=' after a key in a key/value pair", None),
    ],
)
def test_a_syntax_error_is_one_problem_with_its_line(refuse, text, line, message, hint):
    assert refuse(text) == [("", line, message, hint)]


def test_files_that_cannot_be_read_say_why(tmp_path):
    def told(path):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        return str(caught.value)

    (tmp_path / "mymix.toml").write_bytes(b'name = "x"\n# caf\xe9\n')
    assert told(tmp_path / "mymix.toml") == f"{tmp_path / 'mymix.toml'}:2: not UTF-8 (save it as UTF-8)"
    assert (
        told(tmp_path / "mymx.toml")
        == f"{tmp_path / 'mymx.toml'}: no such file (did you mean {tmp_path / 'mymix.toml'}?)"
    )
    assert told(tmp_path) == f"{tmp_path}: a folder, not a recipe (it has mymix.toml)"
    assert told(tmp_path / "nothing" / "here.toml").endswith("here.toml: no such file")
    assert told(tmp_path / "mymix.toml" / "x").endswith("cannot be read: Not a directory")


def test_a_missing_file_with_the_name_of_a_shipped_recipe_says_where_that_is(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped" / "dpopenhermes.toml"
    monkeypatch.setattr("prefmix.recipe.load.shipped_recipes", lambda: {"dpopenhermes": shipped})
    with pytest.raises(RecipeError, match="no such file") as caught:
        load_recipe(tmp_path / "dpopenherms.toml")
    assert caught.value.problems[0].hint == f"prefmix comes with {shipped}"


# --set


def test_an_override_is_as_if_it_were_in_the_file(load):
    recipe = load(FULL, "train.stages.0.epochs=1", "sources.mine.take=9", "filter.min_margin=off", "splits.test=0.5")
    assert recipe.train.stages[0].epochs == 1.0
    assert recipe.sources["mine"].take == 9
    assert recipe.filter.min_margin == "off"
    assert load(SMALL, "dedupe.near.on=prompt").dedupe.near.on == "prompt"
    assert load(SMALL, "seed=1", "seed=2").seed == 2


def test_a_wrong_override_is_told_with_the_override_and_no_line(refuse):
    overrides = ("filter.min_margn=1", "seed='1'", "sources.b.take=5", "foo", "train.output=x")
    base, stages = "Base model: Hub name or folder (relative to the recipe)", "Training stages, in order"
    assert refuse(f"{SMALL}repeat = 0\n", *overrides) == [
        ("", None, "--set foo: expected key=value", None),
        ("sources.b", None, "--set sources.b.take=5: needs `hub` or `path`", None),
        ("seed", None, f"--set seed='1': {SEED}, got \"1\"", "without quotes: 1"),
        ("filter.min_margn", None, "--set filter.min_margn=1: unknown key", "did you mean `min_margin`?"),
        ("train.base", None, "--set train.output=x: missing", base),
        ("train.stages", None, "--set train.output=x: missing", stages),
        ("sources.a.repeat", 4, "expected a whole number of at least 1, got 0", None),
    ]


def test_an_override_of_a_source_that_is_not_there_proposes_the_one_that_is(refuse):
    assert refuse(SMALL.replace("sources.a", "sources.orca"), "sources.orka.take=5") == [
        ("sources.orka", None, "--set sources.orka.take=5: needs `hub` or `path`", "did you mean sources.orca?")
    ]


def test_a_fault_of_the_file_is_not_blamed_on_an_override_beside_it(refuse):
    ((_, line, message, hint),) = refuse(SMALL.replace('path = "a.jsonl"', ""), "sources.a.take=5")
    assert (line, message, hint) == (2, "needs `hub` or `path`", None)


# Digest and the resolved recipe


def shuffled(value, order, path=()):
    """The same data with the keys of every table but [sources] in another order."""
    if isinstance(value, list):
        return [shuffled(item, order, (*path, 0)) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value) if path == ("sources",) else order(list(value))
    return {key: shuffled(value[key], order, (*path, key)) for key in keys}


@given(st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(random):
    data = {**tomllib.loads(FULL), "root": Path("/")}
    mixed = shuffled(data, lambda keys: random.sample(keys, len(keys)))
    assert Recipe.model_validate(mixed).digest() == Recipe.model_validate(data).digest()
    assert list(Recipe.model_validate(mixed).splits) == ["test", "validation"]


def test_the_order_of_the_sources_is_part_of_the_digest():
    sources = {"a": Source(path="a.jsonl"), "b": Source(path="b.jsonl")}
    one, other = Recipe(name="x", sources=sources), Recipe(name="x", sources=dict(reversed(sources.items())))
    assert one.digest() != other.digest()


def test_the_digest_does_not_see_train_root_path_and_defaults_that_are_spelled_out(load):
    recipe = load(SMALL)
    assert len(recipe.digest()) == 64
    assert load(STAGES).digest() == recipe.digest()
    assert recipe.model_copy(update={"root": Path("/"), "path": None}).digest() == recipe.digest()
    assert load(SMALL + "repeat = 1\n[filter]\nmin_margin = 0\n[splits]\ntest = 0.02").digest() == recipe.digest()


#: Values of the full example that the digest must tell apart: nothing here is a default, or is written as one.
OTHER_VALUES = {
    "name": "other",
    "seed": 8,
    "license": "mit",
    "sources.orca.format": "sharegpt",
    "sources.orca.hub": "a/b",
    "sources.orca.revision": "main",
    "sources.orca.columns.question": "q",
    "sources.orca.split": "test",
    "sources.orca.where": "true",
    "sources.orca.exclude": "x",
    "sources.orca.take": 4999,
    "sources.orca.repeat": 1,
    "sources.orca.license": "mit",
    "sources.orca.options.swap": False,
    "sources.mine.path": "x",
    "sources.mine.take": 0.6,
    "filter.empty": "off",
    "filter.min_margin": "report",
    "filter.languages": [],
    "filter.min_chars": 11,
    "filter.max_chars.total": 9,
    "filter.max_tokens": 2047,
    "dedupe.exact": "off",
    "dedupe.prompt_cap": 5,
    "dedupe.near.recall": 0.96,
    "dedupe.across": False,
    "decontaminate.ngram": 9,
    "decontaminate.suites": ["gsm8k"],
    "decontaminate.answers": False,
    "decontaminate.against.mine.fields": ["x"],
    "decontaminate.against.theirs.revision": "v2",
    "format.layout": "text",
    "format.system": "drop",
    "format.tokenizer": "x",
    "format.tokenizer_revision": "x",
    "mix.preference.orca": 2,
    "mix.preference_rows": 1,
    "mix.allow_repeat": False,
    "splits.test": 0.03,
}


def test_every_change_outside_train_changes_the_digest(load):
    digests = {load(FULL).digest()}
    for key, value in OTHER_VALUES.items():
        digests.add(load(FULL, f"{key}={tomli_w.dumps({'v': value}).removeprefix('v = ').strip()}").digest())
    assert len(digests) == len(OTHER_VALUES) + 1
    assert load(FULL, "train.base=x", "train.stages.0.beta=1").digest() == load(FULL).digest()


def test_resolved_revisions_replace_the_written_ones_in_digest_and_text(load):
    recipe = load(FULL)
    commits = {"orca": "c1", "tokenizer": "c2", "against.theirs": "c3"}
    pinned = load(recipe.to_toml(commits))
    assert pinned.sources["orca"].revision == "c1"
    assert pinned.format.tokenizer_revision == "c2"
    assert pinned.decontaminate.against["theirs"].revision == "c3"
    assert pinned.digest() == recipe.digest(commits) != recipe.digest()
    for name in commits:
        assert recipe.digest({**commits, name: "other"}) != recipe.digest(commits)


def test_the_resolved_recipe_spells_out_every_default(load):
    resolved = tomllib.loads(load(STAGES + '[format]\ntokenizer = "x"\n[dedupe.near]\n').to_toml())
    schema = json_schema_tree(json_schema())
    assert set(resolved["filter"]) >= set(RULES)
    assert set(resolved["dedupe"]["near"]) == set(schema["dedupe"]["near"])
    assert set(resolved["format"]) == set(schema["format"])
    assert resolved["train"]["stages"][0]["loss"] == "sigmoid"
    assert resolved["root"] == str(load(SMALL).root)


NUMBERS = st.floats(0.001, 1e6)


@st.composite
def recipes(draw):
    """Parts of the full example, some of them with other values."""
    data = tomllib.loads(FULL)
    for table in ("filter", "dedupe", "decontaminate", "mix", "splits", "train"):
        if draw(st.booleans()):
            del data[table]
        elif table in ("filter", "dedupe", "mix"):
            for key in draw(st.sets(st.sampled_from(sorted(data[table])))):
                del data[table][key]
    for key in draw(st.sets(st.sampled_from(sorted(set(data["sources"]["orca"]) - {"hub"})))):
        del data["sources"]["orca"][key]
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1)
    data["format"]["system"] = draw(text)
    data["sources"]["mine"]["options"] = draw(
        st.dictionaries(text, text | st.integers(-9, 9) | NUMBERS | st.booleans())
    )
    data["sources"]["mine"]["take"] = draw(st.integers(0, 9) | st.floats(0.01, 1))
    data.setdefault("filter", {})["default"] = draw(st.sampled_from(["on", "off"]))
    data["filter"]["min_margin"] = draw(st.floats(-1e9, 1e9) | st.sampled_from(["report", "off"]))
    data["root"] = Path("/data")
    return Recipe.model_validate(data)


@given(recipes())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_resolved_recipe_loads_as_the_same_recipe(load, recipe):
    again = load(recipe.to_toml())
    assert again.model_copy(update={"path": None}) == recipe
    assert again.digest() == recipe.digest()
    assert again.to_toml() == recipe.to_toml()


WRONG = [0, -1, 2.5, "", "x", True, [], [1], {}, {"x": 1}, [{}]]


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
def test_whatever_is_wrong_every_problem_has_the_line_of_its_key(load, data):
    """Random damage either loads or is told, with words of ours, at a line that holds the key or its table."""
    damaged = copy.deepcopy(tomllib.loads(FULL))
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(sorted(key_lines(tomli_w.dumps(damaged)), key=str)))
        table = damaged
        for part in path[:-1]:
            table = table[part]
        table[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(WRONG)))
    text = tomli_w.dumps(damaged)
    try:
        load(text)
    except RecipeError as error:
        told = error.problems
    else:
        return
    assert told
    for problem in told:
        assert not re.search(r"Input should|pydantic|type=|got$|expected $", f"{problem.message} {problem.hint}")
        if problem.line is None:
            assert problem.message == "missing"
            continue
        line = text.split("\n")[problem.line - 1]
        assert any(part in line or part.isdigit() for part in problem.key.replace('"', "").split("."))
    assert len({problem.key for problem in told}) == len(told)


# The schema


def test_every_key_has_a_description():
    def check(node):
        if isinstance(node, dict):
            for key, value in node.get("properties", {}).items():
                assert value.get("description"), key
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    schema = inlined(json_schema())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields) - {"path"}
    check(schema)


@pytest.mark.parametrize(
    "path", [None, *sorted((ROOT / "recipes").glob("*.toml"))], ids=lambda path: path and path.stem
)
def test_the_schema_takes_what_loads_and_refuses_what_does_not(path):
    jsonschema = pytest.importorskip(
        "jsonschema", reason="checks the JSON Schema with jsonschema, which is not installed"
    )
    validator = jsonschema.Draft202012Validator(json_schema())
    jsonschema.Draft202012Validator.check_schema(json_schema())
    recipe = tomllib.loads(path.read_text() if path else FULL)
    assert [error.message for error in validator.iter_errors(recipe)] == []
    for change in ({"seed": "1"}, {"sources": {}}, {"name": "A B"}, {"nme": 1}, {"splits": {"test": 1.0}}, {"root": 1}):
        assert not validator.is_valid({**recipe, **change}), change


def test_every_pattern_of_the_schema_has_words():
    assert set(re.findall(r'"(\^[^"]*\$)"', json.dumps(json_schema()).replace("\\\\", "\\"))) == set(problems.PATTERNS)


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(problems).attempted > 0
    assert doctest.testmod(problems).failed == 0
