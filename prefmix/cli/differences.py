"""Two mixtures on the screen."""

from __future__ import annotations

from typing import Any

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from prefmix.cli.charts import Bar, Trimmed, clipped, grid
from prefmix.cli.pages import titled
from prefmix.cli.texts import opening, plain
from prefmix.inspect import Diff, kept_rows
from prefmix.mixture import Mixture

_STYLES = {"came": "green", "went": "yellow", "moved": "cyan", "changed": "cyan"}


def diff_page(found: Diff, limit: int) -> RenderableType:
    """What changed in the recipe and the sources, the rows that came, went, moved and changed by reason, and up to
    `limit` rows of each kind."""
    pages: list[RenderableType] = [_head(found)]
    if found.recipe:
        pages.append(titled("Recipe", _recipe(found)))
    if found.files:
        pages.append(titled("Files", _files(found)))
    if not (found.recipe or found.files):
        pages.append(Text("Recipe and source files are the same: prefmix, or what it stands on, is not.", "dim"))
    if found.came.height:
        reasons = _by_reason(found.came, _STYLES["came"])
        pages.append(titled("Came", reasons, f"why they were not in {found.a}"))
        pages += _rows(found.came, found.b, limit, "reason")
    if found.went.height:
        reasons = _by_reason(found.went, _STYLES["went"])
        pages.append(titled("Went", reasons, f"why they are not in {found.b}"))
        pages += _rows(found.went, found.a, limit, "reason")
    if found.moved.height:
        ways = found.moved.group_by("subset", "source", "old", "new").len("rows").sort("subset", "source", "old", "new")
        pages.append(titled("Moved between splits", _moves(ways)))
        pages += _rows(found.moved, found.b, limit, None)
    if found.changed.height:
        columns = found.changed.explode("columns", empty_as_null=True).group_by("source", "columns").len("rows")
        columns = columns.sort("source", "columns")
        pages.append(titled("Changed", _columns(columns), "the same id, other contents or scores"))
        pages += _rows(found.changed, found.b, limit, "columns")
    return Group(*pages)


def _head(found: Diff) -> RenderableType:
    old, new = (mixture.funnel[-1]["out"] for mixture in (found.a, found.b))
    line = Text.assemble((str(found.a), "bold"), f" {old:,} rows → ", (str(found.b), "bold"), f" {new:,} rows")
    styles = {name: _STYLES.get(name, "dim") if count else "dim" for name, count in found.counts.items()}
    summary = Text(", ").join(Text(f"{count:,} {name}", styles[name]) for name, count in found.counts.items())
    if found.is_empty:
        summary = Text("The same rows in the same splits; only their columns or their layout differ.")
    return Group(line, summary)


def _recipe(found: Diff) -> RenderableType:
    table = grid("", "*")
    for change in found.recipe:
        values = Text.assemble((_value(change.old), "yellow"), " → ", (_value(change.new), "green"))
        table.add_row(Text(change.key), values)
    return Trimmed(table)


def _value(value: Any) -> str:
    if value is None:
        return "(absent)"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{plain(value)}"' if isinstance(value, str) else str(value)


def _files(found: Diff) -> RenderableType:
    table = grid("", "", "*")
    styles = {"added": "green", "removed": "yellow"}
    for change in found.files:
        name = change.path if change.old_path is None else f"{change.old_path} → {change.path}"
        table.add_row(Text(change.source), Text(change.change, styles.get(change.change, "cyan")), Text(plain(name)))
    for name, entry in found.a.manifest["sources"].items():
        other = found.b.manifest["sources"].get(name)
        if other and other["read"] != entry["read"]:
            table.add_row(Text(name), "rows read", f"{entry['read']:,} → {other['read']:,}")
    return Trimmed(table)


def _by_reason(table: pl.DataFrame, style: str) -> RenderableType:
    counts = table.group_by("reason", "source", "cause").agg(rows=pl.col("copies").sum())
    counts = counts.sort("rows", "reason", "source", descending=[True, False, False])
    total = int(counts["rows"].sum())
    page = grid("reason", "source", "because of", ">rows", "~", header=True)
    for reason, source, cause, rows in counts.select("reason", "source", "cause", "rows").rows():
        bar = Bar(rows, total, style, 20, thin=True)
        page.add_row(reason, Text(source), Text(_CAUSES[cause], "dim"), Text(f"{rows:,}", style), bar)
    return Trimmed(page)


_CAUSES = {
    "recipe": "recipe",
    "source": "source files",
    "benchmark": "benchmark",
    "source or recipe": "files or recipe",
    "prefmix": "prefmix",
}


def _moves(ways: pl.DataFrame) -> RenderableType:
    page = grid("", "", "", ">rows")
    for subset, source, old, new, rows in ways.rows():
        page.add_row(subset, Text(source), Text(f"{old} → {new}"), Text(f"{rows:,}", "cyan"))
    return Trimmed(page)


def _columns(columns: pl.DataFrame) -> RenderableType:
    page = grid("", "", ">rows")
    for source, column, rows in columns.rows():
        page.add_row(Text(source), column, Text(f"{rows:,}", "cyan"))
    return Trimmed(page)


def _rows(table: pl.DataFrame, mixture: Mixture, limit: int, extra: str | None) -> list[RenderableType]:
    """The first rows of a table with the beginnings of their prompts."""
    if not limit:
        return []
    shown = table.head(limit)
    texts = kept_rows(mixture, shown["id"].to_list())
    page = grid("", "", *([""] if extra else []), "~")
    for row in shown.iter_rows(named=True):
        value = row[extra] if extra else ""
        note = [Text(", ".join(value) if isinstance(value, list) else value)] if extra else []
        asked = clipped(opening(texts.get(row["id"])), "dim")
        page.add_row(Text(row["id"][:12], "bold"), Text(row["source"]), *note, asked)
    more = [Text(f"{table.height - limit:,} more: --limit {table.height}", "dim")] if table.height > limit else []
    return ["", Trimmed(page), *more]
