"""The scores of a stage where others look for them: its model card (a section and `model-index`) and `.eval_results/`.

Only whole benchmarks are put into `model-index` and `.eval_results/`, which the Hub ranks models by; what was asked of the
first items is in the text alone, and says so.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefmix.errors import ModelError
from prefmix.scores.results import Results, average_line, how, label, markdown_table, read_results, score

_HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"
_HEADING = "## Evaluation"
_SECTION = re.compile(r"^## Evaluation\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_BEFORE = re.compile(r"^## Training data$", re.MULTILINE)
_FRONT = re.compile(r"\A---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
#: What the card of a stage says as long as nothing was evaluated, and afterwards.
_NOTHING, _NOTHING_ELSE = (
    "No benchmark, and nothing about safety, was measured here.",
    "Nothing about safety was measured here.",
)
_WHAT_MARKS_MEAN = (
    "“Training data” says whether the mixture that this model was trained on was searched for the items and rid of them; "
    "what the base was trained on is not known here."
)


def complete_card(stage: Path) -> None:
    """Puts all results of `<stage>/eval` into the stage's README.md and `.eval_results/`. Raises ModelError for a card that
    has no front matter."""
    results = list(read_results(stage / "eval").values())
    card = stage / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else "---\n{}\n---\n\n# Model\n"
    try:
        text = completed(text, stage.resolve().parent.name, results)
    except ValueError as error:
        raise ModelError(
            f"{card} has no YAML front matter (between two lines ---): restore it, or remove the file."
        ) from error
    _write(card, text)
    for each in results:
        path = stage / ".eval_results" / f"{each['suite']}.yaml"
        entries = eval_results(each)
        if entries:
            path.parent.mkdir(exist_ok=True)
            _write(path, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
        else:
            path.unlink(missing_ok=True)


def completed(card: str, name: str, results: Sequence[Results]) -> str:
    """A model card with the results of the model `name`, in the place of those it had. Raises ValueError for one without
    front matter."""
    front = _FRONT.match(card)
    head = yaml.safe_load(front[1]) if front else None
    if front is None or not isinstance(head, dict):
        raise ValueError("the card has no front matter")
    head.pop("model-index", None)
    if index := model_index(name, results):
        head["model-index"] = index
    dumped = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=math.inf)
    body = _with_section(card[front.end() :], section(results)).replace(_NOTHING, _NOTHING_ELSE)
    return f"---\n{dumped}---{body}"


def section(results: Sequence[Results]) -> str:
    """`## Evaluation`: a table for each suite, its average, and how it was asked."""
    parts = [_HEADING]
    for each in results:
        parts += [f"### {each['title']}", markdown_table(each), average_line(each), f"Asked with {how(each)}."]
        parts += [f"Left out: {name} ({reason})." for name, reason in each["left_out"].items()]
    return "\n\n".join([*parts, _WHAT_MARKS_MEAN]) + "\n\n"


def _with_section(body: str, text: str) -> str:
    """The card's text with the section in the place of the one before, else before the training data, else at the end."""
    if _SECTION.search(body):
        return _SECTION.sub(lambda _: text, body, count=1)
    if found := _BEFORE.search(body):
        return f"{body[: found.start()]}{text}{body[found.start() :]}"
    return f"{body.rstrip()}\n\n{text.rstrip()}\n"


def _whole(results: Sequence[Results]) -> list[tuple[Results, str, Mapping[str, Any]]]:
    """The tasks that were asked in full, each once: a task by itself gives way to its suite."""
    found: dict[str, tuple[Results, str, Mapping[str, Any]]] = {}
    for each in results:
        for name, task in each["tasks"].items():
            if task["n"] == task["of"] and task["dataset"]["id"]:
                found.setdefault(name, (each, name, task))
    return list(found.values())


def model_index(name: str, results: Sequence[Results]) -> list[dict[str, Any]]:
    """`model-index` of the card's front matter, as huggingface_hub's `eval_results_to_model_index` makes it: an entry for
    each data set, with the metrics of all tasks on it. Empty without a whole benchmark."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each, task_name, task in _whole(results):
        place = _without_none(
            {"type": task["dataset"]["id"], **{key: task["dataset"][key] for key in ("config", "split")}}
        )
        entry = entries.setdefault(
            tuple(place.values()),
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": each["title"], **place, "args": {"num_few_shot": task["fewshot"]}},
                "metrics": [],
                "source": {"url": _HARNESS, "name": _source(each)},
            },
        )
        entry["metrics"] += [
            {"type": metric["name"], "value": metric["value"], "name": f"{task_name} {label(metric)}"}
            for metric in task["metrics"]
        ]
    return [{"name": name, "results": list(entries.values())}] if entries else []


def eval_results(results: Results) -> list[dict[str, Any]]:
    """What `.eval_results/<suite>.yaml` holds: the score of each task, as huggingface_hub's `eval_result_entries_to_yaml`
    makes it; empty without a whole benchmark."""
    return [
        {
            "dataset": {"id": task["dataset"]["id"], "task_id": name},
            "value": score(task)["value"],
            "date": results["finished"],
            "source": {"url": _HARNESS, "name": _source(results)},
            "notes": f"{task['counted']}, {task['fewshot']}-shot; training data: {results['training_data']}",
        }
        for _, name, task in _whole([results])
    ]


def _source(results: Results) -> str:
    return f"{results['harness']['name']} {results['harness']['version']}"


def _without_none(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def _write(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text, encoding="utf-8", newline="\n")
    os.replace(staged, path)
