"""Checkpoints as safetensors and JSON: what is trained, the optimiser, the schedule and the random numbers.

<checkpoints>/checkpoint-<step>/
  weights.safetensors      the trainable parameters, by name
  optimizer.safetensors    `<parameter>.<moment>`, with the parameter groups as JSON metadata
  random-<rank>.safetensors   the random states of a process
  scheduler.json  seen.json  trainer_state.json

A checkpoint is written beside its place and renamed, so that one that is there is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefmix.errors import TrainError
from prefmix.mixture import sync

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # it is a mixin: TRL's trainer comes behind it in the bases of ours

PREFIX = "checkpoint-"
_KEPT = 2


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step in a folder of checkpoints."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


class Checkpoints(Trainer):
    """Replaces how Trainer saves and loads (torch.save writes pickles). FSDP keeps Trainer's own way."""

    model: torch.nn.Module
    lr_scheduler: Any
    seen: dict[str, float]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_fsdp_enabled:
            return super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"{PREFIX}{self.state.global_step}"
        staged = folder.with_name(f".{folder.name}")
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            save_file(_trained(self.model), staged / "weights.safetensors")
            _save_optimizer(self.optimizer, staged / "optimizer.safetensors")
            (staged / "scheduler.json").write_text(json.dumps(self.lr_scheduler.state_dict()))
            (staged / "seen.json").write_text(json.dumps(self.seen))
            self.state.save_to_json(str(staged / "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        save_file(_random_states(), staged / f"random-{self.args.process_index}.safetensors")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in staged.iterdir():
                sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(staged, folder)
            sync(folder.parent)
            others = sorted(folder.parent.glob(f"{PREFIX}*"), key=lambda path: int(path.name.removeprefix(PREFIX)))
            for path in others[:-_KEPT]:
                shutil.rmtree(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = _read(Path(resume_from_checkpoint) / "weights.safetensors")
        own = dict(_trainable(self.model))
        if saved.keys() != own.keys():
            raise TrainError(f"{resume_from_checkpoint} is a checkpoint of another model. Start again with --force.")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        _load_optimizer(self.optimizer, Path(checkpoint) / "optimizer.safetensors")
        self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / "scheduler.json").read_text()))
        self.seen = json.loads((Path(checkpoint) / "seen.json").read_text())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled:
            return super()._load_rng_state(checkpoint)
        path = Path(checkpoint) / f"random-{self.args.process_index}.safetensors"
        if path.is_file():  # a run that goes on with more processes has none for the new ones
            _set_random_states(_read(path))


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().contiguous() for name, parameter in _trainable(model)}


def _save_optimizer(optimizer: Any, path: Path) -> None:
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, entry in state["state"].items()
        for name, value in entry.items()
    }
    save_file(tensors, path, {"param_groups": json.dumps(state["param_groups"])})


def _load_optimizer(optimizer: Any, path: Path) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _read(path).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    with safe_open(path, "pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_states() -> dict[str, torch.Tensor]:
    version, words, gauss = random.getstate()
    numbers = np.random.get_state(legacy=False)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numbers["state"]["key"].tolist(), numbers["state"]["pos"], numbers["has_gauss"]]),
        "numpy_gauss": torch.tensor([numbers["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), next(iter(states["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises an exception of its own for a damaged file
        raise TrainError(
            f"{path} cannot be read ({error}). Remove its folder: an older checkpoint is taken."
        ) from error
