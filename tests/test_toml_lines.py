"""The key scanner against tomllib: the same keys, and each on its line."""

import doctest
import json
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmix.recipe import toml_lines
from prefmix.recipe.toml_lines import key_lines, parse_override, set_value

# Texts that would derail a scanner that looked into them.
AWKWARD = ["", "a", "x = 1", "[t]", "]", "}", "{ y = 2 }", "# no comment", ",", "ä€𝄞", "it's", 'a "b" c', "\\", "a\\nb"]


@st.composite
def bare_or_quoted(draw: st.DrawFn) -> str:
    """A key as it may be written."""
    plain = draw(st.text("abcXYZ019_-", min_size=1, max_size=4))
    return draw(
        st.sampled_from([plain, f'"{plain}"', f"'{plain}'"])
        | st.sampled_from(AWKWARD).map(lambda text: json.dumps(text, ensure_ascii=False))
        | st.sampled_from(["'[t]'", "'a.b'", "'x = 1'", "'#'", r'"\u00e9\t"', r'"\\"', r'"\""'])
    )


@st.composite
def dotted_key(draw: st.DrawFn) -> str:
    return draw(st.sampled_from([".", " . ", "\t."])).join(draw(st.lists(bare_or_quoted(), min_size=1, max_size=3)))


def blank() -> st.SearchStrategy[str]:
    """What may stand between the items of an array."""
    return st.sampled_from(["", " ", "\n", "\r\n", ' # a comment, with ] and "quotes\n', "\n\n\t# x = {\n"])


def strings() -> st.SearchStrategy[str]:
    texts = st.sampled_from(AWKWARD)
    one_line = texts.map(lambda text: json.dumps(text, ensure_ascii=False))
    literal = texts.filter(lambda text: "'" not in text).map(lambda text: f"'{text}'")
    lines = st.lists(texts.filter(lambda text: "\\" not in text and '"' not in text), max_size=3).map("\n".join)
    long = lines.map(lambda text: f'"""\n{text}"""')
    long_literal = lines.filter(lambda text: "'" not in text).map(lambda text: f"'''{text}'''")
    edges = st.sampled_from(['""""a"b"""""', '"""a\\""" ]"""', "'''a'b'''''", '"""a \\\n  b"""', '""', "''", '""""""'])
    return one_line | literal | long | long_literal | edges


def scalars() -> st.SearchStrategy[str]:
    others = ["true", "-0", "5e-6", "inf", "1979-05-27T07:32:00Z", "1979-05-27 07:32:00", "0xf", "1_000"]
    return st.integers(-99, 99).map(str) | st.sampled_from(others) | strings()


def arrays(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    spaced = st.tuples(blank(), items, blank()).map("".join)
    return st.tuples(st.lists(spaced, max_size=3).map(",".join), blank()).map(lambda inner: f"[{inner[0]}{inner[1]}]")


def inline_tables(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(dotted_key(), st.sampled_from([" = ", "="]), items).map("".join)
    return st.lists(pairs, max_size=3).map(lambda inner: f"{{ {', '.join(inner)} }}")


VALUES = st.recursive(scalars(), lambda items: arrays(items) | inline_tables(items), max_leaves=6)
PAIRS = st.tuples(st.sampled_from(["", "  "]), dotted_key(), st.sampled_from(["=", " =\t"]), VALUES).map("".join)
HEADERS = dotted_key().flatmap(lambda key: st.sampled_from([f"[{key}]", f"[[{key}]]", f" [ {key} ]  ", f"[[ {key} ]]"]))
STATEMENTS = st.tuples(PAIRS | HEADERS, st.sampled_from(["", " # [not.a.table]", "\n", "\r"])).map("".join)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """Statements that are valid together: each is kept when tomllib still takes the whole."""
    text = ""
    for statement in draw(st.lists(STATEMENTS, max_size=8)):
        try:
            tomllib.loads(longer := f"{text}{statement}\n")
        except tomllib.TOMLDecodeError:
            continue
        text = longer
    return text


def paths(value: object, path: toml_lines.KeyPath = ()) -> set[toml_lines.KeyPath]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path, *(found for key, item in inner for found in paths(item, (*path, key)))}


@given(documents())
def test_every_key_that_tomllib_reads_has_a_line_and_no_other_has(text):
    assert set(key_lines(text)) | {()} == paths(tomllib.loads(text))


@given(documents())
def test_the_line_of_a_key_contains_the_key(text):
    lines = text.split("\n")
    for (*_, key), line in key_lines(text).items():
        written = lines[line - 1]
        if isinstance(key, str) and key.isalnum():
            assert key in written


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True), st.data())
def test_a_value_is_on_the_line_of_its_key(names, data):
    """Each leaf is a number that occurs once, so its line is known without a scanner."""
    numbers = iter(range(1000, 2000))
    text = ""
    for name in names:
        form = data.draw(st.sampled_from(["pair", "inline", "array", "table", "tables"]))
        before = data.draw(blank().filter(lambda space: not space or "\n" in space))
        pairs = [f"{key} = {next(numbers)}" for key in ("k", "l.m", '"n o"')]
        if form == "pair":
            text = f'{before}{name}.v."w x" = {next(numbers)}\n{text}'
        elif form == "inline":
            text = f"{before}{name} = {{ {', '.join(pairs)} }}\n{text}"
        elif form == "array":
            text = f"{before}{name} = [{next(numbers)},\n\n{{ {pairs[0]} }},\n'''\n''', {next(numbers)}]\n{text}"
        elif form == "table":
            text += f"{before}[t.{name}]\n" + "\n\n".join(pairs) + "\n"
        else:
            text += "".join(f"{before}[[u.{name}]]\n{pair}\n[u.{name}.inner]\nz = {next(numbers)}\n" for pair in pairs)
    found = key_lines(text)
    seen = 0
    for path in paths(parsed := tomllib.loads(text)):
        leaf = parsed
        for part in path:
            leaf = leaf[part]
        if isinstance(leaf, int):
            seen += 1
            assert str(leaf) in text.split("\n")[found[path] - 1]
    assert seen == len(re.findall(r"\b1\d\d\d\b", text)) > 0


def test_a_table_has_the_line_of_its_own_header_even_after_that_of_a_child():
    assert key_lines("[a.b]\n\n[a]\n") == {("a",): 3, ("a", "b"): 1}


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("seed=1", ("seed",), 1),
        ("filter.min_margin = 0.5", ("filter", "min_margin"), 0.5),
        ("filter.min_margin=report", ("filter", "min_margin"), "report"),
        ('sources."my source".path = "a = b.jsonl"', ("sources", "my source", "path"), "a = b.jsonl"),
        ("sources.a.where=x = 'y'", ("sources", "a", "where"), "x = 'y'"),
        ("filter.languages=['en', 'de']", ("filter", "languages"), ["en", "de"]),
        ("dedupe.near={}", ("dedupe", "near"), {}),
        ("name=", ("name",), ""),
        ("name=1\nseed = 2", ("name",), "1\nseed = 2"),
        ("dedupe.across=true", ("dedupe", "across"), True),
    ],
)
def test_the_value_of_an_override_is_toml_or_else_text(text, path, value):
    assert parse_override(text) == (path, value)


@pytest.mark.parametrize("text", ["", "seed", "=1", "a b=1", "a..b=1", ".a=1", '"a=1'])
def test_an_override_without_key_and_value_is_refused(text):
    with pytest.raises(ValueError, match="expected key=value"):
        parse_override(text)


def test_setting_makes_tables_and_counts_array_items():
    data = {"train": {"stages": [{"epochs": 1}, {"epochs": 2}]}}
    assert set_value(data, ("train", "stages", "1", "epochs"), 3) == ("train", "stages", 1, "epochs")
    set_value(data, ("dedupe", "near", "on"), "prompt")
    assert data == {"train": {"stages": [{"epochs": 1}, {"epochs": 3}]}, "dedupe": {"near": {"on": "prompt"}}}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("stages", "2", "x"), "stages has items 0 to 1"),
        (("stages", "dpo", "x"), "stages has items 0 to 1"),
        (("seed", "x"), "seed is not a table"),
        (("stages", "0", "x"), "stages.0 is not a table"),
        (("none", "0"), "none is an empty array"),
    ],
)
def test_setting_below_what_is_no_table_says_so(path, message):
    with pytest.raises(ValueError, match=message):
        set_value({"seed": 1, "stages": [1, 2], "none": []}, path, 0)


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(toml_lines).attempted > 0
    assert doctest.testmod(toml_lines).failed == 0
