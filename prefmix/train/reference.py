"""Reference log-probabilities: those of the model at the start of its stage, computed once and kept on disk.

With a fresh adapter that is the base, with the adapter of an earlier stage the model as that stage left it: no second
model is loaded. The file is named after everything that changes the values.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefmix.train.dpo import PairTrainer
from prefmix.train.loop import RowSet
from prefmix.train.processes import from_main

Progress = Callable[[int, int], None]
_WRITE_EVERY_S = 60.0
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def reference_key(*parts: Any) -> str:
    """16 hex digits of what the values depend on: the rows, the base, how it is loaded, the adapter at the start."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def log_probabilities(
    trainer: PairTrainer, rows: RowSet, path: Path, progress: Progress, needed: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """`ref_chosen_logps, ref_rejected_logps`: float32 [rows] each, summed over the answer's tokens; nan for rows that are
    not `needed` (row numbers; all of them when absent).

    What `path` has is not computed again, and what is computed is written there, now and then on the way too. Processes
    share the work.
    """
    accelerator = trainer.accelerator
    needed = np.arange(len(rows)) if needed is None else np.unique(needed)
    found = from_main(lambda: _stored(path, len(rows))) or {
        name: np.full(len(rows), np.nan, np.float32) for name in COLUMNS
    }
    missing = needed[~np.isfinite(found[COLUMNS[0]][needed])]
    if not len(missing):
        return found
    micros = [missing[micro] for micro in trainer.micro_batches(rows, missing)]
    fresh = {name: np.zeros(len(rows), np.float32) for name in COLUMNS}
    done, written = 0, time.monotonic()
    for micro in micros[accelerator.process_index :: accelerator.num_processes]:
        for name, values in zip(COLUMNS, trainer.log_probabilities(rows.rows(micro)), strict=True):
            fresh[name][micro] = values.numpy()
            if accelerator.num_processes == 1:
                found[name][micro] = values.numpy()
        done += len(micro) * accelerator.num_processes
        progress(min(done, len(missing)), len(missing))
        if accelerator.num_processes == 1 and time.monotonic() - written > _WRITE_EVERY_S:
            _write(path, found)
            written = time.monotonic()
    if accelerator.num_processes > 1:
        for name, values in fresh.items():
            shared = accelerator.reduce(torch.from_numpy(values).to(accelerator.device), "sum").cpu().numpy()
            found[name][missing] = shared[missing]
    if accelerator.is_main_process:
        _write(path, found)
    accelerator.wait_for_everyone()
    return found


def _write(path: Path, found: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(dict(found), staged)
    os.replace(staged, path)


def _stored(path: Path, rows: int) -> dict[str, np.ndarray] | None:
    """The values of a file; None when there is none, or it is damaged or another table's."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return dict(found) if all(name in found and found[name].shape == (rows,) for name in COLUMNS) else None
