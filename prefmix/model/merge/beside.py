"""What stands beside the weights of a merged model: its settings, how it generates, its tokenizer.

The settings are the base's own file with a few keys changed. Written by transformers they would have the names that its
newest version gives them, which programs that serve or convert models may not know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefmix.chatml import END
from prefmix.train.records import read_json, write_json

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja")  # fmt: skip


def write_beside(out: Path, base: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files into `out`; `base` and `adapter` are folders,
    `vocabulary` is the number of embeddings."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    generation = read_json(base / "generation_config.json") or {}
    known = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = stop_ids(tokenizer, known)
    for key in ("quantization_config", "_name_or_path", "torch_dtype"):
        config.pop(key, None)
    generation.pop("_from_model_config", None)  # with it, transformers makes it anew
    config["dtype"] = "bfloat16"
    sized = config["text_config"] if "vocab_size" in config.get("text_config", {}) else config
    sized["vocab_size"] = vocabulary
    for settings in (config, generation):
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        if tokenizer.pad_token_id is not None:
            settings["pad_token_id"] = tokenizer.pad_token_id
    if "bos_token_id" in config:
        generation.setdefault("bos_token_id", config["bos_token_id"])
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation)
    for name in _TOKENIZER:
        if (adapter / name).is_file():
            shutil.copy(adapter / name, out / name)


def stop_ids(tokenizer: PreTrainedTokenizerBase, known: int | Sequence[int] | None) -> list[int]:
    """The ids that end a turn: that of `<|im_end|>`, which is the tokenizer's own unless it knows no ChatML, then those that
    the base knows. The padding is none of them, and nothing that is text is: some bases name the number of another model's
    token."""
    found: list[Any] = [tokenizer.added_tokens_encoder.get(END), tokenizer.eos_token_id]
    found += known if isinstance(known, Sequence) else [known]
    return [
        each
        for each in dict.fromkeys(found)
        if each in tokenizer.added_tokens_decoder and each != tokenizer.pad_token_id
    ]
