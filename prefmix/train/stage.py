"""One stage of a run, from its token ids to its record."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from prefmix.errors import TrainError
from prefmix.mixture import Mixture
from prefmix.train import records, weights
from prefmix.train.checkpoints import last_checkpoint
from prefmix.train.data import TokenRows
from prefmix.train.guard import Guard
from prefmix.train.records import StageRun
from prefmix.train.report import write_report
from prefmix.train.session import AnyStage, Session
from prefmix.train.steps import Steps, plan_steps
from prefmix.train.trainers import Trainer, is_tied, trainer_of


def run_stage(session: Session, stage: AnyStage, before: StageRun | None, resume: bool) -> StageRun:
    """One stage, from its token ids to its record."""
    watcher = session.watcher
    folder = session.folder / stage.name
    tokens = {
        split: session.tokens(stage.subset, split, stage.max_length)
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
            return StageRun(folder, found, _eos_of(folder), was_there=True)
    checkpoint = last_checkpoint(folder / "checkpoints") if found else None
    watcher.stage(stage, steps, len(table))
    if session.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        records.write_json(folder / "run.json", record)
        records.cut_metrics(folder / "metrics.jsonl", int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1)
    accelerate.PartialState().wait_for_everyone()
    watcher.work("load", 0, 1)
    records.forget_peak_memory()
    trainer, guard = trainer_of(session, stage, before, folder, steps, table, tokens)
    guard.begin(trainer, checkpoint, before.eos if before else None)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    guard.end(trainer)
    done = _finish(session, trainer, guard, folder, record)
    del trainer, guard
    gc.collect()  # a model and its trainer refer to each other; the next stage asks what memory is free
    return done


def _finish(session: Session, trainer: Trainer, guard: Guard, folder: Path, record: dict[str, Any]) -> StageRun:
    """Saves the adapter and completes run.json, on the main process; the model card comes last."""
    if session.is_main:
        weights.save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder / "adapter", session.base)
        session.tokenizer.tokenizer.save_pretrained(folder / "adapter")
        rows, tokens, seconds = (trainer.seen[name] for name in ("rows", "tokens", "seconds"))
        losses = [line["loss"] for line in _lines(folder / "metrics.jsonl") if "loss" in line]
        record |= {
            "finished": records.now(),
            "tokens": tokens,
            "wall_s": round(seconds, 3),
            "pairs_per_s": round(rows / seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            "mfu": _mfu(trainer, tokens / seconds),
            "peak_memory_bytes": records.peak_memory(),
            "packed": trainer.packs,
            "token_budget": trainer.token_budget,
            "gradient_checkpointing": trainer.args.gradient_checkpointing,
            "losses": {"first": losses[0], "last": losses[-1], "mean": sum(losses) / len(losses)},
            "adapter_sha256": records.sha256_of(folder / "adapter"),
        }
        records.write_json(folder / "eos.json", guard.as_json())
        records.write_json(folder / "run.json", record)
        write_report(folder, session.mixture.manifest)
    accelerate.PartialState().wait_for_everyone()
    return StageRun(folder, records.read_json(folder / "run.json") or {}, _eos_of(folder))


def _record(
    session: Session,
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
    before, now = (
        {key: _without(each[key], same.get(key, set())) for key in keys if key in each} for each in (found, record)
    )
    if changed := list(records.differences(before, now)):
        raise TrainError(
            f"{folder} was trained with other settings, and cannot go on with these:\n  "
            + "\n  ".join(changed)
            + "\nPut them back, or start again with --force."
        )


def _eos_of(folder: Path) -> Mapping[str, Any]:
    """eos.json of a stage that has ended. Raises TrainError where it is not what such a stage leaves."""
    path = folder / "eos.json"
    eos = records.read_json(path)
    if not isinstance(eos, dict) or not eos.get("after"):
        wrong = "is missing" if eos is None else "does not say how the model ends its turns after the stage"
        raise TrainError(f"{path} {wrong}, although {folder / 'run.json'} says that the stage has ended. Start the run "
                         f"again with --force.")  # fmt: skip
    return eos


def _without(value: Any, keys: set[str]) -> Any:
    return {key: item for key, item in value.items() if key not in keys} if isinstance(value, dict) else value


def _no_rows(mixture: Mixture, stage: AnyStage, tokens: TokenRows | None) -> str:
    if tokens is None:
        return f"{mixture} has no {stage.subset} rows to train on, and the stage {stage.name} reads them."
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in tokens.left_out.items())
    return f"The stage {stage.name} has no row left to train on ({reasons}). Raise max_length."


def _mfu(trainer: Trainer, tokens_per_s: float) -> float | None:
    """Model FLOPs of the steps over what the device can do: 2 FLOPs a parameter and token forward, as many for the
    gradients of the activations, and as many again for those of the weights where all are trained."""
    peak = records.peak_flops(records.hardware(1)["device"])
    if peak is None:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    lora = hasattr(model, "get_base_model")
    flops = (4 if lora else 6) * matrix_parameters(model.config) * tokens_per_s
    return round(flops / peak / trainer.accelerator.num_processes, 4)


def matrix_parameters(config: Any) -> int:
    """Parameters that take part in a matrix product for every token: all but the embeddings, with the head."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    inputs = model.get_input_embeddings().weight.numel()
    tied = 0 if is_tied(model) else inputs
    return sum(parameter.numel() for parameter in model.parameters()) - tied


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
