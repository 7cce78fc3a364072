"""What a stage leaves in its folder beside the adapter: run.json, eos.json and metrics.jsonl.

run.json is written when the stage starts, with `finished` null, and again when it ends; a stage that has no finished one
can be resumed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prefmix.mixture import write_durably
from prefmix.stages import read_record

#: Settings that change speed, memory or what is looked at, never the weights: a run may be resumed with others.
FREE = frozenset(
    {"token_budget", "eval_every", "checkpoint_every", "eval", "if_needed", "gradient_checkpointing", "packing", "eos"}
)

#: Dense bf16 TFLOP/s by a part of the GPU's name: what a large matrix product reached on an H200, and the makers' figures
#: for the rest.
PEAK_TFLOPS = {"H200": 790, "H100": 790, "A100": 312, "L40S": 362, "4090": 165, "B200": 2250}


@dataclass(frozen=True)
class StageRun:
    """A stage that has ended: its folder, its run.json and its eos.json. `was_there` when `--resume` found it finished."""

    folder: Path
    run: Mapping[str, Any]
    eos: Mapping[str, Any]
    was_there: bool = False


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    names = ("prefmix", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware(processes: int) -> dict[str, Any]:
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {"device": gpu.name, "memory_bytes": gpu.total_memory, "processes": processes}
    return {"device": "cpu", "threads": torch.get_num_threads(), "processes": processes}


def peak_flops(device: str) -> float | None:
    """FLOP/s that `mfu` is a share of; None for a device without a known figure."""
    return next((tera * 1e12 for name, tera in PEAK_TFLOPS.items() if name in device), None)


def forget_peak_memory() -> None:
    """Starts the peak anew, where the system allows it: a stage's own, not that of the stages before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):  # getrusage counts what the process that started this one had, up to the exec
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sha256_of(folder: Path) -> str:
    """64 hex digits over the weight files of a folder."""
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when there is no file. Raises TrainError for one that cannot be read."""
    return read_record(path) if path.exists() else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replaces a file at once."""
    staged = path.with_name(f".{path.name}")
    write_durably(staged, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    os.replace(staged, path)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """`key: was x, is y` for everything that differs and changes the weights."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if key in FREE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{path}{key}.")
        else:
            yield f"{path}{key}: was {json.dumps(old)}, is {json.dumps(new)}"


def cut_metrics(path: Path, step: int) -> None:
    """Leaves the lines up to a step: what a resumed run repeats is not recorded twice. A line that was not written to its
    end goes as well."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    path.write_text("".join(kept), encoding="utf-8")
