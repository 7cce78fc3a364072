"""The first and the last pieces of work, which see the texts: from sources to parts, and from parts to shards and ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from prefmix import audit, batch, decontaminate, dedupe, minhash, mix
from prefmix.ledger import ALIVE, LEDGER, ledger
from prefmix.manifest import changes
from prefmix.mixture import BATCH_ROWS, columns, rendered, token_columns, tokens_of, write_shard
from prefmix.scale.job import Job, Part, Result, Unit
from prefmix.schema import NO_CHANGES, PARTS, Kind, prompt_text


def prepare(job: Job, unit: Unit) -> Result:
    """Reads a unit and does what needs only the row itself; leaves the living rows' texts by their order in the mixture,
    their keys by the hash of their prompts and the keys of their buckets by bands; and what is dropped."""
    source = job.planned.sources[unit.source]
    parts: list[dict[str, Any]] = []
    number = list(job.planned.sources).index(unit.source)
    frames = source.read_part(unit.file, unit.span, job.sizes.rows, job.planned.recipe.seed, job.types[unit.source])
    for rows in _of_size(frames, job.sizes.part):
        name = f"{number:03d}-{unit.file:05d}-{unit.span.start:015d}-{len(parts):04d}"
        read = rows.with_columns(pl.col("source").cast(job.priority), NO_CHANGES)
        parts.append({"name": name, "rows": rows.height, "alive": _prepare(job, name, read, source.kind)})
    return {"parts": parts}


def _prepare(job: Job, name: str, rows: pl.DataFrame, kind: Kind) -> int:
    """Does it for one part; gives the number of living rows."""
    recipe, scratch = job.planned.recipe, job.scratch
    marked = batch.filtered(rows, kind, job.planned)
    if job.index is not None:
        found = decontaminate.find({kind: marked}, job.index, recipe.decontaminate.answers)
        marked = decontaminate.drop({kind: marked}, found)[kind]
        scratch.write(f"found/{name}", found.with_columns(pl.col("part", "rule").cast(pl.String)))
    scratch.write(f"dropped/{name}", ledger(marked, kind))
    scratch.write(f"changes/{name}", changes(marked, kind))
    alive = marked.with_row_index("_index").filter(ALIVE)
    bucket = order_cut(alive["id"], pl.zeros(alive.height, pl.UInt64, eager=True), job)
    scores = ["chosen_score", "rejected_score"] if kind == "preference" else []
    counts = [column for column in token_columns(kind) if column in alive.columns]
    texts = alive.select(pl.col("_index").alias("place"), "id", "source_row", *PARTS[kind], *scores, *counts)
    scratch.write(f"texts/{name}", texts, bucket, job.sizes.buckets)
    keys = dedupe.keys(alive.lazy(), kind).drop("source")
    facts = audit.facts(alive.lazy(), recipe.filter, kind).drop(
        "chosen_score", "rejected_score", "margin_score", strict=False
    )
    keyed = pl.concat([keys, facts], how="horizontal").rename({"_index": "place"}).collect()
    if recipe.splits:
        keyed = keyed.with_columns(cluster=pl.Series(mix.clusters_of(alive.select(prompt_text(kind)).to_series())))
    scratch.write(f"keys/{name}", keyed, _cut(keyed["prompt_a"], job.sizes.partitions), job.sizes.partitions)
    if (near := recipe.dedupe.near) is not None:
        texts_of = {"near": dedupe.compared(near.on, kind)} | ({"prompts": prompt_text(kind)} if recipe.splits else {})
        for what, text in texts_of.items():
            compared = alive.select(text).to_series()
            places, bands = minhash.band_keys(compared, **dedupe.minhash_settings(near))
            _write_bands(job, f"{what}-bands/{name}", alive["_index"].to_numpy()[places], bands)
    return alive.height


def _write_bands(job: Job, name: str, places: np.ndarray, bands: np.ndarray) -> None:
    """Writes the keys of rows, (bands, rows), by band and in it by range."""
    keys = pl.DataFrame({"place": np.tile(places, len(bands)), "key": bands.ravel()})
    band = np.repeat(np.arange(len(bands)), len(places))
    cut = band * job.sizes.ranges + _cut(keys["key"], job.sizes.ranges)
    job.scratch.write(name, keys, cut, len(bands) * job.sizes.ranges)


def _of_size(frames: Iterator[pl.DataFrame], size: int) -> Iterator[pl.DataFrame]:
    """The frames, large ones in pieces of about `size` bytes."""
    for frame in frames:
        pieces = max(1, -(-int(frame.estimated_size()) // (2 * size)))
        yield from frame.iter_slices(max(1, -(-frame.height // pieces)))


def _cut(hashes: pl.Series, cuts: int) -> np.ndarray:
    """int64, the cut of each hash (uint64): hashes in ascending order are in ascending cuts."""
    return ((hashes.to_numpy() >> np.uint64(32)) * np.uint64(cuts) >> np.uint64(32)).astype(np.int64)


def order_cut(ids: pl.Series, copies: pl.Series, job: Job) -> np.ndarray:
    """int64, the bucket of each copy of some rows."""
    return _cut(mix.draws(ids, job.planned.recipe.seed, mix.ORDER, copies), job.sizes.buckets)


def spread(job: Job, part: Part) -> Result:
    """Copies rows that go into the mixture several times into the buckets of their other copies."""
    texts = job.scratch.read(f"texts/{part.name}")
    times = job.rows["copies"][texts["place"].to_numpy() + part.first]
    more = texts[np.repeat(np.arange(len(times)), np.maximum(times - 1, 0))]
    number = np.concatenate(
        [np.zeros(0, np.uint64), *(np.arange(1, count, dtype=np.uint64) for count in times if count > 1)]
    )
    copied = more.with_columns(copy=pl.Series(number, dtype=pl.UInt64))
    job.scratch.write(f"copies/{part.name}", copied, order_cut(copied["id"], copied["copy"], job), job.sizes.buckets)
    return {}


class Bucket(NamedTuple):
    """A run of the rows of a kind in the order of the mixture: with each of its splits, one shard of it."""

    kind: Kind
    number: int


def finish(job: Job, bucket: Bucket) -> Result:
    """Joins the kept rows of a bucket with their texts, in their order, and writes them; `splits`: for each split with rows
    their number, their tokens and the file."""
    kind, recipe = bucket.kind, job.planned.recipe
    rows = job.gathered("texts", kind, bucket.number).with_columns(copy=pl.lit(0, pl.UInt64))
    rows = rows.filter(pl.Series(job.rows["copies"][rows["_index"].to_numpy()] > 0, dtype=pl.Boolean))
    if job.facts["repeats"]:
        rows = pl.concat([rows, job.gathered("copies", kind, bucket.number).select(rows.columns)], rechunk=True)
    rows = rows[mix.order(rows, kind, recipe.seed)].with_columns(reason=pl.lit(None, pl.String))
    split_of = job.rows["split"][rows["_index"].to_numpy()]
    rows = batch.counted(rows.drop("_index"), kind, job.planned)
    schema = columns(kind, recipe.format.layout, job.planned.tokenizer is not None)
    splits: dict[str, Any] = {}
    for number, split in enumerate(("train", *recipe.splits)):
        own = rows.filter(pl.Series(split_of == number, dtype=pl.Boolean))
        if own.is_empty():
            continue
        name = f"shards/{kind}-{split}-{bucket.number:05d}.arrow"
        with job.scratch.writing(name) as path:
            written = write_shard(
                path, name, schema, (rendered(part, kind, schema) for part in own.iter_slices(BATCH_ROWS))
            )
        splits[split] = {"rows": own.height, "tokens": tokens_of(own, kind), "file": written}
    return {"splits": splits}


class Portion(NamedTuple):
    """Parts that follow one another in the ledger."""

    number: int
    parts: Sequence[Part]


def account(job: Job, portion: Portion) -> Result:
    """The ledger of some parts: what was dropped when they were read, and what was decided of their rows later."""
    decisions = [job.scratch.read(name, portion.number) for name in job.facts["decisions"]]
    later = pl.concat(decisions) if decisions else None
    dropped: dict[tuple[str, str], int] = {}
    for part in portion.parts:
        found = job.scratch.read(f"dropped/{part.name}").with_columns(pl.col("source_row") + part.base)
        if later is not None:
            own = later.filter(pl.col("_index").is_between(part.first, part.first + part.rows, closed="left"))
            found = pl.concat([found, _decided_later(job, part, own)])
        for reason, rows in found.group_by("reason").len().rows():
            dropped[part.source, reason] = dropped.get((part.source, reason), 0) + rows
        job.scratch.write(f"ledger/{part.name}", found.sort("source_row"))
    return {"dropped": [[source, reason, rows] for (source, reason), rows in dropped.items()]}


def _decided_later(job: Job, part: Part, decisions: pl.DataFrame) -> pl.DataFrame:
    """Ledger rows of decisions about rows that were alive when their part was written."""
    rows = job.scratch.read(f"keys/{part.name}", columns=["place", "id", "source_row"])
    places = decisions.with_columns(place=pl.col("_index") - pl.lit(part.first, pl.UInt32)).drop("_index")
    return (
        rows.join(places, on="place")
        .with_columns(
            pl.col("source_row") + part.base,
            source=pl.lit(part.source),
            source_file=pl.lit(part.file),
            kind=pl.lit(part.kind),
            stage=pl.col("reason").str.split("/").list.first(),
        )
        .select(pl.col(name).cast(dtype) for name, dtype in LEDGER.items())
    )
