"""The data sets of the named suites for the loopback Hub: laid out as upstream, with two items of our own in each split."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl
from hub.loopback import LoopbackHub

from prefmix.recipe.suites import Part, suites

#: Columns that hold a list of texts.
_LISTS = {"choices", "turns", "reference", "endings", "correct_answers", "incorrect_answers"}


def commit_suites(
    hub: LoopbackHub, names: Iterable[str], planted: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Puts every data set of some suites on the Hub.

    `planted` has texts by suite and field, which the first item of the suite's first split has. All other texts stand
    nowhere else.
    """
    repos: dict[str, dict[str, bytes]] = {}
    cards: dict[str, str] = {}
    for name in names:
        wanted = dict((planted or {}).get(name, {}))
        for part in suites()[name].parts:
            for config in part.config or [None]:
                path = f"{config or 'data'}/{part.split}-00000-of-00001.parquet"
                repos.setdefault(part.hub, {})[path] = _parquet(part, f"{part.hub} {config or ''}", wanted)
                if config:
                    files = f"  data_files:\n  - split: {part.split}\n    path: {config}/{part.split}-*\n"
                    cards[part.hub] = f"{cards.get(part.hub, '')}- config_name: {config}\n{files}"
                wanted = {}
    for repo, files in repos.items():
        card = f"---\nconfigs:\n{cards[repo]}---\n" if repo in cards else "# A card\n"
        hub.commit(repo, {"README.md": card.encode(), **files})


def _parquet(part: Part, label: str, planted: Mapping[str, str]) -> bytes:
    items: list[dict[str, Any]] = [{}, {}]
    for number, item in enumerate(items):
        for field in part.fields:
            text = planted.get(field) if number == 0 else None
            text = text or f"Text number {number} that was made up for the field {field} of {label} and is in no row."
            column, _, key = field.partition(".")
            value = [text] if key or column in _LISTS else text
            item[column] = {key: value} if key else value
    buffer = io.BytesIO()
    pl.DataFrame(items).write_parquet(buffer)
    return buffer.getvalue()
