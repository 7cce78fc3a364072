"""A starter recipe: what some data files are, written down as a recipe to go on from.

    starter = starter_recipe(["data/orca.jsonl", "Intel/orca_dpo_pairs"], Path("."))
    starter.text        # a commented recipe that loads and builds
    starter.left_out    # the data that no format fits, each with the formats that come nearest

groups    which files become one source
nearest   formats that columns would fit under other names
lines     the text of the recipe
shipped   the recipes that come with prefmix
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefmix import files, recipe, sources
from prefmix.card import DataCard, data_cards
from prefmix.errors import SourceError
from prefmix.sources.match import union
from prefmix.starter.groups import Origin, grouped, plain_name
from prefmix.starter.lines import Found, LeftOut, one_line, recipe_lines, toml
from prefmix.starter.nearest import nearest_formats
from prefmix.starter.shipped import shipped_files
from prefmix.storage import is_address

__all__ = ["DataCard", "Found", "LeftOut", "Starter", "data_cards", "shipped_files", "starter_recipe"]


@dataclass(frozen=True)
class Starter:
    """A starter recipe: its name and text, what it reads, and what was named but cannot be read."""

    name: str
    text: str
    found: tuple[Found, ...]
    left_out: tuple[LeftOut, ...]


def starter_recipe(data: Sequence[str], folder: Path, name: str | None = None) -> Starter:
    """A starter recipe, for a file in `folder`, over files, folders, glob patterns and data sets on the Hub.

    `data` is relative to the current folder; without any, the data files of the current folder and of `data/` in it are
    taken. Files whose names differ only in numbers are one source; where some files of a folder are called train, those
    of other splits are left aside. `name` is that of the mixture: else that of the only source, or of the folder.

    Raises SourceError when nothing can be used, with the formats that come nearest; HubError.
    """
    root = folder.resolve()
    found: list[Found] = []
    left_out: list[LeftOut] = []
    for group in grouped(data, root):
        title = _free(group.title, [each.name for each in (*found, *left_out)])
        spec = recipe.Source.model_validate(_from_anywhere(group.origin, root))
        try:
            source = sources.resolve(title, spec, root)
        except SourceError as error:
            left_out.append(_left_out(title, group.origin, spec, root, str(error)))
        else:
            found.append(Found(title, group.origin, source, group.beside))
    if not found:
        raise SourceError("\n".join(each.reason for each in left_out))
    if name is None:
        name = found[0].name if len(found) == 1 else root.name
    name = plain_name(name).lower() or "mixture"
    return Starter(name, "\n".join(recipe_lines(name, found, left_out)) + "\n", tuple(found), tuple(left_out))


def _from_anywhere(origin: Origin, root: Path) -> dict[str, str | list[str]]:
    """The same with absolute paths: the folder of a recipe that is not written yet need not exist."""
    if "path" not in origin:
        return dict(origin)
    paths = [origin["path"]] if isinstance(origin["path"], str) else origin["path"]
    return {"path": [path if is_address(path) else os.path.normpath(root / path) for path in paths]}


def _free(title: str, taken: Sequence[str]) -> str:
    """The name, with a number where it is taken (`tokenizer` names a revision in a resolved recipe)."""
    names = (title, *(f"{title}_{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken and name != "tokenizer")


def _left_out(name: str, origin: Origin, spec: recipe.Source, root: Path, error: str) -> LeftOut:
    """Why data is no source: for readable files without a format, their columns and what comes nearest."""
    reason = error.removeprefix(f"source {name}: ")
    if spec.path is None:
        return LeftOut(name, origin, reason)
    try:
        paths = files.find_files(spec.path, root)
        columns = union(files.schema(path) for path in paths)
    except SourceError:
        return LeftOut(name, origin, reason)
    if sources.sniff(columns) is not None:  # some of the files fit it, and `error` says which do not
        return LeftOut(name, origin, reason)
    nearest = []
    for format_name, renames in nearest_formats(columns):
        pairs = ", ".join(f"{wanted} = {toml(there)}" for wanted, there in renames.items())
        nearest.append((f"format = {toml(format_name)}", f"columns = {{ {pairs} }}"))
    tries = "; or ".join(", ".join(keys) for keys in nearest)
    hint = f"Nearest: {tries}" if tries else "None comes near: `prefmix sources` says what each one needs"
    where = files.relative_name(paths[0], Path.cwd()) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    shown = ", ".join(map(one_line, columns))
    return LeftOut(name, origin, f"{where}: no format fits the columns {shown}. {hint}", tuple(nearest))
