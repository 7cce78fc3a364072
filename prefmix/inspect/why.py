"""The ledger of a mixture, and the story of one row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from prefmix.inspect.rows import Dropped, Row, as_text, dropped_rows, kept_rows, read_again
from prefmix.mixture import Mixture
from prefmix.schema import CONTENT, PARTS

_ID = re.compile(r"[0-9a-f]{6,32}")  # in a query: an id, or enough of its beginning


@dataclass(frozen=True)
class Story:
    """What became of all the rows with one id.

    `places` says where it is in the mixture (`split` and `row`, its 0-based number in the split), `row` has its texts;
    `changes` are the records of what was done to it, `dropped` the ledger rows with this id, `instead_of` the ledger
    rows that were dropped because this row was kept.
    """

    id: str
    row: Row | None
    places: Sequence[Mapping[str, Any]]
    changes: Sequence[Mapping[str, Any]]
    dropped: Sequence[Dropped]
    instead_of: Sequence[Mapping[str, Any]]


def drop_counts(mixture: Mixture) -> pl.DataFrame:
    """`reason, source, rows` of the ledger, the sources in the order of the recipe."""
    order = pl.Enum(list(mixture.manifest["sources"]))
    counts = mixture.drops.group_by("reason", pl.col("source").cast(order)).len("rows")
    return counts.sort("reason", "source").with_columns(pl.col("source").cast(pl.String)).collect()


def why(mixture: Mixture, query: str, limit: int = 20) -> tuple[list[Story], int, list[str]]:
    """The stories of the rows that a query means: an id, the beginning of one, or text that the row contains.

    Gives at most `limit` stories, the number of rows that were found, and what is to be said of texts that could not
    be read again. The rows in the mixture come first. Text is compared without regard to case.
    """
    ids = _by_id(mixture, query) if _ID.fullmatch(query.lower()) else []
    problems: list[str] = []
    if not ids:
        ids, problems = _by_text(mixture, query)
    stories, unread = _stories(mixture, ids[:limit])
    return stories, len(ids), list(dict.fromkeys([*problems, *unread]))


def _by_id(mixture: Mixture, query: str) -> list[str]:
    starts = pl.col("id").str.starts_with(query.lower())
    parts = [mixture.scan(kind).select("id").filter(starts) for kind in mixture.splits]
    parts.append(mixture.drops.select("id").filter(starts))
    return pl.concat(parts).collect()["id"].unique(maintain_order=True).to_list()


def _by_text(mixture: Mixture, query: str) -> tuple[list[str], list[str]]:
    """The ids of the rows that contain a text: in the mixture, then in the ledger by reading the sources again."""
    pattern = f"(?i){pl.escape_regex(query)}"
    found: list[str] = []
    for kind in mixture.splits:
        holds = pl.any_horizontal(text.str.contains(pattern) for text in as_text(mixture, kind).values())
        found += mixture.scan(kind).filter(holds).select("id").collect()["id"].to_list()
    entries = mixture.drops.filter(pl.col("reason") != "source/invalid").select("source", "id").collect()
    frames, problems = read_again(mixture, entries["source"].unique(maintain_order=True).to_list())
    for source, frame in frames.items():
        holds = pl.any_horizontal(
            pl.col(part).list.eval(CONTENT.str.contains(pattern)).list.any()
            for part in PARTS[mixture.manifest["sources"][source]["kind"]]
        )
        dropped = entries.filter(pl.col("source") == source)["id"]
        found += frame.filter(holds & pl.col("id").is_in(dropped.implode()))["id"].to_list()
    invalid = mixture.drops.filter(pl.col("reason") == "source/invalid", pl.col("detail").str.contains(pattern))
    found += invalid.select("id").collect()["id"].to_list()
    return list(dict.fromkeys(found)), problems


def _stories(mixture: Mixture, ids: list[str]) -> tuple[list[Story], list[str]]:
    rows = kept_rows(mixture, ids)
    places: dict[str, list[Mapping[str, Any]]] = {each: [] for each in ids}
    for kind, splits in mixture.splits.items():
        for split in splits:
            numbered = mixture.scan(kind, split).select("id").with_row_index("row").filter(pl.col("id").is_in(ids))
            for number, each in numbered.sort("row").collect().rows():
                places[each].append({"subset": kind, "split": split, "row": number})
    entries = mixture.drops.filter(pl.col("id").is_in(ids)).collect()
    dropped, problems = dropped_rows(mixture, entries)
    changes = mixture.changes.filter(pl.col("id").is_in(ids)).collect()
    instead = mixture.drops.filter(pl.col("kept_id").is_in(ids)).collect()
    return [
        Story(
            id=each,
            row=rows.get(each),
            places=places[each],
            changes=changes.filter(pl.col("id") == each).to_dicts(),
            dropped=[drop for drop in dropped if drop.entry["id"] == each],
            instead_of=instead.filter(pl.col("kept_id") == each).to_dicts(),
        )
        for each in ids
    ], problems
