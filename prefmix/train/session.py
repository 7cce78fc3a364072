"""What the stages of a run share: the recipe, the mixture as token ids, the rows that the EOS is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate

from prefmix.mixture import Mixture
from prefmix.recipe import DpoStage, Recipe, SftStage, Train
from prefmix.schema import Kind
from prefmix.train.data import TokenRows, tokenize
from prefmix.train.eos import HeldOut, Measured, measure
from prefmix.train.steps import Steps
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


@dataclass
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

    def tokens(self, subset: Kind, split: str, max_length: int) -> TokenRows:
        """The token ids of a split, made by the main process and opened by all."""
        return tokenized(self.mixture, subset, split, self.tokenizer, max_length, self.settings, self.watcher)

    def measured(self, model: Any) -> Measured:
        """The EOS of a model, on the rows of every stage."""
        self.watcher.work("measure", 0, 1)
        seed = self.recipe.seed % 2**32
        return measure(model, self.tokenizer.tokenizer, self.held_out, self.settings.eos, seed)

    @property
    def is_main(self) -> bool:
        return accelerate.PartialState().is_main_process


def held_out_rows(mixture: Mixture, tokenizer: ChatTokenizer, settings: Train, watcher: Watcher) -> HeldOut:
    """The rows that every stage measures the EOS on: from the test splits (else train) of the subsets, in equal parts."""
    longest = max(stage.max_length for stage in settings.stages)
    subsets = sorted(mixture.splits)
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    split = "test" if any("test" in splits for splits in mixture.splits.values()) else "train"
    for number, subset in enumerate(subset for subset in subsets if split in mixture.splits[subset]):
        wanted = settings.eos.prompts * (number + 1) // len(subsets) - len(prompts)
        rows = tokenized(mixture, subset, split, tokenizer, longest, settings, watcher).table
        for row in rows.select(range(min(wanted, len(rows)))):
            prompt, answer = _last_answer(row)
            prompts.append(prompt)
            answers.append(answer)
    return HeldOut(prompts, answers, split)


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
    """The token ids of a split, made by the main process and opened by all."""
    with accelerate.PartialState().main_process_first():
        return tokenize(
            mixture,
            subset,
            split,
            tokenizer,
            max_length=max_length,
            fallback=Path(settings.output) / ".tokens",
            progress=lambda done, total: watcher.work("tokens", done, total),
        )
