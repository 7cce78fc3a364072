"""`prefmix train`: the stages of a recipe on a mixture, one after the other, with a record of each.

<output>/<name>/<stage>/
  adapter/        the adapter as safetensors, with the tokenizer and its ChatML template (the whole model when there is none)
  checkpoints/    see checkpoints.py
  metrics.jsonl   a line per step and per evaluation
  eos.json        does the model still end its turn: before, during, after
  run.json        what was run, on what, how fast
  recipe.toml     the recipe, with every default spelled out
  mixture.json    the manifest of the mixture
  README.md       the model card
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets.utils.logging
import transformers.utils.logging

from prefmix.errors import GateError, TrainError, UsageError
from prefmix.mixture import Mixture
from prefmix.recipe import Eos, Recipe, SftStage, load_recipe
from prefmix.train import processes
from prefmix.train.inputs import find_mixture, settings_of
from prefmix.train.session import AnyStage, Session, Watcher, held_out_rows
from prefmix.train.stage import StageRun, run_stage
from prefmix.train.tokenizer import load_tokenizer
from prefmix.train.weights import find_base


@dataclass(frozen=True)
class Run:
    """All stages of a recipe that ran. `skipped` names those marked `if_needed` that were not."""

    folder: Path
    stages: Sequence[StageRun]
    skipped: Sequence[str]
    stop_rate: float
    min_stop_rate: float

    @property
    def passed(self) -> bool:
        """Whether the model ends its turn as often as `[train.eos] min_stop_rate` asks for."""
        return self.stop_rate >= self.min_stop_rate


class StopGateError(GateError):
    """The model ends fewer of its turns than the recipe asks for. `run` is there all the same."""

    def __init__(self, run: Run) -> None:
        super().__init__(
            f"{run.stop_rate:.0%} of the answers end by themselves, {run.min_stop_rate:.0%} are asked for "
            f"([train.eos] min_stop_rate). The run is in {run.folder}; see eos.json of its stages."
        )
        self.run = run


def train(
    recipe: Recipe | str | Path,
    mixture: Mixture | str | Path | None = None,
    *,
    store: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    report_to: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Run:
    """Runs the stages of a recipe's `[train]` on a mixture: the one built from this recipe last, unless it is given.

    `resume` goes on from the last checkpoint of a stage and leaves finished stages as they are; `force` removes stage
    folders that exist. `report_to` names trackers that transformers knows ("wandb", "trackio", "tensorboard").
    Raises UsageError for a recipe without `[train]`; MixtureError for a mixture that is missing or fails verification;
    HubError for one on the Hub, or a base there; TrainError for a base, a tokenizer, a folder or a machine that does not
    do; StopGateError after the last stage, when the model does not end its turns and the recipe says `on_fail = "stop"`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    settings = settings_of(recipe)
    if resume and force:
        raise UsageError("resume and force exclude each other: one goes on, the other starts again.")
    watcher = watcher or Watcher()
    mixture = mixture if isinstance(mixture, Mixture) else find_mixture(recipe, mixture, store)
    folder = Path(settings.output) / recipe.name
    state = processes.join()
    processes.check_common(mixture, folder)
    if state.is_local_main_process:
        mixture.verify()
    if state.is_main_process:
        _check_folders(folder, settings.stages, resume, force)
    processes.wait()
    _quiet_libraries()
    base = find_base(settings.base, settings.base_revision, recipe.root)
    tokenizer = load_tokenizer(settings.base, settings.base_revision, recipe.root, add_tokens=settings.add_tokens)
    for note in tokenizer.notes:
        watcher.note(note)
    held_out = held_out_rows(mixture, tokenizer, settings, watcher)
    session = Session(recipe, settings, mixture, tokenizer, base, held_out, watcher, tuple(report_to))
    done: list[StageRun] = []
    skipped: list[str] = []
    for stage in settings.stages:
        if not _is_needed(stage, done, settings.eos):
            skipped.append(stage.name)
            continue
        done.append(run_stage(session, stage, done[-1] if done else None, resume))
    run = Run(folder, done, skipped, _stop_rate(done[-1]), settings.eos.min_stop_rate)
    if not run.passed and settings.eos.on_fail == "stop":
        raise StopGateError(run)
    return run


def _check_folders(folder: Path, stages: Sequence[AnyStage], resume: bool, force: bool) -> None:
    there = [folder / stage.name for stage in stages if (folder / stage.name).exists()]
    if force:
        for path in there:
            shutil.rmtree(path)
    elif there and not resume:
        raise TrainError(
            f"{there[0]} is there already. Go on with --resume, start again with --force, or give the run "
            f'another folder (--set train.output="...").'
        )


def _is_needed(stage: AnyStage, done: Sequence[StageRun], eos: Eos) -> bool:
    """Whether a stage runs: one that is marked `if_needed` does so to repair what the stage before it does not pass."""
    if not (isinstance(stage, SftStage) and stage.if_needed and done):
        return True
    return eos.on_fail == "repair" and _stop_rate(done[-1]) < eos.min_stop_rate


def _stop_rate(stage: StageRun) -> float:
    return stage.eos["after"]["stop_rate"]


def _quiet_libraries() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
