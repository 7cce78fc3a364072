"""The pieces of work in between: exact duplicates and splits, which see keys, and near-duplicates, which see the texts of
rows that share buckets. Each works on a part that holds all it has to compare."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from prefmix import dedupe, mix
from prefmix.scale.connected import Group
from prefmix.scale.job import Job, Result
from prefmix.schema import Kind


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
