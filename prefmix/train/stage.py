"""One stage of a run, from its token ids to its record."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate

from prefmix.errors import TrainError
from prefmix.mixture import MANIFEST, write_durably
from prefmix.recipe import portable
from prefmix.stages import read_lines
from prefmix.train import processes, records, weights
from prefmix.train.checkpoints import last_checkpoint
from prefmix.train.guard import Guard
from prefmix.train.inputs import revisions_of
from prefmix.train.memory import sizes_of
from prefmix.train.records import StageRun
from prefmix.train.report import write_report
from prefmix.train.session import AnyStage, Session, StageRows
from prefmix.train.trainers import Trainer, trainer_of


def run_stage(session: Session, stage: AnyStage, before: StageRun | None, resume: bool) -> StageRun:
    """One stage, from its token ids to its record."""
    watcher = session.watcher
    folder = session.folder / stage.name
    rows = session.rows(stage)
    record = _record(session, stage, before, rows)
    found = processes.from_main(lambda: records.read_json(folder / "run.json")) if resume else None
    if found is not None:
        _same_run(folder, found, record)
        if found["finished"]:
            return StageRun(folder, found, processes.from_main(lambda: _eos_of(folder)), was_there=True)
    checkpoint = processes.from_main(lambda: last_checkpoint(folder / "checkpoints")) if found else None
    watcher.stage(stage, rows.steps, len(rows.table))
    if session.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        records.write_json(folder / "run.json", record)
        records.write_json(folder / MANIFEST, session.mixture.manifest)
        write_durably(folder / "recipe.toml", portable(session.recipe.to_toml(revisions_of(session.mixture))))
        records.cut_metrics(folder / "metrics.jsonl", int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1)
    processes.wait()
    watcher.work("load", 0, 1)
    records.forget_peak_memory()
    trainer, guard = trainer_of(session, stage, before, folder, rows)
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
        rows, tokens, processed, seconds = (trainer.seen[key] for key in ("rows", "tokens", "processed", "seconds"))
        losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        record |= {
            "finished": records.now(),
            "tokens": tokens,
            "wall_s": round(seconds, 3),
            "pairs_per_s": round(rows / seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            "mfu": _mfu(session, processed / seconds),
            "peak_memory_bytes": records.peak_memory(),
            "packed": trainer.packs,
            "token_budget": trainer.token_budget,
            "gradient_checkpointing": trainer.args.gradient_checkpointing,
            "losses": {"first": losses[0], "last": losses[-1], "mean": sum(losses) / len(losses)},
            "adapter_sha256": records.sha256_of(folder / "adapter"),
        }
        records.write_json(folder / "eos.json", guard.as_json())
        records.write_json(folder / "run.json", record)
        write_report(folder)
    return StageRun(
        folder, *processes.from_main(lambda: (records.read_json(folder / "run.json") or {}, _eos_of(folder)))
    )


def _record(session: Session, stage: AnyStage, before: StageRun | None, rows: StageRows) -> dict[str, Any]:
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
        "rows": len(rows.table),
        "left_out": dict(rows.tokens["train"].left_out),
        "shortened": rows.tokens["train"].shortened,
        "steps": len(rows.steps),
        "epochs": round(rows.steps.epochs, 4),
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


def _mfu(session: Session, processed_per_s: float) -> float | None:
    """Model FLOPs of the steps over what the devices can do, at so many tokens a second through the model: 2 FLOPs a
    parameter and token forward, as many for the gradients of the activations, and as many again for those of the weights
    where all are trained."""
    peak = records.peak_flops(records.hardware(1)["device"])
    if peak is None:
        return None
    matrices = sizes_of(session.base.config, session.settings, len(session.tokenizer.tokenizer)).matrices
    flops = (4 if session.settings.adapter == "lora" else 6) * matrices * processed_per_s
    return round(flops / peak / accelerate.PartialState().num_processes, 4)
