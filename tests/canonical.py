"""Canonical rows for tests, from short texts."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from prefmix.schema import CANONICAL, NO_CHANGES, Kind, with_ids

Turns = Sequence[tuple[str, str]]


def turns(content: str | Turns, role: str) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return [{"role": role_, "content": text} for role_, text in content]


def pair(
    prompt: str | Turns, chosen: str | Turns, rejected: str | Turns, scores: tuple = (None, None), source: str = "a"
) -> dict:
    return {
        "source": source,
        "prompt": turns(prompt, "user"),
        "chosen": turns(chosen, "assistant"),
        "rejected": turns(rejected, "assistant"),
        "chosen_score": scores[0],
        "rejected_score": scores[1],
    }


def chat(*messages: tuple[str, str], source: str = "a") -> dict:
    return {"source": source, "messages": turns(messages, "")}


def frame(rows: Sequence[dict], kind: Kind = "preference", sources: Sequence[str] = ("a", "b", "c")) -> pl.DataFrame:
    """Rows as they are when they come from their source: numbered, with ids, all alive."""
    schema = {name: dtype for name, dtype in CANONICAL[kind].items() if name != "id"}
    numbered = [{**row, "source_file": "f.jsonl", "source_row": n} for n, row in enumerate(rows)]
    read = with_ids(pl.DataFrame(numbered, schema=schema), kind)
    return read.with_columns(pl.col("source").cast(pl.Enum(list(sources))), NO_CHANGES)
