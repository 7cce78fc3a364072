"""`prefmix train --dry-run`: what a run will be, without loading weights.

Rows, tokens and steps are those of the run: the same token ids, the same steps, the same micro-batches. Memory and hours
are computed from the model's config (memory.py) and the tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefmix.mixture import Mixture
from prefmix.recipe import DpoStage, Recipe, Train, load_recipe
from prefmix.train import records
from prefmix.train.inputs import find_mixture, settings_of
from prefmix.train.loop import WHOLE_STEP, RowSet, conversations, longest_row, pairs
from prefmix.train.memory import (
    Memory,
    Sizes,
    loading_bytes,
    measuring_bytes,
    micro_batches_of,
    most_tokens,
    not_packed,
    sizes_of,
    training_memory,
)
from prefmix.train.session import AnyStage, StageRows, Watcher, stage_rows
from prefmix.train.steps import Steps, best_fit, by_budget
from prefmix.train.tokenizer import load_tokenizer
from prefmix.train.weights import device, dtype_of, find_base

#: The share of a GPU's peak that hours are computed at.
UTILISATION = 0.45
#: Name, the part of it that `records.PEAK_TFLOPS` knows, and the bytes that CUDA says it has.
GPUS = (
    ("H100 80 GB", "H100", int(79.1 * 2**30)),
    ("H200 141 GB", "H200", int(139.8 * 2**30)),
    ("A100 80 GB", "A100", int(79.1 * 2**30)),
    ("L40S 48 GB", "L40S", int(44.4 * 2**30)),
    ("RTX 4090 24 GB", "4090", int(23.5 * 2**30)),
)


@dataclass(frozen=True)
class Layout:
    """How the rows of all steps lie in micro-batches. `tokens` are with padding, `padding` is the share that pads;
    `largest` is the most tokens of a micro-batch, with `answers` read by the head and `mask_cells` in a dense mask."""

    tokens: int
    padding: float
    micro_batches: int
    largest: int
    answers: int
    mask_cells: int


@dataclass(frozen=True)
class OnGpu:
    """A stage on a named GPU: whether its longest row fits, the micro-batch and the hours at `UTILISATION`."""

    gpu: str
    memory_bytes: int
    fits: bool
    token_budget: int
    gradient_checkpointing: bool
    memory: Memory
    hours: float


@dataclass(frozen=True)
class StageEstimate:
    """One stage. `tokens` are those of all sequences in its steps, each with its prompt; `packed_tokens` have the prompt
    of a pair once, and `shared` is the share that this saves. `packs` says which of the layouts the stage takes here;
    `not_packed` why it is the padded one. `memory` is what the steps take on this machine at `token_budget`, `loading` and
    `measuring` the bytes in all while the weights are loaded and while the EOS is measured."""

    stage: str
    method: str
    rows: int
    left_out: Mapping[str, int]
    shortened: int
    batch_size: int
    steps: int
    epochs: float
    tokens: int
    packed_tokens: int
    shared: float
    reference_tokens: int
    longest: int
    token_budget: int
    padded: Layout
    packed: Layout
    not_packed: str | None
    flops: float
    memory: Memory
    loading: int
    measuring: int
    fits: bool
    gpus: tuple[OnGpu, ...]

    @property
    def peak(self) -> int:
        """Bytes: the most that the stage takes on this machine."""
        return max(self.memory.total, self.loading, self.measuring)

    @property
    def packs(self) -> bool:
        return self.not_packed is None


@dataclass(frozen=True)
class Estimate:
    """What a recipe's `[train]` will do on a mixture. Counts are numbers, memory is in bytes.

    `if_needed` names the stages that run only when the EOS gate fails; `peak` is the largest memory of all stages.
    """

    recipe: str
    mixture: Mapping[str, Any]
    base: str
    parameters: int
    trainable: int
    quantization: str
    dtype: str
    device: str
    memory_bytes: int
    utilisation: float
    if_needed: tuple[str, ...]
    stages: tuple[StageEstimate, ...]

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """JSON data: the fields, with `total` among the parts of a memory and `peak` in a stage and at the top."""
        return _json(self)


def estimate(
    recipe: Recipe | str | Path,
    mixture: Mixture | str | Path | None = None,
    *,
    store: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Estimate:
    """What `train` with the same arguments would do. The mixture is tokenised if it was not (as `train` would: cached);
    no weights are read.

    Raises UsageError, MixtureError and TrainError as `train` does.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    settings = settings_of(recipe)
    mixture = mixture if isinstance(mixture, Mixture) else find_mixture(recipe, mixture, store)
    base = find_base(settings.base, settings.base_revision, recipe.root)
    tokenizer = load_tokenizer(settings.base, settings.base_revision, recipe.root, add_tokens=settings.add_tokens)
    sizes = sizes_of(base.config, settings, len(tokenizer.tokenizer))
    stages = []
    for stage in settings.stages:
        rows = stage_rows(mixture, stage, recipe.seed, settings, tokenizer, watcher or Watcher())
        stages.append(_stage(settings, stage, rows, base.config, len(tokenizer.tokenizer)))
    here = records.hardware(1)
    return Estimate(
        recipe=recipe.name,
        mixture={"name": mixture.name, "version": mixture.version, "digest": mixture.digest},
        base=settings.base,
        parameters=sizes.parameters,
        trainable=sizes.trainable,
        quantization=settings.quantization,
        dtype=dtype_of(settings),
        device=here["device"],
        memory_bytes=_memory_here(here),
        utilisation=UTILISATION,
        if_needed=tuple(stage.name for stage in settings.stages if getattr(stage, "if_needed", False)),
        stages=tuple(stages),
    )


def _stage(settings: Train, stage: AnyStage, given: StageRows, config: Any, vocabulary: int) -> StageEstimate:
    sizes = sizes_of(config, settings, vocabulary)
    table, steps = given.table, given.steps
    is_dpo = isinstance(stage, DpoStage)
    rows = pairs(table) if is_dpo else conversations(table)
    answers, visible = _answers_and_visible(table, rows, is_dpo)
    cpu = device().type == "cpu"
    reason = not_packed(config, settings)
    longest = longest_row(rows, reason is None, 2 if is_dpo else 1)
    free = None if cpu else _memory_here(records.hardware(1))
    budget, checkpointing = micro_batches_of(stage, settings, config, free, longest=longest, vocabulary=vocabulary)
    padded, packed = layouts(rows, steps, budget, answers, sequences=2 if is_dpo else 1)
    layout = padded if reason else packed
    dropout = 0.0 if is_dpo else settings.lora.dropout
    memory = training_memory(
        sizes,
        settings,
        dtype_of(settings),
        cpu=cpu,
        tokens=layout.largest,
        answers=layout.answers,
        mask_cells=layout.mask_cells if cpu or reason else 0,
        checkpointing=checkpointing,
        dropout=dropout,
    )
    loading = loading_bytes(sizes, settings, dtype_of(settings), _stored_bytes(config), cpu=cpu)
    measuring = measuring_bytes(sizes, settings, dtype_of(settings), int(rows.lengths.max()), cpu=cpu)
    whole, in_packs = int(rows.whole[steps.order].sum()), int(rows.packed[steps.order].sum())
    reference = _reference_tokens(rows, given) if is_dpo else 0
    run = padded.tokens if reason else in_packs
    flops = training_flops(sizes, settings, run, float(visible[steps.order].sum()))
    flops += forward_flops(sizes, reference, reference * float(visible.sum()) / max(1, int(rows.packed.sum())))
    return StageEstimate(
        stage=stage.name,
        method=stage.method,
        rows=len(table),
        left_out=dict(given.tokens["train"].left_out),
        shortened=given.tokens["train"].shortened,
        batch_size=stage.batch_size,
        steps=len(steps),
        epochs=round(steps.epochs, 4),
        tokens=whole,
        packed_tokens=in_packs,
        shared=1 - in_packs / whole,
        reference_tokens=reference,
        longest=longest,
        token_budget=budget,
        padded=padded,
        packed=packed,
        not_packed=reason,
        flops=flops,
        memory=memory,
        loading=loading,
        measuring=measuring,
        fits=max(memory.total, loading, measuring) <= _memory_here(records.hardware(1)),
        gpus=tuple(_on_gpu(gpu, sizes, settings, stage, longest, flops) for gpu in GPUS),
    )


def layouts(rows: RowSet, steps: Steps, budget: int, answers: np.ndarray, sequences: int) -> tuple[Layout, Layout]:
    """The padded and the packed micro-batches of all steps, parted as loop.py parts them on one process.

    `answers` is int64 [rows]: the tokens of a row that the head reads. A pack is not padded where its length may vary;
    its `padding` is the room that it leaves of the budget, which is what a fixed length pads.
    """
    found: dict[str, list[tuple[int, int, int, int, int]]] = {"padded": [], "packed": []}
    for step in range(len(steps)):
        numbers = steps.rows(step)
        for micro in by_budget(rows.lengths[numbers], budget, sequences):
            chosen = numbers[micro]
            longest = int(rows.lengths[chosen].max())
            held = len(chosen) * sequences * longest
            found["padded"].append(
                (held, int(rows.whole[chosen].sum()), held, int(answers[chosen].sum()), held * longest)
            )
        for micro in best_fit(rows.packed[numbers], budget):
            chosen = numbers[micro]
            held = int(rows.packed[chosen].sum())
            room = max(held, budget) if budget < WHOLE_STEP else held
            found["packed"].append((held, held, room, int(answers[chosen].sum()), held * held))
    return _layout(found["padded"]), _layout(found["packed"])


def _layout(micros: Sequence[tuple[int, int, int, int, int]]) -> Layout:
    held, real, room, answers, cells = (np.array(values) for values in zip(*micros, strict=True))
    return Layout(
        tokens=int(held.sum()),
        padding=float(1 - real.sum() / room.sum()),
        micro_batches=len(micros),
        largest=int(held.max()),
        answers=int(answers.max()),
        mask_cells=int(cells.max()),
    )


def forward_flops(sizes: Sizes, tokens: float, visible: float) -> float:
    """FLOPs of a forward pass: 2 a parameter of the matrices and token, and 4 a query's width, layer and pair of tokens
    that see each other (the scores and their mean of the values)."""
    return 2.0 * (sizes.matrices + sizes.lora) * tokens + 4.0 * sizes.layers * sizes.queries * visible


def training_flops(sizes: Sizes, settings: Train, tokens: float, visible: float, checkpointing: bool = False) -> float:
    """FLOPs of the steps: a forward pass, the gradients of the activations (as much again, the attention's twice), those
    of the weights that are trained (2 a parameter and token); checkpointing repeats the forward pass."""
    trained = sizes.lora if settings.adapter == "lora" else sizes.matrices
    forward = forward_flops(sizes, tokens, visible)
    attention = 4.0 * sizes.layers * sizes.queries * visible
    return (3 if checkpointing else 2) * forward + attention + 2.0 * trained * tokens


def _answers_and_visible(table: Any, rows: RowSet, is_dpo: bool) -> tuple[np.ndarray, np.ndarray]:
    """[rows]: the tokens that the head reads, and the pairs of tokens that see each other in a packed row."""
    if not is_dpo:
        return rows.answers, rows.lengths.astype(np.float64) ** 2 / 2
    prompt = rows.whole - rows.packed
    both = rows.packed - prompt
    chosen, rejected = rows.answers, both - rows.answers
    visible = prompt**2 / 2 + prompt * both + chosen**2 / 2 + rejected**2 / 2
    return both, visible


def _reference_tokens(rows: RowSet, given: StageRows) -> int:
    """Tokens of the reference pass: every row of the steps once, and the held-out ones."""
    more = int(pairs(given.held_out).packed.sum()) if given.held_out is not None else 0
    return int(rows.packed[np.unique(given.steps.order)].sum()) + more


def _on_gpu(
    gpu: tuple[str, str, int], sizes: Sizes, settings: Train, stage: AnyStage, longest: int, flops: float
) -> OnGpu:
    name, part, memory_bytes = gpu
    tokens, checkpointing, memory = most_tokens(sizes, settings, memory_bytes, longest)
    return OnGpu(
        gpu=name,
        memory_bytes=memory_bytes,
        fits=memory.total <= memory_bytes,
        token_budget=tokens,
        gradient_checkpointing=checkpointing,
        memory=memory,
        hours=flops * (4 / 3 if checkpointing else 1) / (records.PEAK_TFLOPS[part] * 1e12 * UTILISATION) / 3600,
    )


def _stored_bytes(config: Any) -> int:
    """Bytes of a parameter in the base's files: two where the config does not say."""
    dtype = config.get_text_config().dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 2


def _memory_here(hardware: Mapping[str, Any]) -> int:
    """Bytes of this machine's GPU, or of its main memory."""
    return hardware.get("memory_bytes") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _json(value: Any) -> Any:
    if isinstance(value, Memory):
        return value.as_json()
    if isinstance(value, Estimate | StageEstimate | Layout | OnGpu):
        data = {field.name: _json(getattr(value, field.name)) for field in fields(value)}
        return data | ({"peak": value.peak} if isinstance(value, Estimate | StageEstimate) else {})
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value
