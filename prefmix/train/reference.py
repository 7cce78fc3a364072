"""Reference log-probabilities: those of the model at the start of its stage, computed once and kept on disk.

With a fresh adapter that is the base, with the adapter of an earlier stage the model as that stage left it: no second
model is loaded. The file is named after everything that changes the values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefmix.train.dpo import PairTrainer
from prefmix.train.loop import RowSet

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def reference_key(*parts: Any) -> str:
    """16 hex digits of what the values depend on: the rows, the base, how it is loaded, the adapter at the start."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def log_probabilities(
    trainer: PairTrainer, rows: RowSet, path: Path, progress: Callable[[int, int], None]
) -> dict[str, np.ndarray]:
    """`ref_chosen_logps, ref_rejected_logps`: float32 [rows] each, summed over the answer's tokens; read from `path`
    where they are already. Processes share the work."""
    accelerator = trainer.accelerator
    found = _stored(path, len(rows))
    if found is None:
        found = {name: torch.zeros(len(rows)) for name in COLUMNS}
        micros = trainer.micro_batches(rows, np.arange(len(rows)))
        done = 0
        for micro in micros[accelerator.process_index :: accelerator.num_processes]:
            values = trainer.log_probabilities(rows.rows(micro))
            for name, value in zip(COLUMNS, values, strict=True):
                found[name][torch.as_tensor(micro)] = value
            done += len(micro) * accelerator.num_processes
            progress(min(done, len(rows)), len(rows))
        if accelerator.num_processes > 1:
            found = {
                name: accelerator.reduce(value.to(accelerator.device), "sum").cpu() for name, value in found.items()
            }
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f".{path.name}.{os.getpid()}")
            save_file(found, staged)
            os.replace(staged, path)
    return {name: value.numpy() for name, value in found.items()}


def _stored(path: Path, rows: int) -> dict[str, torch.Tensor] | None:
    """The values of a file; None when there is none, or it is damaged or another table's."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    whole = all(name in found and found[name].shape == (rows,) for name in COLUMNS)
    return found if whole and all(bool(torch.isfinite(value).all()) for value in found.values()) else None
