"""`prefmix build`: from a recipe to a version of a mixture, or to a look at what it would be."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from prefmix.cli.looks import ASKED_FOR, preview, samples, samples_json, warnings
from prefmix.cli.options import json_option, override_option, store_option
from prefmix.cli.progress import NOTHING_WRITTEN, Progress, bars, run_beside
from prefmix.cli.recipes import read_recipe
from prefmix.cli.screen import command_line, emit_json, err, out, say, say_next, say_warnings
from prefmix.errors import UsageError

if TYPE_CHECKING:
    from prefmix.build import Means
    from prefmix.inspect import Row
    from prefmix.mixture import Mixture
    from prefmix.plan import Plan
    from prefmix.store import Store

_PUBLISHING_S = 0.5


@click.command("build")
@click.argument("recipe", metavar="RECIPE", type=click.Path())
@override_option
@store_option
@click.option("--dry-run", is_flag=True, help="Run every stage, write nothing.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take a first look at N rows of each source; writes nothing.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["contamination"]),
    multiple=True,
    help="Fail (exit code 3) on rows that hold text of a benchmark, where they would be dropped.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory that the build may take, as in 4GB [default: 60 % of the machine's]. Rows that do not fit are worked on "
    "in parts, in a scratch folder; the mixture is the same.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "memory", "disk", "ray"]),
    default="auto",
    help="All rows in memory, or parts of them: on this machine, or on a Ray cluster [default: what --memory asks for].",
)
@click.option("--address", metavar="ADDRESS", help="With --engine ray: the cluster, as in auto or head:6379.")
@click.option(
    "--scratch",
    metavar="DIR",
    help="Folder or address (s3://...) for what a build in parts leaves for itself [default: one in the store].",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the name and version only.")
@json_option
def build_command(
    recipe: str,
    overrides: Sequence[str],
    store: str | None,
    dry_run: bool,
    limit: int | None,
    fail_on: Sequence[str],
    memory: str | None,
    engine: Literal["auto", "memory", "disk", "ray"],
    address: str | None,
    scratch: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build a mixture from a recipe.

    RECIPE is a TOML file. The mixture goes into the store as a new version, unless a version was made from the same
    recipe and the same inputs before. Every row that is read is kept, or is in the mixture's ledger with its reason.
    """
    started = time.monotonic()
    shown = not (quiet or as_json)
    shelf = _Shelf(store, lambda: _means(memory, engine, address, scratch))
    if dry_run or limit is not None:
        with bars(shown) as progress:
            look, rows, planned = run_beside(
                lambda: shelf.look(recipe, overrides, limit, fail_on, progress), abandon=shelf.unfinished
            )
        seconds = round(time.monotonic() - started, 3)
        if as_json:
            emit_json({**look, "limit": limit, "samples": samples_json(rows), "seconds": seconds})
        elif quiet:
            rows = (f"{look['funnel'][place]['out']:,}" for place in (-1, 0))
            say(f"{look['name']}: {' of '.join(rows)} rows kept; nothing was written")
        else:
            _report_look(planned, look, rows, limit, seconds)
            if look["funnel"][-1]["out"]:
                say_next([(command_line("build", recipe, overrides=overrides, store=store), "write it")])
        return
    with bars(shown) as progress:
        planned, mixture = run_beside(lambda: shelf.build(recipe, overrides, fail_on, progress), abandon=shelf.abandon)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        emit_json({**_mixture_json(mixture, seconds), "stages": shelf.stages})
    elif quiet:
        say(str(mixture))
    elif not mixture.is_new:
        say((str(mixture), "bold"), " is up to date  ", (mixture.place, "dim"))
    else:
        _report(planned, mixture, seconds, in_parts=bool(shelf.stages))
        say_next(_next_commands(mixture, store))


class _Shelf:
    """The store of this build, which knows the folder that the build is written into while it is."""

    def __init__(self, root: str | None, means: Callable[[], Means]) -> None:
        self._root = root
        self._means = means
        self._staged: Path | None = None
        self._scratch: Path | str | None = None
        #: What a build in parts notes of its stages.
        self.stages: dict[str, dict[str, float]] = {}

    def build(
        self, recipe: str, overrides: Sequence[str], fail_on: Sequence[str], progress: Progress
    ) -> tuple[Plan, Mixture]:
        means = self._means()
        planned = _planned(recipe, overrides, progress)
        from prefmix.build import built, made, scratch_home

        store = self._store()
        self._scratch = scratch_home(planned, store, means)
        mixture = built(planned, store, fail_on)
        return planned, mixture or made(planned, store, fail_on, means, progress, self.stages)

    def look(
        self, recipe: str, overrides: Sequence[str], limit: int | None, fail_on: Sequence[str], progress: Progress
    ) -> tuple[dict[str, Any], list[Row], Plan]:
        """What the build would give, and some of its rows."""
        means = self._means()
        planned = _planned(recipe, overrides, progress)
        from prefmix.build import curating, scratch_home

        store = self._store()
        self._scratch = scratch_home(planned, store, means)
        with curating(planned, store, limit, fail_on, means, progress) as rows:
            return preview(rows), samples(rows), planned

    def abandon(self) -> str:
        """Takes the folder away from the thread that writes into it.

        A rename decides: either this one comes first and nothing is published, or the thread's own came first and the
        folder is a version. That is then given the time to get its name.
        """
        if self._staged is None:
            return "; ".join(filter(None, (NOTHING_WRITTEN, self.unfinished())))
        grave = self._staged.with_name(f"{self._staged.name}-interrupted")
        try:
            self._staged.rename(grave)
        except OSError:
            time.sleep(_PUBLISHING_S)
            return "the mixture was complete, and is in the store"
        shutil.rmtree(grave, ignore_errors=True)
        Path(f"{self._staged}.lock").unlink(missing_ok=True)
        return NOTHING_WRITTEN

    def unfinished(self) -> str:
        """What there is to say of a build in parts that is interrupted."""
        if not isinstance(self._scratch, Path) or not any(self._scratch.glob("*/done")):
            return ""
        return f"the same command goes on from what is done, in {self._scratch}"

    def _store(self) -> Store:
        from prefmix.store import Store

        shelf = self

        class Noting(Store):
            @contextmanager
            def staging(self, name: str) -> Generator[Path]:
                with super().staging(name) as folder:
                    shelf._staged = folder
                    yield folder

        return Noting(self._root)


def _planned(recipe: str, overrides: Sequence[str], progress: Progress) -> Plan:
    checked = read_recipe(recipe, overrides)
    from prefmix.plan import plan

    if not any(source.hub for source in checked.sources.values()):
        progress("plan", 0, 1)
    planned = plan(checked)
    progress("plan", 1, 1)
    return planned


def _means(
    memory: str | None, engine: Literal["auto", "memory", "disk", "ray"], address: str | None, scratch: str | None
) -> Means:
    from prefmix.build import Means
    from prefmix.scale import memory_of

    if address is not None and engine != "ray":
        raise UsageError(f"--address {address} needs --engine ray.")
    return Means(engine, None if memory is None else memory_of(memory), scratch, address)


def _mixture_json(mixture: Mixture, seconds: float) -> dict[str, Any]:
    manifest = mixture.manifest
    keys = (
        "name",
        "version",
        "build",
        "digest",
        "recipe_digest",
        "funnel",
        "sources",
        "subsets",
        "audit",
        "contamination",
    )
    return {
        **{key: manifest[key] for key in keys},
        "folder": mixture.place,
        "up_to_date": not mixture.is_new,
        "warnings": warnings(manifest["sources"]),
        "seconds": seconds,
    }


def _report(planned: Plan, mixture: Mixture, seconds: float, in_parts: bool) -> None:
    _say_formats(planned)
    say(
        (str(mixture), "bold"),
        f"  digest {mixture.digest[:12]}  built in {seconds:.1f} s{', in parts' if in_parts else ''}",
    )
    say((mixture.place, "dim"))
    _print_pages(mixture.manifest)
    say_warnings(warnings(mixture.manifest["sources"]))


def _report_look(
    planned: Plan, look: Mapping[str, Any], rows: Sequence[Row], limit: int | None, seconds: float
) -> None:
    _say_formats(planned)
    what = "a dry run" if limit is None else f"a look at {limit:,} row{'s' * (limit != 1)} of each source"
    say((look["name"], "bold"), f"  {what}: nothing was written", (f"  {seconds:.1f} s", "dim"))
    mix = planned.recipe.mix
    if limit is not None and any((mix.preference, mix.sft, mix.preference_rows, mix.sft_rows)):
        say(("[mix] is left out: it needs all rows", "dim"))
    _print_pages(look)
    if limit is not None:
        from prefmix.cli.texts import row_page

        for row in rows:
            out().print(row_page(row))
    say_warnings(look["warnings"])


def _print_pages(manifest: Mapping[str, Any]) -> None:
    from prefmix.cli.pages import contamination_page, funnel_page, sources_page, splits_page, titled

    out().print(titled("From rows read to rows in the mixture", funnel_page(manifest)))
    if held := contamination_page(manifest["contamination"], manifest["funnel"][0]["out"]):
        out().print(titled("Text of benchmarks", held))
    out().print(titled("Sources", sources_page(manifest)))
    out().print(titled("Splits", splits_page(manifest)))


def _next_commands(mixture: Mixture, store: str | None) -> list[tuple[str, str]]:
    """Three commands that are of use now; the rows are those of the most frequent reason that was not asked for."""
    import polars as pl

    from prefmix.cli.pages import by_count

    again = partial(command_line, store=store)
    commands = [(again("show", str(mixture)), "what is in it")]
    dropped = {reason: count for stage in mixture.funnel for reason, count in stage["dropped"].items()}
    if reasons := by_count({reason: count for reason, count in dropped.items() if reason not in ASKED_FOR}):
        reason, count = reasons[0]
        rows = f"the {count:,} rows" if count > 1 else "the row"
        first = mixture.drops.filter(pl.col("reason") == reason).select("id").head(1).collect().item()
        commands.append((again("drops", str(mixture), "--reason", reason), f"{rows} of the most frequent reason"))
        commands.append((again("why", str(mixture), first[:12]), "the story of one of them"))
    return commands


def _say_formats(planned: Plan) -> None:
    for name, source in planned.sources.items():
        if source.sniffed:
            say((f"{name}: format {source.format} (from its columns)", "dim"), on=err())
