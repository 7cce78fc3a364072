"""The errors that prefmix raises, each with the exit code that the command line gives it.

PrefmixError                1   an expected failure: says what, where and what to do
├── RecipeError             2   the recipe (or a --set) is wrong; carries every problem found, with its line
├── UsageError              2   a command or a call that cannot be meant
├── SourceError             1   an input that cannot be read: names the file, the row and the remedy
├── StorageError            1   a file at an address (s3://...) that cannot be reached, read or written
├── HubError                1   the Hub refused, is out of reach, or has no such repository or revision
├── BuildError              1   the rows do not allow what the recipe asks for
├── MixtureError            1   no such mixture, or one that fails verification
├── TrainError              1   a base, a tokenizer, a run folder or a machine that training cannot go on with
├── ModelError              1   a model or a run that cannot be found, merged, evaluated, exported or talked to
└── GateError               3   a quality gate was set and not passed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PrefmixError(Exception):
    """An expected failure. Its text is written for the user and needs no traceback."""

    exit_code = 1


class UsageError(PrefmixError):
    """A command or a call that cannot be meant: an unknown name, options that exclude each other."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe.

    `key` is the dotted key (`filter.min_margin`), `line` its 1-based line in the file (None for a --set or a missing
    table), `message` says what is wrong and `hint`, where there is one, what would be right.
    """

    key: str
    message: str
    line: int | None = None
    hint: str | None = None


class RecipeError(PrefmixError):
    """The recipe is wrong. `problems` has all that were found, in the order of their lines."""

    exit_code = 2

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))
        lines = [
            f"{path}{f':{p.line}' if p.line else ''}: {p.key + ': ' if p.key else ''}{p.message}"
            f"{f' ({p.hint})' if p.hint else ''}"
            for p in self.problems
        ]
        super().__init__("\n".join(lines))


class SourceError(PrefmixError):
    """An input that cannot be read at all."""


class StorageError(PrefmixError):
    """An address that cannot be reached, read or written. Its text never holds a credential."""


class HubError(PrefmixError):
    """The Hub refused, could not be reached, or has no such repository or revision."""


class BuildError(PrefmixError):
    """The rows at hand do not allow what the recipe asks for."""


class MixtureError(PrefmixError):
    """A mixture that does not exist, or does not pass verification."""


class TrainError(PrefmixError):
    """A base model, a tokenizer, a run folder or a machine that training cannot go on with."""


class ModelError(PrefmixError):
    """A model or a run that cannot be found, merged, evaluated, exported or talked to."""


class GateError(PrefmixError):
    """A quality gate was set and not passed."""

    exit_code = 3
