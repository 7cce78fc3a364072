"""`prefmix train`: the stages of a recipe on its mixture, or an estimate of what they will take."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from prefmix.cli import evals
from prefmix.cli.extras import needing, quiet_imports
from prefmix.cli.options import json_option, override_option, store_option
from prefmix.cli.progress import run_beside
from prefmix.cli.recipes import read_recipe
from prefmix.cli.screen import command_line, emit_json, out, say, say_next, say_warnings
from prefmix.cli.training import Watch, watching
from prefmix.errors import GateError, PrefmixError, RecipeError, TrainError, UsageError

if TYPE_CHECKING:
    from prefmix.mixture import Mixture
    from prefmix.recipe import Recipe
    from prefmix.train.run import Run
    from prefmix.train.session import Watcher

Result = TypeVar("Result")
#: What gloo and NCCL say in a process that waits for another one, which has ended.
_ENDED = re.compile(r"closed by peer|reset by peer|Broken pipe|remote process exiting", re.IGNORECASE)
#: How long a process waits for one before it to tell what is wrong.
_GIVE_WAY_S = 2.0
_INTERRUPTED = 130
_TRACKERS = ("wandb", "trackio", "tensorboard")


@click.command("train")
@click.argument("recipe", metavar="RECIPE", type=click.Path())
@click.option("--mixture", "reference", metavar="REF", help="Mixture to train on; else the last one of this recipe.")
@override_option
@store_option
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; finished stages stay as they are.")
@click.option("--force", is_flag=True, help="Start again: the folders of the stages are removed first.")
@click.option(
    "--report-to",
    type=click.Choice(_TRACKERS),
    multiple=True,
    metavar="NAME",
    help="Send the metrics to wandb, trackio or tensorboard as well; may be given more than once.",
)
@click.option(
    "--eval-data",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder with local benchmark files for the stages that have `eval`; else the Hub.",
)
@click.option("--dry-run", is_flag=True, help="Estimate steps, memory and hours; train nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print the folder and the stop rate only.")
@json_option
def train_command(
    recipe: str,
    reference: str | None,
    overrides: Sequence[str],
    store: str | None,
    resume: bool,
    force: bool,
    report_to: Sequence[str],
    eval_data: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a model on a mixture, as the recipe says.

    RECIPE is the TOML file that the mixture was built from; the stages of its [train] run one after the other, each from
    the adapter of the one before. What is trained goes to runs/NAME/STAGE, with the adapter, its metrics and whether the
    model still ends its turn. An interrupted run goes on with --resume, from its last checkpoint. For several GPUs:
    torchrun --nproc-per-node N -m prefmix train RECIPE.
    """
    if resume and force:
        raise UsageError("--resume and --force exclude each other: one goes on, the other starts again.")
    _need_trackers(report_to)
    asked = _Asked(recipe, reference, tuple(overrides), store, tuple(report_to), eval_data)
    shown = not (quiet or as_json) and _rank() == 0
    if dry_run:
        _estimate(asked, shown, quiet, as_json)
    else:
        _train(asked, resume, force, shown, quiet, as_json)


@dataclass(frozen=True)
class _Asked:
    """What a command line asks to train."""

    recipe: str
    mixture: str | None
    overrides: Sequence[str]
    store: str | None
    report_to: Sequence[str]
    eval_data: Path | None

    def again(self, *words: str) -> str:
        """The command line for the same with other words."""
        options = [word for name in self.report_to for word in ("--report-to", name)]
        if self.mixture is not None:
            options += ["--mixture", self.mixture]
        if self.eval_data is not None:
            options += ["--eval-data", str(self.eval_data)]
        return command_line("train", self.recipe, *options, *words, overrides=self.overrides, store=self.store)

    def found(self, watch: Watch) -> tuple[Recipe, Mixture]:
        """The recipe, and the mixture to train on. Raises RecipeError, UsageError, MixtureError, HubError."""
        recipe = read_recipe(self.recipe, self.overrides)
        from prefmix.train.inputs import find_mixture, settings_of

        settings_of(recipe)
        if self.mixture is not None and self.mixture.startswith("hub:"):
            from prefmix.publish import pull

            mixture = pull(self.mixture, self.store, progress=watch.work)
        else:
            mixture = find_mixture(recipe, self.mixture, self.store)
        watch.work("start", 0, 1)  # seconds of imports come next
        quiet_imports()
        return recipe, mixture


def _train(asked: _Asked, resume: bool, force: bool, shown: bool, quiet: bool, as_json: bool) -> None:
    started = time.monotonic()

    def work() -> tuple[Recipe, Mixture, Run, Mapping[str, Any], GateError | None]:
        recipe, mixture = asked.found(watch)
        if not _rank():
            evals.with_extra(lambda: evals.check_stages(recipe, asked.eval_data))
        from prefmix.train.inputs import settings_of
        from prefmix.train.processes import leave
        from prefmix.train.run import StopGateError, train

        watch.folder = Path(settings_of(recipe).output) / recipe.name
        failed: GateError | None = None
        try:
            run = train(
                recipe, mixture, resume=resume, force=force, report_to=asked.report_to, watcher=cast("Watcher", watch)
            )
        except StopGateError as error:  # what ran is there, and worth reading
            run, failed = error.run, error
        leave()
        scores = {} if failed or _rank() else evals.evaluate_stages(recipe, run, mixture, asked.eval_data, scoring)
        return recipe, mixture, run, scores, failed

    with watching(shown) as watch:
        scoring = _Scoring(watch)
        recipe, mixture, run, scores, failed = run_beside(
            lambda: _in_its_rank(work), abandon=lambda: scoring.abandoned(asked) or _abandoned(asked, watch)
        )
    seconds = round(time.monotonic() - started, 3)
    if _rank():
        return  # with 0: at any other code torchrun would end the first process, which reports
    if as_json:
        emit_json({**_run_json(recipe, run, watch.notes, seconds), **({"eval": scores} if scores else {})})
    elif quiet:
        say(_line(run))
    else:
        _report(recipe, mixture, run, seconds)
        for name, results in scores.items():
            say("")
            evals.report(results, run.folder / name / "eval")
        say_next(_next_commands(asked, mixture, run))
    if failed:
        raise failed


class _Scoring(evals.Watch):
    """Is told how the evaluations after a run go on, and tells the watch of the run."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(shown=False)
        self.watch = watch

    def note(self, text: str) -> None:
        self.watch.note(text)

    def loading(self) -> None:
        self.watch.work("load", 0, 1)

    def task(self, name: str, number: int, tasks: int) -> None:
        super().task(name, number, tasks)
        self.watch.work("evaluating", number - 1, tasks)

    def abandoned(self, asked: _Asked) -> str:
        """As for a run, where its evaluation was interrupted; nothing before that."""
        again = asked.again("--resume")
        return f"the stages are trained; in {self.name} of their evaluation: `{again}` goes on" if self.name else ""


def _estimate(asked: _Asked, shown: bool, quiet: bool, as_json: bool) -> None:
    started = time.monotonic()

    def work() -> dict[str, Any]:
        recipe, mixture = asked.found(watch)
        from prefmix.train.estimate import estimate

        return estimate(recipe, mixture, watcher=cast("Watcher", watch)).as_json()

    with watching(shown) as watch:
        found = run_beside(lambda: _in_its_rank(work))
    seconds = round(time.monotonic() - started, 3)
    if _rank():
        return
    if as_json:
        emit_json({**found, "seconds": seconds})
    elif quiet:
        from prefmix.cli.charts import size

        steps = sum(stage["steps"] for stage in found["stages"])
        say(f"{found['recipe']}: {steps:,} steps, {size(found['peak'])} of memory on {found['device']}")
    else:
        _report_estimate(found, seconds)
        say_next([(asked.again(), "train it")])


def _abandoned(asked: _Asked, watch: Watch) -> str:
    """What an interrupted run leaves, and how it goes on. The thread that trains is not waited for: a checkpoint is whole
    or not there. Of several processes the first one says so."""
    if _rank():
        raise click.exceptions.Exit(_INTERRUPTED)
    if watch.name is None or watch.folder is None:
        return "nothing was trained"
    from prefmix.train.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(watch.folder / watch.name / "checkpoints")
    place = f"in the stage {watch.name}, at step {watch.at:,} of {watch.of:,}"
    again = f"`{asked.again('--resume')}`"
    if checkpoint is None:
        return f"{place}; there is no checkpoint of it yet: {again} starts this stage again"
    return f"{place}; {again} goes on from {checkpoint}"


def _in_its_rank(work: Callable[[], Result]) -> Result:
    """The result of `work()`. Of several processes the others say who they are, and leave it to the first one to tell what all
    of them find wrong: when that has ended, torchrun ends them. Raises ModelError where a package of the extra is missing."""
    try:
        return needing("train", "train", work)
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not _ENDED.search(str(error)):
            raise
        found: PrefmixError = TrainError("another process of this run has ended; what it said itself, or torchrun of it, is "
                                         "the reason. --resume goes on from the last checkpoint.")  # fmt: skip
        found.__cause__ = error
    except PrefmixError as error:
        if not _rank():
            raise
        found = error
    if _rank():
        time.sleep(_GIVE_WAY_S if os.environ.get("LOCAL_RANK") == "0" else 2 * _GIVE_WAY_S)
    if isinstance(found, (RecipeError, UsageError)):
        raise found
    told = TrainError(f"process {_rank()}: {found}")
    told.exit_code = found.exit_code
    raise told from found


def _rank() -> int:
    """The number of this process among those that torchrun or accelerate started; 0 for one that runs alone."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def _need_trackers(names: Sequence[str]) -> None:
    """Raises TrainError for a tracker that is not installed."""
    for name in names:
        if not any(find_spec(package) for package in ((name, "tensorboardX") if name == "tensorboard" else (name,))):
            raise TrainError(f"--report-to {name} needs {name}, which is not installed. Install it: pip install {name}")


def _line(run: Run) -> str:
    asked = f"below the {run.min_stop_rate:.1%} that are asked for" if not run.passed else "as asked for"
    return f"{run.folder}: {run.stop_rate:.1%} of the answers end by themselves, {asked}"


def _run_json(recipe: Recipe, run: Run, notes: Sequence[str], seconds: float) -> dict[str, Any]:
    stages = [
        {"folder": str(stage.folder), "was_there": stage.was_there, "run": stage.run, "eos": stage.eos}
        for stage in run.stages
    ]
    return {
        "name": recipe.name,
        "folder": str(run.folder),
        "mixture": run.stages[0].run["mixture"],
        "passed": run.passed,
        "stop_rate": run.stop_rate,
        "min_stop_rate": run.min_stop_rate,
        "stages": stages,
        "skipped": list(run.skipped),
        "notes": list(notes),
        "seconds": seconds,
    }


def _report(recipe: Recipe, mixture: Mixture, run: Run, seconds: float) -> None:
    from prefmix.cli import runs
    from prefmix.cli.pages import titled

    first, last = run.stages[0], run.stages[-1]
    say((recipe.name, "bold"), f"  trained on {mixture} in {runs.duration(seconds)}, from {first.run['base']['name']}")
    say((str(run.folder), "dim"))
    out().print(titled("Stages", runs.stages_page(run.stages)))
    for name in run.skipped:
        why = "the model ends its turns without it" if run.passed else 'it is for [train.eos] on_fail = "repair"'
        say((f"{name}: not run, {why}", "dim"))
    note = f"on {last.eos['rows']:,} rows of {last.eos['split']}"
    out().print(titled("Does the model end its turns?", runs.eos_page(run.stages), note))
    out().print(runs.verdict(run.stop_rate, run.min_stop_rate))
    if not run.passed and recipe.train is not None:
        say_warnings([runs.advice(recipe.train, last.eos["after"])])


def _report_estimate(found: Mapping[str, Any], seconds: float) -> None:
    from prefmix.cli import estimates
    from prefmix.cli.pages import titled

    say((found["recipe"], "bold"), "  an estimate: nothing was trained", (f"  {seconds:.1f} s", "dim"))
    weights = "in 4 bits" if found["quantization"] == "nf4" else f"in {found['dtype']}"
    counts = f"{found['parameters']:,} parameters {weights}, {found['trainable']:,} trained"
    mixture = found["mixture"]
    say((f"{found['base']}: {counts}, on {mixture['name']}@{mixture['version']}", "dim"))
    out().print(titled("Stages", estimates.steps_page(found)))
    out().print(titled("Memory", estimates.memory_page(found), f"on this machine ({found['device']})"))
    note = f"at {found['utilisation']:.0%} of what they can do"
    out().print(titled("Time on one GPU", estimates.gpus_page(found), note))


def _next_commands(asked: _Asked, mixture: Mixture, run: Run) -> list[tuple[str, str]]:
    """Commands that are of use now: what goes on from the run, what it was trained on, and whether that holds benchmarks,
    where nobody looked."""
    reference = str(mixture.folder) if asked.mixture and Path(asked.mixture).is_dir() else str(mixture)
    commands = [(command_line("chat", str(run.folder)), "talk to it")]
    if run.stages[-1].run["hyperparameters"]["adapter"] == "lora":
        commands.append((command_line("merge", str(run.folder), store=asked.store), "a model of its own of it"))
    commands.append((command_line("show", reference, store=asked.store), "what it was trained on"))
    if not mixture.manifest["contamination"]:
        words = [reference, "--against", "truthfulqa", "--against", "gsm8k"]
        commands.append((command_line("contamination", *words, store=asked.store), "were benchmarks in it?"))
    return commands
