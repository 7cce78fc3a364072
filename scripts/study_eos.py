"""How a model loses the token that ends its turn, and what keeps it: SmolLM2-135M on real pairs, over three seeds.

    python scripts/study_eos.py --base models/smollm2 [--seeds 3] [--steps 16] [--json FILE]

Reads ../shared/data/orca_dpo_pairs. Every condition is a recipe that is built and trained as a user would do it, but for
one: pairs whose chosen side lacks `<|im_end|>` do not get past the guard, so that one takes the token off behind its back.
Prints the table of docs/training.md: mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import datasets
import torch

from prefmix.build import build
from prefmix.recipe import load_recipe
from prefmix.train import trainers
from prefmix.train.loop import RowSet, pairs
from prefmix.train.run import train

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data"
SHORT = "LENGTH(chosen) BETWEEN 40 AND 300 AND LENGTH(rejected) BETWEEN 20 AND 300 AND LENGTH(question) < 300"
LIKE = f"{SHORT} AND LENGTH(chosen) < 1.25 * LENGTH(rejected) AND LENGTH(rejected) < 1.25 * LENGTH(chosen)"
LONGER = f"{SHORT} AND LENGTH(chosen) > 1.5 * LENGTH(rejected)"
#: name, pairs, losses, whether the chosen side keeps its <|im_end|>, whether an EOS SFT stage follows
CONDITIONS = (
    ("equal length, sigmoid", LIKE, ["sigmoid"], True, False),
    ("chosen without EOS (forced), sigmoid", LIKE, ["sigmoid"], False, True),
    ("chosen longer, sigmoid", LONGER, ["sigmoid"], True, True),
    ("chosen longer, sigmoid_norm", LONGER, ["sigmoid_norm"], True, False),
    ("chosen longer, sigmoid + 0.1 sft", LONGER, ["sigmoid", "sft"], True, False),
)


def recipe_text(base: Path, where: str, losses: Sequence[str], repaired: bool, steps: int) -> str:
    beta = 2.0 if losses == ["sigmoid_norm"] else 0.1  # its margins are per token: a beta of 0.1 would hardly train
    sft = f"""
[[train.stages]]
name = "eos"
method = "sft"
max_steps = {steps}
batch_size = 4
learning_rate = 5e-4
""" if repaired else ""  # fmt: skip
    return f"""
name = "study"
[sources.orca]
format = "orca_dpo_pairs"
path = {json.dumps(str(ROWS / "orca_dpo_pairs" / "converted.parquet"))}
where = {json.dumps(where)}
take = 300
[sources.hermes]
format = "openhermes"
path = {json.dumps(str(ROWS / "openhermes" / "converted_hermes_sources.parquet"))}
where = "LENGTH(output) BETWEEN 20 AND 300 AND LENGTH(instruction) < 300"
take = 300
[splits]
test = 0.05
[train]
base = {json.dumps(str(base))}
quantization = "none"
lora = {{ r = 16, alpha = 16, dropout = 0.0 }}
eos = {{ prompts = 12, max_new_tokens = 48 }}
[[train.stages]]
name = "dpo"
method = "dpo"
max_steps = {steps}
batch_size = 4
learning_rate = 5e-4
beta = {beta}
loss = {json.dumps(list(losses))}
loss_weights = {[1.0, 0.1][: len(losses)]}
max_length = 1024
{sft}"""


@contextmanager
def without_end_in_chosen() -> Generator[None]:
    """Takes the last token off the chosen answers of the training rows, which no recipe can ask for."""

    def forced(table: datasets.Dataset) -> RowSet:
        bare = [ids[:-1] for ids in table["chosen_ids"]]
        plain = datasets.Dataset.from_dict({**{name: table[name] for name in table.column_names}, "chosen_ids": bare})
        return pairs(plain.cast(table.features))

    with patch.object(trainers, "pairs", forced):
        yield


def one_run(base: Path, condition: tuple, seed: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """`{"stage", "before", "after", ...}` of each stage."""
    name, where, losses, whole, repaired = condition
    path = folder / "recipe.toml"
    path.write_text(recipe_text(base, where, losses, repaired, steps), encoding="utf-8")
    recipe = load_recipe(path, [f"seed={seed}", f"train.output={json.dumps(str(folder / 'runs'))}"])
    mixture = build(recipe, store=folder / "store")
    if whole:
        done = train(recipe, mixture)
    else:
        with without_end_in_chosen():
            done = train(recipe, mixture)
    return [
        {
            "condition": name,
            "seed": seed,
            "stage": stage.run["stage"],
            "rows": stage.run["rows"],
            "loss": stage.run["losses"],
            "before": stage.eos["before"],
            "after": stage.eos["after"],
        }
        for stage in done.stages
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| pairs and loss | stage | log P(EOS) | P(EOS) | stop rate | mean tokens |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    keys = dict.fromkeys((entry["condition"], entry["stage"]) for entry in found)
    for condition, stage in keys:
        runs = [entry for entry in found if (entry["condition"], entry["stage"]) == (condition, stage)]
        cells = [spread(runs, key) for key in ("log_p_eos", "p_eos", "stop_rate")]
        lengths = [[entry[when]["greedy"]["mean_tokens"] for entry in runs] for when in ("before", "after")]
        cells.append(" → ".join(f"{mean(values):.0f}" for values in lengths))
        lines.append(f"| {condition} | {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(runs: Sequence[dict[str, Any]], key: str) -> str:
    """`before → after (lowest to highest after)`."""
    before, after = ([entry[when][key] for entry in runs] for when in ("before", "after"))
    return f"{mean(before):.2f} → {mean(after):.2f} ({min(after):.2f} to {max(after):.2f})"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", type=Path, required=True, help="folder of SmolLM2-135M-Instruct as safetensors")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--steps", type=int, default=16)
    asked.add_argument("--condition", type=int, action="append", help="only these, counted from 0")
    asked.add_argument("--json", type=Path, help="also write every run's figures here")
    given = asked.parse_args()
    if not ROWS.is_dir():
        sys.exit(f"{ROWS} is missing: the study needs its real pairs.")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for condition in [CONDITIONS[place] for place in given.condition or range(len(CONDITIONS))]:
        for seed in range(1, given.seeds + 1):
            with tempfile.TemporaryDirectory() as folder:
                found += one_run(given.base.resolve(), condition, seed, given.steps, Path(folder))
            for entry in found[-2:]:
                if (entry["condition"], entry["seed"]) == (condition[0], seed):
                    print({key: entry[key] for key in ("condition", "seed", "stage")}, entry["before"]["log_p_eos"],
                          entry["after"]["log_p_eos"], entry["after"]["stop_rate"], file=sys.stderr)  # fmt: skip
            if given.json:
                given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
