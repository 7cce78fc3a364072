"""What a build leaves behind: the files of a mixture, and what its manifest, ledger and card say of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from prefmix import card, mix
from prefmix.digest import SplitDigest, mixture_digest
from prefmix.ledger import ALIVE, CHANGES, ledger
from prefmix.mixture import columns, recorded, token_columns, write_durably, write_split
from prefmix.plan import Plan
from prefmix.schema import KINDS, ORIGIN, Kind

#: Called as `progress(stage, done, total)`; `done` counts sources, rows or texts of the stage.
Progress = Callable[[str, int, int], None]

#: The ledger, and the rows that are not as they were read, in a mixture's folder.
DROPS, CHANGED = "drops/drops.parquet", "drops/changes.parquet"

#: The stages that drop rows, in their order; the first part of a reason is its stage.
STAGES = ("source", "filter", "decontaminate", "dedupe", "mix")


@dataclass(frozen=True)
class Tally:
    """What became of the rows: by source the rows of each file that were read and the rows dropped for each reason; and
    how many rows the mixture has, copies counted."""

    read: Mapping[str, Mapping[str, int]]
    dropped: Mapping[str, Mapping[str, int]]
    copies: int

    def rows(self, source: str) -> int:
        """The rows of a source that were read."""
        return sum(self.read[source].values())

    def kept(self, source: str) -> int:
        """The rows of a source that are not dropped, each counted once."""
        return self.rows(source) - sum(self.dropped[source].values())

    def funnel(self) -> list[dict[str, Any]]:
        """`{"stage", "in", "dropped": {reason: count}, "out"}` for every stage that dropped or added rows."""
        by_reason: dict[str, int] = {}
        for reasons in self.dropped.values():
            for reason, count in reasons.items():
                by_reason[reason] = by_reason.get(reason, 0) + count
        left = sum(map(self.rows, self.read))
        stages: list[dict[str, Any]] = [{"stage": "read", "in": left, "dropped": {}, "out": left}]
        for stage in STAGES:
            reasons = {reason: count for reason, count in sorted(by_reason.items()) if reason.startswith(f"{stage}/")}
            if reasons:
                stages.append({"stage": stage, "in": left, "dropped": reasons, "out": left - sum(reasons.values())})
                left = stages[-1]["out"]
        if self.copies != left:
            stages.append(
                {"stage": "repeat", "in": left, "dropped": {}, "added": self.copies - left, "out": self.copies}
            )
        return stages


@dataclass(frozen=True)
class Curated:
    """The rows of every subset, each with its reason or its split, before anything is written."""

    plan: Plan
    rows: Mapping[Kind, pl.DataFrame]
    kept: Mapping[Kind, pl.DataFrame]
    audit: Mapping[str, Any]
    contamination: Mapping[str, Any]

    def split_sizes(self) -> dict[Kind, dict[str, dict[str, int | None]]]:
        """By subset and split the `rows`, copies counted, and the `tokens` where they are counted."""
        sizes: dict[Kind, dict[str, dict[str, int | None]]] = {}
        for kind, frame in self.kept.items():
            counted = [name for name in token_columns(kind) if name in frame.columns]
            for split in ("train", *self.plan.recipe.splits):
                part = frame.filter(split=split)
                if part.height:
                    tokens = sum(int((part[name] * part["copies"]).sum()) for name in counted) if counted else None
                    sizes.setdefault(kind, {})[split] = {"rows": int(part["copies"].sum()), "tokens": tokens}
        return sizes

    @cached_property
    def tally(self) -> Tally:
        return Tally(
            read=_counts(self.plan, self.rows.values(), "source_file"),
            dropped=_counts(self.plan, [frame.filter(~ALIVE) for frame in self.rows.values()], "reason"),
            copies=sum(int(frame["copies"].sum()) for frame in self.kept.values()),
        )


def _counts(planned: Plan, frames: Iterable[pl.DataFrame], by: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {name: {} for name in planned.sources}
    for frame in frames:
        for source, value, rows in frame.group_by(pl.col("source").cast(pl.String), by).len().sort("source", by).rows():
            found[source][value] = rows
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
    (folder / "drops").mkdir()
    for path, listed in ((DROPS, ledger), (CHANGED, changes)):
        found = pl.concat(listed(frame, kind) for kind, frame in curated.rows.items())
        found.sort("kind", "source", "source_row").write_parquet(folder / path)
    digest = mixture_digest(schemas, digests)
    return finished(folder, planned, curated.tally, subsets, digest, curated.audit, curated.contamination)


def finished(
    folder: Path,
    planned: Plan,
    tally: Tally,
    subsets: Mapping[str, Any],
    digest: str,
    audit: Mapping[str, Any],
    contamination: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the recipe and the card beside the rows and the ledger; gives the manifest."""
    recipe = planned.recipe
    identity = json.dumps([digest, planned.recipe_digest, planned.fingerprint])
    entries = source_entries(planned, tally)
    loaded = planned.tokenizer
    manifest = {
        "format": 1, "name": recipe.name, "build": sha256(identity.encode()).hexdigest()[:12], "digest": digest,
        "recipe_digest": planned.recipe_digest, "fingerprints": planned.fingerprint, "seed": recipe.seed,
        "license": recipe.license or card.strictest(entry["licence"] for entry in entries.values()),
        "subsets": subsets, "sources": entries, "funnel": tally.funnel(), "audit": audit,
        "benchmarks": _benchmark_entries(planned), "contamination": contamination,
        "tokenizer": loaded and {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256, "added": loaded.added},
        "tools": {name: version(name) for name in ("prefmix", "polars", "pyarrow", "tokenizers")},
    }  # fmt: skip
    write_durably(folder / "recipe.toml", recipe.to_toml(planned.revisions))
    write_durably(folder / "README.md", card.card(manifest))
    manifest["records"] = recorded(folder, (DROPS, CHANGED, "recipe.toml", "README.md"))
    return manifest


def source_entries(planned: Plan, tally: Tally) -> dict[str, dict[str, Any]]:
    """The manifest's `sources`: what each one is and what became of its rows."""
    entries: dict[str, Any] = {}
    for name, source in planned.sources.items():
        spec = planned.recipe.sources[name]
        entries[name] = {
            "format": source.format, "kind": source.kind,
            **({"hub": spec.hub} if spec.hub else {"path": spec.path}),
            "revision": source.revision, "licence": source.license or card.KNOWN_LICENCES.get(spec.hub or "", card.UNKNOWN),
            "files": [{"path": file, "sha256": sha, "rows": tally.read[name].get(file, 0)} for file, sha in planned.fingerprints[name]],
            "read": tally.rows(name), "kept": tally.kept(name), "dropped": tally.dropped[name],
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


def changes(rows: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """One row for each change of a row, in the order of `CHANGES`."""
    return (
        rows.lazy().filter(pl.col("changes").list.len() > 0).select("id", *ORIGIN, "changes", kind=pl.lit(kind))
        .explode("changes", empty_as_null=False).unnest("changes")
        .select(pl.col(name).cast(dtype) for name, dtype in CHANGES.items()).collect()
    )  # fmt: skip
