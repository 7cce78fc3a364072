"""Merging an adapter into its base, tensor by tensor: no model is loaded, and memory holds a shard at most.

An adapter that was trained on a base in 4 bits has learnt to work with the rounded weights. It is added to these, in fp32:
quantised as in training and back. Added to the original weights it meets another model (KL 1e-3 instead of 1e-6), and
merged inside the 4 bits it is mostly rounded away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from prefmix.errors import TrainError

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in memory: by the name of the weight that it changes, `A` [r, in] and `B` [out, r] with their scale;
    `replaced` holds whole tensors (embeddings of added tokens)."""

    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    replaced: Mapping[str, torch.Tensor]


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter that PEFT can load. Raises TrainError when it is none, or one of another kind than LoRA."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise TrainError(f"{folder} is not an adapter that can be read ({error}).") from error
    if config["peft_type"] != "LORA" or config.get("use_dora") or config.get("rank_pattern"):
        raise TrainError(f"{folder}: only plain LoRA adapters can be merged, this is {config['peft_type']}.")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    replaced: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        if module:
            pairs.setdefault(f"{module}.weight", {})[part.partition(".")[0]] = tensor.float()
        else:
            replaced[name.removeprefix(_PREFIX)] = tensor.float()
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    return Adapter({name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, scale, replaced)


def merged_tensors(base: Path, adapter: Adapter, quantization: str, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Yields (name, fp32 tensor) for every tensor of the merged model, in the order of the base's files.

    `base` is a folder with safetensors; `quantization` ("nf4" or "none") and `dtype` are what it was trained in.
    Raises TrainError when the adapter changes tensors that the base does not have.
    """
    rounded = quantised_names(base) if quantization == "nf4" else frozenset()
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise TrainError(f"{base} has no safetensors to merge into.")
    waiting = {*adapter.pairs, *adapter.replaced}
    if AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings:
        waiting.discard("lm_head.weight")  # it is the embeddings
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = adapter.replaced.get(name)
                if tensor is None:
                    tensor = file.get_tensor(name).to(dtype)
                    tensor = through_nf4(tensor) if name in rounded else tensor.float()
                if name in adapter.pairs:
                    a, b = adapter.pairs[name]
                    tensor = tensor + adapter.scale * (b @ a)
                waiting.discard(name)
                yield name, tensor
    if waiting:
        raise TrainError(f"The adapter is one of another base: {base} has no {min(waiting)}.")


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """fp32: a weight as qLoRA's forward pass sees it, quantised to NF4 (blocks of 64, double quantisation) and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).float()


def quantised_names(base: Path) -> frozenset[str]:
    """The weights that transformers quantises: those of linear layers, but for the head and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    kept = tuple(get_keys_to_not_convert(model))
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part == name or name.startswith(f"{part}.") for part in kept)
    )
