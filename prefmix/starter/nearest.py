"""Which formats come nearest to columns that none of them fits."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import polars as pl

from prefmix import sources
from prefmix.sources.layout import Layout, fits, layouts

_MOST_NEAREST = 2

#: What other data sets call the columns of the formats, the likeliest first: for suggestions, never read by themselves.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "question": ("prompt", "instruction", "query", "input", "user", "problem"),
    "instruction": ("prompt", "question", "query", "input", "user", "problem", "task"),
    "prompt": ("question", "instruction", "query", "input", "user", "problem", "context"),
    "chosen": ("chosen_response", "preferred", "accepted", "better", "winner", "good", "positive", "response_chosen"),
    "rejected": ("rejected_response", "dispreferred", "worse", "loser", "bad", "negative", "response_rejected"),
    "output": ("response", "answer", "completion", "target", "reply", "assistant"),
    "completion": ("response", "answer", "output", "target", "reply", "assistant"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "turns", "chat"),
    "conversations": ("conversation", "messages", "dialog", "dialogue", "turns", "chat"),
}


def nearest_formats(columns: Mapping[str, pl.DataType]) -> list[tuple[str, dict[str, str]]]:
    """The formats that columns would fit under other names: (format, {its column: column there}), the likeliest first.

    A column for which there is no candidate is "..."; a format lacks one at most, and less than half.
    """
    ranked = []
    for number, (name, each) in enumerate(sources.FORMATS.items()):
        for layout in layouts(each):
            mapping = _mapping(layout, columns)
            missing = sum(there == "..." for there in mapping.values())
            if missing <= 1 and 2 * missing < len(mapping):
                exact = sum(wanted == there for wanted, there in mapping.items())
                ranked.append((missing, -len(mapping), -exact, number, name, mapping))
    best: dict[str, dict[str, str]] = {}
    for *_, name, mapping in sorted(ranked, key=lambda item: item[:4]):
        best.setdefault(name, {wanted: there for wanted, there in mapping.items() if wanted != there})
    return list(best.items())[:_MOST_NEAREST]


def _mapping(layout: Layout, columns: Mapping[str, pl.DataType]) -> dict[str, str]:
    """Each column that a layout needs -> the column that is most likely meant, or "..."."""
    free = [name for name in columns if name not in layout.types]
    mapping = {}
    for wanted, dtype in layout.columns.items():
        fitting = [name for name in free if fits(columns[name], dtype, layout.loose)]
        by_lower = {name.lower(): name for name in fitting}
        if wanted in columns and fits(columns[wanted], dtype, layout.loose):
            mapping[wanted] = wanted
            continue
        likely = [by_lower[name] for name in SYNONYMS.get(wanted, ()) if name in by_lower]
        likely += [by_lower[name] for name in get_close_matches(wanted, by_lower, n=1, cutoff=0.75)]
        mapping[wanted] = likely[0] if likely else "..."
        free = [name for name in free if name != mapping[wanted]]
    return mapping
