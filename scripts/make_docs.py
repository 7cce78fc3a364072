"""Writes the generated parts of docs/: run it after a change of the recipe's keys, and commit what it changes.

    python scripts/make_docs.py

A generated part stands between `<!-- NAME: written by ... -->` and `<!-- end of NAME -->`; the rest of a page is
written by hand. tests/test_docs.py fails when a page is not what this program would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from prefmix.recipe import reference_markdown

DOCS = Path(__file__).parents[1] / "docs"


def recipes(page: str) -> str:
    """docs/recipes.md: a table of keys for each table of a recipe."""
    return with_part(page, "reference", reference_markdown())


#: Every page with a generated part, and what writes it: the page as it is -> the page as it should be.
PAGES: dict[str, Callable[[str], str]] = {"recipes.md": recipes}


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
