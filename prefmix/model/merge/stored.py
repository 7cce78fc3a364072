"""Weights in safetensors files: read one tensor at a time, written one file at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prefmix.errors import ModelError
from prefmix.train.records import write_json
from prefmix.train.weights import Base

#: `progress(what, done, total)`
Progress = Callable[[str, int, int], None]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE = ("config.json", "generation_config.json")


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files by name, in the order of the files; `shapes` has theirs.

    A tensor is read when it is asked for. Its file is opened for it alone: pages of a file that stays mapped count as
    memory of the process, until the whole file does.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the headers. Raises ModelError for a file that is missing or is none."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        self._files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read ({error}).") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a model's weights from. Raises ModelError when none of them is safetensors."""
    there = {path.name for path in folder.iterdir()}
    return [folder / name for name in _weight_names(str(folder), folder, there)]


def base_folder(base: Base) -> Path:
    """The folder with the weights and the settings of a base: that of the cache, where they are fetched from the Hub.

    Raises ModelError when it has no safetensors; HubError.
    """
    if base.commit is None:
        return Path(base.path)
    from prefmix import hub

    there = set(hub.list_files(base.path, base.commit, repo_type="model"))
    beside = [name for name in (*_BESIDE, _INDEX) if name in there]
    folder = hub.download(base.path, base.commit, beside, repo_type="model")[0].parent
    hub.download(base.path, base.commit, _weight_names(base.name, folder, there), repo_type="model")
    return folder


def _weight_names(model: str, folder: Path, there: set[str]) -> list[str]:
    """Of the files that are `there`: one, or those of the index in `folder`."""
    if _SINGLE in there:
        return [_SINGLE]
    if _INDEX in there:
        try:
            return sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder / _INDEX} is no index of weights that can be read ({error!r}).") from error
    others = sorted(name for name in there if name.endswith((".bin", ".pt", ".pth", ".gguf")))
    has = f"its weights are {others[0]}" if others else "it has no weights"
    raise ModelError(f"{model} has no safetensors to merge into: {has}. Save it again with transformers: "
                     f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder), and give that folder with --base.")  # fmt: skip


def write_weights(
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    shard_bytes: int,
    progress: Progress,
) -> None:
    """Writes the tensors in bf16, each when its shard is: as many as fit into `shard_bytes`, and at least one. Memory holds
    those of one shard."""
    shards = _shards(shapes, shard_bytes)
    done = total = 0
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            progress("merging", done, len(shapes))
            tensors[name] = _as_saved(weights[name])
            total += tensors[name].nbytes
            done += 1
        save_file(tensors, folder / file, {"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # safetensors keeps it to its owner
        with (folder / file).open("rb+") as written:
            os.fsync(written.fileno())
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    progress("merging", done, len(shapes))


def bytes_of(shapes: Iterable[tuple[int, ...]]) -> int:
    """What tensors of these shapes take in bf16."""
    return sum(2 * math.prod(shape) for shape in shapes)


def _shards(shapes: Mapping[str, tuple[int, ...]], most: int) -> list[list[str]]:
    """The names of the tensors of each shard."""
    shards: list[list[str]] = [[]]
    left = most
    for name, shape in shapes.items():
        size = bytes_of([shape])
        if shards[-1] and size > left:
            shards.append([])
            left = most
        shards[-1].append(name)
        left -= size
    return shards


def _as_saved(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.bfloat16() if tensor.is_floating_point() else tensor).contiguous()
