"""The items of benchmarks in local files, as the rows that lm-evaluation-harness reads from the Hub.

Files keep the shapes in which the benchmarks were published: TruthfulQA's CSV, AGIEval's JSON lines, BIG-Bench Hard's
JSON, OLMES prompts of ARC and OpenBookQA. Each shape has a function here that gives the Hub's columns; rows that have
them already stay as they are. What the harness makes of them, prompt and metric, is its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmix import files
from prefmix.errors import ModelError, SourceError
from prefmix.scores.suites import SUITES

Row = Mapping[str, Any]
_TEXT = (".jsonl", ".json", ".csv")
_ENDINGS = (*(f"{kind}{packed}" for kind in _TEXT for packed in ("", *files.COMPRESSIONS)), ".parquet", ".arrow")
_OPTION = re.compile(r"\n [A-Z]\. ")


class UnlikeTheHubError(ModelError):
    """A file whose items are not those that the harness reads, so that its task is left out."""


@dataclass(frozen=True)
class Local:
    """A task's files: by split, their names without ending, the best one first; and what gives the Hub's columns. `second_best`
    says what of a file that is not the best one."""

    splits: Mapping[str, tuple[str, ...]]
    convert: Callable[[Row], dict[str, Any]]
    second_best: str = ""


@dataclass(frozen=True)
class LocalRows:
    """The rows of a task by split, the name and sha256 of each file that they are from, and what the user should know."""

    splits: Mapping[str, list[dict[str, Any]]]
    files: Mapping[str, str]
    note: str


def local_rows(task: str, folder: Path) -> LocalRows:
    """The rows of a task from the files below a folder.

    Raises:
        ModelError: the task is not one that local files are known for, or its file is missing.
        UnlikeTheHubError: the file has other items than the harness reads.
        SourceError: a file cannot be read, or a row lacks a column.
    """
    if task not in _LOCAL:
        raise ModelError(f"no local file for {task}: prefmix knows none of its format. Leave --data out to read it from "
                         f"the Hub; local files are known for {', '.join(SUITES)}.")  # fmt: skip
    spec = _LOCAL[task]
    paths = {split: _find(task, names, folder) for split, names in spec.splits.items()}
    rows = {split: [_converted(spec, row, path, number) for number, row in enumerate(_read(path))]
            for split, path in paths.items()}  # fmt: skip
    best = all(
        path.name.startswith(f"{Path(names[0]).name}.")
        for path, names in zip(paths.values(), spec.splits.values(), strict=True)
    )
    prints = {files.relative_name(path, folder): files.fingerprint(path) for path in paths.values()}
    return LocalRows(rows, prints, "" if best else spec.second_best)


def _find(task: str, names: tuple[str, ...], folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(f"--data {folder}: there is no such folder.")
    for name in names:
        inside = [name, Path(name).name] if folder.name == Path(name).parent.name else [name]
        for path in (folder / f"{place}{ending}" for place in inside for ending in _ENDINGS):
            if path.is_file():
                return path
    wanted = " or ".join(f"{name}.*" for name in names)
    raise ModelError(f"no local file for {task}: {folder} has no {wanted} ({', '.join(_TEXT)} or .parquet). Put it there, or "
                     f"leave --data out to read it from the Hub.")  # fmt: skip


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; of one object with a list `examples`, those."""
    if path.suffix in (".parquet", ".arrow"):
        return files.read(path, {}, None).to_dicts()
    rows = [row for chunk in files.json_records(path) for row in _whole(chunk, path)]
    return rows[0]["examples"] if len(rows) == 1 and isinstance(rows[0].get("examples"), list) else rows


def _whole(chunk: Any, path: Path) -> list[dict[str, Any]]:
    if chunk.faults:
        fault = next(iter(chunk.faults.values()))
        raise SourceError(f"{path}, line {fault['line']}: {fault['error']}: fetch the file again")
    return chunk.rows


def _converted(spec: Local, row: Row, path: Path, number: int) -> dict[str, Any]:
    try:
        return spec.convert(row)
    except KeyError as error:
        raise SourceError(f"{path}, row {number}: no {error}: it is not a file of this benchmark") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}, row {number}: {error}: it is not a file of this benchmark") from None


# One function for each shape: a row as published -> the Hub's columns.


def truthfulqa(row: Row) -> dict[str, Any]:
    """TruthfulQA's CSV as its own mc_task.json, which the Hub's `multiple_choice` is: mc1 has the best answer and the
    wrong ones, mc2 the right and the wrong ones; each answer is stripped, ends on a full stop and is there once."""
    if "mc1_targets" in row:
        return {key: row[key] for key in ("question", "mc1_targets", "mc2_targets")}
    best, right, wrong = (_answers(row[key]) for key in ("Best Answer", "Correct Answers", "Incorrect Answers"))
    return {
        "question": row["Question"].strip(),
        "mc1_targets": _targets(best[:1], wrong),
        "mc2_targets": _targets(right, wrong),
    }


def _answers(text: str) -> list[str]:
    found = (answer.strip() for answer in text.split(";"))
    return [answer if answer.endswith(".") else f"{answer}." for answer in found if answer]


def _targets(right: list[str], wrong: list[str]) -> dict[str, Any]:
    labels = dict.fromkeys(right, 1) | dict.fromkeys(wrong, 0)
    return {"choices": list(labels), "labels": list(labels.values())}


def arc(row: Row, stem: str = "question") -> dict[str, Any]:
    """ARC and OpenBookQA: the Hub's rows, or OLMES prompts (`Question: ...`, a line ` A. ...` for each option, `Answer:`)
    taken apart. Labels that are numbers on the Hub are letters there; only their place counts."""
    if "query" not in row:
        return {key: row[key] for key in (stem, "choices", "answerKey")}
    question, *options = _OPTION.split(row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"))
    if len(options) != len(row["choices"]):
        raise ValueError(f"{len(options)} options in the query and {len(row['choices'])} choices")
    labels = list(row["choices"])
    return {stem: question, "choices": {"text": options, "label": labels}, "answerKey": labels[row["gold"]]}


def openbookqa(row: Row) -> dict[str, Any]:
    return arc(row, "question_stem")


def boolq(row: Row) -> dict[str, Any]:
    """SuperGLUE's BoolQ, whose passages begin with their title. Google's BoolQ has other prompts."""
    if "label" not in row:
        raise UnlikeTheHubError(
            "no local file for boolq: the harness reads SuperGLUE's BoolQ, whose passages begin with their title; the file "
            "is Google's BoolQ, which has none (and `answer` in place of `label`)"
        )
    return {"passage": row["passage"], "question": row["question"], "label": int(row["label"])}


def agieval(row: Row) -> dict[str, Any]:
    """AGIEval's JSON lines as hails/agieval-*: the query is AGIEval's own zero-shot prompt for questions in English."""
    if "query" in row:
        return {key: row[key] for key in ("query", "choices", "gold")}
    options = list(row["options"])
    letters = "ABCDEFG"[: len(options)]
    query = f"{row['passage'] or ''}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
    query += f"A: Among A through {letters[-1]}, the answer is"
    return {"query": query, "choices": options, "gold": [letters.index(row["label"])]}


def _columns(*names: str) -> Callable[[Row], dict[str, Any]]:
    """For files that have the Hub's columns: those that the task reads."""
    return lambda row: {name: row[name] for name in names}


_LOCAL = {
    **{task: Local({"validation": ("truthfulqa/TruthfulQA.v0", "truthfulqa/TruthfulQA")}, truthfulqa,
                   "truthfulqa: TruthfulQA.csv is a later edition than the Hub's, with more answers and some other ones: "
                   "scores differ a little. The Hub's is TruthfulQA.v0.csv (data/v0/TruthfulQA.csv of its repository)")
       for task in SUITES["truthfulqa"].tasks},
    **{task: Local({"test": (f"gpt4all/{task}.test",)}, arc) for task in ("arc_challenge", "arc_easy")},
    "openbookqa": Local({"test": ("gpt4all/openbookqa.test",)}, openbookqa),
    "boolq": Local({"validation": ("gpt4all/boolq.validation",)}, boolq),
    "hellaswag": Local({"validation": ("gpt4all/hellaswag.validation",)},
                       _columns("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "piqa": Local({"validation": ("gpt4all/piqa.validation",)}, _columns("goal", "sol1", "sol2", "label")),
    "winogrande": Local({"validation": ("gpt4all/winogrande_xl.validation",)},
                        _columns("sentence", "option1", "option2", "answer")),
    "gsm8k": Local({"test": ("gsm8k/test",), "train": ("gsm8k/train",)}, _columns("question", "answer")),
    **{task: Local({"test": (f"agieval/{task.removeprefix('agieval_').replace('_', '-')}",)}, agieval)
       for task in SUITES["agieval"].tasks},
    **{task: Local({"test": (f"bbh/{task.removeprefix('leaderboard_bbh_')}",)}, _columns("input", "target"))
       for task in SUITES["bbh"].tasks},
}  # fmt: skip
