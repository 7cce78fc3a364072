"""Benchmarks: from a suite, a table or an argument to texts, each with the item and the field it comes from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import zstandard
from hub.loopback import LoopbackHub
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix import recipe
from prefmix.benchmarks import Benchmark, from_argument, resolve, suites
from prefmix.errors import HubError, RecipeError, SourceError, UsageError
from prefmix.fields import known_fields
from prefmix.recipe.model import Decontaminate
from prefmix.recipe.suites import SUITES

QUESTIONS = [
    {"question": "How many legs has a spider?", "choices": ["six", "eight"], "answer": 1},
    {"question": "Which metal is liquid at room temperature?", "choices": ["iron", "mercury", "tin"], "answer": 1},
]
TEXTS = [
    ("0", "question", "How many legs has a spider?"),
    ("0", "choices[0]", "six"),
    ("0", "choices[1]", "eight"),
    ("1", "question", "Which metal is liquid at room temperature?"),
    ("1", "choices[0]", "iron"),
    ("1", "choices[1]", "mercury"),
    ("1", "choices[2]", "tin"),
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(path.name, rows))
    return path


def encoded(name: str, rows: list[dict[str, Any]]) -> bytes:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.endswith((".parquet", ".arrow")):
        table, buffer = pl.DataFrame(rows, infer_schema_length=None), io.BytesIO()
        (table.write_parquet if name.endswith(".parquet") else table.write_ipc)(buffer)
        return buffer.getvalue()
    if name.endswith(".csv"):
        return pl.DataFrame(rows).write_csv().encode()
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    return compress(lines)


def own(root: Path, fields: list[str], **keys: Any) -> Benchmark:
    """The benchmark that `[decontaminate.against.mine]` with these keys means."""
    mine = {"mine": {"fields": fields, **keys}}
    (found,) = resolve(Decontaminate.model_validate({"against": mine}), root)
    return found


def texts(benchmark: Benchmark) -> list[tuple[str, str, str]]:
    table = benchmark.read()
    assert table.schema == {"item": pl.String, "field": pl.String, "text": pl.String}
    return table.rows()


# What is read


@pytest.mark.parametrize(
    "name", ["q.jsonl", "q.jsonl.gz", "q.jsonl.zst", "q.json", "q.parquet", "q.arrow"], ids=lambda name: name[2:]
)
def test_every_type_of_file_gives_a_row_for_each_text_and_says_where_it_is_from(tmp_path: Path, name: str) -> None:
    written(tmp_path / name, QUESTIONS)
    expected = [(f"{name}:{row}", field, text) for row, field, text in TEXTS]
    assert texts(own(tmp_path, ["question", "choices"], path=name)) == expected


def test_the_texts_of_a_row_stand_in_the_order_of_the_fields(tmp_path: Path) -> None:
    written(tmp_path / "q.csv", [{"Question": "Is it?", "Best Answer": "It is, 100 %."}])
    assert texts(own(tmp_path, ["Best Answer", "Question"], path="q.csv")) == [
        ("q.csv:0", "Best Answer", "It is, 100 %."),
        ("q.csv:0", "Question", "Is it?"),
    ]


def test_files_are_read_in_the_order_of_their_paths_and_named_as_from_the_recipe(tmp_path: Path) -> None:
    for name in ("b/1.jsonl", "a/2.jsonl", "a/1.jsonl.gz"):
        written(tmp_path / "sets" / name, [{"q": f"What is in {name}?"}])
    (tmp_path / "recipes").mkdir()
    items = [item for item, _, _ in texts(own(tmp_path / "recipes", ["q"], path=["../sets/b", "../sets/**/*"]))]
    assert items == ["../sets/a/1.jsonl.gz:0", "../sets/a/2.jsonl:0", "../sets/b/1.jsonl:0"]


def test_a_split_keeps_its_files(tmp_path: Path) -> None:
    written(tmp_path / "q.train.jsonl", [{"q": "Trained on?"}])
    written(tmp_path / "q.test.jsonl", [{"q": "Measured with?"}])
    assert texts(own(tmp_path, ["q"], path=".", split="test")) == [("q.test.jsonl:0", "q", "Measured with?")]


def test_blank_texts_nulls_and_numbers_are_no_texts_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    rows = [{"q": " \n", "a": ["", None, 7, "yes"]}, {"a": None}, {"q": "Who?", "a": ["7", True, {"b": "c"}]}]
    written(tmp_path / "q.jsonl", rows)
    assert texts(own(tmp_path, ["q", "a"], path="q.jsonl")) == [
        ("q.jsonl:0", "a[3]", "yes"),
        ("q.jsonl:2", "q", "Who?"),
        ("q.jsonl:2", "a[0]", "7"),
    ]


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
def test_a_dotted_path_reaches_into_objects_and_the_lists_in_them(tmp_path: Path, name: str) -> None:
    rows = [{"choices": {"text": ["a tin", "a pin"], "label": ["A", "B"]}}, {"choices": {"text": [], "label": []}}]
    written(tmp_path / name, rows)
    assert texts(own(tmp_path, ["choices.text"], path=name)) == [
        (f"{name}:0", "choices.text[0]", "a tin"),
        (f"{name}:0", "choices.text[1]", "a pin"),
    ]


@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet", "q.json"])
def test_each_object_of_a_list_is_an_item_with_its_texts_together(tmp_path: Path, name: str) -> None:
    examples = [
        {"input": "not True is", "target": "False", "n": 1},
        {"input": "not False is", "target": "True", "n": 2},
    ]
    row = {"canary": "never train on this", "examples": examples}
    written(tmp_path / name, [row])
    if name == "q.json":  # as BIG-Bench Hard has it: the file is one object
        (tmp_path / name).write_text(json.dumps(row))
    assert texts(own(tmp_path, ["examples.input", "canary", "examples.target"], path=name)) == [
        (f"{name}:0", "canary", "never train on this"),
        (f"{name}:0[0]", "examples.input", "not True is"),
        (f"{name}:0[0]", "examples.target", "False"),
        (f"{name}:0[1]", "examples.input", "not False is"),
        (f"{name}:0[1]", "examples.target", "True"),
    ]


def test_a_json_object_whose_columns_are_not_named_is_the_rows_of_its_array(tmp_path: Path) -> None:
    (tmp_path / "bbh.json").write_text(
        json.dumps({"canary": "x", "examples": [{"input": "1 + 1"}, {"input": "2 + 2"}]})
    )
    assert [item for item, _, _ in texts(own(tmp_path, ["input"], path="bbh.json"))] == ["bbh.json:0", "bbh.json:1"]


def test_a_list_inside_a_list_of_objects_keeps_all_places(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", [{"choices": [{"turns": ["One.", "Two."]}, {"turns": [["Three."]]}]}])
    assert texts(own(tmp_path, ["choices.turns"], path="q.jsonl")) == [
        ("q.jsonl:0[0]", "choices.turns[0]", "One."),
        ("q.jsonl:0[0]", "choices.turns[1]", "Two."),
        ("q.jsonl:0[1]", "choices.turns[0][0]", "Three."),
    ]


def test_a_key_that_holds_a_dot_is_taken_as_it_is(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", [{"q.en": "Why?", "q": {"a.b": "Because."}}])
    assert [(field, text) for _, field, text in texts(own(tmp_path, ["q.en", "q.a.b"], path="q.jsonl"))] == [
        ("q.en", "Why?"),
        ("q.a.b", "Because."),
    ]


TEXT = st.text(st.characters(codec="utf-8"), max_size=5)


@settings(max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries({"q": TEXT | st.none(), "choices": st.lists(TEXT | st.none(), max_size=3)}),
        min_size=1,
        max_size=5,
    )
)
def test_the_texts_are_all_that_are_not_blank_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    rows.append({"q": "last", "choices": ["last"]})
    expected = [
        (str(number), field, text)
        for number, row in enumerate(rows)
        for field, text in [("q", row["q"]), *((f"choices[{i}]", text) for i, text in enumerate(row["choices"]))]
        if text and text.strip()
    ]
    folder = tmp_path_factory.mktemp("rows")
    for name in ("q.jsonl", "q.parquet"):
        written(folder / name, rows)
        found = texts(own(folder, ["q", "choices"], path=name))
        assert [(item.removeprefix(f"{name}:"), field, text) for item, field, text in found] == expected


def test_fingerprints_are_of_the_content_under_the_names_of_the_files(tmp_path: Path) -> None:
    data = written(tmp_path / "sets" / "q.jsonl", QUESTIONS).read_bytes()
    assert own(tmp_path, ["question"], path="sets/*.jsonl").fingerprints() == [
        ("sets/q.jsonl", hashlib.sha256(data).hexdigest())
    ]


# What is refused


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.parquet", "q.csv"])
def test_a_column_that_is_not_there_is_named_with_the_file_and_the_nearest(tmp_path: Path, name: str) -> None:
    written(tmp_path / name, [{"Question": "Is it?", "Answer": "It is."}])
    expected = (
        r"^decontaminate\.against\.mine: "
        + name
        + r': no field "question" \(it has: Question, Answer\): did you mean "Question"\?$'
    )
    with pytest.raises(SourceError, match=expected):
        own(tmp_path, ["question"], path=name).read()


def test_a_column_is_missed_before_anything_is_read(tmp_path: Path) -> None:
    written(tmp_path / "q.parquet", QUESTIONS)
    with pytest.raises(SourceError, match='did you mean "choices"'):
        own(tmp_path, ["choice"], path="q.parquet")


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ("choices.txt", r'no field "choices.txt" \("choices" has: text, label\): did you mean "choices.text"\?'),
        ("choice.text", r'\(it has: choices, q\): did you mean "choices.text"\?'),
        ("q.text", r'no field "q.text": "q" has no keys: name it without the rest'),
        ("choices", r'"choices" holds objects, not text: .*"choices.text", "choices.label"'),
        ("zebra", r"\(it has: choices, q\): name one of them in `fields`"),
    ],
)
@pytest.mark.parametrize("name", ["q.jsonl", "q.parquet"])
def test_a_path_that_leads_nowhere_says_where_it_ends(tmp_path: Path, name: str, field: str, problem: str) -> None:
    written(tmp_path / name, [{"choices": {"text": ["a"], "label": ["A"]}, "q": "Who?"}])
    with pytest.raises(SourceError, match=problem):
        own(tmp_path, ["q", field], path=name).read()


def test_a_field_of_one_file_only_is_missed_in_the_other(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"q": "Who?", "passage": "A long one."}])
    written(tmp_path / "b.jsonl", [{"q": "Who?", "passage": None}])
    assert len(texts(own(tmp_path, ["q", "passage"], path="*.jsonl"))) == 3
    written(tmp_path / "b.jsonl", [{"q": "Who?"}])
    with pytest.raises(SourceError, match=r'mine: b\.jsonl: no field "passage"'):
        own(tmp_path, ["q", "passage"], path="*.jsonl").read()


def test_a_field_without_one_text_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", QUESTIONS)
    with pytest.raises(SourceError, match=r'mine: not one text in "answer": .*numbers, which are no texts'):
        own(tmp_path, ["question", "answer"], path="q.jsonl").read()


def test_a_benchmark_without_one_text_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", [{"q": "", "a": [None]}])
    with pytest.raises(SourceError, match='mine: not one text in "q" and "a"'):
        own(tmp_path, ["q", "a"], path="q.jsonl").read()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("q.jsonl", '{"q": "a"}\n{"q": \n', r"mine: q\.jsonl, line 2: invalid JSON"),
        ("q.csv", "q,a\nx,y\nx\n", r"mine: q\.csv, line 3: 1 fields, not 2"),
        ("q.json", '[{"q": "a"},\n 3]', r"mine: q\.json, line 2: a number, not a JSON object"),
        ("q.parquet", "PAR1", r"mine: .*q\.parquet: the file is truncated"),
        ("q.jsonl", "", r"mine: .*q\.jsonl: .*no"),
    ],
)
def test_a_benchmark_is_read_as_a_whole_or_not_at_all(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=problem):
        own(tmp_path, ["q"], path=name).read()


def test_files_that_are_not_there_are_named_with_their_table(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^decontaminate\.against\.mine: nothing/\*\.jsonl: no such file"):
        own(tmp_path, ["q"], path="nothing/*.jsonl")


# On the Hub

CARD = b"""---
configs:
- config_name: easy
  data_files:
  - split: test
    path: easy/test-*
- config_name: hard
  data_files:
  - split: train
    path: hard/train-*
  - split: test
    path: hard/test-*
---
"""


def asked(question: str) -> bytes:
    return encoded("q.parquet", [{"question": question}])


def test_a_data_set_on_the_hub_is_read_at_a_commit_with_its_rows_counted_over_its_files(
    loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    first = {
        "README.md": CARD,
        "easy/test-0.parquet": asked("1 + 1?"),
        "hard/train-0.parquet": asked("Seen before?"),
        "hard/test-00000-of-00002.parquet": encoded("q.parquet", [{"question": "Why?"}, {"question": "When?"}]),
        "hard/test-00001-of-00002.parquet": asked("Who?"),
    }
    commit = loopback_hub.commit("someone/quiz", first)
    loopback_hub.tag("someone/quiz", "v1")
    loopback_hub.commit("someone/quiz", {**first, "hard/test-00001-of-00002.parquet": asked("Who else?")})
    benchmark = own(tmp_path, ["question"], hub="someone/quiz", revision="v1", config="hard", split="test")
    assert benchmark.revisions == {"someone/quiz": commit}
    assert texts(benchmark) == [
        ("hard/test:0", "question", "Why?"),
        ("hard/test:1", "question", "When?"),
        ("hard/test:2", "question", "Who?"),
    ]
    assert benchmark.fingerprints() == [
        (path, hashlib.sha256(first[path]).hexdigest()) for path in sorted(first) if path.startswith("hard/test")
    ]


def test_a_branch_of_converted_files_is_a_revision_like_any_other(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    loopback_hub.commit("someone/script", {"script.py": b"raise"})
    converted = {"hard/test/0000.parquet": asked("Why?"), "easy/test/0000.parquet": asked("1 + 1?")}
    commit = loopback_hub.commit("someone/script", converted, branch="refs/convert/parquet")
    keys = {"hub": "someone/script", "config": "hard", "split": "test"}
    benchmark = own(tmp_path, ["question"], revision="refs/convert/parquet", **keys)
    assert texts(benchmark) == [("hard/test:0", "question", "Why?")]
    assert benchmark.revisions == {"someone/script": commit}
    with pytest.raises(SourceError, match=r"mine: someone/script: no data file of the split"):
        own(tmp_path, ["question"], **keys)


def test_without_a_split_the_test_split_is_read_rather_than_train(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    files = {"train.jsonl": b'{"question": "Seen before?"}\n', "test.jsonl": b'{"question": "Why?"}\n'}
    loopback_hub.commit("someone/quiz", files)
    assert texts(own(tmp_path, ["question"], hub="someone/quiz")) == [("test.jsonl:0", "question", "Why?")]
    loopback_hub.commit("someone/quiz", {"questions.jsonl": files["test.jsonl"]})
    assert texts(own(tmp_path, ["question"], hub="someone/quiz")) == [("questions.jsonl:0", "question", "Why?")]


def test_what_the_hub_refuses_is_said_with_the_table(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"^decontaminate\.against\.mine: someone/none: no such repository"):
        own(tmp_path, ["q"], hub="someone/none")
    loopback_hub.commit("someone/quiz", {"test.parquet": asked("Why?")})
    with pytest.raises(SourceError, match=r'mine: test\.parquet: no field "questions" .* did you mean "question"'):
        own(tmp_path, ["questions"], hub="someone/quiz")


def test_a_suite_out_of_reach_says_how_to_name_a_copy(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"^suite gsm8k: openai/gsm8k: offline .*\[decontaminate\.against\.gsm8k\]"):
        resolve(Decontaminate(suites=["gsm8k"]), tmp_path)


# Suites

CHOICES = {"text": ["a leaf", "a stone"], "label": ["A", "B"]}
#: Where the files of each data set are (a file is `<name>-00000-of-00001.parquet`), whether its card has them as
#: configurations, and a row of ours with its columns.
STAND_INS: dict[str, tuple[list[str], bool, dict[str, Any]]] = {
    "truthfulqa/truthful_qa": (
        ["generation/validation", "multiple_choice/validation"],
        True,
        {"question": "Q?", "best_answer": "No.", "correct_answers": ["No."], "incorrect_answers": ["Yes.", "Maybe."]},
    ),
    **{
        f"hails/agieval-{task}": (["data/test"], False, {"query": f"Q: {task}?", "choices": ["(A) x"], "gold": [0]})
        for task in (
            *("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc"),
            *("sat-en", "sat-en-without-passage", "sat-math"),
        )
    },
    "SaylorTwift/bbh": (
        [*(f"{config}/test" for config in suites()["bbh"].parts[0].config), "default/test"],
        True,
        {"input": "not True is", "target": "False"},
    ),
    "allenai/ai2_arc": (
        [f"ARC-{level}/{split}" for level in ("Challenge", "Easy") for split in ("train", "validation", "test")],
        True,
        {"question": "What burns?", "choices": CHOICES, "answerKey": "A"},
    ),
    "google/boolq": (
        ["data/train", "data/validation"],
        False,
        {"question": "is it", "answer": True, "passage": "It is."},
    ),
    "Rowan/hellaswag": (
        ["data/train", "data/validation", "data/test"],
        False,
        {"ctx_a": "A man", "ctx": "A man sits.", "endings": ["He stands.", "It rains."], "label": "0"},
    ),
    "allenai/openbookqa": (
        [f"{config}/{split}" for config in ("main", "additional") for split in ("train", "test")],
        True,
        {"question_stem": "What burns?", "choices": CHOICES, "answerKey": "A"},
    ),
    "baber/piqa": (
        ["piqa_train", "piqa_validation", "piqa_test"],
        False,
        {"goal": "To cut", "sol1": "a knife", "sol2": "a spoon", "label": 0},
    ),
    "allenai/winogrande": (
        [f"winogrande_{size}/{split}" for size in ("xs", "xl") for split in ("train", "validation", "test")],
        True,
        {"sentence": "The cup did not fit in the box as _ was small.", "option1": "cup", "option2": "box"},
    ),
    "openai/gsm8k": (
        [f"{config}/{split}" for config in ("main", "socratic") for split in ("train", "test")],
        True,
        {"question": "How many?", "answer": "Two.\n#### 2"},
    ),
    "lighteval/mt-bench": (["data/train"], False, {"turns": ["Write.", "Now shorter."], "reference": ["Done."]}),
    "cais/mmlu": (
        ["all/auxiliary_train", "all/test", "all/dev", "anatomy/test"],
        True,
        {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
    ),
    "openai/openai_humaneval": (
        ["openai_humaneval/test"],
        True,
        {"prompt": "def f():", "canonical_solution": "    return 1", "test": "assert f()"},
    ),
}


def stand_in(repo: str) -> dict[str, bytes]:
    """Files laid out as in a data set on the Hub, with a row of our own in each."""
    names, carded, row = STAND_INS[repo]
    configs: dict[str, list[str]] = {}
    for name in names:
        config, _, split = name.rpartition("/")
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{split}-*\n")
    card = "".join(f"- config_name: {name}\n  data_files:\n{''.join(paths)}" for name, paths in configs.items())
    files = {
        f"{name}-00000-of-00001.parquet": encoded("q.parquet", [{**row, "from": name}, {**row, "from": name}])
        for name in names
    }
    return {"README.md": f"---\nconfigs:\n{card}---\n".encode() if carded else b"# A card", **files}


@pytest.fixture
def hub_of_suites(loopback_hub: LoopbackHub) -> dict[str, str]:
    return {repo: loopback_hub.commit(repo, stand_in(repo)) for repo in STAND_INS}


#: Of each suite: the labels of its items in their order, and how many texts a row has.
SUITE_LABELS = {
    "truthfulqa": (["generation/validation"], 5),
    "agieval": ([f"{repo}/test" for repo in STAND_INS if repo.startswith("hails/")], 2),
    "bbh": ([f"{config}/test" for config in suites()["bbh"].parts[0].config], 1),
    "gpt4all": (
        [
            *("allenai/ai2_arc/ARC-Challenge/test", "allenai/ai2_arc/ARC-Easy/test", "google/boolq/validation"),
            *("Rowan/hellaswag/validation", "allenai/openbookqa/main/test", "baber/piqa/validation"),
            "allenai/winogrande/winogrande_xl/validation",
        ],
        None,
    ),
    "gsm8k": (["main/test"], 2),
    "gsm8k_train": (["main/train"], 2),
    "mt_bench": (["train"], 3),
    "mmlu": (["all/test"], 5),
    "humaneval": (["test"], 2),
}


@pytest.mark.parametrize("name", SUITE_LABELS)
def test_a_suite_reads_its_splits_and_no_other_and_counts_rows_by_them(
    hub_of_suites: dict[str, str], tmp_path: Path, name: str
) -> None:
    (suite,) = resolve(Decontaminate(suites=[name]), tmp_path)
    found = texts(suite)
    labels, per_row = SUITE_LABELS[name]
    items = list(dict.fromkeys(item for item, _, _ in found))
    assert items == [f"{label}:{row}" for label in labels for row in (0, 1)]
    assert per_row is None or len(found) == per_row * len(items)
    assert suite.revisions == {repo: hub_of_suites[repo] for repo in {part.hub for part in suites()[name].parts}}
    assert len({path for path, _ in suite.fingerprints()}) == len(labels)


def test_suites_come_first_and_then_what_a_recipe_adds(hub_of_suites: dict[str, str], tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", QUESTIONS)
    wanted = {"suites": ["mmlu", "gsm8k"], "against": {"mine": {"path": "q.jsonl", "fields": ["question"]}}}
    assert [each.name for each in resolve(Decontaminate.model_validate(wanted), tmp_path)] == ["mmlu", "gsm8k", "mine"]


def test_a_suite_asks_for_a_commit_once_and_fetches_nothing_twice(
    hub_of_suites: dict[str, str], loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    resolve(Decontaminate(suites=["bbh"]), tmp_path)
    assert sum("/revision/main" in path for _, path in loopback_hub.requests) == 1
    loopback_hub.requests.clear()
    resolve(Decontaminate(suites=["bbh"]), tmp_path)
    assert len(loopback_hub.requests) == 1


def test_every_suite_is_described_in_the_recipe_and_tested_here() -> None:
    assert set(SUITE_LABELS) == set(suites())
    said = Decontaminate.model_fields["suites"].description
    assert said is not None
    assert said.rpartition(": ")[2].rstrip(".").split(", ") == list(suites())
    assert {part.hub for suite in suites().values() for part in suite.parts} == set(STAND_INS)
    assert SUITES.parent.name == "data", "the wheel has prefmix/data"


# In a recipe

MIX = 'name = "mix"\n[sources.a]\npath = "a.jsonl"\n[decontaminate]\n'
AGAINST = '[decontaminate.against.mine]\npath = "q.csv"\nfields = ["q"]\n'


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            'suites = [\n  "mmlu",\n  "gsm8",\n]',
            [("decontaminate.suites.1", 7, 'no suite is called "gsm8"', 'did you mean "gsm8k"?')],
        ),
        (
            'suites = ["zzz"]',
            [("decontaminate.suites.0", 5, 'no suite is called "zzz"', f"suites: {', '.join(suites())}")],
        ),
        ('suites = ["mmlu", "mmlu"]', [("decontaminate.suites.1", 5, "a suite is named twice", None)]),
        (
            'suites = ["mmlu"]\n' + AGAINST.replace("mine", "mmlu"),
            [("decontaminate.against.mmlu", 6, "this name is taken", "`suites` has it too")],
        ),
        (
            AGAINST.replace('path = "q.csv"', 'hub = "a/b"\nconfig = "c"'),
            [("decontaminate.against.mine.config", 7, "needs `split`", None)],
        ),
        (
            'suites = "mmlu"',
            [("decontaminate.suites", 5, 'expected a list, each item text, got "mmlu"', 'as a list: ["mmlu"]')],
        ),
        (
            'suites = ["hellaswag", "arc_challenge", "main"]',
            [
                ("decontaminate.suites.0", 5, 'no suite is called "hellaswag"', 'it is part of "gpt4all"'),
                ("decontaminate.suites.1", 5, 'no suite is called "arc_challenge"', 'it is part of "gpt4all"'),
                ("decontaminate.suites.2", 5, 'no suite is called "main"', f"suites: {', '.join(suites())}"),
            ],
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_its_line(
    tmp_path: Path, text: str, problems: list[tuple[str, int, str, str | None]]
) -> None:
    (tmp_path / "mix.toml").write_text(MIX + text)
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe(tmp_path / "mix.toml")
    assert [(each.key, each.line, each.message, each.hint) for each in caught.value.problems] == problems


def test_known_suites_and_own_benchmarks_make_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_text(f"{MIX}suites = {json.dumps(list(suites()))}\n{AGAINST}")
    assert recipe.load_recipe(tmp_path / "mix.toml").decontaminate.suites == list(suites())


# As an argument


def test_an_argument_is_a_suite_before_it_is_a_path(
    hub_of_suites: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("mmlu/q.jsonl"), QUESTIONS)
    assert from_argument("mmlu").revisions == {"cais/mmlu": hub_of_suites["cais/mmlu"]}
    benchmark = from_argument("./mmlu", ["question"])
    assert (benchmark.name, benchmark.revisions) == ("./mmlu", {})
    assert [item for item, _, _ in texts(benchmark)] == ["mmlu/q.jsonl:0", "mmlu/q.jsonl:1"]
    with pytest.raises(UsageError, match=r"the suite mmlu has fields of its own: .*\./mmlu"):
        from_argument("mmlu", ["question"])


def test_without_fields_each_file_gives_the_columns_with_well_known_names(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", QUESTIONS)
    written(tmp_path / "b.parquet", [{"id": "b", "goal": "To cut", "sol1": "a knife", "sol2": "a spoon"}])
    written(tmp_path / "c.csv", [{"Category": "law", "Question": "Is it?", "Answer": "It is."}])
    written(tmp_path / "d.jsonl", [{"instruction": "Add.", "input": ""}, {"instruction": "Sort.", "input": ""}])
    benchmark = from_argument("*", root=tmp_path)
    assert {section.files[0].name: section.fields for section in benchmark.sections} == {
        "a.jsonl": ("question", "choices"),
        "b.parquet": ("goal", "sol1", "sol2"),
        "c.csv": ("Question",),
        "d.jsonl": ("instruction", "input"),
    }
    assert len(texts(benchmark)) == 7 + 3 + 1 + 2


def test_well_known_names_are_taken_where_they_hold_text() -> None:
    assert known_fields({"text": pl.Int64(), "Prompt": pl.String(), "label": pl.String()}) == ["Prompt"]
    turns = pl.List(pl.Struct({"index": pl.Float64, "turns": pl.List(pl.String)}))
    inner = pl.Struct({"label": pl.List(pl.String), "text": pl.List(pl.String)})
    assert known_fields({"choices": turns}) == ["choices.turns"]
    assert known_fields({"choices": inner, "options": pl.Struct({"A": pl.String})}) == ["choices.text"]


def test_a_file_without_a_well_known_column_is_refused_with_what_it_has(tmp_path: Path) -> None:
    written(tmp_path / "q.jsonl", [{"frage": "Warum?", "x" * 50: "y"}])
    with pytest.raises(
        SourceError, match=rf"q\.jsonl: no column has a well-known name \(it has: frage, {'x' * 37}\.\.\.\)"
    ):
        from_argument("q.jsonl", root=tmp_path)


def test_a_name_that_is_neither_suite_nor_file_gets_the_nearest_suite(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"truthful_qa: no such file.*did you mean the suite truthfulqa"):
        from_argument("truthful_qa", root=tmp_path)
    with pytest.raises(SourceError, match=r"hellaswag: no such file.*it is part of the suite gpt4all"):
        from_argument("hellaswag", root=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: no data files in the folder [^;]*$"):
        from_argument("empty", root=tmp_path)


# The real benchmarks

#: (folder, files in it, fields) and how many items they have.
REAL = [
    ("agieval", "*.jsonl", ["passage", "question", "options"], 8269),  # two of the files end without a line end
    ("arena_hard", "*.jsonl", ["prompt"], 500),
    ("bbh", "*.json", ["input"], 6511),
    ("bbh", "*.json", ["examples.input"], 6511),
    ("gpt4all", "arc_*.validation.parquet", ["question", "choices.text"], 299 + 570),
    ("gpt4all", "*.test.jsonl", ["query"], 1172 + 2376 + 500),
    ("gpt4all", "boolq.validation.parquet", ["passage", "question"], 3270),
    ("gpt4all", "hellaswag.validation.parquet", ["ctx", "endings"], 10042),
    ("gpt4all", "openbookqa.validation.parquet", ["question_stem", "choices.text"], 500),
    ("gpt4all", "piqa.validation.parquet", ["goal", "sol1", "sol2"], 1838),
    ("gpt4all", "winogrande_xl.validation.parquet", ["sentence"], 1267),
    ("gsm8k", "test.jsonl", ["question", "answer"], 1319),
    ("gsm8k", "train.jsonl.gz", ["question", "answer"], 7473),
    ("humaneval", "HumanEval.jsonl.gz", ["prompt", "canonical_solution"], 164),
    ("mmlu", "test.parquet", ["question", "choices"], 14042),
    ("mt_bench", "question.jsonl", ["turns", "reference"], 80),
    ("mt_bench", "reference_answer_gpt-4.jsonl", ["choices.turns"], 30),
    ("rephrased_llm_decontaminator", "rephrase__*.jsonl", ["text"], 1236),
    ("rephrased_llm_decontaminator", "database__CodeAlpacaDB.jsonl", ["test", "train"], 82),
    ("truthfulqa", "TruthfulQA.csv", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"], 817),
    ("truthfulqa", "TruthfulQA.v0.csv", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"], 817),
    ("wizardlm", "WizardLM_testset.jsonl", ["Instruction"], 218),
]


@pytest.mark.parametrize(("folder", "files", "fields", "items"), REAL)
def test_every_real_benchmark_is_read_with_its_number_of_items(
    real_data: Path, folder: str, files: str, fields: list[str], items: int
) -> None:
    started = time.monotonic()
    table = own(real_data / "benchmarks", fields, path=f"{folder}/{files}").read()
    assert table["item"].n_unique() == items
    assert table["text"].str.strip_chars().str.len_bytes().min() > 0
    asked = {field.partition("[")[0] for field in table["field"].unique()}
    assert asked == set(fields)
    assert time.monotonic() - started < 20


def test_every_folder_of_real_benchmarks_is_read(real_data: Path) -> None:
    assert {folder for folder, *_ in REAL} == {each.name for each in (real_data / "benchmarks").iterdir()}


def test_the_columns_of_the_real_benchmarks_have_well_known_names(real_data: Path) -> None:
    for folder in ("agieval", "bbh", "gpt4all", "gsm8k", "humaneval", "mmlu", "mt_bench", "truthfulqa", "wizardlm"):
        benchmark = from_argument(f"./{folder}", root=real_data / "benchmarks")
        assert all(section.fields for section in benchmark.sections)
        assert not benchmark.read().is_empty()
