"""Two models side by side: the difference of their scores, its standard error, and whether it is beyond noise.

Where both answered the same items, the difference is taken item by item: what is hard for both then does not count as
noise. Otherwise the two standard errors are added in squares. Beyond noise is what lies further from zero than 1.96
standard errors; of twenty tasks without any difference, one does. A standard error of zero says that all items had the
same value, which a few items may: nothing is concluded from it.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prefmix.errors import ModelError
from prefmix.scores.results import Results, aligned, item_key, read_results, results_folder, score, value_and_error
from prefmix.scores.suites import REFERENCE

_CARD = Path(__file__).parents[2] / "data" / "reference_card.toml"
_CRITICAL = 1.959964
_SMALL = 1e-12

How = Literal["paired", "unpaired", "unlike"]


@dataclass(frozen=True)
class Other:
    """What is compared with: results by suite, and the folder that they are in (None for the reference card)."""

    name: str
    results: Mapping[str, Results]
    folder: Path | None


@dataclass(frozen=True)
class Difference:
    """A task, or the average of a suite (`task` is None), of two models. `difference` is `own` minus `other`, `how` says where
    its standard error comes from; `beyond_noise` is None where that cannot be said."""

    suite: str
    task: str | None
    metric: str
    own: float
    own_stderr: float | None
    other: float
    other_stderr: float | None
    difference: float
    stderr: float | None
    how: How

    @property
    def beyond_noise(self) -> bool | None:
        if self.stderr is None or self.how == "unlike":
            return None
        return abs(self.difference) > max(_CRITICAL * self.stderr, _SMALL)

    @property
    def verdict(self) -> str:
        if self.how == "unlike":
            return "other task"
        if self.beyond_noise is None:
            return "no standard error"
        return ("better" if self.difference > 0 else "worse") if self.beyond_noise else "within noise"


@cache
def reference_card() -> Other:
    """The published figures of the reference card, in the shape of results."""
    card = tomllib.loads(_CARD.read_text(encoding="utf-8"))
    results = {}
    for suite, entry in card.items():
        if not isinstance(entry, dict):
            continue
        tasks = {}
        for task, metrics in entry["tasks"].items():
            listed = [{"name": name, "filter": None, "value": value, "stderr": error, "higher_is_better": True}
                      for name, (value, error) in metrics.items()]  # fmt: skip
            counted = "acc_norm" if "acc_norm" in metrics else next(iter(metrics))
            tasks[task] = {"metrics": listed, "counted": counted}
        results[suite] = {"suite": suite, "title": entry["title"], "tasks": tasks, "unlike": entry.get("unlike"),
                          "average": {"value": entry["average"], "stderr": None}}  # fmt: skip
    return Other(card["model"], results, None)


def open_other(reference: str) -> Other:
    """`reference`, a folder with results, a stage, or a run (its only stage that has some).

    Raises ModelError when there are no results.
    """
    if reference == REFERENCE:
        return reference_card()
    folder = Path(reference)
    homes = [folder, folder / "eval", *sorted(folder.glob("*/eval")), results_folder(reference)]
    holding = [home for home in homes if home.is_dir() and any(_is_results(path) for path in home.glob("*.json"))]
    if not holding:
        raise ModelError(f"--compare {reference}: there are no results of an evaluation. Run `prefmix eval {reference} ...` "
                         f"with the same suites first, or name a folder with results, or `reference`.")  # fmt: skip
    if len(holding) > 1 and holding[0] not in (folder, folder / "eval"):
        raise ModelError(
            f"--compare {reference}: several stages have results ({', '.join(map(str, holding))}): name one."
        )
    return Other(reference, read_results(holding[0]), holding[0])


def _is_results(path: Path) -> bool:
    try:
        return "suite" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def compare(own: Sequence[Results], folder: Path, other: Other) -> list[Difference]:
    """The scores of all tasks that both have, suite by suite, each suite's average over these at its end."""
    found = []
    for results in own:
        theirs = other.results.get(results["suite"]) or _containing(results, other)
        if theirs is None:
            continue
        tasks = [
            _difference(results, theirs, name, folder, other.folder)
            for name in results["tasks"]
            if name in theirs["tasks"]
        ]
        found += tasks
        averaged = [each for each in tasks if each.task in (results["average"] or {"of": ()})["of"]]
        if len(averaged) > 1:
            found.append(_average(averaged))
    return found


def _containing(results: Results, other: Other) -> Results | None:
    """Results of another suite that has a task of this one: a task by itself is in the table of its suite."""
    return next((each for each in other.results.values() if each["tasks"].keys() & results["tasks"].keys()), None)


def _difference(own: Results, other: Results, task: str, own_folder: Path, other_folder: Path | None) -> Difference:
    mine, theirs = own["tasks"][task], other["tasks"][task]
    a, b = score(mine), score(theirs)
    how: How = "unlike" if other.get("unlike") or (a["name"], a["filter"]) != (b["name"], b["filter"]) else "unpaired"
    stderr = math.hypot(a["stderr"], b["stderr"]) if a["stderr"] and b["stderr"] else None
    if how == "unpaired" and other_folder is not None:
        pairs = _pairs(own_folder, mine, other_folder, theirs, item_key(a))
        if pairs:
            how, stderr = "paired", _error_of_mean([x - y for x, y in pairs])
    return Difference(own["suite"], task, mine["counted"], a["value"], a["stderr"], b["value"], b["stderr"],
                      a["value"] - b["value"], stderr, how)  # fmt: skip


def _pairs(
    own_folder: Path, mine: Mapping[str, Any], other_folder: Path, theirs: Mapping[str, Any], key: str
) -> list[tuple[float, float]] | None:
    """The values of the items of both; None when they are not the same items."""
    sides = [_values(own_folder, mine, key), _values(other_folder, theirs, key)]
    if None in sides or sorted(sides[0]) != sorted(sides[1]):
        return None
    return [(sides[0][item], sides[1][item]) for item in sides[0]]


def _values(folder: Path, task: Mapping[str, Any], key: str) -> Any:
    """Values by item, repeated items counted; None without a record."""
    try:
        items = json.loads((folder / "tasks" / task["record"]).read_text(encoding="utf-8"))["items"][key]
    except (OSError, ValueError, KeyError):
        return None
    seen: dict[str, int] = {}
    values = {}
    for item, value in zip(items["ids"], items["values"], strict=True):
        seen[item] = seen.get(item, 0) + 1
        values[item, seen[item]] = value
    return values


def _error_of_mean(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    if len(values) < 2 or (squares < _SMALL < abs(mean)):
        return None
    return math.sqrt(squares / (len(values) - 1) / len(values))


def _average(tasks: Sequence[Difference]) -> Difference:
    """The plain means of some tasks; the errors of their differences add in squares."""
    count = len(tasks)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / count

    def error(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.hypot(*known) / count if len(known) == count else None

    how: How = tasks[0].how if len({each.how for each in tasks}) == 1 else "unpaired"
    if any(each.how == "unlike" for each in tasks):
        how = "unlike"
    return Difference(
        tasks[0].suite,
        None,
        f"average of {count}",
        mean([each.own for each in tasks]),
        error([each.own_stderr for each in tasks]),
        mean([each.other for each in tasks]),
        error([each.other_stderr for each in tasks]),
        mean([each.difference for each in tasks]),
        error([each.stderr for each in tasks]),
        how,
    )


def comparison_table(differences: Sequence[Difference], own: str, other: str) -> str:
    """A Markdown table: both scores with their standard errors, the difference with its own, and the verdict."""
    rows = []
    for each in differences:
        columns = [
            " ".join(value_and_error({"value": value, "stderr": error}))
            for value, error in ((each.own, each.own_stderr), (each.other, each.other_stderr))
        ]
        error = "-" if each.stderr is None else f"{each.stderr:.4f}"
        name = each.task or f"{each.suite}: average"
        rows.append([name, each.metric, *columns, f"{each.difference:+.4f} ± {error}", each.how, each.verdict])
    return aligned(["Task", "Metric", own, other, "Difference", "Items", "Verdict"], rows, right=(2, 3, 4))
