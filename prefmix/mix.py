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
from prefmix.ledger import ALIVE, decided, decisions
from prefmix.minhash import near_clusters
from prefmix.recipe import Mix, Near, Source
from prefmix.schema import Kind, prompt_text
from prefmix.shingles import sequence_hashes, slices

NOT_SAMPLED = "mix/not_sampled"
ORDER, SAMPLE, _SPLIT = 0, 1, 2  # what a hash is for: the same row draws other numbers for other questions


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


def _tie_breakers(kind: Kind) -> list[str]:
    """The columns by which rows of equal draws are ordered."""
    return ["id", "source", *(["chosen_score", "rejected_score"] if kind == "preference" else [])]


def sample(rows: pl.DataFrame, kind: Kind, sources: Mapping[str, Source], mix: Mix, seed: int) -> pl.DataFrame:
    """Applies `take`, `repeat` and the shares of one subset.

    Adds `copies`: how often a kept row goes into the mixture. Rows that are not taken are marked `mix/not_sampled`.
    Raises BuildError when the recipe asks for more rows than there are and does not allow repeating.
    """
    alive = rows.with_row_index("_index").filter(ALIVE).select("_index", "source_row", *_tie_breakers(kind))
    placed = places(alive.with_columns(draws(alive["id"], seed, SAMPLE)), kind)
    counts = dict(placed.group_by(pl.col("source").cast(pl.String)).len().rows())
    taken = copies(placed, quotas(kind, counts, sources, mix))
    joined = rows.with_row_index("_index").join(
        taken.select("_index", "copies"), on="_index", how="left", maintain_order="left"
    )
    return decided(joined.drop("_index"), not_sampled(taken))


def places(drawn: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Adds `place`: the number, from 0, of a row among those of its source in the order in which they are taken."""
    ordered = drawn.sort("draw", *_tie_breakers(kind), "source_row", nulls_last=True)
    return ordered.with_columns(place=pl.int_range(pl.len()).over("source"))


def quotas(kind: Kind, counts: Mapping[str, int], sources: Mapping[str, Source], mix: Mix) -> pl.DataFrame:
    """For each source with living rows: `source`, its `rows`, how many of them are `available` after `take`, and how many
    are `wanted` in the mixture (repeated ones counted). Raises BuildError as `sample` does."""
    available = {source: _taken(count, sources[source].take) for source, count in counts.items()}
    wanted = {source: count * sources[source].repeat for source, count in available.items()}
    shares: Mapping[str, float] | None = getattr(mix, kind)
    total: int | None = getattr(mix, f"{kind}_rows")
    if shares is not None or (total is not None and wanted):
        wanted = _by_shares(kind, wanted, wanted if shares is None else shares, total, mix.allow_repeat)
    return pl.DataFrame(
        [(source, counts[source], available[source], wanted[source]) for source in counts],
        schema={"source": pl.String, "rows": pl.Int64, "available": pl.Int64, "wanted": pl.Int64},
        orient="row",
    )


def copies(placed: pl.DataFrame, quotas: pl.DataFrame) -> pl.DataFrame:
    """How often each row goes into the mixture, by its place among those of its source: `_index, copies, rows, wanted`."""
    place, usable, goal = pl.col("place"), pl.col("available"), pl.col("wanted")
    return (
        placed.select("_index", pl.col("source").cast(pl.String), "place")
        .join(quotas, on="source", maintain_order="left")
        .select(
            "_index",
            copies=pl.when(place < usable).then(goal // usable + (place < goal % usable)).otherwise(0).cast(pl.Int32),
            rows="rows",
            wanted="wanted",
        )
    )


def not_sampled(taken: pl.DataFrame) -> pl.DataFrame:
    """The rows of `copies` that are not taken (see `ledger.DECISION`)."""
    return decisions(taken.filter(pl.col("copies") == 0), NOT_SAMPLED, pl.struct("rows", "wanted"))


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
    """The kept rows with `split`, by the cluster of their prompt (see `splits_of`). `joined` gives clusters another name,
    as `near_prompts` does."""
    kept = rows.filter(ALIVE)
    clusters = pl.Series(clusters_of(kept.select(prompt_text(kind)).to_series()))
    return kept.with_columns(split=splits_of(clusters, splits, seed, joined))


def splits_of(clusters: pl.Series, splits: Mapping[str, float], seed: int, joined: Mapping[int, int]) -> pl.Series:
    """string: the split of each cluster of prompts, by a hash threshold: rows with the same prompt are never on both
    sides, in either subset."""
    if joined:
        clusters = clusters.replace(joined)
    point = pl.Series("point", _drawn(clusters.to_numpy(), seed, _SPLIT)).cast(pl.Float64) / 2.0**64
    name, upper = pl.lit("train"), sum(splits.values())
    for split_name, fraction in reversed(list(splits.items())):
        name = pl.when(point < upper).then(pl.lit(split_name)).otherwise(name)
        upper -= fraction
    return point.to_frame().select(split=name).to_series()


def near_prompts(rows: Mapping[Kind, pl.DataFrame], near: Near) -> dict[int, int]:
    """`{cluster: the cluster that it belongs to}` for the clusters of prompts (see `clusters_of`) of kept rows, of all
    subsets together, that near pairs connect. The one with the least name gives the name."""
    prompts = pl.concat(frame.filter(ALIVE).select(prompt=prompt_text(kind)) for kind, frame in rows.items())
    return join_prompts(prompts.with_columns(name=clusters_of(prompts["prompt"])), near)


def join_prompts(named: pl.DataFrame, near: Near) -> dict[int, int]:
    """As `near_prompts`, of prompts as `prompt` and `name` (their cluster). They may be given in parts, as long as all
    that buckets connect (see `minhash`) are in one of them."""
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
    """Every copy of every row (`copies`), in the order of the mixture."""
    copied = rows.select(*_tie_breakers(kind), "copies").with_row_index("_index")
    copied = copied.with_columns(copy=pl.int_ranges("copies")).explode("copy", empty_as_null=True)
    return rows[copied["_index"].gather(order(copied, kind, seed))]


def order(copied: pl.DataFrame, kind: Kind, seed: int) -> pl.Series:
    """The places of copies of rows (`copy` is the number of the copy) in the order of the mixture: by a hash of (seed, id,
    copy number)."""
    drawn = copied.select(draws(copied["id"], seed, ORDER, copied["copy"]), "copy", *_tie_breakers(kind))
    return drawn.with_row_index("_place").sort("draw", "id", "copy", *_tie_breakers(kind)[1:], nulls_last=True)[
        "_place"
    ]
