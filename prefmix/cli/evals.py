"""`prefmix eval`: suites of benchmarks asked of a model, its tables, and how it compares with another."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from prefmix.cli.extras import needing, quiet_imports
from prefmix.cli.options import json_option, store_option
from prefmix.cli.progress import run_beside
from prefmix.cli.screen import command_line, emit_json, err, say, say_next, say_warnings

if TYPE_CHECKING:
    from prefmix.mixture import Mixture
    from prefmix.model.evaluation.compare import Difference, Other
    from prefmix.model.evaluation.evaluating import Watcher
    from prefmix.recipe import Recipe
    from prefmix.scores.results import Results
    from prefmix.train.run import Run

Result = TypeVar("Result")


@click.command("eval")
@click.argument("model", metavar="MODEL|RUN")
@click.argument("suites", metavar="SUITE...", nargs=-1, required=True)
@click.option(
    "--data", metavar="DIR", type=click.Path(path_type=Path), help="Folder with local benchmark files; else the Hub."
)
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Ask the first N items of each task only.")
@click.option("--chat", is_flag=True, help="Put the prompts into the model's chat template.")
@click.option(
    "--compare",
    "other",
    metavar="OTHER",
    help="Put another run, a folder with results or `reference` (the published figures of the reference run) beside it.",
)
@click.option("--base", metavar="DIR", help="Folder of an adapter's base, where its name does not lead to it.")
@click.option(
    "--mixture", metavar="REF", help="The mixture that it was trained on; else found by the digest in run.json."
)
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the results; else STAGE/eval or eval/MODEL.",
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(min=1), help="Requests at once; else 1 on a CPU and 8 on a GPU."
)
@click.option("-q", "--quiet", is_flag=True, help="Print the averages only.")
@store_option
@json_option
def eval_command(
    model: str,
    suites: Sequence[str],
    data: Path | None,
    limit: int | None,
    chat: bool,
    other: str | None,
    base: str | None,
    mixture: str | None,
    folder: Path | None,
    batch: int | None,
    quiet: bool,
    store: str | None,
    as_json: bool,
) -> None:
    """Evaluate a model on suites of benchmarks.

    MODEL is a run of `prefmix train` (its last stage), a stage, a folder with a model or user/model on the Hub. SUITE is
    agieval, bbh, gpt4all, truthfulqa, gsm8k, reference (the four tables of the reference run's card) or a task of
    lm-evaluation-harness. An evaluation that was interrupted goes on when it is run again. The card of a stage is completed
    with the tables.
    """
    started = time.monotonic()
    words = [model, *suites, *_options(data=data, limit=limit, chat=chat, compare=other, base=base, mixture=mixture,
                                       out=folder, batch=batch)]  # fmt: skip

    def work() -> tuple[list[Results], list[Difference], Other | None, Path]:
        quiet_imports()
        from prefmix.model.evaluation.compare import compare, open_other
        from prefmix.model.evaluation.decontaminated import run_of, training_data
        from prefmix.model.evaluation.evaluating import Settings, evaluate
        from prefmix.model.find import find_model
        from prefmix.scores.results import results_folder
        from prefmix.scores.suites import expand

        found = find_model(model, base)
        home = folder or (found.stage / "eval" if found.stage else results_folder(model))
        beside = open_other(other) if other is not None else None
        trained_on = training_data(found.run or run_of(model), mixture, store)
        for suite in expand(suites):
            watch.note(trained_on.line(suite))
        results = evaluate(
            found,
            suites,
            home,
            settings=Settings(data, limit, chat, batch),
            trained_on=trained_on,
            watcher=cast("Watcher", watch),
        )
        if found.stage is not None and folder is None:
            from prefmix.scores.card import complete_card

            complete_card(found.stage)
        return results, compare(results, home, beside) if beside else [], beside, home

    with watching(not (quiet or as_json)) as watch:
        again = command_line("eval", *words, store=store)
        results, differences, beside, home = run_beside(lambda: with_extra(work), abandon=lambda: watch.left(again))
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        compared = {"with": beside.name, "differences": [_as_json(each) for each in differences]} if beside else None
        emit_json(
            {"results": results, "compared": compared, "folder": str(home), "notes": watch.notes, "seconds": seconds}
        )
    elif quiet:
        from prefmix.scores.results import average_line

        for each in results:
            say(f"{each['suite']}: {average_line(each)}")
    else:
        report(results, home)
        if beside is not None:
            _report_comparison(differences, results[0]["model"]["name"], beside)
        elif "reference" not in suites:
            say_next(
                [
                    (
                        command_line("eval", *words, "--compare", "reference", store=store),
                        "beside the reference run's figures",
                    )
                ]
            )


def check_stages(recipe: Recipe, data: Path | None) -> None:
    """Whether the suites of a recipe's stages can be asked after them. Raises as the command does."""
    if names := _asked_of(recipe):
        from prefmix.model.evaluation.evaluating import check

        check(list(dict.fromkeys(name for suites in names.values() for name in suites)), data)


def evaluate_stages(recipe: Recipe, run: Run, mixture: Mixture, data: Path | None, watch: Watch) -> dict[str, Any]:
    """Asks each stage of a run that has `eval` its suites, and completes its card. Gives the results by stage."""
    from prefmix.model.evaluation.decontaminated import TrainingData
    from prefmix.model.evaluation.evaluating import Settings, evaluate
    from prefmix.model.find import find_model
    from prefmix.scores.card import complete_card

    names, found = _asked_of(recipe), {}
    for stage in run.stages:
        if suites := names.get(stage.folder.name):
            base = recipe.root / recipe.train.base if recipe.train else Path()
            model = find_model(stage.folder, str(base) if base.is_dir() else None)
            asked: dict[str, Any] = {"settings": Settings(data), "trained_on": TrainingData(mixture)}
            watcher = cast("Watcher", watch)
            found[stage.folder.name] = evaluate(model, suites, stage.folder / "eval", **asked, watcher=watcher)
            complete_card(stage.folder)
    return found


def _asked_of(recipe: Recipe) -> dict[str, list[str]]:
    """The suites of each stage that has some."""
    return {stage.name: stage.eval for stage in recipe.train.stages if stage.eval} if recipe.train else {}


def _options(**given: Any) -> list[str]:
    """The options that were given, as they are typed."""
    words = []
    for name, value in given.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    return words


def report(results: Sequence[Results], home: Path) -> None:
    """The tables of a card, as they are in it."""
    from prefmix.scores.results import average_line, how, markdown_table

    say((results[0]["model"]["name"], "bold"), "  evaluated")
    say((str(home), "dim"))
    for each in results:
        say("")
        say((f"## {each['title']}", "bold"))
        say("")
        say(markdown_table(each))
        say("")
        say(average_line(each))
        say((how(each), "dim"))
        for name, reason in each["left_out"].items():
            say((f"left out: {name} ({reason})", "yellow"))


def _report_comparison(differences: Sequence[Difference], own: str, other: Other) -> None:
    from prefmix.model.evaluation.compare import comparison_table

    say("")
    say((f"## Beside {other.name}", "bold"))
    say("")
    if not differences:
        say_warnings([f"{other.name} has no result of these suites: nothing can be compared"])
        return
    say(comparison_table(differences, own, other.name))
    say("")
    beyond = [each for each in differences if each.task and each.beyond_noise]
    told = f"{len(beyond)} of {sum(each.task is not None for each in differences)} differences are beyond noise"
    ways = {"paired": "item by item", "unpaired": "from both standard errors (not the same items)",
            "unlike": "not judged where the tasks are not the same"}  # fmt: skip
    used = ", ".join(ways[how] for how in ways if any(each.how == how for each in differences))
    say((told, "bold"), f"  at 1.96 standard errors, {used}")
    for reason in dict.fromkeys(each["unlike"] for each in other.results.values() if each.get("unlike")):
        if any(each.how == "unlike" for each in differences):
            say((f"other task: {reason}", "dim"))


def _as_json(difference: Difference) -> dict[str, Any]:
    return {**asdict(difference), "beyond_noise": difference.beyond_noise, "verdict": difference.verdict}


def with_extra(work: Callable[[], Result]) -> Result:
    """The result of `work()`. Raises ModelError where a package of the extras is missing."""
    return needing("train,eval", "eval", work)


class Watch:
    """What is known of an evaluation while it goes on; it has the methods of `Watcher` in evaluating.py. `shown` says whether
    notes are written to stderr."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.notes: list[str] = []
        self.name: str | None = None
        self.done = self.requests = 0

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self.shown:
            say((f"note: {text}", "dim"), on=err())

    def loading(self) -> None:
        pass

    def task(self, name: str, number: int, tasks: int) -> None:
        self.name, self.done, self.requests = name, 0, 0

    def answered(self, done: int, requests: int) -> None:
        self.done, self.requests = done, requests

    def left(self, again: str) -> str:
        """What an interrupted evaluation leaves, and how it goes on."""
        if self.name is None:
            return "nothing was asked"
        return f"in {self.name}, {self.done:,} of {self.requests:,} requests are answered and kept: `{again}` goes on"


class Bar(Watch):
    """Draws on a terminal: the task, its number, and its requests."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(shown=True)
        bar = BarColumn(bar_width=24, complete_style="cyan", finished_style="dim", pulse_style="cyan")
        of = (MofNCompleteColumn(), TextColumn("[dim]requests"), TimeElapsedColumn(), TextColumn("[dim]ETA"))
        self.display = Progress(
            TextColumn("{task.description}"), bar, *of, TimeRemainingColumn(), console=err(), transient=True
        )
        self._bar = self.display.add_task("starting", total=None)

    def loading(self) -> None:
        self.display.reset(self._bar, description="loading the model", total=None)

    def task(self, name: str, number: int, tasks: int) -> None:
        super().task(name, number, tasks)
        self.display.reset(self._bar, description=f"{name} ({number} of {tasks})", total=None)
        self._description = f"{name} ({number} of {tasks})"

    def answered(self, done: int, requests: int) -> None:
        super().answered(done, requests)
        self.display.update(self._bar, description=self._description, completed=done, total=requests)


@contextmanager
def watching(shown: bool) -> Generator[Watch]:
    """What an evaluation is told to: a bar on a terminal, which is gone afterwards; notes alone elsewhere."""
    watch = Bar() if shown and err().is_terminal else Watch(shown)
    try:
        with watch.display if isinstance(watch, Bar) else nullcontext():
            yield watch
    finally:
        watch.shown = False  # the work of an interrupted command goes on for a moment
