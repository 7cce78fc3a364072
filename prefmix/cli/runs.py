"""What a run looks like on the screen once it has ended: its stages, and whether the model ends its turn.

The pages take what a run left in its folders (run.json and eos.json). Colours as in pages.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from prefmix.cli.charts import Trimmed, grid, size
from prefmix.cli.pages import by_count

_LIKELY = 0.5  # an end that is this probable comes, if it is given the room

if TYPE_CHECKING:
    from prefmix.recipe import Train
    from prefmix.train.records import StageRun


def stages_page(stages: Sequence[StageRun]) -> RenderableType:
    """A line per stage, and below it the rows that had to be left out."""
    table = grid("stage", ">rows", ">steps", "loss", ">rows/s", ">tokens/s", ">time", ">memory", "", header=True)
    others: list[RenderableType] = []
    for stage in stages:
        run = stage.run
        losses = run["losses"]
        course = f"{losses['first']:.4f} → {losses['last']:.4f}" if losses else ""
        speed = (f"{run['pairs_per_s']:,.1f}", f"{run['tokens_per_s']:,.0f}", duration(run["wall_s"]))
        counts = (f"{run['rows']:,}", f"{run['steps']:,}")
        there = Text("finished before" if stage.was_there else "", "dim")
        table.add_row(Text(run["stage"], "bold"), *counts, course, *speed, size(run["peak_memory_bytes"]), there)
        out = left_out(run)
        if out:
            others.append(Text(f"{run['stage']}: {'; '.join(out)}", "dim"))
    return Group(Trimmed(table), *others)


def left_out(run: Mapping[str, Any]) -> list[str]:
    """`left out: tokens/too_long 3`, `14 with a shortened prompt`: what there is of it."""
    reasons = [f"{reason} {count:,}" for reason, count in by_count(run["left_out"])]
    told = [f"left out: {', '.join(reasons)}"] if reasons else []
    return [*told, *([f"{run['shortened']:,} with a shortened prompt"] if run["shortened"] else [])]


def eos_page(stages: Sequence[StageRun]) -> RenderableType:
    """Before and after each stage: the probability of the end of a turn, and how many answers end by themselves."""
    table = grid("stage", "P(EOS)", "log P(EOS)", "stop rate", ">cut at the bound", header=True)
    for stage in stages:
        before, after = stage.eos["before"], stage.eos["after"]
        table.add_row(
            Text(stage.run["stage"], "bold"),
            f"{before['p_eos']:.4f} → {after['p_eos']:.4f}",
            f"{before['log_p_eos']:.3f} → {after['log_p_eos']:.3f}",
            f"{before['stop_rate']:.1%} → {after['stop_rate']:.1%}",
            f"{after['cut']:,} of {after['n']:,}",
        )
    return Trimmed(table)


def verdict(rate: float, asked: float) -> Text:
    """Whether the model ends its turns as often as it is asked to."""
    passed = rate >= asked
    told = f"{rate:.1%} of the answers end by themselves; {asked:.1%} are asked for"
    return Text.assemble((("passes: " if passed else "below: "), "bold green" if passed else "bold yellow"), told)


def advice(settings: Train, after: Mapping[str, Any]) -> str:
    """What brings a model to end its turns, of what the recipe does not have yet. `after` is the last entry of eos.json."""
    last = settings.stages[-1]
    losses = [stage.loss for stage in settings.stages if stage.method == "dpo"]
    named = [{each} if isinstance(each, str) else {*each} for each in losses]
    ways = [f"more rows or steps in {last.name}" if last.method == "sft" else "an sft stage at the end"]
    if any("sft" not in each for each in named):
        ways.append('an "sft" term in the loss')
    if named:
        ways.append("a lower learning rate in dpo")
    text = f"the model does not end its turns often enough. What helps: {'; '.join(ways)}."
    if after["cut"] and after["p_eos"] > _LIKELY:
        bound = settings.eos.max_new_tokens
        text += f" {after['cut']:,} of {after['n']:,} answers were cut at {bound:,} tokens: a higher train.eos.max_new_tokens may be enough."
    return text


def duration(seconds: float) -> str:
    """`4.1 s`, `12:05`, `3:01:07`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
