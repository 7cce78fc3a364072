"""A run while it goes on: on a terminal a line for each piece of work, and a bar for the steps of a stage."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from prefmix.cli.screen import err, say

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import TaskID

    from prefmix.train.session import AnyStage
    from prefmix.train.steps import Steps

#: What a piece of work is called, and what it counts ("" = nothing that means something to a reader).
_WORK = {
    "start": ("starting", ""),
    "tokens": ("token ids", "rows"),
    "load": ("loading the model", ""),
    "reference": ("reference log-probabilities", "pairs"),
    "measure": ("measuring the EOS", ""),
}
_WIDEST = max(len(label) for label, _ in _WORK.values())
_SPEED_OVER_S = 1800.0  # steps take seconds to minutes: a time to go that is guessed from the last few jumps about


class Watch:
    """What is known of a run while it goes on; it has the methods of `prefmix.train.session.Watcher`, which the command
    line does not import before it trains. This one draws nothing; `shown` says whether notes are written to stderr.

    `folder` is the run's, `name` the stage that goes on, `at` its last step `of` so many.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.notes: list[str] = []
        self.folder: Path | None = None
        self.name: str | None = None
        self.at = self.of = 0

    def stage(self, stage: AnyStage, steps: Steps, rows: int) -> None:
        self.name, self.at, self.of = stage.name, 0, len(steps)

    def work(self, what: str, done: int, total: int) -> None:
        pass

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.at = step

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self.shown:
            say((f"note: {text}", "dim"), on=err())


class Bars(Watch):
    """Draws on a terminal. Stages that have ended keep their bar until the run ends; pieces of work go with their stage."""

    def __init__(self) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        super().__init__(shown=True)
        bar = BarColumn(bar_width=24, complete_style="cyan", finished_style="dim", pulse_style="cyan")
        name, counted = TextColumn("{task.description}"), TextColumn("[dim]{task.fields[counted]}")
        to_go = (TextColumn("[dim]ETA"), Remaining())
        self._work = Progress(name, bar, counted, TimeElapsedColumn(), console=err())
        self._steps = Progress(
            name,
            bar,
            MofNCompleteColumn(),
            TextColumn("[dim]steps"),
            TimeElapsedColumn(),
            *to_go,
            console=err(),
            speed_estimate_period=_SPEED_OVER_S,
        )
        self._pieces: dict[str, TaskID] = {}
        self._bar: TaskID | None = None
        self._last: dict[str, float] = {}
        self._unit = "pairs"
        self.live = Live(get_renderable=self._page, console=err(), transient=True, refresh_per_second=8)

    def stage(self, stage: AnyStage, steps: Steps, rows: int) -> None:
        super().stage(stage, steps, rows)
        for piece in self._pieces.values():
            self._work.remove_task(piece)
        self._pieces.clear()
        self._last.clear()
        self._bar, self._unit = None, "pairs" if stage.subset == "preference" else "rows"

    def work(self, what: str, done: int, total: int) -> None:
        self._ended(but=what)
        label, unit = _WORK.get(what, (what, ""))
        if what not in self._pieces:
            self._pieces[what] = self._work.add_task(label.ljust(_WIDEST), total=None, counted="")
        elif done == 0:
            self._work.reset(self._pieces[what])
        counted = f"{done:,} of {total:,} {unit}" if unit else ""
        known = total if done or unit else None  # of one piece of work nobody knows how far it is
        self._work.update(self._pieces[what], completed=done, total=known, counted=counted)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step(step, metrics)
        self._ended()
        self._last |= metrics
        if self._bar is None:
            self._bar = self._steps.add_task((self.name or "").ljust(_WIDEST), total=self.of)
        self._steps.update(self._bar, completed=step)

    def _ended(self, but: str = "") -> None:
        """Work that another piece of work follows has ended: nobody says so."""
        for what, piece in self._pieces.items():
            if what != but and not self._work.tasks[self._work.task_ids.index(piece)].finished:
                self._work.update(piece, total=1, completed=1)

    def _page(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(" · ".join(figures), "dim") for figures in figures_of(self._last, self._unit) if figures]
        return Group(self._work, self._steps, *lines)


def figures_of(metrics: Mapping[str, float], unit: str) -> tuple[list[str], list[str]]:
    """`loss 0.6931`, `margin 0.120` ... of the last step, `P(EOS) 0.981` ... of the last measurement, as far as there are
    any. `unit` is what a row is."""
    of_step = {
        "loss": "loss {:.4f}",
        "rewards/margins": "margin {:.3f}",
        "rewards/accuracies": "accuracy {:.0%}",
        "rows_per_s": "{:,.1f} " + unit + "/s",
        "tokens_per_s": "{:,.0f} tokens/s",
    }
    measured = {"eval_p_eos": "P(EOS) {:.3f}", "eval_stop_rate": "stop rate {:.0%}"}
    step, last = (
        [text.format(metrics[name]) for name, text in shown.items() if name in metrics] for shown in (of_step, measured)
    )
    return step, last


@contextmanager
def watching(shown: bool) -> Generator[Watch]:
    """What a run is told to: bars on a terminal, which are gone afterwards; notes alone elsewhere; `shown` false, nothing."""
    watch = Bars() if shown and err().is_terminal else Watch(shown)
    try:
        with watch.live if isinstance(watch, Bars) else nullcontext():
            yield watch
    finally:
        watch.shown = False  # the work of an interrupted command goes on for a moment
