"""The tensors of a merge: an adapter added to its base, each when it is asked for. No model is loaded.

An adapter that was trained on a base in 4 bits has learnt to work with the rounded weights. It is added to these:
quantised as in training and back, in fp32. Added to the original weights it meets another model, and merged inside the 4
bits it is mostly rounded away. Weights that come back from the 4 bits in bf16 would lose it too: they lie on the very
grid that the merge is saved on, and a change of less than half a step is rounded off everywhere (SmolLM2: a KL of 5e-3
between the saved merge and its adapter, instead of 7e-5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from prefmix.errors import ModelError
from prefmix.model.merge.stored import Stored, weight_files
from prefmix.train.weights import DType, Quantization, device

_PREFIX = "base_model.model."
#: Settings of PEFT that make more of LoRA than `weight + scale * B A`, each with the values that do not.
_PLAIN = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    **dict.fromkeys(("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "fan_in_fan_out"), ()),
    **dict.fromkeys(("layer_replication", "target_parameters", "trainable_token_indices"), ()),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in its file: by the weight that it changes, the names of `A` [r, in] and `B` [out, r] in `tensors`,
    and their scale; `replaced` has the names of whole tensors (embeddings of added tokens)."""

    tensors: Stored
    pairs: Mapping[str, tuple[str, str]]
    replaced: Mapping[str, str]
    scale: float


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter that PEFT can load. Raises ModelError when it is none, or one of another kind than LoRA."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, r = config["peft_type"], config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is not an adapter that can be read ({error}).") from error
    odd = [name for name, plain in _PLAIN.items() if config.get(name) and config[name] not in plain]
    if kind != "LORA" or odd:
        raise ModelError(f"{folder}: only plain LoRA adapters can be merged, and this one is {kind}"
                         f"{f' with {odd[0]} = {config[odd[0]]!r}' if odd else ''}. Merge it with PEFT.")  # fmt: skip
    tensors = Stored([folder / "adapter_model.safetensors"])
    pairs = {}
    replaced = {}
    for name in tensors:
        module, found, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not found:
            replaced[name.removeprefix(_PREFIX)] = name
        elif part == "A.weight":
            pairs[f"{module}.weight"] = (name, f"{name.removesuffix(part)}B.weight")
        elif part != "B.weight":
            raise ModelError(f"{folder}: only adapters of linear layers can be merged, and this one has {name}.")
    scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    return Adapter(tensors, pairs, replaced, scale)


class MergedTensors(Mapping[str, torch.Tensor]):
    """The tensors of the merged model by name, in the order of the base's files, computed in fp32 when they are asked for;
    `shapes` has theirs. A head that is the embeddings is not among them."""

    def __init__(
        self, base: Path, config: PretrainedConfig, adapter: Adapter, quantization: Quantization, dtype: DType
    ) -> None:
        """`base` is a folder with safetensors; `quantization` and `dtype` are what the adapter was trained in.

        Raises ModelError for weights that are quantised already, and for an adapter of another base.
        """
        if method := getattr(config, "quantization_config", None):
            raise ModelError(f"{base} is quantised already ({_method(method)}): give the original weights with --base.")
        self._base, self._adapter = Stored(weight_files(base)), adapter
        self._dtype = getattr(torch, dtype)
        skeleton = on_meta(config)
        self._rounded = quantised_names(skeleton) if quantization == "nf4" else frozenset()
        embeddings = _name_of(skeleton, skeleton.get_input_embeddings())
        head = _name_of(skeleton, skeleton.get_output_embeddings())
        self._tied = {head: embeddings} if config.get_text_config().tie_word_embeddings else {}
        self.shapes = {name: shape for name, shape in self._base.shapes.items() if name not in self._tied}
        self._check(base)
        self.shapes |= {
            name: adapter.tensors.shapes[own] for name, own in adapter.replaced.items() if name in self.shapes
        }
        self.vocabulary = self.shapes[embeddings][0]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._adapter.replaced:
            return self._adapter.tensors[self._adapter.replaced[name]].float()
        tensor = self._base[name]
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(self._dtype).float()
        if name in self._rounded:
            tensor = through_nf4(tensor)
        if name not in self._adapter.pairs:
            return tensor
        a, b = (self._adapter.tensors[each].float() for each in self._adapter.pairs[name])
        return torch.addmm(tensor, b, a, alpha=self._adapter.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _check(self, base: Path) -> None:
        """Raises ModelError where the adapter changes what the base does not have."""
        of = self._adapter.tensors.shapes
        pairs, replaced = self._adapter.pairs, self._adapter.replaced
        for head, embeddings in self._tied.items():
            if head in pairs or (head in replaced and embeddings not in replaced):
                raise ModelError(f"The adapter changes {head} alone, which in {base} is one with {embeddings}. "
                                 f"Merge it with PEFT.")  # fmt: skip
        for name, (a, b) in pairs.items():
            if self.shapes.get(name) != (of.get(b, (0,))[0], of[a][1]):
                raise ModelError(_of_another(base, name, self.shapes.get(name)))
        for name, own in replaced.items():
            there = self.shapes.get(self._tied.get(name, name))
            if there is None or there[1:] != of[own][1:] or there[0] > of[own][0]:
                raise ModelError(_of_another(base, name, there))


def on_meta(config: PretrainedConfig) -> Any:
    """A causal language model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight in fp32 as qLoRA's forward pass sees it, quantised to NF4 (blocks of 64, double quantisation) and back; on
    the device of this machine, as in training."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(device()), blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.device)


def quantised_names(model: torch.nn.Module) -> frozenset[str]:
    """The weights that transformers quantises: those of linear layers, but for the head and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = tuple(get_keys_to_not_convert(model))
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part == name or name.startswith(f"{part}.") for part in kept)
    )


def _name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(f"{name}.weight" for name, each in model.named_modules() if each is module)


def _method(settings: object) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(method or "quantization_config in config.json")


def _of_another(base: Path, name: str, there: tuple[int, ...] | None) -> str:
    what = f"has another {name} {list(there)}" if there else f"has no {name}"
    return f"The adapter is one of another base: {base} {what}. Give the folder of its own base with --base."
