"""What a build would give, for a look at it: a dry run in the words of a manifest, some rows, what to be warned about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefmix.inspect import Row
    from prefmix.manifest import Curated
    from prefmix.schema import Kind

#: Reasons that the recipe asks for by name: a source that loses most of its rows to them is not one to look at.
ASKED_FOR = ("source/where", "source/excluded", "mix/not_sampled")


def preview(curated: Curated) -> dict[str, Any]:
    """What a manifest says of the rows, for a build that is not written: the same keys."""
    from prefmix.manifest import source_entries

    sources = source_entries(curated.plan, curated.tally)
    return {
        "name": curated.plan.recipe.name,
        "recipe_digest": curated.plan.recipe_digest,
        "funnel": curated.tally.funnel(),
        "sources": sources,
        "subsets": {kind: _split_sizes(curated, kind) for kind, frame in curated.kept.items() if frame.height},
        "audit": dict(curated.audit),
        "contamination": dict(curated.contamination),
        "warnings": warnings(sources),
    }


def _split_sizes(curated: Curated, kind: Kind) -> dict[str, dict[str, int | None]]:
    frame = curated.kept[kind]
    parts = ("tokens",) if kind == "sft" else ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    counted = [name for name in parts if name in frame.columns]
    sizes: dict[str, dict[str, int | None]] = {}
    for split in ("train", *curated.plan.recipe.splits):
        part = frame.filter(split=split)
        if part.height:
            tokens = sum(int((part[name] * part["copies"]).sum()) for name in counted) if counted else None
            sizes[split] = {"rows": int(part["copies"].sum()), "tokens": tokens}
    return sizes


def samples(curated: Curated) -> list[Row]:
    """Two kept rows: the first of each kind, or the first two of the only kind."""
    from prefmix.inspect import Row
    from prefmix.schema import PARTS

    frames = {kind: frame for kind, frame in curated.kept.items() if frame.height}
    return [
        Row(row["id"], kind, str(row["source"]), {part: row[part] for part in PARTS[kind]}, split=row["split"])
        for kind, frame in frames.items()
        for row in frame.head(3 - min(2, len(frames))).iter_rows(named=True)
    ]


def samples_json(curated: Curated) -> list[dict[str, Any]]:
    rows = samples(curated)
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
