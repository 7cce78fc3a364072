"""`prefmix train`: the stages of a recipe on a mixture, one after the other, with a record of each.

<output>/<name>/<stage>/
  adapter/        the adapter as safetensors, with the tokenizer and its ChatML template (the whole model when there is none)
  checkpoints/    see checkpoints.py
  metrics.jsonl   a line per step and per evaluation
  eos.json        does the model still end its turn: before, during, after
  run.json        what was run, on what, how fast
  README.md       the model card
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import datasets
import numpy as np
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, SFTConfig

from prefmix.errors import GateError, MixtureError, TrainError, UsageError
from prefmix.mixture import Mixture
from prefmix.recipe import DpoStage, Recipe, SftStage, Train, load_recipe
from prefmix.schema import Kind
from prefmix.store import Store, open_mixture
from prefmix.train import records, weights
from prefmix.train.checkpoints import last_checkpoint
from prefmix.train.data import TokenRows, tokenize
from prefmix.train.dpo import COMPARING, PairTrainer
from prefmix.train.eos import HeldOut, Measured, measure
from prefmix.train.loop import conversations, pairs
from prefmix.train.packed import refused
from prefmix.train.reference import log_probabilities, reference_key
from prefmix.train.sft import ConversationTrainer
from prefmix.train.steps import Steps, plan_steps
from prefmix.train.tokenizer import ChatTokenizer, load_tokenizer

AnyStage = DpoStage | SftStage
Trainer = PairTrainer | ConversationTrainer
_CPU_TOKENS = 4096


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
class StageRun:
    """A stage that has ended: its folder, its run.json and its eos.json. `was_there` when `--resume` found it finished."""

    folder: Path
    run: Mapping[str, Any]
    eos: Mapping[str, Any]
    was_there: bool = False


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


@dataclass
class _Session:
    """What the stages of one run share."""

    recipe: Recipe
    settings: Train
    mixture: Mixture
    tokenizer: ChatTokenizer
    base: weights.Base
    held_out: HeldOut
    watcher: Watcher
    report_to: Sequence[str]
    measured: dict[str, Measured] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.settings.output) / self.recipe.name

    @property
    def is_main(self) -> bool:
        return accelerate.PartialState().is_main_process


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
    TrainError for a base, a tokenizer, a folder or a machine that does not do; GateError after the last stage, when the
    model does not end its turns and the recipe says `on_fail = "stop"`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    settings = settings_of(recipe)
    if resume and force:
        raise UsageError("resume and force exclude each other: one goes on, the other starts again.")
    watcher = watcher or Watcher()
    mixture = mixture if isinstance(mixture, Mixture) else find_mixture(recipe, mixture, store)
    folder = Path(settings.output) / recipe.name
    state = accelerate.PartialState()
    if state.is_main_process:
        _check_folders(folder, settings.stages, resume, force)
        mixture.verify()
    state.wait_for_everyone()
    _quiet_libraries()
    base = weights.find_base(settings, recipe.root)
    tokenizer = load_tokenizer(settings.base, settings.base_revision, recipe.root, add_tokens=settings.add_tokens)
    for note in tokenizer.notes:
        watcher.note(note)
    held_out = held_out_rows(mixture, tokenizer, settings, watcher)
    session = _Session(recipe, settings, mixture, tokenizer, base, held_out, watcher, tuple(report_to))
    done: list[StageRun] = []
    skipped: list[str] = []
    for stage in settings.stages:
        repairs = isinstance(stage, SftStage) and stage.if_needed
        if repairs and done and _stop_rate(done[-1]) >= settings.eos.min_stop_rate:
            skipped.append(stage.name)
            continue
        done.append(_run_stage(session, stage, done[-1] if done else None, resume))
    run = Run(folder, done, skipped, _stop_rate(done[-1]), settings.eos.min_stop_rate)
    if not run.passed and settings.eos.on_fail == "stop":
        raise GateError(
            f"{run.stop_rate:.0%} of the answers end by themselves, {run.min_stop_rate:.0%} are asked for "
            f"([train.eos] min_stop_rate). The run is in {folder}; see eos.json of its stages."
        )
    return run


def settings_of(recipe: Recipe) -> Train:
    """The recipe's `[train]`. Raises UsageError when it has none."""
    if recipe.train is None:
        raise UsageError(f"{recipe.path or recipe.name} has no [train]: name a base model and at least one stage.")
    return recipe.train


def find_mixture(recipe: Recipe, reference: str | Path | None, store: str | Path | None) -> Mixture:
    """The mixture that is named, else the last version that was built from this recipe.

    Raises MixtureError when there is none: it has to be built first.
    """
    if reference is not None:
        return open_mixture(reference, store)
    shelf = Store(store)
    for label in reversed(shelf.versions(recipe.name)):
        found = shelf.find(recipe.name, label)
        if recipe.digest(_revisions(found)) == found.manifest["recipe_digest"]:
            return found
    raise MixtureError(
        f"No mixture of the store {shelf.root} was built from {recipe.path or 'this recipe'} as it is now. "
        f"Run `prefmix build` first, or name a mixture with --mixture."
    )


def _revisions(mixture: Mixture) -> dict[str, str]:
    """The commits that a mixture's recipe was resolved to, as `Recipe.digest` takes them."""
    resolved = tomllib.loads((mixture.folder / "recipe.toml").read_text(encoding="utf-8"))
    against = resolved.get("decontaminate", {}).get("against", {})
    tables = {**resolved["sources"], **{f"against.{name}": table for name, table in against.items()}}
    found = {name: table["revision"] for name, table in tables.items() if "revision" in table}
    tokenizer = resolved.get("format", {}).get("tokenizer_revision")
    return found | ({"tokenizer": tokenizer} if tokenizer else {})


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


def _run_stage(session: _Session, stage: AnyStage, before: StageRun | None, resume: bool) -> StageRun:
    """One stage, from its token ids to its record."""
    settings, watcher = session.settings, session.watcher
    folder = session.folder / stage.name
    tokens = {
        split: tokenized(
            session.mixture, stage.subset, split, session.tokenizer, stage.max_length, settings, watcher
        )
        for split in ("train", "test")
        if split in session.mixture.splits.get(stage.subset, ())
    }
    if "train" not in tokens or not len(tokens["train"].table):
        raise TrainError(_no_rows(session.mixture, stage, tokens.get("train")))
    table = tokens["train"].table
    table = table.select(range(min(stage.rows or len(table), len(table))))
    steps = plan_steps(
        table["id"],
        seed=session.recipe.seed,
        stage=stage.name,
        batch_size=stage.batch_size,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )
    record = _record(session, stage, before, len(table), steps, tokens)
    found = records.read_json(folder / "run.json") if resume else None
    if found is not None:
        _same_run(folder, found, record)
        if found["finished"]:
            return StageRun(folder, found, records.read_json(folder / "eos.json") or {}, was_there=True)
    checkpoint = last_checkpoint(folder / "checkpoints") if found else None
    watcher.stage(stage, steps, len(table))
    if session.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        records.write_json(folder / "run.json", record)
        records.cut_metrics(folder / "metrics.jsonl", int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1)
    accelerate.PartialState().wait_for_everyone()
    watcher.work("load", 0, 1)
    trainer, guard = _trainer(session, stage, before, folder, steps, table, tokens)
    guard.begin(trainer, checkpoint)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = time.perf_counter() - started
    guard.end(trainer)
    return _finish(session, trainer, guard, folder, record, trained)


def _finish(
    session: _Session, trainer: Trainer, guard: _Guard, folder: Path, record: dict[str, Any], wall_s: float
) -> StageRun:
    """Saves the adapter and completes run.json, last."""
    tokens = trainer.tokens_seen
    steps_here = max(1, len(trainer.steps) - guard.first_step)
    losses = [line["loss"] for line in _lines(folder / "metrics.jsonl") if "loss" in line]
    record |= {
        "finished": records.now(),
        "steps": len(trainer.steps),
        "tokens": tokens,
        "wall_s": round(wall_s, 3),
        "steps_timed": steps_here,
        "pairs_per_s": round(trainer.pairs_seen / wall_s, 3),
        "tokens_per_s": round(tokens / wall_s, 1),
        "mfu": _mfu(trainer, wall_s),
        "peak_memory_bytes": records.peak_memory(),
        "token_budget": trainer.token_budget,
        "losses": {"first": losses[0], "last": losses[-1], "mean": sum(losses) / len(losses)} if losses else {},
    }
    eos = guard.as_json()
    if session.is_main:
        weights.save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder / "adapter")
        session.tokenizer.tokenizer.save_pretrained(folder / "adapter")
        record["adapter_sha256"] = records.sha256_of(folder / "adapter")
        records.write_json(folder / "eos.json", eos)
        records.write_json(folder / "run.json", record)
    accelerate.PartialState().wait_for_everyone()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return StageRun(folder, record, eos)


def _trainer(
    session: _Session,
    stage: AnyStage,
    before: StageRun | None,
    folder: Path,
    steps: Steps,
    table: datasets.Dataset,
    tokens: Mapping[str, TokenRows],
) -> tuple[Trainer, _Guard]:
    """The model of the stage before (or the base) in a trainer for this one."""
    settings = session.settings
    lora = settings.adapter == "lora"
    source = session.base
    if before and not lora:
        source = weights.Base(session.base.name, str(before.folder / "adapter"), None, session.base.config)
    model = weights.load_base(source, settings, len(session.tokenizer.tokenizer))
    peft = weights.lora_config(settings.lora, bool(session.tokenizer.added), _tied(model)) if lora else None
    test = tokens.get("test")
    packs = refused(model.config) is None
    held_out = test.table if test is not None and len(test.table) else None
    keys = {"train": tokens["train"].key, "eval": test.key if test else ""}
    guard = _Guard(session, folder)
    shared: dict[str, Any] = {
        "model": model,
        "processing_class": session.tokenizer.tokenizer,
        "steps": steps,
        "token_budget": _token_budget(stage),
        "packs": packs,
        "may_shrink": stage.token_budget == "auto",
        "measure": guard.during,
        "callbacks": [_Writer(session, folder, stage)],
        "peft_config": peft,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(peft|trl|transformers)\..*")
        if isinstance(stage, DpoStage):
            trainer: Trainer = PairTrainer(
                args=_arguments(DPOConfig, session, stage, folder, len(steps), held_out is not None, **_dpo(stage, lora)),
                train_rows=pairs(table),
                eval_rows=pairs(held_out) if held_out is not None else None,
                **shared,
            )
        else:
            trainer = ConversationTrainer(
                args=_arguments(SFTConfig, session, stage, folder, len(steps), held_out is not None),
                train_rows=conversations(table),
                eval_rows=conversations(held_out) if held_out is not None else None,
                **shared,
            )
    trainer.remove_callback(PrinterCallback)
    weights.in_fp32(trainer.model)
    if before and lora:
        weights.load_adapter(trainer.model, before.folder / "adapter")
    if isinstance(trainer, PairTrainer):
        _with_reference(session, trainer, before, keys)
    return trainer, guard


def _with_reference(
    session: _Session, trainer: PairTrainer, before: StageRun | None, keys: Mapping[str, str]
) -> None:
    """Gives the rows their reference log-probabilities; `keys` names the token ids of each split."""
    settings = session.settings
    start = before.run["adapter_sha256"] if before else None
    for split, rows in trainer.rows.items():
        if rows is None:
            continue
        key = reference_key(
            [keys[split], len(rows)],
            session.base.fingerprint,
            [settings.quantization, weights.dtype_of(settings), start],
        )
        extra = log_probabilities(
            trainer,
            rows,
            session.folder / ".reference" / f"{key}.safetensors",
            lambda done, total: session.watcher.work("reference", done, total),
        )
        trainer.rows[split] = replace(rows, extra=extra)


def _tied(model: Any) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _token_budget(stage: AnyStage) -> int:
    if isinstance(stage, DpoStage) and COMPARING & set([stage.loss] if isinstance(stage.loss, str) else stage.loss):
        return 2**62  # these losses compare the rows of a step with each other: it is not split
    if stage.token_budget != "auto":
        return stage.token_budget
    return _CPU_TOKENS


def _dpo(stage: DpoStage, lora: bool) -> dict[str, Any]:
    """DPO's own arguments for TRL. The flag for the reference makes TRL load no second model when there is no adapter."""
    losses = [stage.loss] if isinstance(stage.loss, str) else list(stage.loss)
    return {
        "beta": stage.beta,
        "loss_type": losses,
        "loss_weights": stage.loss_weights or [1.0] * len(losses),
        "label_smoothing": stage.label_smoothing,
        "precompute_ref_log_probs": not lora,
    }


def _arguments(
    kind: type, session: _Session, stage: AnyStage, folder: Path, steps: int, evaluates: bool, **own: Any
) -> Any:
    """TRL's arguments of a stage."""
    every = stage.eval_every if evaluates else None
    return kind(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=1,  # Trainer's epoch is the whole stage: see loop.py
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=math.ceil(stage.warmup_ratio * steps),
        max_grad_norm=1.0,
        max_length=None,  # what is too long was left out or shortened before: see data.py
        bf16=weights.dtype_of(session.settings) == "bfloat16",
        gradient_checkpointing=session.settings.gradient_checkpointing is True,
        seed=session.recipe.seed % 2**32,
        use_cpu=weights.device().type == "cpu",
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=stage.checkpoint_every or steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        report_to=list(session.report_to) or "none",
        run_name=f"{session.recipe.name}-{stage.name}",
        **own,
    )


class _Writer(TrainerCallback):
    """Appends what Trainer logs to metrics.jsonl and tells the watcher."""

    def __init__(self, session: _Session, folder: Path, stage: AnyStage) -> None:
        self.session, self.path, self.stage = session, folder / "metrics.jsonl", stage

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step} | {name: value for name, value in logs.items() if name != "epoch"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.session.watcher.step(state.global_step, line)


class _Guard:
    """Measures the EOS before, during and after a stage, and keeps the record that becomes eos.json."""

    def __init__(self, session: _Session, folder: Path) -> None:
        self.session, self.path = session, folder / "eos.json"
        self.before: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.first_step = 0

    def begin(self, trainer: Trainer, checkpoint: Path | None) -> None:
        """Measures the model as the stage finds it; a resumed stage has that in its eos.json."""
        known = records.read_json(self.path) if checkpoint else None
        if known and checkpoint:
            self.first_step = int(checkpoint.name.rpartition("-")[2])
            self.before = known["before"]
            self.history = [entry for entry in known["history"] if entry["step"] <= self.first_step]
        else:
            self.before = self._measured(trainer.accelerator.unwrap_model(trainer.model)).as_json()
            self._write()

    def during(self, model: torch.nn.Module, step: int) -> Mapping[str, float]:
        measured = self._measured(model)
        self.history.append({"step": step, **measured.as_json()})
        self._write()
        return measured.as_metrics()

    def end(self, trainer: Trainer) -> None:
        """Measures the model as the stage leaves it, unless the last evaluation has just done so."""
        last = self.history[-1]["step"] if self.history else -1
        if last < len(trainer.steps):
            if trainer.rows["eval"] is not None:
                trainer.evaluate()
            else:
                self.during(trainer.accelerator.unwrap_model(trainer.model), len(trainer.steps))

    def as_json(self) -> dict[str, Any]:
        after = {name: value for name, value in self.history[-1].items() if name != "step"} if self.history else None
        return {
            "stage": self.path.parent.name,
            "rows": len(self.session.held_out),
            "split": self.session.held_out.split,
            "before": self.before,
            "after": after,
            "history": self.history,
        }

    def _measured(self, model: Any) -> Measured:
        self.session.watcher.work("measure", 0, 1)
        settings, seed = self.session.settings.eos, self.session.recipe.seed % 2**32
        return measure(model, self.session.tokenizer.tokenizer, self.session.held_out, settings, seed)

    def _write(self) -> None:
        if self.session.is_main:
            records.write_json(self.path, self.as_json() | {"after": None})


def _record(
    session: _Session,
    stage: AnyStage,
    before: StageRun | None,
    rows: int,
    steps: Steps,
    tokens: Mapping[str, TokenRows],
) -> dict[str, Any]:
    """run.json as it is when a stage starts."""
    recipe, settings, mixture = session.recipe, session.settings, session.mixture
    shared = settings.model_dump(mode="json", exclude={"stages", "base", "base_revision", "output"})
    return {
        "stage": stage.name,
        "method": stage.method,
        "recipe_digest": mixture.manifest["recipe_digest"],
        "mixture": {"name": mixture.name, "version": mixture.version, "digest": mixture.digest},
        "base": {"name": session.base.name, "revision": session.base.commit},
        "tokenizer": {"sha256": session.tokenizer.sha256, "added": list(session.tokenizer.added)},
        "after_stage": before.folder.name if before else None,
        "seed": recipe.seed,
        "hyperparameters": {**stage.model_dump(mode="json"), **shared, "dtype": weights.dtype_of(settings)},
        "rows": rows,
        "left_out": dict(tokens["train"].left_out),
        "shortened": tokens["train"].shortened,
        "steps": len(steps),
        "epochs": round(steps.epochs, 4),
        "started": records.now(),
        "finished": None,
        "hardware": records.hardware(accelerate.PartialState().num_processes),
        "versions": records.versions(),
    }


def _same_run(folder: Path, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raises TrainError when a folder's run is not the one that is asked for now."""
    keys = ("method", "mixture", "base", "tokenizer", "after_stage", "seed", "hyperparameters", "rows")
    same = {"mixture": {"version"}}  # a version is a label: its digest decides
    told = [
        {key: _without(each[key], same.get(key, set())) for key in keys if key in each} for each in (found, record)
    ]
    if changed := list(records.differences(*told)):
        raise TrainError(
            f"{folder} was trained with other settings, and cannot go on with these:\n  "
            + "\n  ".join(changed)
            + "\nPut them back, or start again with --force."
        )


def _without(value: Any, keys: set[str]) -> Any:
    return {key: item for key, item in value.items() if key not in keys} if isinstance(value, dict) else value


def _no_rows(mixture: Mixture, stage: AnyStage, tokens: TokenRows | None) -> str:
    if tokens is None:
        return f"{mixture} has no {stage.subset} rows to train on, and the stage {stage.name} reads them."
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in tokens.left_out.items())
    return f"The stage {stage.name} has no row left to train on ({reasons}). Raise max_length."


def _mfu(trainer: Trainer, wall_s: float) -> float | None:
    """Model FLOPs of the steps over what the device can do: 2 FLOPs a parameter and token forward, as many for the
    gradients of the activations, and as many again for those of the weights where all are trained."""
    peak = records.peak_flops(records.hardware(1)["device"])
    if peak is None:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = hasattr(model, "get_base_model")
    flops = (4 if lora else 6) * matrix_parameters(model.config) * trainer.tokens_seen
    return round(flops / wall_s / peak / trainer.accelerator.num_processes, 4)


def matrix_parameters(config: Any) -> int:
    """Parameters that take part in a matrix product for every token: all but the embeddings, with the head."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    inputs = model.get_input_embeddings().weight.numel()
    tied = 0 if _tied(model) else inputs
    return sum(parameter.numel() for parameter in model.parameters()) - tied


def _stop_rate(stage: StageRun) -> float:
    return stage.eos["after"]["stop_rate"]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _quiet_libraries() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
