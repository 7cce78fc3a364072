"""What a build leaves behind: the files of a mixture, and what its manifest, ledger and card say of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from prefmix import card, mix
from prefmix.digest import SplitDigest, mixture_digest
from prefmix.ledger import ALIVE, CHANGES, ledger
from prefmix.mixture import columns, recorded, write_durably, write_split
from prefmix.plan import Plan
from prefmix.schema import KINDS, ORIGIN, Kind

#: Called as `progress(stage, done, total)`; `done` counts sources, rows or texts of the stage.
Progress = Callable[[str, int, int], None]

#: The stages that drop rows, in their order; the first part of a reason is its stage.
STAGES = ("source", "filter", "decontaminate", "dedupe", "mix")


@dataclass(frozen=True)
class Curated:
    """The rows of every subset, each with its reason or its split, before anything is written."""

    plan: Plan
    rows: Mapping[Kind, pl.DataFrame]
    kept: Mapping[Kind, pl.DataFrame]
    audit: Mapping[str, Any]
    contamination: Mapping[str, Any]

    def funnel(self) -> list[dict[str, Any]]:
        """`{"stage", "in", "dropped": {reason: count}, "out"}` for every stage that dropped or added rows."""
        dropped = self.dropped()
        by_reason: dict[str, int] = {}
        for reasons in dropped.values():
            for reason, count in reasons.items():
                by_reason[reason] = by_reason.get(reason, 0) + count
        left = sum(frame.height for frame in self.rows.values())
        stages: list[dict[str, Any]] = [{"stage": "read", "in": left, "dropped": {}, "out": left}]
        for stage in STAGES:
            reasons = {reason: count for reason, count in sorted(by_reason.items()) if reason.startswith(f"{stage}/")}
            if reasons:
                stages.append({"stage": stage, "in": left, "dropped": reasons, "out": left - sum(reasons.values())})
                left = stages[-1]["out"]
        copies = sum(int(frame["copies"].sum()) for frame in self.kept.values())
        if copies != left:
            stages.append({"stage": "repeat", "in": left, "dropped": {}, "added": copies - left, "out": copies})
        return stages

    def dropped(self) -> dict[str, dict[str, int]]:
        """Per source, the number of rows for each reason."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.plan.sources}
        for frame in self.rows.values():
            counts = frame.filter(~ALIVE).group_by(pl.col("source").cast(pl.String), "reason").len()
            for source, reason, count in counts.sort("source", "reason").rows():
                found[source][reason] = count
        return found


def write(curated: Curated, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes everything of a mixture but its manifest into a folder; gives the manifest."""
    planned, recipe = curated.plan, curated.plan.recipe
    kinds = [kind for kind in KINDS if kind in curated.kept and curated.kept[kind].height]
    schemas: dict[str, pa.Schema] = {
        kind: columns(kind, recipe.format.layout, planned.tokenizer is not None) for kind in kinds
    }
    total = sum(int(curated.kept[kind]["copies"].sum()) for kind in kinds)
    written: list[int] = []

    def write_subset(kind: Kind) -> dict[str, tuple[dict[str, Any], SplitDigest]]:
        found = {}
        for split in ("train", *recipe.splits):
            part = mix.ordered(curated.kept[kind].filter(pl.col("split") == split), kind, recipe.seed)
            if part.height:
                progress("write", sum(written), total)
                found[split] = write_split(folder, kind, split, part, schemas[kind])
                written.append(part.height)
        return found

    with ThreadPoolExecutor(min(2, pl.thread_pool_size())) as pool:
        found = dict(zip(kinds, pool.map(write_subset, kinds), strict=True))
    subsets: dict[str, dict[str, Any]] = {
        kind: {split: entry for split, (entry, _) in splits.items()} for kind, splits in found.items()
    }
    digests: dict[str, dict[str, SplitDigest]] = {
        kind: {split: digest for split, (_, digest) in splits.items()} for kind, splits in found.items()
    }
    progress("write", total, total)
    manifest = _manifest(curated, subsets, mixture_digest(schemas, digests))
    (folder / "drops").mkdir()
    _ledger(curated).write_parquet(folder / "drops" / "drops.parquet")
    _changes(curated).write_parquet(folder / "drops" / "changes.parquet")
    write_durably(folder / "recipe.toml", recipe.to_toml(planned.revisions))
    write_durably(folder / "README.md", card.card(manifest))
    manifest["records"] = recorded(folder, ("drops/drops.parquet", "drops/changes.parquet", "recipe.toml", "README.md"))
    return manifest


def source_entries(curated: Curated) -> dict[str, dict[str, Any]]:
    """The manifest's `sources`: what each one is and what became of its rows."""
    planned, recipe = curated.plan, curated.plan.recipe
    dropped = curated.dropped()
    entries: dict[str, Any] = {}
    for name, source in planned.sources.items():
        frame = next(frame for kind, frame in curated.rows.items() if kind == source.kind)
        own = frame.filter(pl.col("source") == name)
        by_file = dict(own.group_by("source_file").len().rows())
        spec = recipe.sources[name]
        entries[name] = {
            "format": source.format, "kind": source.kind,
            **({"hub": spec.hub} if spec.hub else {"path": spec.path}),
            "revision": source.revision, "licence": source.license or card.KNOWN_LICENCES.get(spec.hub or "", card.UNKNOWN),
            "files": [{"path": file, "sha256": sha, "rows": by_file.get(file, 0)} for file, sha in planned.fingerprints[name]],
            "read": own.height, "kept": own.filter(ALIVE).height, "dropped": dropped[name],
        }  # fmt: skip
    return entries


def _benchmark_entries(planned: Plan) -> dict[str, dict[str, Any]]:
    """The manifest's `benchmarks`: what the rows were searched for."""
    return {
        each.name: {
            "fields": list(each.fields),
            "revisions": dict(each.revisions),
            "files": [{"path": file, "sha256": sha} for file, sha in planned.fingerprints[each.table]],
        }
        for each in planned.benchmarks
    }


def _manifest(curated: Curated, subsets: Mapping[str, Any], digest: str) -> dict[str, Any]:
    planned, recipe = curated.plan, curated.plan.recipe
    fingerprints = planned.fingerprint
    identity = json.dumps([digest, planned.recipe_digest, fingerprints])
    entries = source_entries(curated)
    loaded = planned.tokenizer
    return {
        "format": 1, "name": recipe.name, "build": sha256(identity.encode()).hexdigest()[:12], "digest": digest,
        "recipe_digest": planned.recipe_digest, "fingerprints": fingerprints, "seed": recipe.seed,
        "license": recipe.license or card.strictest(entry["licence"] for entry in entries.values()),
        "subsets": subsets, "sources": entries, "funnel": curated.funnel(), "audit": curated.audit,
        "benchmarks": _benchmark_entries(planned), "contamination": curated.contamination,
        "tokenizer": loaded and {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256, "added": loaded.added},
        "tools": {name: version(name) for name in ("prefmix", "polars", "pyarrow", "tokenizers")},
    }  # fmt: skip


def _ledger(curated: Curated) -> pl.DataFrame:
    parts = pl.concat(ledger(frame, kind) for kind, frame in curated.rows.items())
    return parts.sort("kind", "source", "source_row")


def _changes(curated: Curated) -> pl.DataFrame:
    parts = [
        frame.lazy().filter(pl.col("changes").list.len() > 0).select("id", *ORIGIN, "changes", kind=pl.lit(kind))
        .explode("changes", empty_as_null=False).unnest("changes")
        .select(pl.col(name).cast(dtype) for name, dtype in CHANGES.items())
        for kind, frame in curated.rows.items()
    ]  # fmt: skip
    return pl.concat(parts).collect().sort("kind", "source", "source_row")
