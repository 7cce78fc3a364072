"""The results of a suite: the file that keeps them, which metric counts, averages, and the tables of a model card.

    {"format": 1, "suite": "truthfulqa", "title": "TruthfulQA", "model": {"name", "weights", "adapter", "tokenizer",
      "quantization", "dtype", "device"}, "mixture": {"name", "version", "digest"}, "training_data": "decontaminated",
     "harness": {"name": "lm-eval", "version"}, "limit": null, "chat": false, "batch": 1, "data": "hub" | "local",
     "tasks": {"truthfulqa_mc1": {"version", "fewshot", "n", "of", "seconds", "dataset": {"id", "config", "split"}, "files",
       "counted": "acc", "metrics": [{"name", "filter", "value", "stderr", "higher_is_better"}], "record"}},
     "left_out": {"task": "why"}, "average": {"value", "stderr", "of": ["truthfulqa_mc2"]}, "finished"}

Values are shares between 0 and 1, as the harness gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefmix.errors import ModelError
from prefmix.scores.suites import SUITES

FORMAT = 1
Results = Mapping[str, Any]
Metric = Mapping[str, Any]

#: What a task's score is, the first of these that it has: as on the reference card, and for generated answers the strict
#: one.
_COUNTED = (("acc_norm", None), ("acc", None), ("exact_match", "strict-match"), ("exact_match", None))


def label(metric: Metric) -> str:
    """`acc_norm`, `exact_match (strict-match)`."""
    return f"{metric['name']} ({metric['filter']})" if metric["filter"] else metric["name"]


def item_key(metric: Metric) -> str:
    """What a metric is called among the values of the items."""
    return f"{metric['name']},{metric['filter']}" if metric["filter"] else metric["name"]


def counted(metrics: Sequence[Metric]) -> Metric:
    """The metric that is a task's score. Raises ModelError for a task that has none."""
    if not metrics:
        raise ModelError("the harness gives no metric for this task")
    by_name = {(metric["name"], metric["filter"]): metric for metric in metrics}
    return next((by_name[name] for name in _COUNTED if name in by_name), metrics[0])


def score(task: Mapping[str, Any]) -> Metric:
    """The counted metric of a task in results."""
    return next(metric for metric in task["metrics"] if label(metric) == task["counted"])


def average(tasks: Mapping[str, Mapping[str, Any]], averaged: Sequence[str]) -> dict[str, Any] | None:
    """The plain mean of the scores, each task counting as one, and its standard error. None without a task."""
    scores = {name: score(tasks[name]) for name in averaged if name in tasks}
    if not scores:
        return None
    errors = [each["stderr"] for each in scores.values()]
    value = sum(each["value"] for each in scores.values()) / len(scores)
    stderr = None if None in errors else sum(error**2 for error in errors) ** 0.5 / len(scores)
    return {"value": value, "stderr": stderr, "of": list(scores)}


def results_folder(model: str) -> Path:
    """Where the results of a model that is not a stage go: `eval/` and its folder's name, or its name on the Hub. A merge goes
    by the names of its run and stage."""
    folder = Path(model)
    parts = folder.absolute().parts[-3 if (folder / "merge.json").is_file() else -1 :]
    return Path("eval") / ("--".join(parts) if folder.is_dir() else model.replace("/", "--"))


def read_results(folder: Path) -> dict[str, Results]:
    """The results of a folder by suite, in the order of the suites. Raises ModelError for a file that cannot be read."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            suite, version = results["suite"], results["format"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{path} is not what an evaluation leaves ({error!r}): remove it, and evaluate again."
            ) from error
        if version > FORMAT:
            raise ModelError(f"{path} was written by a newer prefmix (format {version}): update prefmix.")
        found[suite] = results
    order = list(SUITES)
    return dict(
        sorted(found.items(), key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item[0]))
    )


def markdown_table(results: Results) -> str:
    """The table of a suite in the shape of the harness's and the reference card's, aligned, with a mark on the training
    data."""
    head = ["Task", "Version", "Metric", "Value", "", "Stderr", "Training data"]
    rows = []
    for name, task in results["tasks"].items():
        mark = results["training_data"]
        for number, metric in enumerate(task["metrics"]):
            first = [name, str(task["version"])] if not number else ["", ""]
            rows.append([*first, label(metric), *value_and_error(metric), mark if not number else ""])
    return aligned(head, rows, right=(1, 3, 5))


def value_and_error(metric: Metric) -> list[str]:
    """`0.5698`, `±`, `0.0154`; one item has no standard error."""
    error = metric["stderr"]
    return [f"{metric['value']:.4f}", "±", "-"] if error is None else [f"{metric['value']:.4f}", "±", f"{error:.4f}"]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """A Markdown table whose columns are as wide as their widest cell."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    widths = [max(width, 3) for width in widths]
    rule = [f"{'-' * (width - 1)}:" if column in right else "-" * width for column, width in enumerate(widths)]
    lines = [head, rule, *rows]
    pads = [[cell.rjust(width) if column in right else cell.ljust(width)
             for column, (cell, width) in enumerate(zip(line, widths, strict=True))] for line in lines]  # fmt: skip
    return "\n".join(f"|{'|'.join(line)}|" for line in pads)


def average_line(results: Results) -> str:
    """`Average: 0.7422 ± 0.0040`, and of what, where that is not every task of the suite."""
    found = results["average"]
    if found is None:
        return "Average: none of its tasks was asked"
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
    suite = SUITES.get(results["suite"])
    whole = suite is None or set(found["of"]) == set(suite.tasks)
    named = ", ".join(found["of"]) if len(found["of"]) < 3 else f"{len(found['of'])} tasks"
    return f"Average: {found['value']:.4f}{error}{'' if whole else f' (of {named})'}"


def how(results: Results) -> str:
    """How a suite was asked, in a line: the harness, the items, few-shot, the model's weights."""
    model = results["model"]
    shots = sorted({task["fewshot"] for task in results["tasks"].values()})
    items = f"the first {results['limit']:,} items of each task" if results["limit"] else "all items"
    parts = [
        f"{results['harness']['name']} {results['harness']['version']}",
        items + (" from local files" if results["data"] == "local" else ""),
        f"{' or '.join(map(str, shots))}-shot" if shots else "",
        "chat template" if results["chat"] else "no chat template",
        f"weights in {'NF4, ' if model['quantization'] == 'nf4' else ''}{model['dtype']} on {model['device']}",
    ]
    return ", ".join(part for part in parts if part)
