"""Memory and time of `prefmix merge` on a model of 1.1 B parameters with random weights, beside those of the imports alone.

    python scripts/bench_merge.py [--layers 22] [--scratch DIR] [--quantization nf4|none] [--json]

The base (the shape of TinyLlama-1.1B, bf16, 2.2 GB) and its adapter (r = 16) are written into a scratch folder, which needs
room for twice the base. The merge runs in a process of its own, without the check: that loads the model as it was trained.
Peaks are what the kernel counts as resident (VmHWM), mapped pages of the base included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prefmix.model.merge.tensors import on_meta

VOCABULARY = 32_000
R = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Runs a command line of prefmix, then says what this process had at most.
MERGE = """
import sys, warnings, re
warnings.simplefilter("ignore")
from pathlib import Path
from prefmix.model.find import find_model
from prefmix.model.merge.merging import merge
from prefmix.cli.main import run
import bitsandbytes
code = run(sys.argv[1:]) if sys.argv[1:] else 0
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(code)
"""


def write_base(folder: Path, layers: int) -> LlamaConfig:
    """A Llama with random weights, a file for each layer, so that no more than one is in memory."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in on_meta(config).named_parameters():
        found = re.search(r"layers\.\d+", name)
        parts.setdefault(found[0] if found else name, {})[name] = parameter.shape
    places: dict[str, str] = {}
    for number, shapes in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}, folder / file)
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def write_run(stage: Path, base: Path, config: LlamaConfig, quantization: str) -> int:
    """A finished stage with a random adapter; gives the parameters of the base."""
    adapter = stage / "adapter"
    adapter.mkdir(parents=True)
    model = on_meta(config)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            rows, columns = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(R, columns) / columns**0.5
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, R) * 0.01
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = LoraConfig(r=R, lora_alpha=R, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(base)
    settings.save_pretrained(str(adapter))
    words = {f"w{number}": number for number in range(VOCABULARY - 2)} | {"<|im_start|>": VOCABULARY - 2}
    backend = Tokenizer(models.WordLevel(words | {"<|im_end|>": VOCABULARY - 1}, unk_token="w0"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="w0").save_pretrained(adapter)
    trained = {"quantization": quantization, "dtype": "bfloat16"}
    run = {"stage": "dpo", "finished": "now", "after_stage": None, "hyperparameters": trained}
    (stage / "run.json").write_text(json.dumps(run))
    return sum(parameter.numel() for parameter in model.parameters())


def measured(*words: str) -> tuple[int, float]:
    """The peak in bytes and the seconds of a command line; without words, of the imports alone."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MERGE, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stderr.split()[-1]) * 1024, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        base, stage = Path(scratch) / "base", Path(scratch) / "run" / "dpo"
        base.mkdir()
        parameters = write_run(stage, base, write_base(base, given.layers), given.quantization)
        imports, imports_s = measured()
        peak, seconds = measured("merge", str(stage), "--no-check", "--json")
        size = sum(path.stat().st_size for path in (stage / "merged").glob("*.safetensors"))
    found = {
        "parameters": parameters,
        "quantization": given.quantization,
        "merged_bytes": size,
        "imports_peak_bytes": imports,
        "imports_s": round(imports_s, 1),
        "peak_bytes": peak,
        "above_imports_bytes": peak - imports,
        "wall_s": round(seconds, 1),
    }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{parameters / 1e9:.2f} B parameters, {given.quantization}: {size / 1e9:.2f} GB merged in {seconds:.1f} s")
    print(f"peak memory {peak / 1e9:.2f} GB, of which the imports take {imports / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
