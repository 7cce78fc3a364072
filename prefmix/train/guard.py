"""The EOS guard of a stage, and what Trainer tells while it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from prefmix.train import records
from prefmix.train.session import Session


class Guard:
    """Measures the EOS before, during and after a stage, and keeps the record that becomes eos.json."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.path = session, folder / "eos.json"
        self.before: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.first_step = 0

    def begin(self, trainer: Any, checkpoint: Path | None, left: Mapping[str, Any] | None) -> None:
        """Measures the model as the stage finds it, unless that is known: a resumed stage has it in its eos.json, and what
        the stage before has `left` is what this one finds."""
        known = records.read_json(self.path) if checkpoint else None
        if known and checkpoint:
            self.first_step = int(checkpoint.name.rpartition("-")[2])
            self.before = known["before"]
            self.history = [entry for entry in known["history"] if entry["step"] <= self.first_step]
        elif left and (left["rows"], left["split"]) == (len(self.session.held_out), self.session.held_out.split):
            self.before = left["after"]
            self._write()
        else:
            self.before = self.session.measured(trainer.accelerator.unwrap_model(trainer.model)).as_json()
            self._write()
        told = {f"eval_{name}": self.before[name] for name in ("p_eos", "log_p_eos", "stop_rate")}
        self.session.watcher.step(self.first_step, told)

    def during(self, model: torch.nn.Module, step: int) -> Mapping[str, float]:
        measured = self.session.measured(model)
        self.history.append({"step": step, **measured.as_json()})
        self._write()
        return measured.as_metrics()

    def end(self, trainer: Any) -> None:
        """Measures the model as the stage leaves it, unless the last evaluation has just done so."""
        last = self.history[-1]["step"] if self.history else -1
        if last < len(trainer.steps):
            if "eval" in trainer.rows:
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

    def _write(self) -> None:
        if self.session.is_main:
            records.write_json(self.path, self.as_json() | {"after": None})


class Writer(TrainerCallback):
    """Appends what Trainer logs to metrics.jsonl and tells the watcher."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.path = session, folder / "metrics.jsonl"

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step} | {name: value for name, value in logs.items() if name != "epoch"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.session.watcher.step(state.global_step, line)
