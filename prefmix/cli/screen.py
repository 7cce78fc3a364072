"""The screen: data on stdout, everything else on stderr, colour and progress only on a terminal."""

from __future__ import annotations

import codecs
import io
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: What stands for the characters of our own pages where the encoding has none of them: one cell for one cell.
_NEAREST = str.maketrans(
    "█▉▊▋▌▍▎▏▇▆▅▄▃▂▁╵━╸−–—·→…•“”‘’\u00a0",
    "#####|||##++--.|==---->~*\"\"'' ",
)


def replace_unwritable() -> None:
    """From now on, stdout and stderr write a character that their encoding lacks as the nearest one in ASCII or `?`."""
    codecs.register_error("prefmix.nearest", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="prefmix.nearest")


def _nearest(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    unwritable = error.object[error.start : error.end]
    return unwritable.translate(_NEAREST).encode("ascii", "replace").decode("ascii"), error.end


@cache
def out() -> Console:
    """For what a command reports. Rich honours NO_COLOR and the width of the terminal; 100 columns elsewhere."""
    return _console(stderr=False)


@cache
def err() -> Console:
    """For progress, hints and warnings."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Rich exits with 1; here main.py decides

    stream = sys.stderr if stderr else sys.stdout
    return Screen(stderr=stderr, highlight=False, soft_wrap=False, width=None if stream.isatty() else 100)


def say(*parts: str | tuple[str, str], on: Console | None = None) -> None:
    """Writes a line of texts, some with their style, to stdout or on another console. It is never cut, and what it says
    is never read as markup."""
    from rich.text import Text

    (on or out()).print(Text.assemble(*parts), soft_wrap=True)


def say_next(commands: Sequence[tuple[str, str]]) -> None:
    """Writes the command lines that are of use now, each with what it is for."""
    from prefmix.cli.pages import NextPage

    out().print(NextPage(commands), soft_wrap=True)


def say_warnings(warnings: Sequence[str]) -> None:
    """Writes each as a line to stderr: wrapped between words on a terminal, after a blank line; whole elsewhere."""
    from rich.text import Text

    sys.stdout.flush()  # so that the two streams keep their order
    wrapped = err().is_terminal
    if warnings and wrapped:
        err().print()
    for warning in warnings:
        err().print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=not wrapped)


def command_line(name: str, *words: str, overrides: Sequence[str] = (), store: str | None = None) -> str:
    """A command line of prefmix, as it is typed in a shell."""
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["prefmix", name, *words, *sets, *(["--store", store] if store else [])])


def emit_json(value: Any) -> None:
    """Writes one JSON document to stdout: in ASCII where the encoding is not Unicode, so that no text is lost."""
    import json

    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    sys.stdout.write(json.dumps(value, ensure_ascii=not unicode, indent=2, default=str) + "\n")
