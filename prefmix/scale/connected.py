"""Which rows have to be compared: those that share a bucket of MinHash keys, and all that buckets connect with them.

Buckets give edges, by bands; edges are contracted to a forest in rounds, by rows; the components of the forest are put
together in groups, each of which is compared by itself. No piece of work sees all edges, or all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from prefmix import dedupe, minhash, mix
from prefmix.scale.job import Job, Part, Result, Run
from prefmix.schema import Kind, prompt_text

#: Edges that are few enough to be connected at once.
_FEW_EDGES = 1 << 18
_MOST_ROUNDS = 12


class Group(NamedTuple):
    """Rows that may be near one another, with all that share buckets with them."""

    kinds: Sequence[Kind]
    number: int


def connected(job: Job, run: Run, what: str, universes: Sequence[Sequence[Kind]]) -> list[Group]:
    """Finds the living rows that buckets connect, and brings their texts together in groups, in `<what>-texts`. Kinds of
    different universes do not meet."""
    near = job.planned.recipe.dedupe.near
    assert near is not None
    bands, _ = minhash.bands_for(near.threshold, near.permutations, near.recall)
    items = [Band(what, kinds, number) for kinds in universes for number in range(bands * job.sizes.ranges)]
    edges = [result["file"] for result in run.map(f"{what}-buckets", buckets, job, items)]
    names, member = _components(job, run, what, edges)
    group = np.full(len(names), -1, np.int32)
    groups: list[Group] = []
    most = max(job.sizes.group // _mean_bytes(job), 1)
    for kinds in universes:
        of_kinds = member & np.repeat([part.kind in kinds for part in job.parts], [part.rows for part in job.parts])
        own = np.flatnonzero(of_kinds)
        _, component, sizes = np.unique(names[own], return_inverse=True, return_counts=True)
        number = (np.cumsum(sizes) - sizes) // most + len(groups)
        group[own] = number[component]
        groups += [Group(kinds, at) for at in range(len(groups), int(number[-1]) + 1 if len(number) else len(groups))]
    texts = [Texts(what, part, max(len(groups), 1)) for part in job.parts]
    for _ in run.map(f"{what}-texts", regroup, job.knowing(group=group), texts):
        pass
    return groups


def _components(job: Job, run: Run, what: str, edges: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(names, members): for each row the least row of its connected component, and whether it has an edge at all."""
    parents: dict[int, str] = {}
    for number in range(_MOST_ROUNDS):
        hubs = [Hub(what, number, at, edges, parents.get(at)) for at in range(job.sizes.partitions)]
        results = list(run.map(f"{what}-connect-{number}", contract, job, hubs))
        edges = [result["edges"] for result in results if result["left"]]
        parents = {at: result["parents"] for at, result in enumerate(results)}
        if sum(result["left"] for result in results) <= _FEW_EDGES:
            break
    names = np.arange(len(job.rows["alive"]), dtype=np.uint32)
    member = np.zeros(len(names), bool)
    for parent in parents.values():
        low, high = job.scratch.read(parent).select("low", "high").to_numpy().T
        names[high] = low
        member[low] = member[high] = True
    while not np.array_equal(jumped := names[names], names):
        names = jumped
    left = [job.scratch.read(name) for name in edges]
    if left:
        low, high = pl.concat(left).select("low", "high").to_numpy().T
        member[low] = member[high] = True
        minhash.connect(names, low, high)
    return names, member


def _mean_bytes(job: Job) -> int:
    """Bytes of a row's texts as they lie in the scratch folder, about."""
    sizes = [job.scratch.size(f"texts/{part.name}") or 0 for part in job.parts]
    return max(2 * sum(sizes) // max(sum(part.rows for part in job.parts), 1), 1)


class Band(NamedTuple):
    """A range of the keys of one band, of rows of some kinds; all ranges of all bands are numbered."""

    what: str
    kinds: Sequence[Kind]
    number: int


def buckets(job: Job, band: Band) -> Result:
    """The buckets of a range of keys: an edge from the first row of each to every other one."""
    rows, keys = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint64)]
    alive = job.rows["alive"]
    for part in job.parts:
        if part.kind in band.kinds:
            found = job.scratch.read(f"{band.what}-bands/{part.name}", band.number)
            row = found["place"].to_numpy() + np.uint32(part.first)
            rows.append(row[alive[row]])
            keys.append(found["key"].to_numpy()[alive[row]])
    row = np.concatenate(rows)
    places, starts = minhash.buckets_of(np.concatenate(keys))
    sizes = np.diff(np.append(starts, len(places)))
    first, other = np.repeat(row[places[starts]], sizes), row[places]
    apart = first != other  # parts are in the order of their rows, so the first of a bucket is its least
    name = f"{band.what}-edges/{band.kinds[0]}-{band.number:06d}"
    return {"file": _write_edges(job, name, first[apart], other[apart])}


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
