"""The pieces of work in between, which see keys and not texts, but for the texts of rows that share buckets: exact
duplicates, near-duplicates, sampling and splits. Each works on a part of the keys that holds all it has to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from prefmix import audit, dedupe, minhash, mix
from prefmix.scale.job import Job, Part, Result
from prefmix.schema import Kind, prompt_text

#: How many bins the draws of a source are counted in, to find the rows where a `take` ends.
BINS = 1 << 12


def exact(job: Job, partition: int) -> Result:
    """The rows of a partition of the keys that repeat another one: all rows of one prompt are in one partition."""
    columns = ["place", *dedupe.HASHES, *(name for name in dedupe.RANK if name != "source")]
    kinds = {kind: job.gathered("keys", kind, partition, columns) for kind in job.kinds}
    return {"file": decide(job, f"exact/{partition:04d}", dedupe.exact_drops(kinds, job.planned.recipe.dedupe))}


def decide(job: Job, name: str, drops: Mapping[Kind, pl.DataFrame]) -> str:
    """Writes decisions (see `ledger.DECISION`, with numbers of rows), by the portion of the ledger that they belong to."""
    whole = pl.concat(drops.values())
    portion = np.searchsorted(job.facts["portions"], whole["_index"].to_numpy(), side="right") - 1
    job.scratch.write(name, whole, portion, len(job.facts["portions"]))
    return name


class Band(NamedTuple):
    """The keys of one band of some kinds, of which `part` of `parts` (by the keys' high bits) is looked at."""

    what: str
    kinds: Sequence[Kind]
    number: int
    part: int
    parts: int


def buckets(job: Job, band: Band) -> Result:
    """The buckets of a band: an edge from the first row of each to every other one, by the other's number."""
    rows, keys = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint64)]
    alive = job.rows["alive"]
    for part in job.parts:
        if part.kind in band.kinds:
            places, found = job.scratch.read_cuts(f"{band.what}-bands/{part.name}", [0, 1 + band.number])
            row = places["key"].to_numpy().astype(np.uint32) + np.uint32(part.first)
            key = found["key"].to_numpy()
            wanted = alive[row]
            if band.parts > 1:
                wanted = wanted & ((key >> np.uint64(32)) * np.uint64(band.parts) >> np.uint64(32) == band.part)
            rows.append(row[wanted])
            keys.append(key[wanted])
    row = np.concatenate(rows)
    places, starts = minhash.buckets_of(np.concatenate(keys))
    sizes = np.diff(np.append(starts, len(places)))
    first, other = np.repeat(row[places[starts]], sizes), row[places]
    apart = first != other  # parts are in the order of their rows, so the first of a bucket is its least
    return {"file": _write_edges(job, f"{band.what}-edges/{_name(band)}", first[apart], other[apart])}


def _name(band: Band) -> str:
    return f"{band.kinds[0]}-{band.number:03d}-{band.part:03d}"


def _write_edges(job: Job, name: str, low: np.ndarray, high: np.ndarray) -> str:
    edges = pl.DataFrame({"low": low, "high": high}, schema={"low": pl.UInt32, "high": pl.UInt32})
    cuts = job.sizes.partitions
    job.scratch.write(name, edges, high % np.uint32(cuts) if len(high) else np.zeros(0, np.int64), cuts)
    return name


class Hub(NamedTuple):
    """The edges whose higher end is in a partition: those in `edges` are new, each row has one in `parents` at most."""

    what: str
    round: int
    partition: int
    edges: Sequence[str]
    parents: str | None


def contract(job: Job, hub: Hub) -> Result:
    """One step towards connected components, on a part of the edges: of the lower ends of each row the least stays its
    parent, and the others are connected with that one.

    It is the small-star step of Kiveris et al., "Connected Components in MapReduce and Beyond" (2014). When no edge is
    left, following the parents from the rows of a component leads to the same row.
    """
    frames = [job.scratch.read(name, hub.partition) for name in hub.edges]
    frames += [job.scratch.read(hub.parents)] if hub.parents else []
    edges = pl.concat(frames).unique()
    stars = edges.with_columns(parent=pl.col("low").min().over("high"))
    parents = stars.filter(pl.col("low") == pl.col("parent")).select("low", "high")
    job.scratch.write(parents_name := f"{hub.what}-parents/{hub.round:03d}-{hub.partition:04d}", parents)
    others = stars.filter(pl.col("low") != pl.col("parent")).select(low="parent", high="low").unique()
    name = f"{hub.what}-edges/round-{hub.round:03d}-{hub.partition:04d}"
    return {"edges": _write_edges(job, name, others["low"].to_numpy(), others["high"].to_numpy()),
            "left": others.height, "parents": parents_name}  # fmt: skip


class Texts(NamedTuple):
    """The texts of a part that have to be compared."""

    what: str
    part: Part
    groups: int


def regroup(job: Job, texts: Texts) -> Result:
    """Copies the texts of the rows that share buckets to the groups that they are compared in."""
    part, near = texts.part, job.planned.recipe.dedupe.near
    assert near is not None
    group_of = job.rows["group"][part.first : part.first + part.rows]
    rows = job.scratch.read(f"texts/{part.name}")
    rows = rows.filter(pl.Series(group_of[rows["place"].to_numpy()] >= 0, dtype=pl.Boolean))
    rows = rows.with_columns(_index=pl.col("place"), source=pl.lit(part.source, job.priority))
    if texts.what == "near":
        compared = dedupe.near_rows(rows.lazy(), part.kind, near.on).drop("source").collect()
    else:
        prompts = rows.select("_index", prompt=prompt_text(part.kind))
        compared = prompts.with_columns(name=pl.Series(mix.clusters_of(prompts["prompt"])))
        compared = compared.unique("name", keep="any")
    compared = compared.rename({"_index": "place"})
    group = group_of[compared["place"].to_numpy()]
    job.scratch.write(f"{texts.what}-texts/{part.name}", compared, group, texts.groups)
    return {}


class Group(NamedTuple):
    """Rows that may be near one another, with all that share buckets with them."""

    kinds: Sequence[Kind]
    number: int


def near(job: Job, group: Group) -> Result:
    """The rows of a group that nearly repeat another one."""
    recipe = job.planned.recipe
    assert recipe.dedupe.near is not None
    rows = {kind: job.gathered("near-texts", kind, group.number) for kind in group.kinds}
    drops = dedupe.near_drops(rows, recipe.dedupe.near, recipe.dedupe.across)
    return {"file": decide(job, f"near/{group.kinds[0]}-{group.number:05d}", drops)}


def join(job: Job, group: Group) -> Result:
    """The clusters of prompts of a group that near pairs connect."""
    near = job.planned.recipe.dedupe.near
    assert near is not None
    prompts = [job.gathered("prompts-texts", kind, group.number).select("name", "prompt") for kind in group.kinds]
    joined = mix.join_prompts(pl.concat(prompts), near)
    frame = pl.DataFrame(
        {"name": list(joined), "joined": list(joined.values())}, schema={"name": pl.UInt64, "joined": pl.UInt64}
    )
    job.scratch.write(name := f"joined/{group.number:05d}", frame)
    return {"file": name}


def _alive(job: Job, kind: Kind, partition: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    rows = job.gathered("keys", kind, partition, columns)
    return rows.filter(pl.Series(job.rows["alive"][rows["_index"].to_numpy()], dtype=pl.Boolean))


def count_draws(job: Job, partition: int) -> Result:
    """How many living rows of each source have their draw in each bin."""
    found: dict[str, list[int]] = {}
    for kind in job.kinds:
        rows = _alive(job, kind, partition, ["place", "id"])
        for (source,), own in rows.group_by("source"):
            drawn = mix.draws(own["id"], job.planned.recipe.seed, mix.SAMPLE).to_numpy()
            found[source] = np.bincount(bin_of(drawn), minlength=BINS).tolist()
    return {"counts": found}


def bin_of(draws: np.ndarray) -> np.ndarray:
    """int64, the bin of each draw."""
    return (draws >> np.uint64(64 - BINS.bit_length() + 1)).astype(np.int64)


def at_ends(job: Job, partition: int) -> Result:
    """The rows whose place in their source has to be known: those in the bins in which a number of rows to take ends."""
    for kind in job.kinds:
        columns = ["place", "id", "source_row"] + (["chosen_score", "rejected_score"] if kind == "preference" else [])
        rows = _alive(job, kind, partition, columns)
        rows = rows.with_columns(mix.draws(rows["id"], job.planned.recipe.seed, mix.SAMPLE))
        bins = pl.Series(bin_of(rows["draw"].to_numpy()))
        wanted = rows.filter(
            pl.any_horizontal(
                [pl.lit(False)]
                + [(pl.col("source") == source) & bins.is_in(ends) for source, ends in job.facts["ends"].items()]
            )
        )
        job.scratch.write(f"ends/{kind}-{partition:04d}", wanted.with_columns(pl.col("source").cast(pl.String)))
    return {}


def settle(job: Job, partition: int) -> Result:
    """How often each living row goes into the mixture, and what the audit counts of the rows that do."""
    drops, counted, copies = {}, [], 0
    tallies: dict[Kind, str] = {}
    for kind in job.kinds:
        rows = _alive(job, kind, partition)
        places = _places(job, rows)
        taken = mix.copies(rows.select("_index", "source", place=places), job.facts["quotas"][kind])
        drops[kind] = mix.not_sampled(taken)
        counted.append(taken.select("_index", "copies"))
        copies += int(taken["copies"].sum())
        kept = rows.filter(taken["copies"] > 0)
        facts = kept.select(pl.selectors.starts_with("filter/"), *(name for name in _COUNTED if name in kept.columns))
        if kind == "preference":
            facts = facts.with_columns(
                kept["chosen_score"], kept["rejected_score"], kept["margin"].alias("margin_score")
            )
        tally = audit.tally(facts.with_columns(kept["source"], kept["prompt_a"].alias("prompt")))
        job.scratch.write(name := f"tally/{kind}-{partition:04d}", tally)
        tallies[kind] = name
    job.scratch.write(name := f"copies-of/{partition:04d}", pl.concat(counted))
    return {"file": decide(job, f"sample/{partition:04d}", drops), "copies": name, "tally": tallies, "rows": copies}


_COUNTED = ("strip", "swap", "chosen_chars", "rejected_chars")


def _places(job: Job, rows: pl.DataFrame) -> pl.Series:
    """int64: for each row a place among those of its source between which and its own no number of rows to take ends."""
    starts: Mapping[str, np.ndarray] = job.facts["starts"]
    if not starts:
        return pl.zeros(rows.height, pl.Int64, eager=True)
    bins = bin_of(mix.draws(rows["id"], job.planned.recipe.seed, mix.SAMPLE).to_numpy())
    places = np.zeros(rows.height, np.int64)
    for (source,), own in rows.select("source").with_row_index("_at").group_by("source"):
        if source in starts:
            at = own["_at"].to_numpy()
            places[at] = starts[source][bins[at]]
    exactly: pl.DataFrame = job.facts["exactly"]
    known = rows.select("_index").join(exactly, on="_index", how="left", maintain_order="left")["place"]
    return known.fill_null(pl.Series(places))


def divide(job: Job, partition: int) -> Result:
    """The number of the split of each kept row."""
    recipe = job.planned.recipe
    names = ["train", *recipe.splits]
    found = []
    for kind in job.kinds:
        rows = job.gathered("keys", kind, partition, ["place", "id", *(["cluster"] if recipe.splits else [])])
        copies = job.rows["copies"][rows["_index"].to_numpy()]
        rows = rows.filter(pl.Series(copies > 0, dtype=pl.Boolean))
        number = pl.zeros(rows.height, pl.UInt8, eager=True)
        if recipe.splits:
            splits = mix.splits_of(rows["cluster"], recipe.splits, recipe.seed, job.facts["joined"])
            number = splits.replace_strict(names, range(len(names)), return_dtype=pl.UInt8)
        found.append(rows.select("_index", split=number))
    job.scratch.write(name := f"split-of/{partition:04d}", pl.concat(found))
    return {"file": name}
