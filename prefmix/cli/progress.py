"""Long work: it runs in a thread beside, so that Ctrl-C ends the command at once, with its stages as bars on stderr."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import click

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
    "decontaminate": ("decontaminating", ""),
    "mix": ("mixing", ""),
    "split": ("splitting", ""),
    "write": ("writing", "rows"),
    "prepare": ("reading and filtering", "parts"),
    "exact": ("removing duplicates", "parts"),
    "near": ("finding near-duplicates", "parts"),
    "draws": ("sampling", "parts"),
    "ends": ("sampling", "parts"),
    "sample": ("sampling", "parts"),
    "prompts": ("finding near prompts", "parts"),
    "divide": ("splitting", "parts"),
    "ledger": ("writing the ledger", "parts"),
    "repeat": ("repeating rows", "parts"),
    "shards": ("writing", "shards"),
    "convert": ("converting", "rows"),
    "send": ("sending", "kB"),
    "fetch": ("fetching", "kB"),
}
_WIDEST = max(len(label) for label, _ in _STAGES.values())
_LOOK_S = 0.1  # a signal that arrives just before a wait begins is seen when it ends
#: What an interrupted command says that would have written something at its end.
NOTHING_WRITTEN = "nothing was written"


def run_beside(work: Callable[[], Result], *, abandon: Callable[[], str] | None = None) -> Result:
    """Gives the result of `work()`, or raises what it raises.

    The work runs in a daemon thread: Polars and the tokenizers do not return to Python for seconds, and a signal is
    only seen by a main thread that waits in Python. At Ctrl-C it raises click.Abort without waiting for the thread,
    which goes on until the process ends; `abandon` cleans up before that and says what became of the work.
    """
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

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        # No longer __main__'s answer, which ends the process: from here on there may be something to clean up.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=run, name="prefmix-work", daemon=True).start()
        while not ended.wait(_LOOK_S):
            pass
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not stop the cleaning up
        raise click.Abort(abandon() if abandon else "") from None
    if errors:
        raise errors[0]
    return results[0]


def busy(what: str, work: Callable[[], Result]) -> Result:
    """`run_beside` for work that may take seconds and has no stages: a spinner on a terminal."""
    if not err().is_terminal:
        return run_beside(work)
    with err().status(f"[dim]{what}[/]", spinner="line", spinner_style="dim"):
        return run_beside(work)


@contextmanager
def bars(wanted: bool = True) -> Generator[Progress]:
    """A callback that draws a bar per stage on a terminal and does nothing elsewhere. The bars are gone afterwards."""
    console = err()
    if not wanted or not console.is_terminal:
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
    drawing = True

    def show(stage: str, done: int, total: int) -> None:
        if not drawing:  # the work of an interrupted command goes on for a moment
            return
        display.start()  # only now: downloads that come before it have bars of their own
        label, unit = _STAGES.get(stage.partition("-")[0], (stage, ""))
        key = (label, threading.get_ident())  # a stage may work on two subsets at once
        if key not in tasks:
            tasks[key] = display.add_task(label.ljust(_WIDEST), total=None, counted="")
        counted = f"{done:,} of {total:,} {unit}" if unit else ""
        known = total if done or unit else None  # of one piece of work nobody knows how far it is
        display.update(tasks[key], completed=done, total=known, counted=counted)

    try:
        yield show
    finally:
        drawing = False
        display.stop()
