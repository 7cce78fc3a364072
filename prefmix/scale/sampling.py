"""How often each row goes into the mixture: takes, shares and repeats, without a sort of all rows.

Rows are taken in the order of their draws. Where a number of rows to take ends, the draws are counted in bins, and only the
rows of the bin with the end are put in order: for any other row it is known whether it is before or behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from prefmix import audit, mix
from prefmix.scale.job import Job, Result, Run
from prefmix.scale.keys import decide
from prefmix.schema import Kind

_BINS = 1 << 12
#: The facts of a row that `audit.tally` counts, beside the rules and the scores.
_COUNTED = ("strip", "swap", "chosen_chars", "rejected_chars")


def sample(job: Job, run: Run, alive: Mapping[str, int]) -> tuple[Job, dict[str, Any]]:
    """Decides how often each row goes into the mixture; gives the audit of those that do."""
    recipe, sources = job.planned.recipe, job.planned.sources
    lost = _dropped_by_source(job)
    quotas = {
        kind: mix.quotas(
            kind,
            {
                name: rows
                for name, source in sources.items()
                if source.kind == kind and (rows := alive[name] - lost[name])
            },
            recipe.sources,
            recipe.mix,
        )
        for kind in job.kinds
    }
    job = job.with_facts(quotas=quotas, **_ends(job, run, quotas))
    copies = np.zeros(len(job.rows["alive"]), np.int32)
    names = list(job.facts["decisions"])
    tallies: dict[Kind, list[pl.DataFrame]] = {kind: [] for kind in job.kinds}
    for result in run.map("sample", settle, job, range(job.sizes.partitions)):
        found = job.scratch.read(result["copies"])
        copies[found["_index"].to_numpy()] = found["copies"].to_numpy()
        names.append(result["file"])
        for kind, name in result["tally"].items():
            tallies[kind].append(job.scratch.read(name))
    audited = {source: entry for kind in job.kinds for source, entry in audit.entries(tallies[kind]).items()}
    return job.knowing(copies=copies).with_facts(decisions=names), audited


def _dropped_by_source(job: Job) -> dict[str, int]:
    """The rows of each source that decisions dropped."""
    found = dict.fromkeys(job.planned.sources, 0)
    for part in job.parts:
        found[part.source] += int((~job.rows["alive"][part.first : part.first + part.rows]).sum())
    return found


def _ends(job: Job, run: Run, quotas: Mapping[Kind, pl.DataFrame]) -> dict[str, Any]:
    """Where numbers of rows to take end: in which bins of the draws, how many rows are before each bin, and the exact
    places of the rows in those bins."""
    wanted: dict[str, set[int]] = {}
    for quota in quotas.values():
        for source, count, available, goal in quota.rows():
            ends = {available, goal % available if available else 0} - {0, count}
            if ends:
                wanted[source] = ends
    if not wanted:
        return {"starts": {}, "ends": {}}
    counts = {source: np.zeros(_BINS, np.int64) for source in wanted}
    for result in run.map("draws", count_draws, job, range(job.sizes.partitions)):
        for source, found in result["counts"].items():
            if source in counts:
                counts[source] += np.array(found)
    starts = {source: np.cumsum(found) - found for source, found in counts.items()}
    bins = {
        source: sorted({int(np.searchsorted(starts[source], end, side="right")) - 1 for end in ends})
        for source, ends in wanted.items()
    }
    job = job.with_facts(ends=bins)
    for _ in run.map("ends", at_ends, job, range(job.sizes.partitions)):
        pass
    exactly = []
    for kind in job.kinds:
        names = [f"ends/{kind}-{at:04d}" for at in range(job.sizes.partitions)]
        drawn = pl.concat([job.scratch.read(name) for name in names])
        for source, numbers in bins.items():
            own = drawn.filter(pl.col("source") == source)
            at = pl.Series(_bin_of(own["draw"].to_numpy()), dtype=pl.Int64)
            for number in numbers:
                placed = mix.places(own.filter(at == number), kind)
                exactly.append(
                    placed.select("_index", place=pl.col("place").cast(pl.Int64) + int(starts[source][number]))
                )
    return {"starts": starts, "ends": bins, "exactly": pl.concat(exactly)}


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
            found[source] = np.bincount(_bin_of(drawn), minlength=_BINS).tolist()
    return {"counts": found}


def _bin_of(draws: np.ndarray) -> np.ndarray:
    """int64, the bin of each draw."""
    return (draws >> np.uint64(64 - _BINS.bit_length() + 1)).astype(np.int64)


def at_ends(job: Job, partition: int) -> Result:
    """The rows whose place in their source has to be known: those in the bins in which a number of rows to take ends."""
    for kind in job.kinds:
        columns = ["place", "id", "source_row"] + (["chosen_score", "rejected_score"] if kind == "preference" else [])
        rows = _alive(job, kind, partition, columns)
        rows = rows.with_columns(mix.draws(rows["id"], job.planned.recipe.seed, mix.SAMPLE))
        bins = pl.Series(_bin_of(rows["draw"].to_numpy()))
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


def _places(job: Job, rows: pl.DataFrame) -> pl.Series:
    """int64: for each row a place among those of its source between which and its own no number of rows to take ends."""
    starts: Mapping[str, np.ndarray] = job.facts["starts"]
    if not starts:
        return pl.zeros(rows.height, pl.Int64, eager=True)
    bins = _bin_of(mix.draws(rows["id"], job.planned.recipe.seed, mix.SAMPLE).to_numpy())
    places = np.zeros(rows.height, np.int64)
    for (source,), own in rows.select("source").with_row_index("_at").group_by("source"):
        if source in starts:
            at = own["_at"].to_numpy()
            places[at] = starts[source][bins[at]]
    exactly: pl.DataFrame = job.facts["exactly"]
    known = rows.select("_index").join(exactly, on="_index", how="left", maintain_order="left")["place"]
    return known.fill_null(pl.Series(places))
