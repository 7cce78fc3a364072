"""A starter recipe: what some data files are, written down as a recipe to go on from.

    starter = starter_recipe(["data/orca.jsonl", "Intel/orca_dpo_pairs"], Path("."))
    starter.text        # a commented recipe that loads and builds
    starter.left_out    # the data that no format fits, each with the formats that come nearest

Also finds what comes with prefmix: data cards, and the files of shipped recipes.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import polars as pl
import yaml

from prefmix import files, recipe, sources
from prefmix.card import KNOWN_LICENCES
from prefmix.errors import SourceError, UsageError
from prefmix.schema import KINDS
from prefmix.sources.layout import TEXT, Layout, fits, layouts
from prefmix.sources.match import union

Origin = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Found:
    """A source of a starter recipe: `origin` is its `path` or `hub`, `beside` names files of other splits."""

    name: str
    origin: Origin
    source: sources.Source
    beside: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(each.path.stat().st_size for each in self.source.files)


@dataclass(frozen=True)
class LeftOut:
    """Data that cannot be a source: why, and the keys to try (TOML lines, the most promising first)."""

    name: str
    origin: Origin
    reason: str
    nearest: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Starter:
    """What `starter_recipe` found, and the recipe."""

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
    for group in _groups(data, root):
        title = _free(group.title, [each.name for each in found])
        spec = recipe.Source.model_validate(dict(group.origin))
        try:
            source = sources.resolve(title, spec, root)
        except SourceError as error:
            left_out.append(_left_out(title, group.origin, spec, root, error))
        else:
            found.append(Found(title, group.origin, source, group.beside))
    if not found:
        raise SourceError("\n".join(each.reason for each in left_out))
    if name is None:
        name = found[0].name if len(found) == 1 else root.name
    name = _plain(name).lower() or "mixture"
    return Starter(name, "\n".join(_lines(name, found, left_out)) + "\n", tuple(found), tuple(left_out))


def _free(title: str, taken: Sequence[str]) -> str:
    """The name, with a number where it is taken (a recipe keeps `tokenizer` for itself)."""
    names = (title, *(f"{title}_{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken and name != "tokenizer")


def _left_out(name: str, origin: Origin, spec: recipe.Source, root: Path, error: SourceError) -> LeftOut:
    """Why data is no source: for readable files without a format, their columns and what comes nearest."""
    try:
        paths = files.find_files(spec.path or [], root)
        columns = union(files.schema(path) for path in paths)
    except SourceError:
        return LeftOut(name, origin, str(error).removeprefix(f"source {name}: "))
    if spec.path is None or sources.sniff(columns) is not None:
        return LeftOut(name, origin, str(error).removeprefix(f"source {name}: "))
    nearest = tuple(_as_toml(each, mapping) for each, mapping in nearest_formats(columns))
    tries = "; or ".join(", ".join(keys) for keys in nearest)
    hint = f"Nearest: {tries}" if tries else "None comes near: `prefmix sources` says what each format needs"
    shown = ", ".join(_one_line(column) for column in columns)
    where = files.relative_name(paths[0], Path.cwd()) if len(paths) == 1 else str(spec.path)
    return LeftOut(name, origin, f"{where}: no format fits its columns {shown}. {hint}", nearest)


def _as_toml(format_name: str, mapping: Mapping[str, str]) -> tuple[str, ...]:
    renames = ", ".join(f"{wanted} = {_toml(there)}" for wanted, there in mapping.items())
    return f"format = {_toml(format_name)}", f"columns = {{ {renames} }}"


def _toml(value: str | list[str]) -> str:
    """A string or a list of strings in TOML: JSON's escapes are also TOML's."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    return " ".join(text.split())
