"""What the stages of a run share: the recipe, the mixture as token ids, the rows that the EOS is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import datasets

from prefmix.errors import TrainError
from prefmix.mixture import Mixture
from prefmix.recipe import DpoStage, Recipe, SftStage, Train
from prefmix.schema import Kind
from prefmix.store import TOKENS
from prefmix.train import processes
from prefmix.train.data import TokenRows, tokenize
from prefmix.train.eos import HeldOut, Measured, measure
from prefmix.train.steps import Steps, plan_steps
from prefmix.train.tokenizer import ChatTokenizer
from prefmix.train.weights import Base

AnyStage = DpoStage | SftStage


class Watcher:
    """Is told how a run goes on. This one says nothing; the command line draws."""

    def stage(self, stage: AnyStage, steps: Steps, rows: int) -> None:
        """A stage begins (or goes on)."""

    def work(self, what: str, done: int, total: int) -> None:
        """Work beside the steps: `tokens` (rows), `reference` (pairs), `load`, `measure`."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step, or an evaluation after it, has these metrics."""

    def note(self, text: str) -> None:
        """Something that the user should know and that stops nothing."""


@dataclass(frozen=True)
class StageRows:
    """What a stage trains on: the token ids of its splits, the rows of `train` that it may use, and which make each step."""

    tokens: Mapping[str, TokenRows]
    table: datasets.Dataset
    steps: Steps

    @property
    def held_out(self) -> datasets.Dataset | None:
        """The rows that are evaluated, when there are any."""
        test = self.tokens.get("test")
        return test.table if test is not None and len(test.table) else None


@dataclass(frozen=True)
class Session:
    """What the stages of one run share."""

    recipe: Recipe
    settings: Train
    mixture: Mixture
    tokenizer: ChatTokenizer
    base: Base
    held_out: HeldOut
    watcher: Watcher
    report_to: Sequence[str]

    @property
    def folder(self) -> Path:
        return Path(self.settings.output) / self.recipe.name

    def rows(self, stage: AnyStage) -> StageRows:
        """What a stage trains on."""
        return stage_rows(self.mixture, stage, self.recipe.seed, self.settings, self.tokenizer, self.watcher)

    def measured(self, model: Any) -> Measured:
        """The EOS of a model, on the rows of every stage."""
        self.watcher.work("measure", 0, 1)
        seed = self.recipe.seed % 2**32
        return measure(model, self.tokenizer.tokenizer, self.held_out, self.settings.eos, seed)

    @property
    def is_main(self) -> bool:
        return accelerate.PartialState().is_main_process


def stage_rows(
    mixture: Mixture, stage: AnyStage, seed: int, settings: Train, tokenizer: ChatTokenizer, watcher: Watcher
) -> StageRows:
    """The rows of a stage. Raises TrainError when there are none to train on."""
    tokens = {
        split: tokenized(mixture, stage.subset, split, tokenizer, stage.max_length, settings, watcher)
        for split in ("train", "test")
        if split in mixture.splits.get(stage.subset, ())
    }
    if "train" not in tokens:
        raise TrainError(f"{mixture} has no {stage.subset} rows to train on, and the stage {stage.name} reads them.")
    table = tokens["train"].table
    if not len(table):
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in tokens["train"].left_out.items())
        raise TrainError(f"The stage {stage.name} has no row left to train on ({reasons}). Raise max_length.")
    table = table.select(range(min(stage.rows or len(table), len(table))))
    steps = plan_steps(
        table.data.column("id").to_pylist(),
        seed=seed,
        stage=stage.name,
        batch_size=stage.batch_size,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    return StageRows(tokens, table, steps)


def held_out_rows(mixture: Mixture, tokenizer: ChatTokenizer, settings: Train, watcher: Watcher) -> HeldOut:
    """The rows that every stage measures the EOS on: from the test splits of the subsets in equal parts, else, when no row
    of them is usable, from the train splits. Raises TrainError when there is none at all."""
    longest = max(stage.max_length for stage in settings.stages)
    for split in ("test", "train"):
        subsets = [subset for subset in sorted(mixture.splits) if split in mixture.splits[subset]]
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        for number, subset in enumerate(subsets, start=1):
            wanted = settings.eos.prompts * number // len(subsets) - len(prompts)
            rows = tokenized(mixture, subset, split, tokenizer, longest, settings, watcher).table
            for row in rows.select(range(min(wanted, len(rows)))):
                prompt, answer = _last_answer(row)
                prompts.append(prompt)
                answers.append(answer)
        if prompts:
            return HeldOut(prompts, answers, split)
    raise TrainError(f"{mixture} has no row that fits into {longest} tokens, to measure the EOS on. Raise max_length.")


def _last_answer(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    if "prompt_ids" in row:
        return row["prompt_ids"], row["chosen_ids"]
    ids, labels = row["input_ids"], row["labels"]
    start = next((place for place in range(len(labels) - 1, -1, -1) if labels[place] == -100), -1) + 1
    return ids[:start], ids[start:]


def tokenized(
    mixture: Mixture,
    subset: Kind,
    split: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    settings: Train,
    watcher: Watcher,
) -> TokenRows:
    """The token ids of a split, made by one process of each node and opened by its others."""
    with processes.first_of_its_node():
        return tokenize(
            mixture,
            subset,
            split,
            tokenizer,
            max_length=max_length,
            fallback=Path(settings.output) / TOKENS,
            progress=lambda done, total: watcher.work("tokens", done, total),
        )
