"""The screen: data on stdout, everything else on stderr, colour and progress only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@cache
def out() -> Console:
    """For what a command reports. Rich honours NO_COLOR and the width of the terminal; 100 columns elsewhere."""
    return _console(stderr=False)


@cache
def err() -> Console:
    """For progress, hints and errors."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Rich exits with 1; here main.py decides

    stream = sys.stderr if stderr else sys.stdout
    return Screen(stderr=stderr, highlight=False, soft_wrap=False, width=None if stream.isatty() else 100)


def emit_json(value: Any) -> None:
    """Writes one JSON document to stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def say_warnings(warnings: Sequence[str]) -> None:
    """Writes each as a line to stderr: wrapped between words on a terminal, after a blank line; whole elsewhere."""
    from rich.text import Text

    sys.stdout.flush()  # so that the two streams keep their order
    wrapped = err().is_terminal
    if warnings and wrapped:
        err().print()
    for warning in warnings:
        err().print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=not wrapped)
