"""`prefmix eval`: the harness's prompts and scores on local files, resuming, marks, comparisons, and the model card."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import lm_eval
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small_models import byte_tokenizer, micro_llama

from prefmix.errors import ModelError, SourceError, UsageError
from prefmix.model.evaluation import benchmark_rows, harness
from prefmix.model.evaluation import evaluating as evaluate
from prefmix.model.evaluation.benchmark_rows import UnlikeTheHubError, local_rows
from prefmix.model.evaluation.decontaminated import TrainingData
from prefmix.model.evaluation.evaluating import Settings
from prefmix.model.evaluation.journal import Journal
from prefmix.model.find import find_model, load_model
from prefmix.scores import results as scores
from prefmix.scores.suites import SUITES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

TASKS = Path(lm_eval.__file__).parent / "tasks"
UNKNOWN = TrainingData(None, "nobody knows")

QUESTIONS = [
    ("What is a prefmix?", "A tool", "A tool; A program.; A tool", "A cat; A river;A song; "),
    ("How many legs has a table?", "It depends", "It depends; Often four.", "Always two; None"),
    ("Who wrote this row? ", "A tester.", "A tester.; Somebody", "A robot; Nobody; A poet; A king"),
]
ITEMS = [
    ("Which of these is a number?", ["seven", "blue", "loud", "soft"], 0),
    ("Which of these is a colour?", ["nine", "green", "late"], 1),
    ("Which of these is an animal?", ["a door", "a lamp", "a spoon", "a horse", "a hat"], 3),
    ("Which of these can be read?", ["a stone", "a book", "the wind", "salt"], 1),
]


def olmes(question: str, options: list[str], gold: int) -> dict:
    """An item as OLMES writes it."""
    lines = "".join(f"\n {letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False))
    return {
        "id": "x",
        "query": f"Question: {question}{lines}\nAnswer:",
        "choices": list("ABCDEFGH"[: len(options)]),
        "gold": gold,
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Benchmark files with a few items of our own."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "truthfulqa").mkdir()
    with (folder / "truthfulqa" / "TruthfulQA.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        writer.writerows(["Adversarial", *row] for row in QUESTIONS)
    for name in ("arc_challenge", "arc_easy"):
        write_lines(folder / "gpt4all" / f"{name}.test.jsonl", [olmes(*item) for item in ITEMS])
    sums = [{"question": f"What is {n} + 1?", "answer": f"It is one more.\n#### {n + 1}"} for n in range(12)]
    write_lines(folder / "gsm8k" / "train.jsonl", sums[:8])
    write_lines(folder / "gsm8k" / "test.jsonl", sums[8:])
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("model")
    return micro_llama(home / "micro", tokenizer=byte_tokenizer(home / "bytes"))


@pytest.fixture(scope="module")
def found(model_folder):
    return find_model(model_folder)


@pytest.fixture(scope="module")
def theirs(found):
    """The harness's own model, as `lm_eval` makes it."""
    model, tokenizer = load_model(found)
    return lambda batch: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def asked(found, suites, folder, data, watcher=None, trained_on=UNKNOWN, **settings):
    return evaluate.evaluate(
        found, suites, folder, settings=Settings(data, **settings), trained_on=trained_on, watcher=watcher
    )


def plain(folder: Path, name: str, harness_file: str, source: dict, **changes) -> str:
    """A task of a user's own: the harness's definition, with `source` as the place of its rows. Gives its name."""
    keys = {
        "include": str(TASKS / harness_file),
        "task": f"plain_{name}",
        "tag": None,
        "dataset_name": None,
        **source,
        **changes,
    }
    (folder / f"plain_{name}.yaml").write_text(yaml.safe_dump(keys))
    return f"plain_{name}"


def own_run(lm, folder: Path, names: list[str], limit=None, **options) -> dict:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    cache = {"metadata": {}}
    return lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, limit=limit, **cache, **options)


def json_files(**splits: Path) -> dict:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in splits.items()}},
    }


def values(results, task: str) -> dict:
    """By metric of our results: value and standard error."""
    return {scores.item_key(each): (each["value"], each["stderr"]) for each in results["tasks"][task]["metrics"]}


def their_values(run: dict, task: str) -> dict:
    found = run["results"][task]
    return {
        key.removesuffix(",none"): (found[key], found[key.replace(",", "_stderr,")])
        for key in found
        if "," in key and "_stderr" not in key
    }


# Rows as published -> the Hub's columns.


def test_answers_of_truthfulqa_are_stripped_end_on_a_full_stop_and_are_there_once():
    row = dict(zip(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"], QUESTIONS[0], strict=True))
    assert benchmark_rows.truthfulqa(row) == {
        "question": "What is a prefmix?",
        "mc1_targets": {"choices": ["A tool.", "A cat.", "A river.", "A song."], "labels": [1, 0, 0, 0]},
        "mc2_targets": {
            "choices": ["A tool.", "A program.", "A cat.", "A river.", "A song."],
            "labels": [1, 1, 0, 0, 0],
        },
    }


LINE = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1)


@given(LINE, st.lists(LINE, min_size=2, max_size=8), st.data())
def test_an_olmes_prompt_is_taken_apart_into_what_it_was_made_of(question, options, drawn):
    gold = drawn.draw(st.integers(0, len(options) - 1))
    row = benchmark_rows.arc(olmes(question, options, gold))
    assert (row["question"], row["choices"]["text"]) == (question, options)
    assert row["choices"]["label"].index(row["answerKey"]) == gold


def test_rows_that_have_the_hubs_columns_stay_as_they_are():
    row = {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert benchmark_rows.arc({"id": "x", **row}) == row
    row = {"query": "Q: ...", "choices": ["(A)1"], "gold": [0]}
    assert benchmark_rows.agieval(row) == row


def test_agieval_is_its_own_zero_shot_prompt():
    row = {"passage": "A text.", "question": "What is it?", "options": ["(A)a text", "(B)a cat", "(C)no"], "label": "B"}
    query = "A text.Q: What is it? Answer Choices: (A)a text (B)a cat (C)no\nA: Among A through C, the answer is"
    assert benchmark_rows.agieval(row) == {"query": query, "choices": row["options"], "gold": [1]}
    assert benchmark_rows.agieval({**row, "passage": None})["query"] == query.removeprefix("A text.")


def test_boolq_of_google_is_not_that_of_the_harness():
    with pytest.raises(UnlikeTheHubError, match="no local file for boolq"):
        benchmark_rows.boolq({"question": "is it", "passage": "It is.", "answer": True})
    row = {"question": "is it", "passage": "It -- It is.", "label": True, "idx": 0}
    assert benchmark_rows.boolq(row) == {"question": "is it", "passage": "It -- It is.", "label": 1}


@pytest.mark.parametrize("task", [task for suite in SUITES.values() for task in suite.tasks if task != "boolq"])
def test_every_task_of_the_suites_reads_its_real_file_as_the_harness_defines_it(task, real_data):
    definition = harness.definitions([task])[task]
    rows = local_rows(task, real_data / "benchmarks")
    with harness.loaded(definition, rows) as read:
        docs = list(read.eval_docs)
        assert len(docs) == len(rows.splits[definition.dataset["split"]])
        for doc in docs[:50]:
            choices = read.doc_to_choice(doc) if definition.keys["output_type"] == "multiple_choice" else [""]
            assert all(isinstance(choice, str) for choice in choices)
            assert read.doc_to_text(doc) not in ("", None)


def test_the_edition_of_truthfulqa_that_the_hub_has_is_preferred(data, tmp_path):
    assert "a later edition than the Hub's" in local_rows("truthfulqa_mc1", data).note
    (tmp_path / "truthfulqa").mkdir()
    for name in ("TruthfulQA", "TruthfulQA.v0"):
        shutil.copy(data / "truthfulqa" / "TruthfulQA.csv", tmp_path / "truthfulqa" / f"{name}.csv")
    rows = local_rows("truthfulqa_mc1", tmp_path)
    assert (list(rows.files), rows.note) == (["truthfulqa/TruthfulQA.v0.csv"], "")
    assert local_rows("truthfulqa_mc1", tmp_path / "truthfulqa").splits == rows.splits


def test_a_missing_benchmark_file_is_named_with_its_folder(data, tmp_path):
    with pytest.raises(
        ModelError, match=r"no local file for piqa: .*benchmarks\d has no gpt4all/piqa\.validation\.\* "
    ):
        local_rows("piqa", data)
    with pytest.raises(ModelError, match="there is no such folder"):
        local_rows("piqa", tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no local file for mmlu_anatomy: prefmix knows none of its format"):
        local_rows("mmlu_anatomy", data)


def test_a_file_of_something_else_is_named_with_its_row(tmp_path):
    write_lines(tmp_path / "gpt4all" / "arc_easy.test.jsonl", [olmes(*ITEMS[0]), {"prompt": "x"}])
    with pytest.raises(SourceError, match=r"arc_easy\.test\.jsonl, row 1: no 'question'"):
        local_rows("arc_easy", tmp_path)


# The harness's own scores.


def test_scores_are_those_of_lm_eval_on_the_same_items(found, theirs, data, tmp_path):
    """To the last bit, also in batches: they are cut alike."""
    batch = 3
    ours = asked(found, ["truthfulqa", "arc_challenge", "gsm8k"], tmp_path / "eval", data, batch=batch)
    for name in ("truthfulqa_mc1", "truthfulqa_mc2", "arc_challenge"):
        split = "test" if name == "arc_challenge" else "validation"
        write_lines(tmp_path / f"{name}.jsonl", local_rows(name, data).splits[split])
    files = {name: json_files(validation=tmp_path / f"{name}.jsonl") for name in SUITES["truthfulqa"].tasks}
    names = [plain(tmp_path, name, f"truthfulqa/{name}.yaml", source) for name, source in files.items()]
    one = {"training_split": None, "validation_split": None}
    names.append(
        plain(tmp_path, "arc", "arc/arc_challenge.yaml", json_files(test=tmp_path / "arc_challenge.jsonl"), **one)
    )
    sums = json_files(train=data / "gsm8k" / "train.jsonl", test=data / "gsm8k" / "test.jsonl")
    names.append(plain(tmp_path, "gsm8k", "gsm8k/gsm8k.yaml", sums))
    for task, name in zip(["truthfulqa_mc1", "truthfulqa_mc2", "arc_challenge", "gsm8k"], names, strict=True):
        run = own_run(theirs(batch), tmp_path, [name])
        mine = next(each for each in ours if task in each["tasks"])
        assert values(mine, task) == their_values(run, name)
        assert mine["tasks"][task]["n"] == len(run["samples"][name]) / len({s["filter"] for s in run["samples"][name]})


def test_a_chat_template_is_applied_as_the_harness_does(model_folder, theirs, data, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    [ours] = asked(find_model(folder), ["gsm8k"], tmp_path / "eval", data, chat=True, limit=2)
    model, tokenizer = load_model(find_model(folder))
    sums = json_files(train=data / "gsm8k" / "train.jsonl", test=data / "gsm8k" / "test.jsonl")
    run = own_run(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tmp_path,
        [plain(tmp_path, "gsm8k", "gsm8k/gsm8k.yaml", sums)],
        limit=2,
        apply_chat_template=True,
    )
    assert values(ours, "gsm8k") == their_values(run, "plain_gsm8k")
    assert "<|im_start|>user" in run["samples"]["plain_gsm8k"][0]["arguments"][0][0]


TRUTHFULQA_DOCS = """
def targets(right, wrong):
    labels = {**{answer: 1 for answer in right}, **{answer: 0 for answer in wrong}}
    return {"choices": list(labels), "labels": list(labels.values())}

def answers(text):
    return [part if part[-1] == "." else part + "." for part in (p.strip() for p in text.strip().split(";")) if part]

def process_docs(rows):
    def published(row):
        best, wrong = answers(row["Best Answer"])[:1], answers(row["Incorrect Answers"])
        return {"question": row["Question"].strip(), "mc1_targets": targets(best, wrong),
                "mc2_targets": targets(answers(row["Correct Answers"]), wrong)}
    return rows.map(published, remove_columns=rows.column_names)
"""


def same_on_fifty(found, theirs, data: Path, ours: str, folder: Path, name: str) -> None:
    """The first 50 items: the same prompts and choices, and the same scores."""
    definition, rows = harness.definitions([ours])[ours], local_rows(ours, data)
    run = own_run(theirs(1), folder, [name], limit=50)
    with harness.loaded(definition, rows) as task:
        mine = [(task.doc_to_text(doc), task.doc_to_choice(doc)) for doc in list(task.eval_docs)[:50]]
    samples = run["samples"][name]
    assert len(samples) == 50
    for sample, (prompt, choices) in zip(samples, mine, strict=True):
        assert [arguments[0] for arguments in sample["arguments"]] == [prompt] * len(choices)
        assert [arguments[1] for arguments in sample["arguments"]] == [f" {choice}" for choice in choices]
    [results] = asked(found, [ours], folder / "eval", data, limit=50)
    assert values(results, ours) == their_values(run, name)


def test_truthfulqa_is_the_harnesss_own_on_fifty_real_items(found, theirs, real_data, tmp_path):
    (tmp_path / "published.py").write_text(TRUTHFULQA_DOCS)
    path = real_data / "benchmarks" / "truthfulqa" / "TruthfulQA.v0.csv"
    source = {
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": {"validation": str(path)}, "encoding": "utf-8-sig"},
    }
    name = plain(tmp_path, "mc1", "truthfulqa/truthfulqa_mc1.yaml", source)
    with (tmp_path / "plain_mc1.yaml").open("a") as file:
        file.write("process_docs: !function published.process_docs\n")
    same_on_fifty(found, theirs, real_data / "benchmarks", "truthfulqa_mc1", tmp_path, name)


def test_arc_is_the_harnesss_own_on_fifty_real_items(found, theirs, real_data, tmp_path):
    """The validation rows have the Hub's columns: the harness reads their file itself."""
    path = real_data / "benchmarks" / "gpt4all" / "arc_challenge.validation.parquet"
    (tmp_path / "gpt4all").mkdir()
    shutil.copy(path, tmp_path / "gpt4all" / "arc_challenge.test.parquet")
    source = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    one = {"training_split": None, "validation_split": None}
    name = plain(tmp_path, "arc", "arc/arc_challenge.yaml", source, **one)
    same_on_fifty(found, theirs, tmp_path, "arc_challenge", tmp_path, name)


def test_the_test_items_of_arc_have_the_prompts_that_olmes_took_from_them(real_data):
    folder = real_data / "benchmarks"
    published = [
        json.loads(line) for line in (folder / "gpt4all" / "arc_easy.test.jsonl").read_text().splitlines()[:50]
    ]
    with harness.loaded(harness.definitions(["arc_easy"])["arc_easy"], local_rows("arc_easy", folder)) as task:
        for doc, item in zip(list(task.eval_docs)[:50], published, strict=True):
            assert task.doc_to_text(doc) == item["query"].partition("\n A. ")[0] + "\nAnswer:"
            lines = [f"\n {letter}. {option}" for letter, option in zip("ABCDE", task.doc_to_choice(doc), strict=False)]
            assert "".join(lines) in item["query"]
            assert task.doc_to_target(doc) == item["gold"]


# Interrupted.


def test_two_processes_do_not_ask_the_same_at_once(found, data, tmp_path):
    class Second(evaluate.Watcher):
        def answered(self, done, requests):
            with pytest.raises(ModelError, match="Another process evaluates into"):
                asked(found, ["arc_easy"], tmp_path, data)

    asked(found, ["arc_easy"], tmp_path, data, Second())
    assert not list((tmp_path / "tasks").glob(".*"))


def stops_after(monkeypatch, calls: int) -> list[int]:
    """Interrupts the model at its `calls`-th forward pass; gives the passes so far."""
    made: list[int] = []
    forward = HFLM._model_call

    def counted(self, *args, **keys):
        made.append(1)
        if len(made) == calls:
            raise KeyboardInterrupt
        return forward(self, *args, **keys)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    return made


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_evaluation_goes_on_where_it_stopped_with_the_same_bits(
    found, data, tmp_path, monkeypatch, torn
):
    suites = ["truthfulqa", "arc_challenge"]
    with monkeypatch.context() as patch:
        passes = stops_after(patch, -1)
        whole = asked(found, suites, tmp_path / "whole", data, batch=2)
        needed = len(passes)
    with monkeypatch.context() as patch:
        stops_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            asked(found, suites, tmp_path / "parts", data, batch=2)
    [journal] = (tmp_path / "parts" / "tasks").glob("*.jsonl")
    if torn:
        with journal.open("a") as file:
            file.write('{"seconds": 1, "answers": {"half of a')
    with monkeypatch.context() as patch:
        passes = stops_after(patch, -1)
        parts = asked(found, suites, tmp_path / "parts", data, batch=2)
        assert len(passes) == needed - 8  # the ninth was not kept
    for one, other in zip(whole, parts, strict=True):
        for name, task in one["tasks"].items():
            assert task["metrics"] == other["tasks"][name]["metrics"]
            records = [
                json.loads((tmp_path / part / "tasks" / task["record"]).read_text()) for part in ("whole", "parts")
            ]
            assert records[0]["items"] == records[1]["items"]
    assert not list((tmp_path / "parts" / "tasks").glob("*.jsonl"))


def test_generated_answers_are_kept_too(found, data, tmp_path, monkeypatch):
    [whole] = asked(found, ["gsm8k"], tmp_path / "whole", data)
    generate = HFLM._model_generate
    made = []

    def interrupted(self, *args, **keys):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **keys)

    monkeypatch.setattr(HFLM, "_model_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked(found, ["gsm8k"], tmp_path / "parts", data)
    [parts] = asked(found, ["gsm8k"], tmp_path / "parts", data)
    assert len(made) == 3 + 2  # of four, two were kept
    assert values(parts, "gsm8k") == values(whole, "gsm8k")


def test_what_was_asked_is_not_asked_again_and_other_settings_leave_it(found, data, tmp_path, monkeypatch):
    [first] = asked(found, ["arc_easy"], tmp_path, data)
    [limited] = asked(found, ["arc_easy"], tmp_path, data, limit=2)
    assert (first["tasks"]["arc_easy"]["n"], limited["tasks"]["arc_easy"]["n"]) == (4, 2)
    monkeypatch.setattr(evaluate, "load_model", lambda found: pytest.fail("the model was loaded"))
    [again] = asked(found, ["arc_easy"], tmp_path, data)
    assert again["tasks"] == first["tasks"]
    assert scores.read_results(tmp_path)["arc_easy"] == again


def test_another_file_or_another_model_is_asked_anew(found, data, tmp_path):
    copied = shutil.copytree(data, tmp_path / "data")
    [first] = asked(found, ["arc_easy"], tmp_path, copied)
    write_lines(copied / "gpt4all" / "arc_easy.test.jsonl", [olmes(*item) for item in ITEMS[:3]])
    [second] = asked(found, ["arc_easy"], tmp_path, copied)
    other = micro_llama(tmp_path / "other", seed=1, tokenizer=Path(found.name))
    [third] = asked(find_model(other), ["arc_easy"], tmp_path, copied)
    assert len({each["tasks"]["arc_easy"]["record"] for each in (first, second, third)}) == 3


def test_a_journal_about_something_else_is_begun_anew(tmp_path):
    path = tmp_path / "task.jsonl"
    first = Journal(path, "one model")
    first.add_partial("loglikelihood", ("a", "b"), (-1.25, True))
    first.commit()
    first.close()
    kept = Journal(path, "one model")
    kept.close()
    assert list(kept.done.values()) == [(-1.25, True)]
    other = Journal(path, "another model")
    other.close()
    assert not other.done
    assert path.read_text() == '{"asked": "another model"}\n'


# What cannot be asked.


def test_a_model_without_chat_template_is_refused_only_when_one_is_asked_for(found, data, tmp_path):
    with pytest.raises(ModelError, match="has no chat template"):
        asked(found, ["arc_easy"], tmp_path, data, chat=True)


def test_items_that_the_hub_does_not_give_are_an_error_with_a_remedy(found, tmp_path, monkeypatch):
    def unreachable(*args, **keys):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ModelError, match=r"arc_easy: its items cannot be read from the Hub .*--data"):
        asked(found, ["arc_easy"], tmp_path, None)


@pytest.mark.slow  # the index of all tasks of the harness
def test_an_unknown_suite_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"truthfullqa is neither a suite nor a task .* Did you mean truthfulqa"):
        harness.definitions(["truthfullqa"])
    with pytest.raises(UsageError, match="mmlu is a group of the harness"):
        harness.definitions(["mmlu"])
    assert harness.definitions(["mmlu_anatomy", "arc_easy"])["mmlu_anatomy"].dataset["id"] == "cais/mmlu"
