"""The benchmarks that have a name: prefmix/data/suites.toml, which says where the rows of each are."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

SUITES = Path(__file__).parents[1] / "data" / "suites.toml"

#: Configurations whose names say nothing of what is in them.
_WHOLE = ("main", "all")

Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Part(_Keys):
    """Some of the rows of a suite: a split of one data set on the Hub, and the columns with their text."""

    about: Line
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    #: Configurations (subsets); none: the only one that the data set has.
    config: Annotated[list[Line], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    split: Line
    fields: Annotated[list[Line], Field(min_length=1)]


class Suite(_Keys):
    """A benchmark, or several that are always measured together."""

    about: Line
    parts: Annotated[list[Part], Field(min_length=1)]


@cache
def suites() -> dict[str, Suite]:
    """Every suite by its name, in the order of the file."""
    return TypeAdapter(dict[str, Suite]).validate_python(tomllib.loads(SUITES.read_text("utf-8")))


def holding(name: str) -> str | None:
    """The suite that has a part of this name: a data set on the Hub, or a configuration of one, however it is written."""
    for suite, each in suites().items():
        for part in each.parts:
            named = [part.hub, part.hub.partition("/")[2], *(config for config in part.config if config not in _WHOLE)]
            if _plain(name) in map(_plain, named):
                return suite
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
