"""What comes with prefmix beside its code: data cards, and the files of recipes."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml

from prefmix import recipe
from prefmix.errors import UsageError


@dataclass(frozen=True)
class DataCard:
    """A datasheet: the Hub names and formats that it is about, and its text without the YAML head."""

    name: str
    hub: tuple[str, ...]
    formats: tuple[str, ...]
    text: str


@cache
def data_cards() -> tuple[DataCard, ...]:
    """The data cards that come with prefmix: in the wheel, or in a checkout of the repository."""
    package = Path(__file__).parents[1]
    folders = (package / "data" / "data_cards", package.parent / "data_cards")
    cards: dict[str, DataCard] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.md"))):
        _, head, text = path.read_text(encoding="utf-8").split("---\n", 2)
        about = yaml.safe_load(head)
        card = DataCard(about["name"], tuple(about["hub"]), tuple(about["formats"]), text.strip())
        cards.setdefault(card.name, card)
    return tuple(cards.values())


def shipped_files(name: str) -> dict[str, Path]:
    """The files of a shipped recipe by the place they go to: `<name>.toml`, and what is in the folder `<name>/`.

    Raises UsageError with the names that there are.
    """
    shipped = recipe.shipped_recipes()
    if name not in shipped:
        near = get_close_matches(name, shipped, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f'no recipe "{name}" comes with prefmix. {hint}There are: {", ".join(sorted(shipped))}.')
    home = shipped[name].parent
    beside = sorted(path for path in (home / name).rglob("*") if path.is_file())
    return {path.relative_to(home).as_posix(): path for path in (shipped[name], *beside)}
