"""What `prefmix train --dry-run` shows: the steps of a run, its memory by part, its hours on named GPUs.

The pages take `prefmix.train.estimate.Estimate.as_json()`. Colours as in pages.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from prefmix.cli.charts import Bar, Trimmed, grid, size
from prefmix.cli.runs import left_out

Document = Mapping[str, Any]


def steps_page(estimate: Document) -> RenderableType:
    """A line per stage: rows, steps, tokens, how they are laid out; below it what is particular about it."""
    names = ("stage", ">rows", ">steps", ">epochs", ">tokens", ">reference", ">longest", ">padding", "")
    table = grid(*names, header=True)
    others: list[RenderableType] = []
    for stage in estimate["stages"]:
        packs = stage["not_packed"] is None
        padding = f"{stage['padded']['padding']:.1%}"
        table.add_row(
            Text(stage["stage"], "bold"),
            f"{stage['rows']:,}",
            f"{stage['steps']:,}",
            f"{stage['epochs']:.2f}",
            f"{stage['packed_tokens' if packs else 'tokens']:,}",
            f"{stage['reference_tokens']:,}" if stage["reference_tokens"] else "",
            f"{stage['longest']:,}",
            "none" if packs else padding,
            Text("if needed" if stage["stage"] in estimate["if_needed"] else "", "dim"),
        )
        told = left_out(stage)
        if packs:
            told.append(f"packed, which saves the {padding} that pad rows side by side")
        else:
            told.append(f"not packed: {stage['not_packed']}")
        if packs and stage["shared"] > 0:
            told.append(f"shared prompts save {stage['shared']:.1%}")
        others.append(Text(f"{stage['stage']}: {'; '.join(told)}", "dim"))
    return Group(Trimmed(table), *others)


def memory_page(estimate: Document) -> RenderableType:
    """The parts of the memory of each stage on this machine, and whether that is there."""
    stages = estimate["stages"]
    table = grid("", *(f">{stage['stage']}" for stage in stages), "~", header=True)
    for part in (name for name in stages[0]["memory"] if name != "total"):
        largest = max(stage["memory"][part] for stage in stages)
        cells = (size(stage["memory"][part]) for stage in stages)
        table.add_row(part, *cells, Bar(largest, estimate["peak"], width=24))
    totals = [Text(size(stage["memory"]["total"]), "bold" if stage["fits"] else "bold yellow") for stage in stages]
    table.add_row(Text("in all", "bold"), *totals, "")
    budgets = dict.fromkeys(_budget(stage["token_budget"]) for stage in stages)
    lines: list[RenderableType] = [Trimmed(table), Text(f"micro-batches of {' and '.join(budgets)}", "dim")]
    if not all(stage["fits"] for stage in stages):
        lines.append(Text(f"more than the {size(estimate['memory_bytes'])} that {estimate['device']} has", "yellow"))
    return Group(*lines)


def gpus_page(estimate: Document) -> RenderableType:
    """By GPU: the memory and the micro-batch that it would be given, and the hours of every stage."""
    stages = estimate["stages"]
    table = grid(
        "GPU", ">memory", ">tokens a micro-batch", *(f">{each['stage']}" for each in stages), ">in all", "", header=True
    )
    for number, gpu in enumerate(stages[0]["gpus"]):
        each = [stage["gpus"][number] for stage in stages]
        needs = max(entry["memory"]["total"] for entry in each)
        fits, again = all(entry["fits"] for entry in each), any(entry["gradient_checkpointing"] for entry in each)
        told = "does not fit" if not fits else "activations computed again" if again else ""
        table.add_row(
            gpu["gpu"],
            Text(size(needs), "" if fits else "yellow"),
            f"{min(entry['token_budget'] for entry in each):,}",
            *(hours(entry["hours"]) for entry in each),
            Text(hours(sum(entry["hours"] for entry in each)), "bold"),
            Text(told, "dim" if fits else "yellow"),
        )
    return Trimmed(table)


def _budget(tokens: int) -> str:
    """Of a loss that compares the rows of a step with each other, no step is split."""
    return f"at most {tokens:,} tokens" if tokens < 2**40 else "a whole step"


def hours(value: float) -> str:
    """`3.4 h`, `12 min`, `<1 min`."""
    if value >= 1:
        return f"{value:,.1f} h"
    return f"{value * 60:.0f} min" if value * 60 >= 1 else "<1 min"
