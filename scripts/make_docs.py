"""Writes the generated parts of docs/: run it after a change of the recipe's keys or of a command, and commit what it
changes.

    python scripts/make_docs.py

A generated part stands between `<!-- NAME: written by ... -->` and `<!-- end of NAME -->`; the rest of a page is
written by hand. tests/test_docs.py fails when a page is not what this program would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path

import click

from prefmix.cli.main import COMMANDS, prefmix
from prefmix.recipe import reference_markdown

DOCS = Path(__file__).parents[1] / "docs"


def recipes(page: str) -> str:
    """docs/recipes.md: a table of keys for each table of a recipe."""
    return with_part(page, "reference", reference_markdown())


def cli(page: str) -> str:
    """docs/cli.md: each command with its usage, its text and its options, in the order of `prefmix --help`."""
    overview = "\n".join(["| command | |", "| --- | --- |"] + [
        f"| [`{name}`](#prefmix-{name}) | {text} |" for name, (_, text) in COMMANDS.items()
    ])  # fmt: skip
    return with_part(with_part(page, "overview", overview), "commands", "\n\n".join(map(command, COMMANDS)))


def command(name: str) -> str:
    """A section on one command."""
    found = prefmix.get_command(click.Context(prefmix, info_name="prefmix"), name)
    if found is None or found.help is None:
        raise ValueError(f"{name} is no command, or has no text")
    context = click.Context(found, info_name=f"prefmix {name}")
    usage = " ".join([context.info_name or "", *found.collect_usage_pieces(context)])
    options = [option.get_help_record(context) for option in found.params if isinstance(option, click.Option)]
    rows = [f"| `{record[0]}` | {_cell(record[1])} |" for record in options if record]
    text = [" ".join(paragraph.split()) for paragraph in cleandoc(found.help).split("\n\n")]
    table = ["\n".join(["| option | |", "| --- | --- |", *rows])] if rows else []
    return "\n\n".join([f"### prefmix {name}", f"```\n{usage}\n```", *text, *table])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


#: Every page with a generated part, and what writes it: the page as it is -> the page as it should be.
PAGES: dict[str, Callable[[str], str]] = {"recipes.md": recipes, "cli.md": cli}


def with_part(page: str, name: str, body: str) -> str:
    """The page with `body` between the two marks of `name`; raises ValueError when it has no such marks."""
    marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not marks.search(page):
        raise ValueError(f"the page has no marks for {name!r}")
    return marks.sub(lambda match: f"{match[1]}\n{body.strip()}\n\n{match[2]}", page)


def main() -> None:
    for name, write in PAGES.items():
        path = DOCS / name
        before = path.read_text(encoding="utf-8")
        after = write(before)
        path.write_text(after, encoding="utf-8")
        print(f"{path.relative_to(DOCS.parent)}: {'as it was' if after == before else 'written'}")


if __name__ == "__main__":
    main()
