"""Which rows a mixture takes, how often, in which split and in which order: all by hashes of (seed, id).

A row's hash does not depend on the other rows. So a larger `take` is a superset of a smaller one, and adding a source
moves no other row except through dedupe and shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from math import floor

import numpy as np
import polars as pl

from prefmix.errors import BuildError
from prefmix.ledger import ALIVE, Drop, mark
from prefmix.minhash import near_clusters
from prefmix.recipe import Mix, Near, Source
from prefmix.schema import Kind, prompt_text
from prefmix.shingles import sequence_hashes, slices

NOT_SAMPLED = "mix/not_sampled"
_ORDER, _SAMPLE, _SPLIT = 0, 1, 2  # what a hash is for: the same row draws other numbers for other questions


def _mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64 whose output bits look random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draws(keys: pl.Series, seed: int, purpose: int, copy: pl.Series | None = None) -> pl.Series:
    """uint64, uniform: one number per key (a hex string, of which the first 16 digits count), seed, purpose and copy."""
    digits = "".join(keys.str.head(16).to_list())
    values = np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64)
    return pl.Series("draw", _drawn(values, seed, purpose, copy))


def _drawn(keys: np.ndarray, seed: int, purpose: int, copy: pl.Series | None = None) -> np.ndarray:
    salt = _mix64(np.array([seed, purpose + 0x9E3779B97F4A7C15], dtype=np.uint64))
    state = _mix64(keys ^ salt[0]) ^ salt[1]
    if copy is not None:
        state = state + copy.to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix64(state)


def sample(rows: pl.DataFrame, kind: Kind, sources: Mapping[str, Source], mix: Mix, seed: int) -> pl.DataFrame:
    """Applies `take`, `repeat` and the shares of one subset.

    Adds `copies`: how often a kept row goes into the mixture. Rows that are not taken are marked `mix/not_sampled`.
    Raises BuildError when the recipe asks for more rows than there are and does not allow repeating.
    """
    scores = ["chosen_score", "rejected_score"] if kind == "preference" else []
    alive = rows.with_row_index("_index").filter(ALIVE).select("_index", "id", "source", "source_row", *scores)
    alive = (
        alive.with_columns(draws(alive["id"], seed, _SAMPLE))
        .sort("draw", "id", "source", *scores, "source_row", nulls_last=True)
        .with_columns(place=pl.int_range(pl.len()).over("source"), rows=pl.len().over("source"))
    )
    present = dict(alive.select("source", "rows").unique().rows())
    available = {source: _taken(count, sources[source].take) for source, count in present.items()}
    wanted = {source: count * sources[source].repeat for source, count in available.items()}
    shares: Mapping[str, float] | None = getattr(mix, kind)
    total: int | None = getattr(mix, f"{kind}_rows")
    if shares is not None or (total is not None and wanted):
        wanted = _by_shares(kind, wanted, wanted if shares is None else shares, total, mix.allow_repeat)
    counts = pl.DataFrame(
        [(source, available[source], wanted[source]) for source in present],
        schema={"source": pl.String, "available": pl.Int64, "wanted": pl.Int64},
        orient="row",
    )
    place, usable, goal = pl.col("place"), pl.col("available"), pl.col("wanted")
    copies = (
        alive.with_columns(pl.col("source").cast(pl.String))
        .join(counts, on="source", maintain_order="left")
        .select(
            "_index",
            copies=pl.when(place < usable).then(goal // usable + (place < goal % usable)).otherwise(0).cast(pl.Int32),
            rows="rows",
            goal="wanted",
        )
    )
    joined = rows.with_row_index("_index").join(copies, on="_index", how="left", maintain_order="left")
    detail = pl.struct(rows=pl.col("rows"), wanted=pl.col("goal"))
    return mark(joined, [Drop(NOT_SAMPLED, pl.col("copies") == 0, detail)]).drop("_index", "rows", "goal")


def _taken(rows: int, take: int | float | None) -> int:
    if take is None:
        return rows
    return min(take, rows) if isinstance(take, int) else floor(take * rows + 0.5)


def _by_shares(
    kind: Kind, available: Mapping[str, int], shares: Mapping[str, float], total: int | None, allow_repeat: bool
) -> dict[str, int]:
    """Rows per source: `total` of them, or as many as the scarcest source allows, in proportion to the shares."""
    missing = [source for source, share in shares.items() if share > 0 and not available.get(source)]
    if missing:
        raise BuildError(f"mix.{kind}: no row of {', '.join(missing)} is left. Remove the source from the shares, or look "
                         f"at `prefmix drops` for what removed its rows.")  # fmt: skip
    unnamed = [source for source in available if source not in shares]
    if unnamed:
        raise BuildError(f"mix.{kind} gives no share to {', '.join(unnamed)}: name it, with 0 to leave it out.")
    weight = sum(shares.values())
    if total is None:
        total = floor(min(available[source] * weight / share for source, share in shares.items() if share > 0) + 1e-9)
    exact = {source: total * shares[source] / weight for source in available}
    wanted = {source: floor(rows) for source, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda source: (wanted[source] - exact[source], source))
    for source in by_remainder[: total - sum(wanted.values())]:  # largest remainder: the sum is exactly `total`
        wanted[source] += 1
    short = [source for source in available if wanted[source] > available[source]]
    if short and not allow_repeat:
        needs = "; ".join(
            f"{source} has {available[source]:,} rows, the mix needs {wanted[source]:,}" for source in short
        )
        raise BuildError(f"mix.{kind}_rows = {total}: {needs}. Lower it, or set mix.allow_repeat = true.")
    return wanted


def split(
    rows: pl.DataFrame, kind: Kind, splits: Mapping[str, float], seed: int, joined: Mapping[int, int]
) -> pl.DataFrame:
    """The kept rows with `split`: a hash threshold on the cluster of the prompt, so that rows with the same prompt are
    never on both sides, in either subset. `joined` gives clusters another name, as `near_prompts` does."""
    kept = rows.filter(ALIVE)
    clusters = pl.Series(clusters_of(kept.select(prompt_text(kind)).to_series()))
    if joined:
        clusters = clusters.replace(joined)
    point = pl.Series("point", _drawn(clusters.to_numpy(), seed, _SPLIT)).cast(pl.Float64) / 2.0**64
    name, upper = pl.lit("train"), sum(splits.values())
    for split_name, fraction in reversed(list(splits.items())):
        name = pl.when(point < upper).then(pl.lit(split_name)).otherwise(name)
        upper -= fraction
    return kept.with_columns(split=name)


def near_prompts(rows: Mapping[Kind, pl.DataFrame], near: Near) -> dict[int, int]:
    """`{cluster: the cluster that it belongs to}` for the clusters of prompts (see `clusters_of`) of kept rows, of all
    subsets together, that near pairs connect. The one with the least name gives the name."""
    prompts = pl.concat(frame.filter(ALIVE).select(prompt=prompt_text(kind)) for kind, frame in rows.items())
    named = prompts.with_columns(name=clusters_of(prompts["prompt"]))
    names = named.group_by("name").agg(pl.col("prompt").min()).sort("name")
    first = near_clusters(
        names["prompt"], near.threshold, near.shingle, near.shingle_unit, near.permutations, near.recall
    )
    moved = names.with_columns(joined=names["name"].gather(first)).filter(pl.col("name") != pl.col("joined"))
    return dict(moved.select("name", "joined").rows())


def clusters_of(prompts: pl.Series) -> np.ndarray:
    """uint64, for each prompt a number that is equal for prompts of the same words (see `shingles.normalise`), whatever
    their case, spacing and punctuation; for a prompt without a word, a number of its own text."""
    with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
        clusters = np.concatenate([np.zeros(0, np.uint64), *pool.map(sequence_hashes, slices(prompts))])
    for place in np.flatnonzero(clusters == 0).tolist():
        text = (prompts[place] or "").encode()
        clusters[place] = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
    return clusters


def ordered(rows: pl.DataFrame, kind: Kind, seed: int) -> pl.DataFrame:
    """Every copy of every row, in the order of the mixture: by hash of (seed, id, copy number)."""
    scores = ["chosen_score", "rejected_score"] if kind == "preference" else []
    copied = rows.select("id", "source", *scores, "copies").with_row_index("_index")
    copied = copied.with_columns(copy=pl.int_ranges("copies")).explode("copy", empty_as_null=True)
    copied = copied.with_columns(draws(copied["id"], seed, _ORDER, copied["copy"]))
    order = copied.sort("draw", "id", "copy", "source", *scores, nulls_last=True)["_index"]
    return rows[order]
