"""Long work: it runs in a thread beside, so that Ctrl-C ends the command at once, with its stages as bars on stderr."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from prefmix.cli.screen import err

Result = TypeVar("Result")
#: `progress(stage, done, total)`, as the stages of a build call it.
Progress = Callable[[str, int, int], None]

#: What a stage is called on the screen, and what it counts ("" = nothing that means something to a reader).
_STAGES = {
    "plan": ("looking at the inputs", ""),
    "read": ("reading", "sources"),
    "filter": ("filtering", ""),
    "tokens": ("counting tokens", "texts"),
    "dedupe": ("removing duplicates", ""),
    "mix": ("mixing", ""),
    "write": ("writing", "rows"),
}
_WIDEST = max(len(label) for label, _ in _STAGES.values())
_INTERRUPTED = 130
_LOOK_S = 0.1  # a signal that arrives just before a wait begins is seen when it ends


def nothing_was_written() -> str:
    """What an interrupted command says that writes nothing before its end."""
    return "nothing was written"


def run_beside(
    work: Callable[[Progress], Result], *, abandon: Callable[[], str] = nothing_was_written, bars: bool = True
) -> Result:
    """Gives the result of `work(progress)`, or raises what it raises.

    The work runs in a daemon thread: Polars and the tokenizers do not return to Python for seconds, and a signal is
    only seen by a main thread that waits in Python. At Ctrl-C the process ends with exit code 130 without waiting for
    the thread; `abandon` cleans up before that and says what became of the work.
    """
    try:
        with _shown(bars) as progress:
            return _in_thread(lambda: work(progress))
    except KeyboardInterrupt:
        _leave(abandon)


def _in_thread(work: Callable[[], Result]) -> Result:
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again in the main thread
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="prefmix-work", daemon=True).start()
    while not ended.wait(_LOOK_S):
        pass
    if errors:
        raise errors[0]
    return results[0]


def _leave(abandon: Callable[[], str]) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
    err().show_cursor(True)
    sys.stderr.write(f"interrupted: {abandon()}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(_INTERRUPTED)


@contextmanager
def _shown(bars: bool) -> Generator[Progress]:
    """A callback that draws a bar per stage on a terminal and does nothing elsewhere. The bars are gone afterwards."""
    console = err()
    if not bars or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=24, complete_style="cyan", finished_style="dim", pulse_style="cyan"),
        rich_progress.TextColumn("[dim]{task.fields[counted]}"),
        rich_progress.TimeElapsedColumn(),
    )
    display = rich_progress.Progress(*columns, console=console, transient=True)
    tasks: dict[tuple[str, int], rich_progress.TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        display.start()  # only now: downloads that come before it have bars of their own
        label, unit = _STAGES[stage]
        key = (stage, threading.get_ident())  # a stage may work on two subsets at once
        if key not in tasks:
            tasks[key] = display.add_task(label.ljust(_WIDEST), total=None, counted="")
        counted = f"{done:,} of {total:,} {unit}" if unit else ""
        known = total if done or unit else None  # of one piece of work nobody knows how far it is
        display.update(tasks[key], completed=done, total=known, counted=counted)

    try:
        yield show
    finally:
        display.stop()
