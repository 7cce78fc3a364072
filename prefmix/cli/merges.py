"""`prefmix merge`: the adapter of a run into its base, as a model of its own."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefmix.cli.extras import with_models
from prefmix.cli.options import json_option, store_option
from prefmix.cli.progress import NOTHING_WRITTEN, bars
from prefmix.cli.screen import command_line, emit_json, out, say, say_next

if TYPE_CHECKING:
    from prefmix.model.merge.merging import Check, Merged


@click.command("merge")
@click.argument("run", metavar="RUN", type=click.Path())
@click.option("--out", "folder", metavar="DIR", type=click.Path(), help="The folder to write; else STAGE/merged.")
@click.option("--base", metavar="DIR", help="Folder of the base, where it is not found by the name that the run has.")
@click.option("--mixture", metavar="REF", help="Mixture to check on; else the one that was trained on, if it is here.")
@store_option
@click.option("--no-check", is_flag=True, help="Do not compare the merge with the adapter on its base.")
@click.option("--force", is_flag=True, help="Replace the merge of another adapter.")
@click.option("-q", "--quiet", is_flag=True, help="Print the folder only.")
@json_option
def merge_command(
    run: str,
    folder: str | None,
    base: str | None,
    mixture: str | None,
    store: str | None,
    no_check: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge an adapter into its base: a model of its own, in bf16.

    RUN is the folder of a run (its last stage is meant), of a stage, or of an adapter. The adapter is added to the base as
    it was trained on it: in 4 bits and back, where that was so. Memory holds a gigabyte of weights. The merge is compared
    with the adapter on its base, on held-out rows, and is written only if it is the same model; the comparison loads what
    was trained, as training did.
    """
    started = time.monotonic()
    keys = {"folder": folder, "base": base, "mixture": mixture, "store": store}
    merged = merge_run(run, **keys, check=not no_check, force=force, shown=not (quiet or as_json))
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        emit_json({**asdict(merged), "seconds": seconds})
    elif quiet:
        say(str(merged.folder))
    else:
        report_merge(merged, seconds)
        say_next(_next_commands(run, merged.folder))


def merge_run(
    run: str,
    *,
    folder: str | None = None,
    base: str | None = None,
    mixture: str | None = None,
    store: str | None = None,
    check: bool = True,
    force: bool = False,
    shown: bool = True,
) -> Merged:
    """Merges the last stage of a run, with bars if `shown`; the parameters are those of the command."""
    place = _Place()

    def work() -> Merged:
        from prefmix.model.find import find_model, load_tokenizer
        from prefmix.model.merge.merging import merge, place_of

        found = find_model(run, base)
        place.folder = Path(folder) if folder else place_of(found)
        rows = None
        if check and found.adapter:
            from prefmix.model.merge.rows import rows_of

            rows = rows_of(found.run, load_tokenizer(found), mixture, store)
        progress("starting", 1, 1)
        return merge(found, place.folder, rows=rows, force=force, progress=progress)

    try:
        with bars(shown) as progress:
            progress("starting", 0, 1)  # seconds of imports come first
            return with_models("merge", "", work, shown=False)
    except click.Abort:
        raise click.Abort(place.abandon()) from None


class _Place:
    """The folder of this merge, once it is known."""

    folder: Path | None = None

    def abandon(self) -> str:
        """What an interrupted merge leaves: nothing, or all of it."""
        if self.folder is None:
            return NOTHING_WRITTEN
        from prefmix.model.merge.place import abandon

        return NOTHING_WRITTEN if abandon(self.folder) else f"{self.folder} was complete, and is there"


def report_merge(merged: Merged, seconds: float) -> None:
    """Writes what was merged and how well it agrees."""
    from prefmix.cli.charts import size

    shards = f"{merged.shards:,} shards" if merged.shards > 1 else "one file"
    done = f"merged in {seconds:.1f} s" if merged.is_new else "is there already, of this very adapter"
    say((str(merged.folder), "bold"), f"  {size(merged.bytes)} in {shards}, bf16; {done}")
    if merged.check:
        _report_check(merged.check)
    else:
        say(("not compared with the adapter on its base", "dim"))


def _report_check(check: Check) -> None:
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid
    from prefmix.cli.pages import titled

    table = grid("", ">mean KL", ">largest difference of a log-probability", header=True)
    for name, found in (("merged, in fp32", check.fp32), ("as saved, in bf16", check.bf16)):
        table.add_row(Text(name), figure(found.kl), figure(found.largest))
    note = f"on {check.tokens:,} answer tokens of {check.source}"
    out().print(titled("Against the adapter on its base", Trimmed(table), note))


def figure(value: float) -> str:
    """`7.0e-05`, `0.257`; what rounding makes of nothing may be below it."""
    return f"{value:.3f}" if value >= 0.01 else f"{max(value, 0.0):.1e}"


def _next_commands(run: str, folder: Path) -> list[tuple[str, str]]:
    return [
        (command_line("eval", run, "reference"), "measure it on the benchmarks of the reference run"),
        (command_line("export", run, "--gguf", "q8_0"), "for llama.cpp, LM Studio and others"),
        (command_line("chat", str(folder)), "talk to it"),
    ]
