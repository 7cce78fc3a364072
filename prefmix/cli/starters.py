"""`prefmix init`: a starter recipe over data files, or a shipped recipe with its data."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefmix.cli.progress import run_beside
from prefmix.cli.screen import err, out
from prefmix.errors import UsageError

if TYPE_CHECKING:
    from prefmix.starter import Starter


@click.command("init")
@click.argument("data", nargs=-1)
@click.option("--recipe", "shipped", metavar="NAME", help="Copy a recipe that comes with prefmix (quickstart with its data).")
@click.option("--out", "path", type=click.Path(dir_okay=False), metavar="FILE", help="The recipe to write; else <name>.toml here.")
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
        _copy_recipe(shipped, path, force, quiet)
        return
    folder, name = (Path(path).parent, Path(path).stem) if path else (Path(), None)
    starter = run_beside(lambda progress: _starter(data, folder, name), bars=not quiet)
    target = Path(path) if path else folder / f"{starter.name}.toml"
    _refuse_existing([target], force)
    _write(target, starter.text)
    if not quiet:
        _say_starter(target, starter)


def _starter(data: Sequence[str], folder: Path, name: str | None) -> Starter:
    from prefmix.starter import starter_recipe

    return starter_recipe(data, folder, name)


def _say_starter(target: Path, starter: Starter) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    count = len(starter.found)
    console.print(Text.assemble(("wrote ", "dim"), (str(target), "bold"), (f"  {count} source{'s' * (count != 1)}", "dim")), soft_wrap=True)
    table = grid("", "", "", ">", ">", "*")
    for each in starter.found:
        rows = each.source.count_rows()
        origin = each.origin.get("hub") or each.origin["path"]
        where = origin if isinstance(origin, str) else ", ".join(origin)
        cells = ("" if rows is None else f"{rows:,} rows", size(each.bytes), Text(where, "dim"))
        table.add_row(Text(f"  {each.name}"), each.source.format, Text(each.source.kind, "dim"), *cells)
    _print_trimmed(table)
    for left in starter.left_out:
        err().print(Text.assemble(("warning: ", "bold yellow"), f"left out: {left.reason}"), soft_wrap=True)
    for each in (each for each in starter.found if each.beside):
        text = f"left aside, because they are other splits: {', '.join(each.beside)}"
        err().print(Text.assemble(("note: ", "bold"), text), soft_wrap=True)
    _say_next(target)


def _say_next(target: Path) -> None:
    from rich.text import Text

    console = out()
    quoted = shlex.quote(str(target))
    console.print()
    console.print(Text("Next:", "bold"))
    for command in (f"prefmix check {quoted}", f"prefmix build {quoted} --limit 100", f"prefmix build {quoted}"):
        console.print(Text(f"  {command}"), soft_wrap=True)


def _copy_recipe(name: str, path: str | None, force: bool, quiet: bool) -> None:
    """Copies a shipped recipe, with the data that it has beside it, to `path` or the current folder."""
    import shutil

    from prefmix.starter import shipped_files

    target = Path(path) if path else Path(f"{name}.toml")
    copies = {target if place == f"{name}.toml" else target.parent / place: file for place, file in shipped_files(name).items()}
    _refuse_existing(list(copies), force)
    for place, file in copies.items():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        except OSError as error:
            raise UsageError(f"{place} cannot be written: {error.strerror}.") from None
    if not quiet:
        from rich.text import Text

        data = f" and its data, {len(copies) - 1} files in {target.parent / name}/" if len(copies) > 1 else ""
        out().print(Text.assemble(("wrote ", "dim"), (str(target), "bold"), data), soft_wrap=True)
        _say_next(target)


def _refuse_existing(targets: Sequence[Path], force: bool) -> None:
    there = [str(target) for target in targets if target.exists()]
    if there and not force:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(f"{there[0]}{more} is there already. Give --out another name, or --force to overwrite.")
