"""What the commands about mixtures give with --json, as plain data. docs/cli.md promises the keys: they stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefmix.inspect import Diff, Dropped, Row, Story


def entry_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ledger, or a change: its evidence as an object."""
    return {**entry, "detail": entry["detail"] and json.loads(entry["detail"])}


def row_json(row: Row | None) -> dict[str, Any] | None:
    """A row with its texts; None where they cannot be read."""
    return None if row is None else asdict(row)


def dropped_json(dropped: Dropped) -> dict[str, Any]:
    """A row of the ledger with its texts and the row that was kept instead."""
    texts = {"row": row_json(dropped.row), "kept": row_json(dropped.kept)}
    return {**entry_json(dropped.entry), **texts, "kept_reason": dropped.kept_reason}


def story_json(story: Story) -> dict[str, Any]:
    """What became of the rows with one id."""
    return {
        "id": story.id,
        "in_mixture": story.row is not None,
        "row": row_json(story.row),
        "places": list(story.places),
        "changes": [entry_json(change) for change in story.changes],
        "dropped": [dropped_json(dropped) for dropped in story.dropped],
        "instead_of": [entry_json(entry) for entry in story.instead_of],
    }


def diff_json(found: Diff, limit: int | None) -> dict[str, Any]:
    """Two mixtures: `counts` are of rows with their copies, and each list has at most `limit` rows."""
    tables = {"came": found.came, "went": found.went, "moved": found.moved, "changed": found.changed}
    sides = {
        name: {"mixture": str(mixture), "digest": mixture.digest, "rows": mixture.funnel[-1]["out"]}
        for name, mixture in (("a", found.a), ("b", found.b))
    }
    return {
        **sides,
        "same_digest": found.a.digest == found.b.digest,
        "recipe": [asdict(change) for change in found.recipe],
        "files": [asdict(change) for change in found.files],
        "counts": found.counts,
        **{name: (table if limit is None else table.head(limit)).to_dicts() for name, table in tables.items()},
    }
