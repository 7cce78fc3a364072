"""`prefmix export`: a model as one GGUF file."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from prefmix.cli.extras import with_models
from prefmix.cli.options import json_option
from prefmix.cli.screen import command_line, emit_json, err, say, say_next

if TYPE_CHECKING:
    from prefmix.model.gguf.exporting import Exported, GgufType, Weights


@click.command("export")
@click.argument("model", metavar="MODEL|RUN", type=click.Path())
@click.option("--gguf", "kind", type=click.Choice(["q8_0", "f16"]), required=True, help="The type of the weights.")
@click.option("--out", metavar="FILE", type=click.Path(), help="The file; else beside the adapter of a run.")
@click.option("--force", is_flag=True, help="Replace a file of that name.")
@click.option("-q", "--quiet", is_flag=True, help="Print the file only.")
@json_option
def export_command(model: str, kind: str, out: str | None, force: bool, quiet: bool, as_json: bool) -> None:
    """Write a model as one GGUF file, for llama.cpp, LM Studio and others.

    A run has to be merged first (prefmix merge); a folder of whole weights and a model of the Hub are taken as they are.
    The converter is fetched once into a folder of its own (below ~/.cache/prefmix). The file is checked before it gets its
    name: the token that ends a turn, the chat template, the type of the weights. A run's goes to STAGE/gguf/.
    """
    started = time.monotonic()
    shown = not (quiet or as_json)

    def find() -> Weights:
        from prefmix.model.gguf.exporting import find_weights

        return find_weights(model)

    weights = with_models("export", "looking at the model", find, shown)
    exported = _export(weights, cast("GgufType", kind), Path(out) if out else None, force, shown)
    if as_json:
        seconds = round(time.monotonic() - started, 3)
        emit_json({**asdict(exported), "model": str(weights.folder), "seconds": seconds})
    elif quiet:
        say(str(exported.path))
    else:
        _report(exported, time.monotonic() - started)
        serve = shlex.join(["llama-server", "-m", str(exported.path), "--port", "8080"])
        say_next([(serve, "serve it with llama.cpp"), (command_line("chat", model), "talk to it here")])


def _export(weights: Weights, kind: GgufType, out: Path | None, force: bool, shown: bool) -> Exported:
    """In the main thread, so that Ctrl-C ends the converter and what it has written goes."""
    from prefmix.model.gguf.exporting import export

    drawn = err().status("", spinner="line", spinner_style="dim") if shown and err().is_terminal else None

    def note(text: str) -> None:
        if drawn:
            drawn.update(f"[dim]{text}[/]")
        elif shown and text.startswith("installing"):
            say((text, "dim"), on=err())

    with drawn or nullcontext():
        return export(weights, kind, out, force=force, note=note)


def _report(exported: Exported, seconds: float) -> None:
    from prefmix.cli.charts import size

    counted = ", ".join(f"{count:,} {kind}" for kind, count in exported.tensors.items())
    say((str(exported.path), "bold"), f"  {size(exported.bytes)}, {seconds:.1f} s")
    say((f"tensors: {counted}; a turn ends with {exported.eos} ({exported.eos_id}); with its chat template", "dim"))
    for what in exported.corrected:
        say((f"put right, the converter leaves it out: {what}", "dim"))
