"""Duplicates: the same pair, the same prompt, too many pairs of one prompt, and texts that are nearly the same.

Rows compete by rank: the source that the recipe names first, then the higher margin, then the id, then the scores. Rank
never looks at where a row stood in a file, so the survivor does not depend on order, files or threads. Content is
compared as it is now (after a swap or a strip): exact duplicates character by character, near ones as `minhash` says.
A prompt is what `schema.prompt_text` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from prefmix.ledger import ALIVE, NONE_DECIDED, decided, decisions
from prefmix.minhash import near_duplicates
from prefmix.recipe import Dedupe, Near
from prefmix.schema import KINDS, PARTS, Kind, answers, contents, prompt_text

#: The columns by which rows compete, best first. `source` is an Enum in the order of the recipe.
RANK = ("source", "margin", "id", "chosen_score", "rejected_score", "source_row")
_RANK_DESCENDING = [False, True, False, False, False, False]


def exact(rows: Mapping[Kind, pl.DataFrame], settings: Dedupe) -> dict[Kind, pl.DataFrame]:
    """Marks the rows that repeat another one, with the survivor in `kept_id`."""
    lazy = [keys(frame.lazy().with_row_index("_index").filter(ALIVE), kind) for kind, frame in rows.items()]
    drops = exact_drops(dict(zip(rows, pl.collect_all(lazy), strict=True)), settings)
    return {kind: decided(frame, drops[kind]) for kind, frame in rows.items()}


def exact_drops(keys: Mapping[Kind, pl.DataFrame], settings: Dedupe) -> dict[Kind, pl.DataFrame]:
    """The rows that repeat another one (see `ledger.DECISION`), of rows as their `keys`.

    Whoever repeats a row has its prompt: rows may be given in parts, as long as all of one prompt are in one of them.
    """
    left = {kind: frame.sort(RANK, descending=_RANK_DESCENDING, nulls_last=True) for kind, frame in keys.items()}
    found: dict[Kind, list[pl.DataFrame]] = {kind: [NONE_DECIDED] for kind in keys}

    def beyond(group: Sequence[str], most: int, reason: str) -> None:
        """Keeps the first `most` rows of every group; the others name the first one."""
        for kind, frame in left.items():
            crowded = frame.filter(pl.len().over(group) > most)
            ranked = crowded.with_columns(
                place=pl.int_range(pl.len()).over(group),
                kept=pl.col("id").first().over(group),
                copies=pl.len().over(group),
            )
            drop(kind, ranked.filter(pl.col("place") >= most), reason)

    def across(group: Sequence[str], reason: str) -> None:
        """Drops the sft rows whose prompt and answer are those of a kept pair (of its chosen side)."""
        if settings.across and len(left) == 2:
            kept = left["preference"].unique(group, keep="first", maintain_order=True)
            drop("sft", left["sft"].join(kept.select(*group, kept="id", copies=pl.lit(2)), on=group), reason)

    def drop(kind: Kind, dropped: pl.DataFrame, reason: str) -> None:
        left[kind] = left[kind].join(dropped, on="_index", how="anti", maintain_order="left")
        found[kind].append(decisions(dropped, reason, pl.struct("copies"), pl.col("kept")))

    if settings.exact != "off":
        beyond(_PAIR, 1, "dedupe/pair")
        across(_CHOSEN, "dedupe/pair")
    if settings.exact == "prompt":
        beyond(_PROMPT, 1, "dedupe/prompt")
        across(_PROMPT, "dedupe/prompt")
    if settings.prompt_cap is not None:
        beyond(_PROMPT, settings.prompt_cap, "dedupe/prompt_cap")
    return {kind: pl.concat(drops) for kind, drops in found.items()}


def near(rows: Mapping[Kind, pl.DataFrame], settings: Near, across: bool) -> dict[Kind, pl.DataFrame]:
    """Marks the rows whose text nearly repeats that of a row of higher rank which stays; pairs rank above sft rows.

    The evidence is the Jaccard similarity with the survivor (`kept_id`) and the cluster: the id of the best row of all
    those that near pairs of a dropped row and a kept one above it connect.
    """
    alive = {kind: frame.lazy().with_row_index("_index").filter(ALIVE) for kind, frame in rows.items()}
    texts = {kind: near_rows(frame, kind, settings.on).collect() for kind, frame in alive.items()}
    drops = near_drops(texts, settings, across)
    return {kind: decided(frame, drops[kind]) for kind, frame in rows.items()}


def near_rows(rows: pl.LazyFrame, kind: Kind, on: str) -> pl.LazyFrame:
    """What is looked at of rows: `_index`, the columns of `RANK`, and the `text` that is compared."""
    return pl.concat([rows.select("_index", text=compared(on, kind)), ranks(rows, kind)], how="horizontal")


def near_drops(texts: Mapping[Kind, pl.DataFrame], settings: Near, across: bool) -> dict[Kind, pl.DataFrame]:
    """The rows that are near another one (see `ledger.DECISION`), of rows as their `near_rows`.

    They may be given in parts, as long as all that buckets connect (see `minhash`) are in one of them.
    """
    found: dict[Kind, pl.DataFrame] = {}
    present = [kind for kind in KINDS if kind in texts]
    for kinds in [present] if across else [[kind] for kind in present]:
        ranked = (texts[kind].sort(RANK, descending=_RANK_DESCENDING, nulls_last=True) for kind in kinds)
        order = pl.concat(
            frame.select("_index", "id", "text", kind=pl.lit(kind)) for kind, frame in zip(kinds, ranked, strict=True)
        )
        duplicates = near_duplicates(order["text"], **minhash_settings(settings))
        dropped = order[duplicates["row"]].with_columns(
            duplicates["jaccard"],
            kept=order["id"].gather(duplicates["kept"]),
            cluster=order["id"].gather(duplicates["cluster"]),
        )
        evidence = pl.struct("jaccard", "cluster")
        for kind in kinds:
            own = dropped.filter(pl.col("kind") == kind)
            found[kind] = decisions(own, "dedupe/near", evidence, pl.col("kept"))
    return found


def minhash_settings(settings: Near) -> dict[str, Any]:
    """The arguments that the functions of `minhash` take."""
    return {
        "threshold": settings.threshold,
        "shingle": settings.shingle,
        "unit": settings.shingle_unit,
        "permutations": settings.permutations,
        "recall": settings.recall,
    }


def compared(on: str, kind: Kind) -> pl.Expr:
    """string: the text of a row by which near-duplicates are found; `messages` is all of it."""
    if on == "messages":
        return pl.concat_str([contents(part).list.join("\n") for part in PARTS[kind]], separator="\n")
    parts = {"prompt": prompt_text(kind), "chosen": answers(kind)[0].fill_null("")}
    return pl.concat_str([parts[name] for name in on.split("+")], separator="\n")


# Two texts are taken as equal when two 64-bit hashes with different seeds agree (2**-128 a pair). The hashes live and
# die with a build by one version of Polars: nothing that is written depends on their values.
_PROMPT = ("prompt_a", "prompt_b")
_CHOSEN = ("chosen_a", "chosen_b")
_PAIR = ("pair_a", "pair_b")
HASHES = (*_PROMPT, *_CHOSEN, *_PAIR)


def ranks(rows: pl.LazyFrame, kind: Kind) -> pl.LazyFrame:
    """The columns of `RANK` of some rows."""
    none = pl.lit(None, pl.Float64)
    scores = [pl.col(name) if kind == "preference" else none.alias(name) for name in ("chosen_score", "rejected_score")]
    margin = pl.col("chosen_score") - pl.col("rejected_score")
    return rows.select("id", "source", "source_row", *scores).with_columns(margin=margin).select(RANK)


def keys(rows: pl.LazyFrame, kind: Kind) -> pl.LazyFrame:
    """Rows as hashes of their texts: `_index`, the columns of `RANK`, two numbers each for the prompt, the prompt with the
    chosen answer, and all of the row. A row's keys are its own: they do not depend on other rows."""
    if kind == "preference":
        best, other = contents("chosen"), contents("rejected")
    else:
        best = other = contents("messages").list.tail(1)
    hashes = {
        f"{name}_{suffix}": text.hash(seed)
        for seed, suffix in enumerate("ab", 1)
        for name, text in {"prompt": prompt_text(kind), "best": best, "other": other}.items()
    }
    joint = [
        pl.struct(f"{name}_{suffix}" for name in names).hash(seed).alias(f"{key}_{suffix}")
        for seed, suffix in enumerate("ab", 1)
        for key, names in {"chosen": ("prompt", "best"), "pair": ("prompt", "best", "other")}.items()
    ]
    hashed = rows.select("_index", **hashes).with_columns(joint).select("_index", *HASHES)
    return pl.concat([hashed, ranks(rows, kind)], how="horizontal")
