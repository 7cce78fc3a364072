"""A whole `prefmix train` against its own estimate: speed, memory, MFU.

    python scripts/bench_train.py --base models/smollm2 [--steps 3] [--json]                   # CPU
    python scripts/bench_train.py --shape mistral-7b --tokenizer DIR [--steps 20] [--json]     # GPU: random weights

Two stages, DPO and SFT, on the real lengths of ../shared/data, each in a process of its own so that its peak is its own. The
base is in NF4 unless --quantization says otherwise; r = 64 on a GPU, 16 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_dpo import MISTRAL_7B, RECIPE, ROWS, random_base

SFT = """
[sources.hermes]
format = "openhermes"
path = "{rows}/openhermes/converted_hermes_sources.parquet"
take = 20000
[train]
base = {base}
quantization = "{quantization}"
lora = {{ r = {r}, alpha = {r}, dropout = 0.0 }}
eos = {{ prompts = 4, max_new_tokens = 16 }}
[[train.stages]]
name = "{method}"
method = "{method}"
max_steps = {steps}
batch_size = {batch}
token_budget = {budget}
max_length = 1024
"""
TOLD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from prefmix.train.estimate import estimate
print("RESULT", json.dumps(estimate(sys.argv[1], store=sys.argv[2]).as_json()))
"""
RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from prefmix.train.run import train
print("RESULT", json.dumps(train(sys.argv[1], store=sys.argv[2]).stages[0].run))
"""


def measured(folder: Path, given: argparse.Namespace, base: Path, method: str) -> dict[str, Any]:
    """One stage: `{"told": the estimate, "run": run.json}`."""
    on_gpu = torch.cuda.is_available()
    text = (RECIPE + SFT).format(
        rows=ROWS,
        base=json.dumps(str(base)),
        quantization=given.quantization,
        r=64 if on_gpu else 16,
        method=method,
        steps=given.steps,
        batch=given.batch,
        budget=given.tokens or '"auto"',
    )
    recipe = folder / "recipe.toml"
    recipe.write_text(text.replace("[splits]\ntest = 0\n", "") + "[splits]\ntest = 0.001\n", encoding="utf-8")
    store = folder / "store"
    subprocess.run([sys.executable, "-m", "prefmix", "build", str(recipe), "--store", str(store), "-q"], check=True)
    found = {}
    for name, program in (("told", TOLD), ("run", RUN)):  # apart: the estimate's own memory is not the run's
        command = [sys.executable, "-c", program, str(recipe), str(store)]
        child = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(child.stdout.rpartition("RESULT ")[2])
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", type=Path)
    asked.add_argument("--shape", choices=["mistral-7b"])
    asked.add_argument("--tokenizer", type=Path)
    asked.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    asked.add_argument("--steps", type=int, default=3)
    asked.add_argument("--batch", type=int, default=8)
    asked.add_argument("--tokens", type=int, help="token budget; default: auto")
    asked.add_argument("--method", choices=["dpo", "sft"], help="only this stage")
    asked.add_argument("--json", action="store_true")
    given = asked.parse_args()
    if not ROWS.is_dir():
        sys.exit(f"{ROWS} is missing: the benchmark needs its real rows.")
    if bool(given.base) == bool(given.shape) or (given.shape and not given.tokenizer):
        sys.exit("Name --base, or --shape with --tokenizer.")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = given.base.resolve() if given.base else random_base(Path(scratch) / "base", MISTRAL_7B, given.tokenizer)
        for method in [given.method] if given.method else ["dpo", "sft"]:
            folder = Path(scratch) / method
            folder.mkdir()
            found[method] = measured(folder, given, base, method)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    print(
        "| stage | rows/s | tokens/s | MFU | peak GB | estimated GB | error |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for method, result in found.items():
        run, told = result["run"], result["told"]["peak"]
        mfu = f"{run['mfu']:.1%}" if run["mfu"] else "–"
        peak = run["peak_memory_bytes"]
        print(f"| {method} | {run['pairs_per_s']:.3f} | {run['tokens_per_s']:.0f} | {mfu} | {peak / 1e9:.2f} | {told / 1e9:.2f} | "
              f"{told / peak - 1:+.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
