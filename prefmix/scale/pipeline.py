"""A build whose rows are never all in memory: the stages in their order, each as pieces of work on files in a scratch folder.

read, filter, decontaminate            rows.prepare     a unit of a source at a time; what follows sees its keys
exact duplicates                       keys.exact       by the hash of the prompt
near-duplicates                        connected, keys.near    rows that share buckets, in groups
take, shares, repeat; audit            sampling         by the hash of the prompt, when the ends of each take are known
splits                                 keys.divide
ledger                                 rows.account     by parts
texts joined back, shards              rows.finish      by runs of the mixture's order

The rules are those of `build` in memory: the same functions, on parts that hold all that a rule has to compare. So the
digest, the ledger and the funnel are the same. This process holds, whatever the number and length of the rows: some bytes
of each row's number (`Job.rows`), and what it shows of benchmarks' texts that were found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from prefmix import decontaminate, files
from prefmix.digest import SplitDigest, mixture_digest
from prefmix.ledger import CHANGES, LEDGER, check_conservation
from prefmix.manifest import CHANGED, DROPS, Tally, finished
from prefmix.mixture import columns
from prefmix.plan import Plan
from prefmix.scale import keys, rows
from prefmix.scale.connected import connected
from prefmix.scale.job import Job, Part, Run, Unit
from prefmix.scale.sampling import sample
from prefmix.schema import Kind


@dataclass(frozen=True)
class Settled:
    """Rows of which all is decided and whose texts are still in the scratch folder."""

    job: Job
    run: Run
    tally: Tally
    audit: Mapping[str, Any]
    contamination: Mapping[str, Any]

    @property
    def plan(self) -> Plan:
        return self.job.planned

    def split_sizes(self) -> dict[Kind, dict[str, dict[str, int | None]]]:
        """As `manifest.Curated` has it; tokens are counted when the rows are written."""
        lengths = [part.rows for part in self.job.parts]
        sizes: dict[Kind, dict[str, dict[str, int | None]]] = {}
        for kind in self.job.kinds:
            own = np.repeat([part.kind == kind for part in self.job.parts], lengths)
            splits = ("train", *self.plan.recipe.splits)
            counts = np.bincount(self.job.rows["split"][own], self.job.rows["copies"][own], len(splits)).astype(int)
            found = {
                split: {"rows": rows, "tokens": None}
                for split, rows in zip(splits, counts.tolist(), strict=True)
                if rows
            }
            sizes |= {kind: found} if found else {}
        return sizes


def settle(job: Job, run: Run, refuse: Callable[[Mapping[str, Any]], None]) -> Settled:
    """Runs every stage up to the ledger. `refuse` may raise on the report of text of benchmarks."""
    recipe = job.planned.recipe
    job, alive, contamination = _read(job, run, refuse)
    if recipe.dedupe.exact != "off" or recipe.dedupe.prompt_cap is not None:
        job = _drop(job, run.map("exact", keys.exact, job, range(job.sizes.partitions)))
    if recipe.dedupe.near is not None:
        universes = [job.kinds] if recipe.dedupe.across else [[kind] for kind in job.kinds]
        job = _drop(job, run.map("near", keys.near, job, connected(job, run, "near", universes)))
    job, audited = sample(job, run, alive)
    joined: dict[int, int] = {}
    if recipe.dedupe.near is not None and recipe.splits:
        kept = job.knowing(alive=job.rows["copies"] > 0)
        for result in run.map("prompts", keys.join, job, connected(kept, run, "prompts", [job.kinds])):
            joined.update(job.scratch.read(result["file"]).rows())
    job = job.with_facts(joined=joined)
    split = np.zeros(len(job.rows["alive"]), np.uint8)
    for result in run.map("divide", keys.divide, job, range(job.sizes.partitions)):
        found = job.scratch.read(result["file"])
        split[found["_index"].to_numpy()] = found["split"].to_numpy()
    job = job.knowing(split=split)
    return Settled(job, run, _account(job, run), audited, contamination)


def write(settled: Settled, folder: Path) -> dict[str, Any]:
    """Writes everything of a mixture but its manifest into a folder; gives the manifest."""
    job, run, recipe = settled.job, settled.run, settled.job.planned.recipe
    repeats = bool((job.rows["copies"] > 1).any())
    job = job.with_facts(repeats=repeats)
    if repeats:
        for _ in run.map("repeat", rows.spread, job, job.parts):
            pass
    schemas: dict[str, pa.Schema] = {}
    digests: dict[str, dict[str, SplitDigest]] = {}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    buckets = [rows.Bucket(kind, number) for kind in job.kinds for number in range(job.sizes.buckets)]
    for bucket, result in zip(buckets, run.map("shards", rows.finish, job, buckets), strict=True):
        for split, entry in result["splits"].items():
            kind = bucket.kind
            schemas[kind] = columns(kind, recipe.format.layout, job.planned.tokenizer is not None)
            digest = digests.setdefault(kind, {}).setdefault(split, SplitDigest(schemas[kind]))
            for batch in job.scratch.batches(entry["file"]["path"]):
                digest.update(batch)
            found.setdefault(kind, {}).setdefault(split, []).append(entry)
    subsets = {
        kind: {split: _shards(job, folder, kind, split, found[kind][split])
               for split in ("train", *recipe.splits) if split in found[kind]}
        for kind in found
    }  # fmt: skip
    (folder / "drops").mkdir()
    in_order = sorted(job.parts, key=lambda part: (part.kind, part.source, part.first))
    _write_parquet(folder / DROPS, LEDGER, (job.scratch.read(f"ledger/{part.name}") for part in in_order))
    _write_parquet(
        folder / CHANGED,
        CHANGES,
        (job.scratch.read(f"changes/{part.name}").with_columns(pl.col("source_row") + part.base) for part in in_order),
    )
    digest = mixture_digest(schemas, digests)
    return finished(folder, job.planned, settled.tally, subsets, digest, settled.audit, settled.contamination)


def _read(
    job: Job, run: Run, refuse: Callable[[Mapping[str, Any]], None]
) -> tuple[Job, dict[str, int], Mapping[str, Any]]:
    """Reads the sources; gives the job with its parts, the living rows of each source, and the report on benchmarks."""
    planned = job.planned
    index = None
    if planned.benchmarks:
        index = decontaminate.index_of(planned.benchmarks, planned.recipe.decontaminate.ngram)
    units = [
        Unit(name, number, span)
        for name, source in planned.sources.items()
        for number, each in enumerate(source.files)
        for span in files.spans(each.path, job.sizes.rows, job.sizes.part)
    ]
    types = {name: source.where_types() for name, source in planned.sources.items()}
    reading = replace(job, index=index, types=types)
    parts: list[Part] = []
    alive: dict[str, int] = dict.fromkeys(planned.sources, 0)
    read: dict[str, int] = dict.fromkeys(planned.sources, 0)
    for unit, result in zip(units, run.map("prepare", rows.prepare, reading, units), strict=True):
        source, base = planned.sources[unit.source], read[unit.source]
        for made in result["parts"]:
            first = parts[-1].first + parts[-1].rows if parts else 0
            file = source.files[unit.file].name
            parts.append(Part(made["name"], source.kind, unit.source, file, made["rows"], first, base))
            read[unit.source] += made["rows"]
            alive[unit.source] += made["alive"]
    contamination: Mapping[str, Any] = {}
    if index is not None:
        contamination = decontaminate.report(_found(job, parts), index)
        refuse(contamination)
    number = max(min(job.sizes.partitions, len(parts)), 1)
    portions = [parts[len(parts) * at // number].first for at in range(number)] if parts else [0]
    everywhere = np.ones(sum(part.rows for part in parts), bool)
    facts = {"portions": np.array(portions), "decisions": []}
    return replace(job, parts=tuple(parts), rows={"alive": everywhere}, facts=facts), alive, contamination


def _found(job: Job, parts: Sequence[Part]) -> pl.DataFrame:
    """What `decontaminate.find` gave for the parts, with the rows' numbers as places."""
    frames = [
        job.scratch.read(f"found/{part.name}").with_columns(
            pl.col("place") + pl.lit(part.first, pl.UInt32),
            pl.col("part").cast(decontaminate.PARTS),
            pl.col("rule").cast(decontaminate.RULES),
        )
        for part in parts
    ]
    return pl.concat(frames).sort("kind", "place", maintain_order=True)


def _drop(job: Job, results: Iterable[Mapping[str, Any]]) -> Job:
    """The job after decisions: who was dropped is alive no more."""
    alive, names = job.rows["alive"].copy(), list(job.facts["decisions"])
    for result in results:
        alive[job.scratch.read(result["file"], columns=["_index"])["_index"].to_numpy()] = False
        names.append(result["file"])
    return job.knowing(alive=alive).with_facts(decisions=names)


def _account(job: Job, run: Run) -> Tally:
    """Writes the ledger, by parts, and counts what became of the rows."""
    bounds = [*job.facts["portions"].tolist(), len(job.rows["alive"])]
    portions = [
        rows.Portion(at, [part for part in job.parts if bounds[at] <= part.first < bounds[at + 1]])
        for at in range(len(bounds) - 1)
    ]
    read: dict[str, dict[str, int]] = {name: {} for name in job.planned.sources}
    kept: dict[str, int] = dict.fromkeys(job.planned.sources, 0)
    copies = job.rows["copies"]
    for part in job.parts:
        read[part.source][part.file] = read[part.source].get(part.file, 0) + part.rows
        kept[part.source] += int((copies[part.first : part.first + part.rows] > 0).sum())
    dropped: dict[str, dict[str, int]] = {name: {} for name in job.planned.sources}
    for result in run.map("ledger", rows.account, job, portions):
        for source, reason, count in result["dropped"]:
            dropped[source][reason] = dropped[source].get(reason, 0) + count
    ordered = {source: dict(sorted(reasons.items())) for source, reasons in dropped.items()}
    tally = Tally(read, ordered, int(copies.sum()))
    check_conservation(
        {source: tally.rows(source) for source in read},
        kept,
        {name: sum(found.values()) for name, found in dropped.items()},
    )
    return tally


def _shards(job: Job, folder: Path, kind: str, split: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Puts the shards of a split into the mixture's folder; gives the manifest's entry."""
    (folder / kind).mkdir(exist_ok=True)
    entries = []
    for number, each in enumerate(found):
        path = f"{kind}/{split}-{number:05d}-of-{len(found):05d}.arrow"
        job.scratch.move_to(each["file"]["path"], folder / path)
        entries.append({**each["file"], "path": path})
    tokens = [each["tokens"] for each in found]
    return {
        "rows": sum(each["rows"] for each in found),
        "tokens": None if None in tokens else sum(tokens),
        "files": entries,
    }


def _write_parquet(path: Path, columns: Mapping[str, Any], frames: Iterable[pl.DataFrame]) -> None:
    """Writes frames, one after the other, as one Parquet file."""
    schema = pl.DataFrame(schema=columns).to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for frame in frames:
            if frame.height:
                writer.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema))
