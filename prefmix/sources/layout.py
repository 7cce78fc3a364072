"""How a source format describes itself, and the expressions that formats are written in.

A format is a module (or any object) with `NAME`, `DESCRIPTION` and `OPTIONS`, and either one layout, written as `KIND`,
`COLUMNS`, `OPTIONAL` and `read`, or several in `LAYOUTS`. A layout is a set of columns with their types, and the
function that makes canonical columns of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from prefmix.schema import MESSAGES, Kind

TEXT = pl.String()
NUMBER = pl.Float64()
TURN = pl.Struct({"from": pl.String, "value": pl.String})
CONVERSATION = pl.List(TURN)

Read = Callable[[pl.LazyFrame, Mapping[str, Any], int], pl.LazyFrame]


@dataclass(frozen=True)
class Layout:
    """One shape in which a format's files come.

    `read(rows, options, seed)` gets every column of `columns` and `optional` with exactly these types (an optional one
    that the files lack is null), adds the parts of `kind` (and `chosen_score`, `rejected_score`), removes and reorders
    no row, and marks (`mark_invalid`) the rows that do not fit. Rows that are already marked come along: their columns
    may be null. The names of the canonical columns for where a row came from (`source` and so on) and what became of
    it (`reason` and so on) are taken.
    """

    kind: Kind
    columns: Mapping[str, pl.DataType]
    read: Read
    optional: Mapping[str, pl.DataType] = field(default_factory=dict)
    #: Fields of structs, by name, that the files may lack and that may be null.
    loose: frozenset[str] = frozenset()

    @property
    def types(self) -> dict[str, pl.DataType]:
        return {**self.columns, **self.optional}


def layouts(source_format: Any) -> tuple[Layout, ...]:
    """The layouts of a format: its `LAYOUTS`, or the only one that it is itself."""
    several = getattr(source_format, "LAYOUTS", None)
    if several is not None:
        return tuple(several)
    return (
        Layout(
            kind=source_format.KIND,
            columns=_instances(source_format.COLUMNS),
            read=source_format.read,
            optional=_instances(getattr(source_format, "OPTIONAL", {})),
            loose=frozenset(getattr(source_format, "LOOSE", ())),
        ),
    )


def _instances(columns: Mapping[str, Any]) -> dict[str, pl.DataType]:
    return {name: dtype() if isinstance(dtype, type) else dtype for name, dtype in columns.items()}


def fits(have: pl.DataType, want: pl.DataType, loose: frozenset[str] = frozenset()) -> bool:
    """Whether a column of type `have` can be read as `want`; widths, categories and extra fields do not matter."""
    if have == pl.Null:
        return True
    if have == pl.Unknown:  # a column of a CSV file
        return want in (TEXT, NUMBER)
    if want == pl.String:
        return have == pl.String or isinstance(have, pl.Categorical | pl.Enum)
    if want == pl.Float64:
        return have.is_numeric()
    if isinstance(want, pl.List):
        return isinstance(have, pl.List | pl.Array) and fits(have.inner, want.inner, loose)  # ty: ignore
    if isinstance(want, pl.Struct):
        fields = {each.name: each.dtype for each in have.fields} if isinstance(have, pl.Struct) else {}
        return bool(fields) and all(
            fits(fields[each.name], each.dtype, loose) if each.name in fields else each.name in loose  # ty: ignore
            for each in want.fields
        )
    return have == want


def cast(column: pl.Expr, have: pl.DataType, want: pl.DataType) -> pl.Expr:
    """`column`, which fits, as exactly `want`."""
    if have == want:
        return column
    if isinstance(want, pl.List):
        if have == pl.Null:
            return column.cast(want)
        if isinstance(have, pl.Array):
            column = column.arr.to_list()
        return column.list.eval(cast(pl.element(), have.inner, want.inner)).cast(want)  # ty: ignore
    if isinstance(want, pl.Struct) and have != pl.Null:
        fields = {each.name: each.dtype for each in have.fields}  # ty: ignore[missing-attribute]
        taken = [
            cast(column.struct.field(each.name), fields[each.name], each.dtype).alias(each.name)  # ty: ignore
            if each.name in fields
            else pl.lit(None, each.dtype).alias(each.name)
            for each in want.fields
        ]
        return pl.when(column.is_not_null()).then(pl.struct(taken))
    return column.cast(want)


def describe(dtype: pl.DataType) -> str:
    """A type in the words of an error message."""
    if dtype == MESSAGES:
        return "a list of {role, content} messages"
    if isinstance(dtype, pl.List):
        return f"a list of {describe(dtype.inner)}"  # ty: ignore[invalid-argument-type]
    if isinstance(dtype, pl.Struct):
        return "{" + ", ".join(each.name for each in dtype.fields) + "}"
    if dtype in (pl.String, pl.Unknown):
        return "text"
    return "a number" if dtype.is_numeric() else str(dtype)


def messages(*turns: tuple[str, pl.Expr]) -> pl.Expr:
    """A MESSAGES column of (role, content) turns, the same roles in every row."""
    structs = [pl.struct(pl.lit(role).alias("role"), content.alias("content")) for role, content in turns]
    # fifteen times as fast as pl.concat_list on structs
    return pl.concat_arr(structs).arr.to_list().cast(MESSAGES)


def conversation(system: pl.Expr, *turns: tuple[str, pl.Expr]) -> pl.Expr:
    """`messages`, behind a system message where `system` is neither null nor empty."""
    return pl.when(system.fill_null("") != "").then(messages(("system", system), *turns)).otherwise(messages(*turns))


#: A row does not fit its format where the expression is true, for the reason that the text gives.
Invalid = tuple[pl.Expr, str | pl.Expr]


def mark_invalid(rows: pl.LazyFrame, rules: Sequence[Invalid]) -> pl.LazyFrame:
    """Marks the living rows that break a rule as source/invalid; of several rules the first one is the reason."""
    if not rules:
        return rows
    error = pl.coalesce(
        pl.when(wrong).then(pl.lit(text) if isinstance(text, str) else text).otherwise(pl.lit(None, pl.String))
        for wrong, text in rules
    )
    found = pl.when(pl.col("reason").is_null()).then(error)
    return (
        rows.with_columns(found.alias("error"))
        .with_columns(
            pl.when(pl.col("error").is_not_null()).then(pl.lit("source/invalid")).otherwise("reason").alias("reason"),
            pl.when(pl.col("error").is_not_null())
            .then(pl.struct("error").struct.json_encode())
            .otherwise("detail")
            .alias("detail"),
        )
        .drop("error")
    )
