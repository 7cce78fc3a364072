"""The suites that a model is evaluated on: names for tasks of lm-evaluation-harness that are reported together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BBH = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "formal_fallacies"),
    *("geometric_shapes", "hyperbaton", "logical_deduction_five_objects", "logical_deduction_seven_objects"),
    *("logical_deduction_three_objects", "movie_recommendation", "navigate", "object_counting", "penguins_in_a_table"),
    *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
    *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies"),
)
_AGIEVAL = ("aqua_rat", "logiqa_en", "lsat_ar", "lsat_lr", "lsat_rc", "sat_en", "sat_en_without_passage", "sat_math")


@dataclass(frozen=True)
class Suite:
    """Tasks by the names that the harness has for them. `averaged` are those whose counted metrics the average is of."""

    name: str
    title: str
    tasks: tuple[str, ...]
    averaged: tuple[str, ...]


def _suite(name: str, title: str, tasks: Sequence[str], averaged: Sequence[str] | None = None) -> Suite:
    return Suite(name, title, tuple(tasks), tuple(tasks if averaged is None else averaged))


#: The suites by name, those of the reference card first and in its order.
SUITES = {
    suite.name: suite
    for suite in (
        _suite("agieval", "AGIEval", [f"agieval_{name}" for name in _AGIEVAL]),
        _suite("bbh", "BigBench Hard", [f"leaderboard_bbh_{name}" for name in _BBH]),
        _suite(
            "gpt4all",
            "GPT4All",
            ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande"),
        ),
        _suite("truthfulqa", "TruthfulQA", ("truthfulqa_mc1", "truthfulqa_mc2"), ("truthfulqa_mc2",)),
        _suite("gsm8k", "GSM8K", ("gsm8k",)),
    )
}
#: One name for the four tables of the reference card.
REFERENCE = "reference"
_OF_THE_CARD = ("agieval", "bbh", "gpt4all", "truthfulqa")
#: The suite that each task is of.
SUITE_OF = {task: suite.name for suite in SUITES.values() for task in suite.tasks}
#: All names that are known without the harness.
KNOWN = (*SUITES, REFERENCE, *(task for task in SUITE_OF if task not in SUITES))


def expand(names: Sequence[str]) -> list[Suite]:
    """The suites that some names mean, each once and in their order; a task by itself is a suite of one."""
    listed = [each for name in names for each in (_OF_THE_CARD if name == REFERENCE else (name,))]
    return [SUITES.get(name) or _suite(name, name, (name,)) for name in dict.fromkeys(listed)]
