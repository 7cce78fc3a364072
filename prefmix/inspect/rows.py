"""Rows with their texts: those of a mixture from its files, those that were dropped from the sources again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from prefmix import chatml, sources
from prefmix.errors import PrefmixError
from prefmix.mix import draws
from prefmix.mixture import Mixture
from prefmix.recipe import load_recipe
from prefmix.schema import PARTS, Kind

Message = Mapping[str, str]

_DRAW_EXAMPLES = 16  # what the draws are for: other numbers than those that order, sample and split (see mix.py)


@dataclass(frozen=True)
class Row:
    """A row and its texts: `parts` has the messages of `prompt`, `chosen`, `rejected` or of `messages`.

    `split` is None for a row that is not in the mixture; `scores` has `chosen_score` and `rejected_score`.
    """

    id: str
    kind: Kind
    source: str
    parts: Mapping[str, list[Message]]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A row of the ledger, with its texts (None where they cannot be read again) and the row that was kept instead.

    `kept_reason` says why that row is not in the mixture either, where it was dropped later for a reason of its own.
    """

    entry: Mapping[str, Any]
    row: Row | None
    kept: Row | None
    kept_reason: str | None


def as_text(mixture: Mixture, kind: Kind) -> dict[str, pl.Expr]:
    """The texts of a subset by part, as ChatML whatever the layout."""
    if kind == "sft":
        return {"messages": pl.col("text") if _is_text(mixture, kind) else chatml.render(pl.col("messages"))}
    if _is_text(mixture, kind):
        return {part: pl.col(part) for part in PARTS[kind]}
    answers = {part: chatml.render_answer(pl.col(part)) for part in ("chosen", "rejected")}
    return {"prompt": chatml.render_prompt(pl.col("prompt")), **answers}


def as_messages(mixture: Mixture, kind: Kind) -> dict[str, pl.Expr]:
    """The messages of a subset by part, whatever the layout."""
    if not _is_text(mixture, kind):
        return {part: pl.col(part) for part in PARTS[kind]}
    parsed = {"messages": ("text", chatml.parse)} if kind == "sft" else {
        "prompt": ("prompt", chatml.parse_prompt),
        "chosen": ("chosen", chatml.parse_answer),
        "rejected": ("rejected", chatml.parse_answer),
    }  # fmt: skip
    # A text that holds special tokens (injection = "report") cannot be parsed: it is shown as it is.
    return {
        part: pl.coalesce(parse(pl.col(column)), pl.concat_list(pl.struct(role=pl.lit("text"), content=column)))
        for part, (column, parse) in parsed.items()
    }


def kept_rows(mixture: Mixture, ids: Collection[str]) -> dict[str, Row]:
    """The rows of the mixture with these ids; an id that is not in it is left out."""
    found: dict[str, Row] = {}
    if not ids:
        return found
    for kind in mixture.splits:
        rows = mixture.scan(kind).filter(pl.col("id").is_in(list(ids)))
        found |= {row.id: row for row in _rows(rows.with_columns(**as_messages(mixture, kind)).collect(), kind)}
    return found


def dropped_rows(mixture: Mixture, entries: pl.DataFrame) -> tuple[list[Dropped], list[str]]:
    """Ledger rows with their texts, in their order, and what is to be said of texts that cannot be read again."""
    texts, problems = _texts_again(mixture, entries)
    kept_ids = entries["kept_id"].drop_nulls().unique().to_list()
    kept = kept_rows(mixture, kept_ids)
    gone = mixture.drops.filter(pl.col("id").is_in(kept_ids)).select("id", "reason").unique("id", keep="first")
    reasons = dict(gone.collect().rows())
    dropped = [
        Dropped(
            entry=entry,
            row=texts.get((entry["source"], entry["id"])),
            kept=kept.get(entry["kept_id"]),
            kept_reason=None if entry["kept_id"] in kept else reasons.get(entry["kept_id"]),
        )
        for entry in entries.iter_rows(named=True)
    ]
    return dropped, problems


def _texts_again(mixture: Mixture, entries: pl.DataFrame) -> tuple[dict[tuple[str, str], Row], list[str]]:
    """The texts of ledger rows by (source, id), read from the source files again, and what could not be.

    A row is recognised by its id, which is a hash of what was read: a text is right even if the files have changed.
    Rows that do not fit their format (source/invalid) have no texts, only their evidence.
    """
    readable = entries.filter(pl.col("reason") != "source/invalid")
    frames, problems = read_again(mixture, readable["source"].unique(maintain_order=True).to_list())
    found: dict[tuple[str, str], Row] = {}
    for source, frame in frames.items():
        ids = readable.filter(pl.col("source") == source)["id"]
        rows = frame.filter(pl.col("id").is_in(ids.implode())).unique("id", keep="first", maintain_order=True)
        found |= {(source, row.id): row for row in _rows(rows, mixture.manifest["sources"][source]["kind"])}
        if missing := ids.n_unique() - rows.height:
            problems.append(f"source {source}: {missing:,} of its rows can no longer be found{_since(mixture, source)}")
    return found, problems


def read_again(mixture: Mixture, names: Iterable[str]) -> tuple[dict[str, pl.DataFrame], list[str]]:
    """Canonical rows of sources, read as the mixture's recipe says, and the sources that cannot be read, with why."""
    frames: dict[str, pl.DataFrame] = {}
    problems: list[str] = []
    for name in names:
        try:
            recipe = load_recipe(mixture.folder / "recipe.toml")
            frames[name] = sources.resolve(name, recipe.sources[name], recipe.root).read(recipe.seed)
        except PrefmixError as error:
            text = str(error).removeprefix(f"source {name}: ")
            problems.append(f"source {name} cannot be read again: {text}")
    return frames, problems


def sample(mixture: Mixture, count: int) -> list[Row]:
    """`count` rows of the mixture, chosen by a hash of (seed, id): always the same ones, and fewer are among more."""
    ids = pl.concat(mixture.scan(kind).select("id") for kind in mixture.splits).collect()["id"].unique()
    chosen = _drawn(ids, mixture.manifest["seed"], count)["id"].to_list()
    rows = kept_rows(mixture, chosen)
    return [rows[each] for each in chosen]


def sample_drops(mixture: Mixture, reasons: Collection[str], count: int) -> pl.DataFrame:
    """`count` ledger rows with one of these reasons, chosen likewise."""
    entries = mixture.drops.filter(pl.col("reason").is_in(list(reasons))).collect()
    return entries[_drawn(entries["id"], mixture.manifest["seed"], count)["place"].to_list()]


def _drawn(ids: pl.Series, seed: int, count: int) -> pl.DataFrame:
    """`place, draw, id` of the `count` ids with the smallest draws."""
    frame = pl.DataFrame(
        {"place": pl.int_range(len(ids), eager=True), "draw": draws(ids, seed, _DRAW_EXAMPLES), "id": ids}
    )
    return frame.sort("draw", "id", "place").head(count)


def _rows(frame: pl.DataFrame, kind: Kind) -> list[Row]:
    scores = [name for name in ("chosen_score", "rejected_score") if name in frame.columns]
    return [
        Row(
            id=row["id"],
            kind=kind,
            source=row["source"],
            parts={part: row[part] for part in PARTS[kind] if row[part] is not None},
            scores={name: row[name] for name in scores},
            split=row.get("split"),
        )
        for row in frame.iter_rows(named=True)
    ]


def _is_text(mixture: Mixture, kind: Kind) -> bool:
    column = {"preference": "prompt", "sft": "text"}[kind]
    return mixture.scan(kind).collect_schema().get(column) == pl.String


def _since(mixture: Mixture, source: str) -> str:
    """What has happened to the files of a source since the build."""
    recipe = load_recipe(mixture.folder / "recipe.toml")
    now = dict(sources.resolve(source, recipe.sources[source], recipe.root).fingerprints())
    built = {file["path"]: file["sha256"] for file in mixture.manifest["sources"][source]["files"]}
    changes = [f"{path} is gone" for path in built if path not in now]
    changes += [f"{path} has changed since the build" for path, sha in built.items() if now.get(path, sha) != sha]
    return f": {', '.join(changes)}" if changes else ""
