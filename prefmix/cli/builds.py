"""`prefmix build`: from a recipe to a version of a mixture, or to a look at what it would be."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.looks import ASKED_FOR, preview, samples, samples_json, warnings
from prefmix.cli.progress import Progress, nothing_was_written, run_beside
from prefmix.cli.recipes import override_option, read_recipe
from prefmix.cli.screen import emit_json, err, out, say_warnings

if TYPE_CHECKING:
    from prefmix.manifest import Curated
    from prefmix.mixture import Mixture
    from prefmix.plan import Plan
    from prefmix.store import Store

_PUBLISHING_S = 0.5


@click.command("build")
@click.argument("recipe", metavar="RECIPE", type=click.Path())
@override_option
@click.option(
    "--store",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder that holds the mixtures; else PREFMIX_STORE, else ./mixtures.",
)
@click.option("--dry-run", is_flag=True, help="Run every stage, write nothing.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take a first look at N rows of each source; writes nothing.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the name and version only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build_command(
    recipe: str,
    overrides: Sequence[str],
    store: str | None,
    dry_run: bool,
    limit: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build a mixture from a recipe.

    RECIPE is a TOML file. The mixture goes into the store as a new version, unless a version was made from the same
    recipe and the same inputs before. Every row that is read is kept, or is in the mixture's ledger with its reason.
    """
    started = time.monotonic()
    bars = not (quiet or as_json)
    if dry_run or limit is not None:
        curated = run_beside(lambda progress: _curated(recipe, overrides, limit, progress), bars=bars)
        look = preview(curated)
        seconds = round(time.monotonic() - started, 3)
        if as_json:
            emit_json({**look, "limit": limit, "samples": samples_json(curated), "seconds": seconds})
        elif quiet:
            rows = (f"{look['funnel'][place]['out']:,}" for place in (-1, 0))
            out().print(_plain(f"{look['name']}: {' of '.join(rows)} rows kept; nothing was written"), soft_wrap=True)
        else:
            _report_look(curated, look, limit, seconds)
            if look["funnel"][-1]["out"]:
                _say_next([(_again(recipe, overrides, store), "write it")])
        return
    shelf = _Shelf(store)
    planned, mixture = run_beside(
        lambda progress: shelf.build(recipe, overrides, progress), abandon=shelf.abandon, bars=bars
    )
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        emit_json(_mixture_json(mixture, seconds))
    elif quiet:
        out().print(_plain(str(mixture)), soft_wrap=True)
    elif not mixture.is_new:
        out().print(_plain((str(mixture), "bold"), " is up to date  ", (str(mixture.folder), "dim")), soft_wrap=True)
    else:
        _report(planned, mixture, seconds)
        _say_next(_next_commands(mixture, store))


class _Shelf:
    """The store of this build, which knows the folder that the build is written into while it is."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._staged: Path | None = None

    def build(self, recipe: str, overrides: Sequence[str], progress: Progress) -> tuple[Plan, Mixture]:
        planned = _planned(recipe, overrides, progress)
        from prefmix.build import built, curate, publish

        store = self._store()
        mixture = built(planned, store) or publish(curate(planned, progress=progress), store, progress)
        return planned, mixture

    def abandon(self) -> str:
        """Takes the folder away from the thread that writes into it.

        A rename decides: either this one comes first and nothing is published, or the thread's own came first and the
        folder is a version. That is then given the time to get its name.
        """
        if self._staged is None:
            return nothing_was_written()
        grave = self._staged.with_name(f"{self._staged.name}-interrupted")
        try:
            self._staged.rename(grave)
        except OSError:
            time.sleep(_PUBLISHING_S)
            return "the mixture was complete, and is in the store"
        shutil.rmtree(grave, ignore_errors=True)
        Path(f"{self._staged}.lock").unlink(missing_ok=True)
        return nothing_was_written()

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


def _curated(recipe: str, overrides: Sequence[str], limit: int | None, progress: Progress) -> Curated:
    planned = _planned(recipe, overrides, progress)
    from prefmix.build import curate

    return curate(planned, limit, progress)


def _mixture_json(mixture: Mixture, seconds: float) -> dict[str, Any]:
    manifest = mixture.manifest
    keys = ("name", "version", "build", "digest", "recipe_digest", "funnel", "sources", "subsets", "audit")
    return {
        **{key: manifest[key] for key in keys},
        "folder": str(mixture.folder),
        "up_to_date": not mixture.is_new,
        "warnings": warnings(manifest["sources"]),
        "seconds": seconds,
    }


def _report(planned: Plan, mixture: Mixture, seconds: float) -> None:
    _say_formats(planned)
    digest = (f"  digest {mixture.digest[:12]}", "")
    out().print(_plain((str(mixture), "bold"), digest, f"  built in {seconds:.1f} s"), soft_wrap=True)
    out().print(_plain((str(mixture.folder), "dim")), soft_wrap=True)
    _print_pages(mixture.manifest)
    say_warnings(warnings(mixture.manifest["sources"]))


def _report_look(curated: Curated, look: Mapping[str, Any], limit: int | None, seconds: float) -> None:
    _say_formats(curated.plan)
    what = "a dry run" if limit is None else f"a look at {limit:,} row{'s' * (limit != 1)} of each source"
    heading = _plain((look["name"], "bold"), f"  {what}: nothing was written", (f"  {seconds:.1f} s", "dim"))
    out().print(heading, soft_wrap=True)
    mix = curated.plan.recipe.mix
    if limit is not None and any((mix.preference, mix.sft, mix.preference_rows, mix.sft_rows)):
        out().print(_plain(("[mix] is left out: it needs all rows", "dim")))
    _print_pages(look)
    if limit is not None:
        from prefmix.cli.texts import row_page

        for row in samples(curated):
            out().print(row_page(row))
    say_warnings(look["warnings"])


def _print_pages(manifest: Mapping[str, Any]) -> None:
    from prefmix.cli.pages import funnel_page, sources_page, splits_page, titled

    out().print(titled("From rows read to rows in the mixture", funnel_page(manifest)))
    out().print(titled("Sources", sources_page(manifest)))
    out().print(titled("Splits", splits_page(manifest)))


def _say_next(commands: Sequence[tuple[str, str]]) -> None:
    from prefmix.cli.pages import next_page

    out().print(next_page(commands), soft_wrap=True)


def _next_commands(mixture: Mixture, store: str | None) -> list[tuple[str, str]]:
    """Three commands that are of use now; the rows are those of the most frequent reason that was not asked for."""
    import polars as pl

    from prefmix.cli.pages import by_count

    def command(name: str, *words: str) -> str:
        return shlex.join(["prefmix", name, str(mixture), *words, *(["--store", store] if store else [])])

    commands = [(command("show"), "what is in it")]
    dropped = {reason: count for stage in mixture.funnel for reason, count in stage["dropped"].items()}
    if reasons := by_count({reason: count for reason, count in dropped.items() if reason not in ASKED_FOR}):
        reason, count = reasons[0]
        rows = f"the {count:,} rows" if count > 1 else "the row"
        first = mixture.drops.filter(pl.col("reason") == reason).select("id").head(1).collect().item()
        commands.append((command("drops", "--reason", reason), f"{rows} of the most frequent reason"))
        commands.append((command("why", first[:12]), "the story of one of them"))
    return commands


def _again(recipe: str, overrides: Sequence[str], store: str | None) -> str:
    """The command line that builds this for good."""
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["prefmix", "build", recipe, *sets, *(["--store", store] if store else [])])


def _say_formats(planned: Plan) -> None:
    for name, source in planned.sources.items():
        if source.sniffed:
            err().print(_plain((f"{name}: format {source.format} (from its columns)", "dim")), soft_wrap=True)


def _plain(*parts: str | tuple[str, str]) -> Any:
    """Rich text of parts with their styles: text that is the user's, never read as markup."""
    from rich.text import Text

    return Text.assemble(*parts)
