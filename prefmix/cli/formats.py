"""`prefmix sources`: the formats that can be read, and what is known of the data sets that have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from prefmix.cli.screen import emit_json, out
from prefmix.errors import UsageError


@click.command("sources")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the formats as JSON.")
def sources_command(name: str | None, as_json: bool) -> None:
    """List the formats that can be read, or show the data card of one.

    NAME is a format, a data set on the Hub such as Intel/orca_dpo_pairs, or a data card.
    """
    from prefmix.starter import data_cards

    formats = _formats()
    if name is None:
        if as_json:
            emit_json(list(formats.values()))
        else:
            _print_formats(formats)
        return
    cards = data_cards()
    chosen = [each for each in cards if name in (each.name, *each.hub)] or [each for each in cards if name in each.formats]
    named = [formats[name]] if name in formats else [formats[each] for card in chosen for each in card.formats if each in formats]
    if not named and not chosen:
        from prefmix.recipe.problems import nearest

        there = list(dict.fromkeys([*formats, *(each.name for each in cards), *(hub for each in cards for hub in each.hub)]))
        near = nearest(name, there)
        hint = f"Did you mean {near}?" if near else f"There are: {', '.join(there)}."
        raise UsageError(f'no format and no data card is called "{name}". {hint}')
    if as_json:
        emit_json({"formats": named, "cards": [{"name": each.name, "hub": list(each.hub), "text": each.text} for each in chosen]})
        return
    for entry in named:
        _print_format(entry)
    for card in chosen:
        _print_card(card.text)


def _formats() -> dict[str, dict[str, Any]]:
    """Every format by name: what it is, the layouts it comes in, its options (all values, the default first)."""
    from prefmix.sources import FORMATS, layouts
    from prefmix.sources.layout import describe

    found = {}
    for name, each in FORMATS.items():
        shapes = [
            {
                "kind": layout.kind,
                "columns": {column: describe(dtype) for column, dtype in layout.columns.items()},
                "optional": {column: describe(dtype) for column, dtype in layout.optional.items()},
            }
            for layout in layouts(each)
        ]
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in each.OPTIONS.items()}
        kinds = sorted({shape["kind"] for shape in shapes})
        found[name] = {"name": name, "description": each.DESCRIPTION, "kinds": kinds, "layouts": shapes, "options": options}
    return found


def _print_formats(formats: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    table = grid("format", "kind", "*columns", header=True)
    for name, entry in formats.items():
        first, others = entry["layouts"][0], len(entry["layouts"]) - 1
        columns = Text(", ".join(first["columns"]))
        if first["optional"]:
            columns.append(f" ({', '.join(first['optional'])})", "dim")
        if others:
            columns.append(f" and {others} other form{'s' * (others > 1)}", "dim")
        table.add_row(Text(name, "bold"), " or ".join(entry["kinds"]), columns)
    _print_trimmed(table)
    console.print()
    console.print(Text("Optional columns are in brackets. A source that names no format gets the one that fits its columns.", "dim"))
    console.print()
    console.print(Text("Next:", "bold"))
    console.print(Text("  prefmix sources orca_dpo_pairs"), soft_wrap=True)


def _print_format(entry: Mapping[str, Any]) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    console.print(Text.assemble((entry["name"], "bold"), "  ", entry["description"]))
    console.print()
    table = grid("kind", "column", "*type", "", header=True)
    for shape in entry["layouts"]:
        kind = shape["kind"]
        for needed, columns in ((True, shape["columns"]), (False, shape["optional"])):
            for column, words in columns.items():
                table.add_row(kind, Text(column), Text(words, "dim"), "" if needed else Text("optional", "dim"))
                kind = ""
        table.add_section()
    _print_trimmed(table)
    for key, values in entry["options"].items():
        shown = " or ".join(f'"{value}"' for value in values) if isinstance(values, list) else repr(values)
        console.print(Text.assemble("option  ", (key, "bold"), f" = {shown}", ("  (the first is the default)", "dim")))
    console.print()


def _print_card(text: str) -> None:
    """A data card: laid out on a terminal, as it is elsewhere."""
    console = out()
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        click.echo(text)
