"""`prefmix sources`: the formats that can be read, and what is known of the data sets that have them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from prefmix.cli.screen import command_line, emit_json, out, say, say_next
from prefmix.errors import UsageError


@click.command("sources")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print formats and data cards as JSON.")
def sources_command(name: str | None, as_json: bool) -> None:
    """List the formats that can be read, or show the data card of one.

    NAME is a format, a data card, or a data set on the Hub such as Intel/orca_dpo_pairs.
    """
    from prefmix.starter import data_cards

    formats = _formats()
    if name is None:
        if as_json:
            emit_json(list(formats.values()))
        else:
            _print_formats(formats)
        return
    about = [card for card in data_cards() if name in (card.name, *card.hub)]
    cards = about or [card for card in data_cards() if name in card.formats]
    meant = [name] if name in formats else [each for card in about for each in card.formats if each in formats]
    if not meant:
        raise UsageError(_unknown(name, formats))
    if as_json:
        texts = [{"name": card.name, "hub": list(card.hub), "text": card.text} for card in cards]
        emit_json({"formats": [formats[each] for each in meant], "cards": texts})
        return
    for each in meant:
        _print_format(formats[each])
    for card in cards:
        _print_card(card.text)


def _unknown(name: str, formats: Mapping[str, Any]) -> str:
    from prefmix.recipe.problems import nearest
    from prefmix.starter import data_cards

    known = [*formats, *(hub for card in data_cards() for hub in card.hub)]
    close = nearest(name, known)
    hint = f"Did you mean {close}?" if close else f"There are: {', '.join(known)}."
    return f'no format and no data set that prefmix knows is called "{name}". {hint}'


def _formats() -> dict[str, dict[str, Any]]:
    """Every format by name: what it is, the layouts it comes in, its options (all values, the default first)."""
    from prefmix.sources import FORMATS
    from prefmix.sources.layout import describe, layouts

    found = {}
    for name, each in FORMATS.items():
        several = layouts(each)
        found[name] = {
            "name": name,
            "description": each.DESCRIPTION,
            "kinds": sorted({layout.kind for layout in several}),
            "layouts": [
                {
                    "kind": layout.kind,
                    "columns": {column: describe(dtype) for column, dtype in layout.columns.items()},
                    "optional": {column: describe(dtype) for column, dtype in layout.optional.items()},
                }
                for layout in several
            ],
            "options": {key: list(value) if isinstance(value, tuple) else value for key, value in each.OPTIONS.items()},
        }
    return found


def _print_formats(formats: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid

    table = grid("", "*")
    for name, entry in formats.items():
        first, others = entry["layouts"][0], len(entry["layouts"]) - 1
        columns = Text(f": {', '.join(first['columns'])}")
        columns.append(f" ({', '.join(first['optional'])})" if first["optional"] else "", "dim")
        columns.append(f"; {others} more form{'s' * (others > 1)}" if others else "", "dim")
        table.add_row(Text(name, "bold"), Text.assemble((" or ".join(entry["kinds"]), "cyan"), columns))
        table.add_row("", Text(entry["description"], "dim"))
    out().print(Trimmed(table))
    say()
    say(("Columns in brackets may be missing. A source that names no format gets the one that fits.", "dim"))
    say_next([(command_line("sources", next(iter(formats))), "its columns, options and data card")])


def _print_format(entry: Mapping[str, Any]) -> None:
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid

    say((entry["name"], "bold"), "  ", (entry["description"], "dim"))
    say()
    table = grid("kind", "column", "", "*what", header=True)
    for number, shape in enumerate(entry["layouts"]):
        if number:
            table.add_row()
        kind = shape["kind"]
        for columns, note in ((shape["columns"], ""), (shape["optional"], "optional")):
            for column, what in columns.items():
                table.add_row(kind, Text(column), Text(note, "dim"), Text(what, "dim"))
                kind = ""
    out().print(Trimmed(table))
    for key, values in entry["options"].items():
        shown = " or ".join(f'"{value}"' for value in values) if isinstance(values, list) else repr(values)
        say()
        say(f"options.{key} = {shown}", ("  the first is the default", "dim"))
    say()


def _print_card(text: str) -> None:
    """A data card: laid out on a terminal, as it is elsewhere."""
    if not out().is_terminal:
        sys.stdout.write(f"{text}\n")
        return
    from rich.markdown import Markdown

    out().print(Markdown(text))
