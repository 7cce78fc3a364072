"""DPO steps: stock TRL, our padded path, packed, and packed with the prompt processed once. Same rows, same run.

    python scripts/bench_dpo.py --base models/smollm2 [--rows 32] [--json]          # CPU
    python scripts/bench_dpo.py --shape mistral-7b --tokenizer DIR [--rows 256]     # GPU: random weights in NF4, r = 64

Rows: a hash sample of the preference pairs of ../shared/data as a recipe mixes and filters them, with their real lengths.
Each contender does the work of a step (`--batch` rows): forward and backward of the policy, with reference log-probabilities
that were computed before, and then the reference's own forward pass. The contenders take turns on every step, so that a busy
machine slows all of them; what is printed is sums over the steps.

- `trl`: stock DPOTrainer, `precompute_ref_log_probs`, no gradient checkpointing, `--trl-rows` rows a micro-batch in their order
  (the best of 1, 2, 4 ... that fit is its best setting: try some).
- `padded`: our step on the padded path: micro-batches of `--padded-tokens` tokens, rows of like length together.
- `packed`: packs of `--tokens` tokens in which each answer has its own copy of the prompt.
- `shared`: packs of `--tokens` tokens with the prompt of a pair once: what `prefmix train` does.

MFU counts 2 FLOPs a parameter and token for each of: reference forward, policy forward, gradients of the activations; tokens
without padding; against the dense bf16 rate in prefmix.train.records.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer

from prefmix.build import build
from prefmix.recipe import Train, load_recipe
from prefmix.train import records, weights
from prefmix.train.data import tokenize
from prefmix.train.dpo import PairTrainer
from prefmix.train.estimate import sizes_of
from prefmix.train.loop import RowSet, pairs
from prefmix.train.packed import PackedModel, pack_conversations, pack_pairs
from prefmix.train.steps import best_fit, by_budget, plan_steps
from prefmix.train.tokenizer import load_tokenizer

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data"
RECIPE = """
name = "bench"
[sources.orca]
format = "orca_dpo_pairs"
path = "{rows}/orca_dpo_pairs/converted.parquet"
[sources.ultrafeedback]
format = "ultrafeedback_binarized"
path = "{rows}/ultrafeedback_binarized/converted_alpaca_eval.parquet"
[splits]
test = 0
"""
MISTRAL_7B: dict[str, Any] = {"vocab_size": 32002, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768}  # fmt: skip


@dataclass
class Contender:
    """`groups` parts rows into micro-batches, `loss` runs one; `tokens` counts those run through the model, padding included."""

    name: str
    trainer: Any
    groups: Callable[[np.ndarray], list[np.ndarray]]
    loss: Callable[[list[dict[str, Any]], float], torch.Tensor]
    reference: Callable[[list[dict[str, Any]]], Any]
    tokens: Callable[[list[dict[str, Any]]], int]
    policy_s: float = 0.0
    reference_s: float = 0.0
    processed: int = 0
    peak_bytes: int = 0


class CopiedPrompts(PackedModel):
    """Packs in which the two answers of a pair are rows of their own, each with the prompt."""

    def __init__(self, model: Any, batch: Sequence[dict[str, Any]], config: Any, device: torch.device) -> None:
        pack = pack_pairs(batch)
        lines = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in batch]
        copies = pack_conversations(
            [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in lines]
        )
        places = pack.places.sort().values  # line by line, chosen rows first: the order of the copies
        super().__init__(model, replace(copies, places=places, shape=pack.shape), config, device)


def random_base(folder: Path, shape: dict[str, Any], tokenizer: Path) -> Path:
    """A base of a shape with random weights in bf16, and a tokenizer beside it."""
    torch.set_default_dtype(torch.bfloat16)
    with weights.device():
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=4096))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    load_tokenizer(str(tokenizer.resolve()), "main", Path("/")).tokenizer.save_pretrained(folder)
    return folder


def rows_of(tokenizer: Any, count: int, longest: int) -> RowSet:
    """The first `count` pairs of the mixture in its order, which is one of hashes."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(RECIPE.format(rows=ROWS), encoding="utf-8")
        mixture = build(load_recipe(recipe), store=Path(folder) / "store")
        table = tokenize(mixture, "preference", "train", tokenizer, max_length=longest).table
        table = table.select(range(count)).flatten_indices(keep_in_memory=True)
    return pairs(table)


def contenders(given: argparse.Namespace, rows: RowSet, load: Callable[[], Any], tokenizer: Any) -> list[Contender]:
    scratch = tempfile.mkdtemp()
    on_cpu = weights.device().type == "cpu"
    dtype = given.dtype

    def arguments(**more: Any) -> DPOConfig:
        return DPOConfig(output_dir=scratch, use_cpu=on_cpu, bf16=dtype == "bfloat16", gradient_checkpointing=False, max_length=None,
                         remove_unused_columns=False, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **more)  # fmt: skip

    lora = LoraConfig(
        task_type="CAUSAL_LM", r=given.r, lora_alpha=given.r, target_modules="all-linear", lora_dropout=0.0
    )
    shared: dict[str, Any] = {"processing_class": tokenizer.tokenizer, "peft_config": lora}
    ours = PairTrainer(model=load(), args=arguments(), train_rows=rows, eval_rows=None, token_budget=given.tokens, packs=True,
                       steps=plan_steps(rows.table["id"], seed=1, stage="bench", batch_size=given.batch, epochs=1), **shared)  # fmt: skip
    model: Any = ours.model
    weights.in_fp32(model)
    extra = {name: np.full(len(rows), -200.0, np.float32) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    ours.rows["train"] = replace(rows, extra=extra)
    found = []
    if not given.skip_trl:
        prepared = type("Stock", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
        stock = prepared(load(), args=arguments(), train_dataset=rows.table, **shared)
        stock.precompute_ref_logps = True

        def stock_loss(batch: list[dict[str, Any]], share: float) -> torch.Tensor:
            return share * stock.compute_loss(stock.model, stock._prepare_inputs(stock.data_collator(batch)))

        def stock_reference(batch: list[dict[str, Any]]) -> Any:
            return stock.compute_ref_log_probs(stock.model, stock._prepare_inputs(stock.data_collator(batch)))

        def slices(numbers: np.ndarray) -> list[np.ndarray]:
            return np.split(np.arange(len(numbers)), range(given.trl_rows, len(numbers), given.trl_rows))

        found.append(Contender("trl", stock, slices, stock_loss, stock_reference, padded_tokens))

    def our_loss(
        forward: Callable[[list[dict[str, Any]]], Any],
    ) -> Callable[[list[dict[str, Any]], float], torch.Tensor]:
        def loss(batch: list[dict[str, Any]], share: float) -> torch.Tensor:
            ours.loss_weights = [share]
            with ours.compute_loss_context_manager(), ours._own_metrics("train"):
                return ours.compute_loss(forward(batch), ours._prepare_inputs(ours.data_collator(batch)))

        return loss

    def our_reference(forward: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
        def reference(batch: list[dict[str, Any]]) -> Any:
            inputs = ours._prepare_inputs(ours.data_collator(batch))
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad(), model.disable_adapter(), ours.accelerator.autocast():
                return forward(batch)(**kept, labels=labels, use_cache=False, fused_lm_head=True).log_probs

        return reference

    device, config = ours.accelerator.device, weights.plain(model).config
    forwards: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
        "padded": lambda batch: model,
        "packed": lambda batch: CopiedPrompts(model, batch, config, device),
        "shared": lambda batch: PackedModel(model, pack_pairs(batch), config, device),
    }
    groups = {
        "padded": lambda numbers: by_budget(rows.lengths[numbers], given.padded_tokens, 2),
        "packed": lambda numbers: best_fit(rows.whole[numbers], given.tokens),
        "shared": lambda numbers: best_fit(rows.packed[numbers], given.tokens),
    }
    counts = {
        "padded": padded_tokens,
        "packed": lambda batch: sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in batch),
        "shared": lambda batch: sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in batch),
    }  # fmt: skip
    for name, forward in forwards.items():
        found.append(Contender(name, ours, groups[name], our_loss(forward), our_reference(forward), counts[name]))
    return found


def padded_tokens(batch: list[dict[str, Any]]) -> int:
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in batch)
    return 2 * len(batch) * longest


def timed(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def step(contender: Contender, rows: RowSet, numbers: np.ndarray, count: bool) -> None:
    """The policy's step over some rows, then the reference's forward pass over them."""
    micros = [rows.rows(numbers[group]) for group in contender.groups(numbers)]
    model = contender.trainer.model
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def policy() -> None:
        for batch in micros:
            contender.loss(batch, len(batch) / len(numbers)).backward()

    def reference() -> None:
        for batch in micros:
            contender.reference(batch)

    model.train()
    model.zero_grad()
    spent = timed(policy)
    model.eval()
    seen = timed(reference)
    if count:
        contender.policy_s += spent
        contender.reference_s += seen
        contender.processed += sum(map(contender.tokens, micros))
        contender.peak_bytes = max(
            contender.peak_bytes, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        )


def report(found: Sequence[Contender], rows: RowSet, numbers: np.ndarray, matrices: int) -> list[dict[str, Any]]:
    useful = {"trl": rows.whole, "padded": rows.whole, "packed": rows.whole, "shared": rows.packed}
    peak = records.peak_flops(records.hardware(1)["device"])
    lines = []
    for each in found:
        tokens, seconds = int(useful[each.name][numbers].sum()), each.policy_s + each.reference_s
        lines.append(
            {
                "path": each.name,
                "pairs_per_s": len(numbers) / seconds,
                "policy_pairs_per_s": len(numbers) / each.policy_s,
                "tokens_per_pair": each.processed / len(numbers),
                "padding": 1 - tokens / each.processed,
                "tokens_per_s": each.processed / seconds,
                "mfu": 6 * matrices * tokens / seconds / peak if peak else None,
                "peak_bytes": each.peak_bytes or None,
            }
        )
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    first = lines[0]
    out = ["| path | pairs/s | against the first | tokens a pair | tokens fall to | padding | tokens/s | MFU | peak GB |",
           "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for line in lines:
        mfu = f"{line['mfu']:.1%}" if line["mfu"] else "–"
        peak = f"{line['peak_bytes'] / 1e9:.1f}" if line["peak_bytes"] else "–"
        out.append(
            f"| {line['path']} | {line['pairs_per_s']:.3f} | {line['pairs_per_s'] / first['pairs_per_s']:.2f}x | "
            f"{line['tokens_per_pair']:.0f} | {line['tokens_per_pair'] / first['tokens_per_pair']:.2f} | {line['padding']:.1%} | "
            f"{line['tokens_per_s']:.0f} | {mfu} | {peak} |"
        )
    return "\n".join(out)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", type=Path, help="folder of a model; its own tokenizer")
    asked.add_argument("--shape", choices=["mistral-7b"], help="random weights of this shape instead of --base")
    asked.add_argument("--tokenizer", type=Path, help="folder of a ChatML tokenizer, for --shape")
    asked.add_argument("--quantization", choices=["nf4", "none"], help="default: none on a CPU, nf4 on a GPU")
    asked.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as prefmix train")
    asked.add_argument("--rows", type=int, default=32)
    asked.add_argument("--batch", type=int, default=16, help="rows a step")
    asked.add_argument("--max-length", type=int, default=1024)
    asked.add_argument("--r", type=int, help="rank; default 16 on a CPU, 64 on a GPU")
    asked.add_argument("--tokens", type=int, help="tokens a pack; default 1024 on a CPU, 16384 on a GPU")
    asked.add_argument("--padded-tokens", type=int, help="tokens a padded micro-batch; default twice --tokens on a CPU")
    asked.add_argument("--trl-rows", type=int, default=1, help="rows a micro-batch of stock TRL")
    asked.add_argument("--skip-trl", action="store_true")
    asked.add_argument("--json", action="store_true")
    given = asked.parse_args()
    if not ROWS.is_dir():
        sys.exit(f"{ROWS} is missing: the benchmark needs its real pairs.")
    if bool(given.base) == bool(given.shape) or (given.shape and not given.tokenizer):
        sys.exit("Name --base, or --shape with --tokenizer.")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    given.quantization = given.quantization or ("nf4" if on_gpu else "none")
    given.r = given.r or (64 if on_gpu else 16)
    given.tokens = given.tokens or (16_384 if on_gpu else 1024)
    given.padded_tokens = given.padded_tokens or (given.tokens if on_gpu else 2 * given.tokens)
    folder = given.base or random_base(Path(tempfile.mkdtemp()) / "random", MISTRAL_7B, given.tokenizer)
    stage = {"name": "bench", "method": "dpo", "subset": "preference"}
    settings = {"base": str(folder.resolve()), "quantization": given.quantization, "dtype": given.dtype or "auto", "stages": [stage],
                "lora": {"r": given.r, "alpha": given.r, "dropout": 0.0}}  # fmt: skip
    train = Train.model_validate(settings)
    given.dtype = weights.dtype_of(train)
    base = weights.find_base(train.base, train.base_revision, Path("/"))
    tokenizer = load_tokenizer(str(folder.resolve()), "main", Path("/"))
    rows = rows_of(tokenizer, given.rows, given.max_length)
    found = contenders(
        given, rows, lambda: weights.load_base(base, train.quantization, weights.dtype_of(train)), tokenizer
    )
    rows = found[-1].trainer.rows["train"]
    numbers = np.arange(len(rows))
    parts = [numbers[start : start + given.batch] for start in range(0, len(numbers), given.batch)]
    for contender in found:
        step(contender, rows, parts[0][:2], count=False)  # warm up
    for place, part in enumerate(parts):
        for contender in found[place % len(found) :] + found[: place % len(found)]:
            step(contender, rows, part, count=True)
    lines = report(found, rows, numbers, sizes_of(base.config, train).matrices)
    facts = {
        "device": records.hardware(1), "dtype": given.dtype, "quantization": given.quantization, "rows": len(rows),
        "batch": given.batch, "tokens": given.tokens, "padded_tokens": given.padded_tokens, "trl_rows": given.trl_rows,
        "mean_tokens_a_pair": float(rows.whole.mean()), "mean_prompt": float((rows.whole - rows.packed).mean()),
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    if given.json:
        print(json.dumps({**facts, "paths": lines}, indent=1))
    else:
        print(", ".join(f"{name}: {value}" for name, value in facts.items()))
        print(table(lines))


if __name__ == "__main__":
    main()
