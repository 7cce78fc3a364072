"""`prefmix build`: from a recipe to a version of a mixture, or to a look at what it would be."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.progress import Progress, nothing_was_written, run_beside
from prefmix.cli.recipes import read_recipe
from prefmix.cli.screen import emit_json, err, out

if TYPE_CHECKING:
    import polars as pl

    from prefmix.build import Curated, Plan
    from prefmix.mixture import Mixture
    from prefmix.schema import Kind
    from prefmix.store import Store

#: Reasons that the recipe asks for by name: a source that loses most of its rows to them is not one to look at.
_ASKED_FOR = ("source/where", "source/excluded", "mix/not_sampled")
_SHOWN_CHARS = 400
_PUBLISHING_S = 0.5


@click.command("build")
@click.argument("recipe", metavar="RECIPE", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe, as in filter.min_margin=1.0. May be given more than once.")  # fmt: skip
@click.option("--store", type=click.Path(file_okay=False), metavar="DIR", help="Folder that holds the mixtures; else PREFMIX_STORE, else ./mixtures.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Run every stage, write nothing.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="A first look at N rows of each source; writes nothing.")  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Print the name and version only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build_command(
    recipe: str, overrides: Sequence[str], store: str | None, dry_run: bool, limit: int | None, quiet: bool, as_json: bool
) -> None:
    """Build a mixture from a recipe.

    RECIPE is a TOML file. The mixture goes into the store as a new version, unless a version was made from the same
    recipe and the same inputs before. Every row that is read is kept, or is in the mixture's ledger with its reason.
    """
    started = time.monotonic()
    bars = not (quiet or as_json)
    if dry_run or limit is not None:
        curated = run_beside(lambda progress: _curated(recipe, overrides, limit, progress), bars=bars)
        result = _preview(curated)
        if as_json:
            emit_json({**result, "limit": limit, "samples": _samples(curated), "seconds": _seconds(started)})
        else:
            _report_look(curated, result, limit, quiet, shlex.join(_again(recipe, overrides, store)), _seconds(started))
        return
    shelf = _Shelf(store)
    planned, mixture = run_beside(lambda progress: shelf.build(recipe, overrides, progress), abandon=shelf.abandon, bars=bars)
    warnings = _warnings(mixture.manifest)
    if as_json:
        emit_json(_as_json(mixture, warnings, _seconds(started)))
    elif quiet:
        out().print(str(mixture), soft_wrap=True)
    else:
        _report(planned, mixture, warnings, store, _seconds(started))


class _Shelf:
    """The store of this build, which knows the folder that the build is written into while it is."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._staged: Path | None = None
        self._done = False

    def build(self, recipe: str, overrides: Sequence[str], progress: Progress) -> tuple[Plan, Mixture]:
        from prefmix.build import built, curate, publish

        planned = _planned(recipe, overrides)
        store = self._store()
        mixture = built(planned, store) or publish(curate(planned, progress=progress), store, progress)
        self._done = True
        return planned, mixture

    def abandon(self) -> str:
        """Takes the folder away from the thread that writes into it. A rename decides: either this one comes first and
        nothing is published, or the thread's own has made the folder a version."""
        if self._staged is None:
            return nothing_was_written()
        grave = self._staged.with_name(f"{self._staged.name}-interrupted")
        try:
            os.rename(self._staged, grave)
        except OSError:
            time.sleep(0 if self._done else _PUBLISHING_S)  # for the version's name, which is written after the rename
            return "the mixture was complete, and is in the store"
        shutil.rmtree(grave, ignore_errors=True)
        Path(f"{self._staged}.lock").unlink(missing_ok=True)
        return nothing_was_written()

    def _store(self) -> Store:
        from prefmix.store import Store

        shelf = self

        class Noting(Store):
            @contextmanager
            def staging(self, name: str) -> Iterator[Path]:
                with super().staging(name) as folder:
                    shelf._staged = folder
                    yield folder

        return Noting(self._root)


def _planned(recipe: str, overrides: Sequence[str]) -> Plan:
    recipe_ = read_recipe(recipe, overrides)
    from prefmix.build import plan

    return plan(recipe_)


def _curated(recipe: str, overrides: Sequence[str], limit: int | None, progress: Progress) -> Curated:
    from prefmix.build import curate

    return curate(_planned(recipe, overrides), limit, progress)


def _preview(curated: Curated) -> dict[str, Any]:
    """What a manifest says of the rows, for a build that is not written: the same keys."""
    read: dict[str, int] = {}
    kept: dict[str, int] = {}
    for counts, frames in ((read, curated.rows), (kept, curated.kept)):
        for frame in frames.values():
            by_source = frame.group_by("source").len()
            counts.update({str(source): count for source, count in by_source.rows()})
    dropped = curated.dropped()
    sources = {
        name: {"format": source.format, "kind": source.kind,
               **({"hub": source.spec.hub} if source.spec.hub else {"path": source.spec.path}), "revision": source.revision,
               "read": read.get(name, 0), "kept": kept.get(name, 0), "dropped": dropped[name]}
        for name, source in curated.plan.sources.items()
    }  # fmt: skip
    subsets = {kind: _split_sizes(curated, kind) for kind, frame in curated.kept.items() if frame.height}
    result = {"name": curated.plan.recipe.name, "recipe_digest": curated.plan.recipe_digest, "funnel": curated.funnel()}
    result |= {"sources": sources, "subsets": subsets, "audit": dict(curated.audit)}
    return {**result, "warnings": _warnings(result)}


def _split_sizes(curated: Curated, kind: Kind) -> dict[str, dict[str, int | None]]:
    frame = curated.kept[kind]
    counted = [name for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens") if name in frame.columns]
    counted = ["tokens"] if "tokens" in frame.columns else counted
    sizes: dict[str, dict[str, int | None]] = {}
    for split in ("train", *curated.plan.recipe.splits):
        part = frame.filter(split=split)
        if part.height:
            tokens = sum(int((part[name] * part["copies"]).sum()) for name in counted) if counted else None
            sizes[split] = {"rows": int(part["copies"].sum()), "tokens": tokens}
    return sizes


def _samples(curated: Curated) -> list[dict[str, Any]]:
    """Two kept rows: the first of each kind, or the first two of the only kind."""
    from prefmix.schema import PARTS

    frames = {kind: frame for kind, frame in curated.kept.items() if frame.height}
    return [
        {"kind": kind, **{key: row[key] for key in ("id", "source", *PARTS[kind])}}
        for kind, frame in frames.items()
        for row in frame.head(3 - min(2, len(frames))).iter_rows(named=True)
    ]


def _warnings(manifest: Mapping[str, Any]) -> list[str]:
    """A line for each source of which less than half is kept for reasons that the recipe did not ask for."""
    found = []
    for name, entry in manifest["sources"].items():
        reasons = {reason: count for reason, count in entry["dropped"].items() if reason not in _ASKED_FOR}
        offered = entry["kept"] + sum(reasons.values())
        if reasons and entry["kept"] * 2 < offered:
            most = max(reasons, key=lambda reason: reasons[reason])
            kept = f"{entry['kept']:,} of {offered:,} rows are" if entry["kept"] else f"none of {offered:,} rows is"
            found.append(f"{name}: {kept} kept; most of the others are {most} ({reasons[most]:,})")
    return found


def _as_json(mixture: Mixture, warnings: list[str], seconds: float) -> dict[str, Any]:
    manifest = mixture.manifest
    keys = ("name", "version", "build", "digest", "recipe_digest", "funnel", "sources", "subsets", "audit")
    folder = {"folder": str(mixture.folder), "up_to_date": not mixture.is_new}
    return {**{key: manifest[key] for key in keys}, **folder, "warnings": warnings, "seconds": seconds}


def _report(planned: Plan, mixture: Mixture, warnings: list[str], store: str | None, seconds: float) -> None:
    from rich.text import Text

    console = out()
    if not mixture.is_new:
        line = Text.assemble((str(mixture), "bold"), " is up to date  ", (str(mixture.folder), "dim"))
        console.print(line, soft_wrap=True)
        return
    _say_formats(planned)
    heading = Text.assemble((str(mixture), "bold"), "  digest ", (mixture.digest[:12], "cyan"), f"  built in {seconds:.1f} s")
    console.print(heading, soft_wrap=True)
    console.print(Text(str(mixture.folder), "dim"), soft_wrap=True)
    _print_pages(mixture.manifest)
    _say_warnings(warnings)
    _print_next(_next_commands(mixture, store))


def _report_look(curated: Curated, result: Mapping[str, Any], limit: int | None, quiet: bool, again: str, seconds: float) -> None:
    from rich.text import Text

    console = out()
    read, kept = (result["funnel"][place]["out"] for place in (0, -1))
    if quiet:
        console.print(Text(f"{result['name']}: {kept:,} of {read:,} rows kept; nothing was written"), soft_wrap=True)
        return
    _say_formats(curated.plan)
    what = "a dry run" if limit is None else f"a look at {limit:,} row{'s' * (limit != 1)} of each source"
    console.print(Text.assemble((result["name"], "bold"), f"  {what}: nothing was written", (f"  {seconds:.1f} s", "dim")))
    if limit is not None and (curated.plan.recipe.mix.preference or curated.plan.recipe.mix.sft):
        console.print(Text("The shares of [mix] are left out: so few rows say nothing about them.", "dim"))
    _print_pages(result)
    if limit is not None:
        _print_samples(_samples(curated))
    _say_warnings(result["warnings"])
    if kept:
        _print_next([(again, "write it")])


def _print_pages(manifest: Mapping[str, Any]) -> None:
    from rich.text import Text

    from prefmix.cli.pages import funnel_page, sources_page, splits_page

    console = out()
    for title, page in (("From rows read to rows kept", funnel_page), ("Sources", sources_page), ("Splits", splits_page)):
        console.print()
        console.print(Text(title, "bold"))
        console.print(page(manifest))


def _print_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = out()
    for sample in samples:
        console.print()
        console.print(Text.assemble(("A row of ", "bold"), (sample["source"], "bold"), (f"  {sample['id']}", "dim")))
        for part in ("messages", "prompt", "chosen", "rejected"):
            for turn in sample.get(part) or ():
                label = turn["role"] if part in ("messages", "prompt") else part
                console.print(Text(f"  {label}", "cyan"))
                console.print(Padding(Text(_cut(turn["content"])), (0, 0, 0, 4), expand=False))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS].rstrip()} ... ({len(text):,} characters)"


def _print_next(commands: Sequence[tuple[str, str]]) -> None:
    """The commands that are of use now: printed whole, whatever the width, so that they can be copied."""
    from rich.text import Text

    console = out()
    widest = max(len(command) for command, _ in commands)
    console.print()
    console.print(Text("Next:", "bold"))
    for command, what in commands:
        fits = 2 + widest + 2 + len(what) <= console.width
        console.print(Text.assemble("  ", command.ljust(widest if fits else 0), (f"  {what}" if fits else "", "dim")), soft_wrap=True)


def _next_commands(mixture: Mixture, store: str | None) -> list[tuple[str, str]]:
    import polars as pl

    from prefmix.cli.pages import by_count

    where = f" --store {shlex.quote(store)}" if store else ""
    commands = [(f"prefmix show {mixture}{where}", "what is in it")]
    dropped: dict[str, int] = {}
    for stage in mixture.funnel:
        dropped |= {reason: count for reason, count in stage["dropped"].items() if reason != "mix/not_sampled"}
    if dropped:
        reason, _ = by_count(dropped)[0]
        rows = f"the {dropped[reason]:,} rows" if dropped[reason] > 1 else "the row"
        commands.append((f"prefmix drops {mixture} --reason {reason}{where}", f"{rows} of the most frequent reason"))
        first = mixture.drops.filter(pl.col("reason") == reason).select("id").head(1).collect().item()
        commands.append((f"prefmix why {mixture} {first}{where}", "the story of one of them"))
    return commands


def _again(recipe: str, overrides: Sequence[str], store: str | None) -> list[str]:
    """The command line that builds this for good."""
    sets = [word for override in overrides for word in ("--set", override)]
    return ["prefmix", "build", recipe, *sets, *(["--store", store] if store else [])]


def _say_formats(planned: Plan) -> None:
    from rich.text import Text

    for name, source in planned.sources.items():
        if source.sniffed:
            err().print(Text(f"{name}: format {source.format} (from its columns)", "dim"), soft_wrap=True)


def _say_warnings(warnings: Sequence[str]) -> None:
    from rich.text import Text

    out().file.flush()
    for warning in warnings:
        err().print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)


def _seconds(started: float) -> float:
    return round(time.monotonic() - started, 3)
