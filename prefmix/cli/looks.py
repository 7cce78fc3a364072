"""What a build would give, for a look at it: a dry run in the words of a manifest, some rows, what to be warned about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefmix.inspect import Row
    from prefmix.manifest import Curated
    from prefmix.scale import Settled

#: Reasons that the recipe asks for by name: a source that loses most of its rows to them is not one to look at.
ASKED_FOR = ("source/where", "source/excluded", "mix/not_sampled")


def preview(curated: Curated | Settled) -> dict[str, Any]:
    """What a manifest says of the rows, for a build that is not written: the same keys."""
    from prefmix.manifest import source_entries

    sources = source_entries(curated.plan, curated.tally)
    return {
        "name": curated.plan.recipe.name,
        "recipe_digest": curated.plan.recipe_digest,
        "funnel": curated.tally.funnel(),
        "sources": sources,
        "subsets": curated.split_sizes(),
        "audit": dict(curated.audit),
        "contamination": dict(curated.contamination),
        "warnings": warnings(sources),
    }


def samples(curated: Curated | Settled) -> list[Row]:
    """Two kept rows: the first of each kind, or the first two of the only kind; none of a build that is not in memory."""
    from prefmix.inspect import Row
    from prefmix.manifest import Curated
    from prefmix.schema import PARTS

    if not isinstance(curated, Curated):
        return []
    frames = {kind: frame for kind, frame in curated.kept.items() if frame.height}
    return [
        Row(row["id"], kind, str(row["source"]), {part: row[part] for part in PARTS[kind]}, split=row["split"])
        for kind, frame in frames.items()
        for row in frame.head(3 - min(2, len(frames))).iter_rows(named=True)
    ]


def samples_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{"id": row.id, "kind": row.kind, "source": row.source, "split": row.split, **row.parts} for row in rows]


def warnings(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each source of which less than half is kept for reasons that the recipe did not ask for."""
    found = []
    for name, entry in sources.items():
        reasons = {reason: count for reason, count in entry["dropped"].items() if reason not in ASKED_FOR}
        offered = entry["kept"] + sum(reasons.values())
        if reasons and entry["kept"] * 2 < offered:
            most = max(reasons, key=lambda reason: reasons[reason])
            kept = (
                f"only {entry['kept']:,} of {offered:,} rows are" if entry["kept"] else f"none of {offered:,} rows is"
            )
            found.append(f"{name}: {kept} kept; {reasons[most]:,} of the others are {most}")
    return found
