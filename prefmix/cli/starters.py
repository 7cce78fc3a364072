"""`prefmix init`: a starter recipe over data files, or a shipped recipe with its data."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefmix.cli.progress import NOTHING_WRITTEN, run_beside
from prefmix.cli.screen import command_line, out, say, say_next, say_warnings
from prefmix.errors import UsageError

if TYPE_CHECKING:
    from prefmix.starter import Starter


@click.command("init")
@click.argument("data", nargs=-1)
@click.option("--recipe", "shipped", metavar="NAME", help="Copy a recipe that comes with prefmix, and its data.")
@click.option(
    "--out",
    "path",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The recipe to write; else <name>.toml in the current folder.",
)
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def init_command(data: Sequence[str], shipped: str | None, path: str | None, force: bool, quiet: bool) -> None:
    """Write a starter recipe for data files, or copy a shipped recipe.

    DATA are files, folders, glob patterns or data sets on the Hub (owner/name). Their formats are found from their
    columns. Without DATA the data files of the current folder and of data/ in it are taken.
    """
    if shipped is not None:
        if data:
            raise UsageError("either DATA or --recipe, not both.")
        target = Path(path or f"{shipped}.toml")
        _copy(shipped, target, force, quiet)
    else:
        if path is not None:
            _refuse_existing([Path(path)], force)
        folder, name = (Path(path).parent, Path(path).stem) if path else (Path(), None)
        starter = run_beside(lambda: _starter(data, folder, name), abandon=lambda: NOTHING_WRITTEN)
        target = Path(path or f"{starter.name}.toml")
        _refuse_existing([target], force)
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(starter.text, encoding="utf-8")
        if not quiet:
            _report(target, starter)
    if not quiet:
        build = command_line("build", str(target))
        commands = [(command_line("check", str(target)), "what a build would read")]
        say_next([*commands, (f"{build} --limit 100", "a first look at some rows"), (build, "all of it")])


def _starter(data: Sequence[str], folder: Path, name: str | None) -> Starter:
    from prefmix.starter import starter_recipe

    return starter_recipe(data, folder, name)


def _report(target: Path, starter: Starter) -> None:
    """What was found, and what was not taken."""
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid, size

    count = len(starter.found)
    say("wrote ", (str(target), "bold"), (f"  {count} source{'s' * (count != 1)}", "dim"))
    say()
    table, origins = grid("source", "kind", "format", ">rows", ">size", header=True), grid("", "*")
    for each in starter.found:
        rows = each.source.count_rows()
        origin = each.origin.get("hub") or each.origin["path"]
        where = Text(origin if isinstance(origin, str) else ", ".join(origin), "dim")
        counted = "" if rows is None else f"{rows:,}"
        table.add_row(Text(each.name), each.source.kind, each.source.format, counted, size(each.bytes))
        origins.add_row(Text(each.name), where)
    for page in (Trimmed(table), "", Trimmed(origins)):
        out().print(page)
    notes = [f"left out: {each.reason}" for each in starter.left_out]
    besides = [", ".join(each.beside) for each in starter.found if each.beside]
    say_warnings([*notes, *(f"left aside, because they are other splits: {names}" for names in besides)])


def _copy(name: str, target: Path, force: bool, quiet: bool) -> None:
    """Copies a shipped recipe to `target`, and the data that it has beside it to the same folder."""
    from prefmix.starter import shipped_files

    files = shipped_files(name)
    copies = {target if place == f"{name}.toml" else target.parent / place: path for place, path in files.items()}
    _refuse_existing(copies, force)
    for place, path in copies.items():
        with _writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    if not quiet:
        data = f" and its data, {len(copies) - 1} files in {target.parent / name}" if len(copies) > 1 else ""
        say("wrote ", (str(target), "bold"), data)


def _refuse_existing(targets: Iterable[Path], force: bool) -> None:
    there = [str(target) for target in targets if target.exists()]
    if there and not force:
        are = f"and {len(there) - 1} more are" if len(there) > 1 else "is"
        raise UsageError(f"{there[0]} {are} there already. Give another --out, or --force to overwrite.")


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """Turns a refusal of the file system into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
