"""Which layout of a format the columns of some files fit, and what to say when none does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import polars as pl

from prefmix.errors import SourceError
from prefmix.sources.layout import Layout, describe, fits

Columns = Mapping[str, pl.DataType]


def union(schemas: Iterable[Columns]) -> dict[str, pl.DataType]:
    """All columns of several files; of several types the first that says something."""
    columns: dict[str, pl.DataType] = {}
    for schema in schemas:
        for name, dtype in schema.items():
            if name not in columns or columns[name] == pl.Null:
                columns[name] = dtype
    return columns


def renamed(columns: Columns, renames: Mapping[str, str]) -> dict[str, pl.DataType]:
    """The columns of the files under the names that the format gives them."""
    taken = set(renames.values())
    kept = {name: dtype for name, dtype in columns.items() if name not in taken and name not in renames}
    return kept | {name: columns[there] for name, there in renames.items() if there in columns}


def matched(layout: Layout, columns: Columns) -> tuple[int, int]:
    """How many required and optional columns of a layout there are."""
    optional = sum(
        name in columns and fits(columns[name], want, layout.loose) for name, want in layout.optional.items()
    )
    return len(layout.columns), optional


def best_layout(several: Sequence[Layout], columns: Columns) -> Layout | None:
    """The layout whose required columns are all there and fit, with most columns; None if there is no such layout."""
    fitting = [layout for layout in several if not _problems(layout, columns)]
    return max(fitting, key=lambda layout: matched(layout, columns), default=None)


def fitting_layout(
    format_name: str, several: Sequence[Layout], schemas: Mapping[str, Columns], renames: Mapping[str, str]
) -> Layout:
    """The layout of all files (name -> columns). Raises a SourceError that names the file and the column at fault."""
    known = sorted({name for layout in several for name in layout.types})
    for name, there in renames.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"it has: {', '.join(known)}"
            raise SourceError(
                f'columns = {{ {name} = "{there}" }}: format {format_name} has no column "{name}": {hint}'
            )
    every_column = renamed(union(schemas.values()), renames)
    layout = best_layout(several, every_column)
    if layout is None:
        layout = max(several, key=lambda each: sum(name in every_column for name in each.columns))
    for file, columns in schemas.items():
        there = renamed(columns, renames)
        wrong = _problems(layout, there) or _problems(layout, there, optional=True)
        if wrong:
            raise SourceError(f"{file}: {_explained(wrong[0], format_name, layout, columns, renames)}")
    return layout


def _problems(layout: Layout, columns: Columns, optional: bool = False) -> list[str]:
    """The columns of a layout that are not there (none is required of the optional ones) or do not fit."""
    wanted = layout.optional if optional else layout.columns
    return [
        name
        for name, want in wanted.items()
        if (not fits(columns[name], want, layout.loose) if name in columns else not optional)
    ]


def _explained(name: str, format_name: str, layout: Layout, columns: Columns, renames: Mapping[str, str]) -> str:
    there = renames.get(name, name)
    want = describe(layout.types[name])
    if there in columns:
        have = describe(columns[there])
        return f'column "{there}" is {have}, but {format_name} wants {want}: convert it or set another format'
    free = sorted(set(columns) - set(layout.types) - set(renames.values()))
    near = get_close_matches(there, columns, n=1) or get_close_matches(name, columns, n=1)
    remedy = f'columns = {{ {name} = "{near[0] if near else "..."}" }}'
    hint = f'did you mean "{near[0]}"? Then set {remedy}' if near else f"set {remedy}, or another format"
    return f'no column "{there}" ({want}, needed by {format_name}; the file has: {", ".join(columns)}): {hint}' + (
        f" (not used yet: {', '.join(free)})" if free and not near else ""
    )
