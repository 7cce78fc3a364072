"""The base model and its adapter: loading in 4 bits, the adapter of the recipe, and the fixes that the stack needs.

- LoRA weights are trained in fp32: TRL casts them to bf16 on a quantised base, where a step of 5e-6 rounds away, and a
  resumed run would not be bit-equal (`in_fp32`).
- bitsandbytes 0.50 repacks NF4 weights for AVX512-BF16 in any forward pass in eval mode on a CPU; gradients are wrong
  afterwards (`cured`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from prefmix.errors import TrainError
from prefmix.recipe import Lora, Train

DType = Literal["float32", "bfloat16"]
Quantization = Literal["nf4", "none"]


@dataclass(frozen=True)
class Base:
    """A base model before its weights are loaded. `path` is a folder or a Hub name, `commit` its commit on the Hub."""

    name: str
    path: str
    commit: str | None
    config: PretrainedConfig

    @property
    def fingerprint(self) -> list[Any]:
        """What a change of the weights changes: the commit, or names, sizes and times of a folder's weight files."""
        if self.commit:
            return [self.name, self.commit]
        files = sorted(Path(self.path).glob("*.safetensors"))
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def find_base(name: str, revision: str, root: Path) -> Base:
    """A base model: a folder relative to `root`, else a Hub name whose revision is resolved to a commit.

    Raises TrainError when a folder has no readable config.json; HubError.
    """
    folder = root / name
    commit = None
    path = str(folder)
    if not folder.is_dir():
        from prefmix import hub

        path, commit = name, hub.resolve_revision(name, revision, repo_type="model")
    try:
        config = AutoConfig.from_pretrained(path, revision=commit, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TrainError(f"The base {name} is not a model that can be read: {_first_line(error)}") from error
    return Base(name, path, commit, config)


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def dtype_of(settings: Train) -> DType:
    """What the recipe's runs compute in: `native_dtype` unless it says."""
    return native_dtype() if settings.dtype == "auto" else settings.dtype


def native_dtype() -> DType:
    """bf16 on a GPU and on a CPU with matrix units for it (AMX, where it is 15 times as fast), fp32 on other CPUs."""
    return "float32" if device().type == "cpu" and not torch.cpu._is_amx_tile_supported() else "bfloat16"


def load_base(base: Base, quantization: Quantization, dtype: DType, vocabulary: int | None = None) -> PreTrainedModel:
    """The base with its weights on this process's device, in NF4 (double quantisation) or as they are.

    `vocabulary` makes the embeddings at least that long, for tokens that were added. Raises TrainError.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device()}}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.path, revision=base.commit, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise TrainError(f"The base {base.name} cannot be loaded: {_first_line(error)}") from error
    embeddings: Any = model.get_input_embeddings()
    if vocabulary is not None and vocabulary > embeddings.weight.shape[0]:
        model.resize_token_embeddings(vocabulary, mean_resizing=True)
    model.config.use_cache = False
    return cured(model)


def cured(model: PreTrainedModel) -> PreTrainedModel:
    """The model with bitsandbytes' repacking for CPUs switched off; GPUs are not touched by it."""
    from bitsandbytes.nn import Linear4bit

    if device().type == "cpu":
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
    return model


def lora_config(lora: Lora, added_tokens: bool, tied: bool) -> LoraConfig:
    """PEFT's settings for the adapter. Added tokens have their embeddings trained whole and saved with it."""
    embeddings = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # ty: ignore[invalid-argument-type] (PEFT divides it by r: a fraction will do)
        lora_dropout=lora.dropout,
        target_modules=lora.target,
        modules_to_save=embeddings if added_tokens else None,
        ensure_weight_tying=added_tokens and tied,
    )


def plain(model: Any) -> PreTrainedModel:
    """The causal language model below an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def in_fp32(model: torch.nn.Module) -> None:
    """Casts the trainable parameters to fp32, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Puts a saved adapter's weights into the model's own. Raises TrainError when it is another base's."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise TrainError(f"{file} is missing. Run the stage before this one again with --force.")
    try:
        loaded = set_peft_model_state_dict(model, load_file(file))
    except RuntimeError as error:
        raise TrainError(f"{folder} is the adapter of another base or of other [train.lora] settings: "
                         f"{_first_line(error)}") from error  # fmt: skip
    if loaded.unexpected_keys:
        raise TrainError(f"{folder} is the adapter of another base: it has {loaded.unexpected_keys[0]}.")
    if missing := [name for name in loaded.missing_keys if ".lora_" in name]:
        raise TrainError(f"{folder} is the adapter of another base: it has no {missing[0]}.")


def save_adapter(model: PreTrainedModel | PeftModel, folder: Path, base: Base) -> None:
    """Writes the adapter (or the whole model, when there is none) as safetensors, in fp32. The base goes by its name, not
    by the path of this machine."""
    if isinstance(model, PeftModel):
        folder.mkdir(parents=True, exist_ok=True)
        # Trained embeddings are modules of the adapter already: PEFT's own guess would save them a second time.
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(_copies(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
        settings = model.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = base.name, base.commit
        settings.save_pretrained(str(folder))
    else:
        model.save_pretrained(folder)


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them: a head that is the embeddings is written twice, as PEFT wants to load it."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
