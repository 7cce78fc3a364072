"""From a recipe to a mixture: the stages in their order.

    read, where, split                      sources
    validity, injection, filters            filters
    exact duplicates                        dedupe
    take, shares, repeat                    mix
    splits by cluster of prompts            mix
    token counts, rendering, writing        tokens, mixture
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from prefmix import audit, card, chatml, dedupe, filters, mix, sources, tokens
from prefmix.digest import mixture_digest
from prefmix.errors import BuildError, UsageError
from prefmix.ledger import ALIVE, CHANGES, check_conservation, ledger, mark
from prefmix.mixture import Mixture, columns, recorded, write_split
from prefmix.recipe import Mix, Recipe, load_recipe
from prefmix.schema import KINDS, NO_CHANGES, ORIGIN, Kind
from prefmix.sources import Source
from prefmix.store import Store, write_durably

#: Called as `progress(stage, done, total)`; `done` counts sources, rows or texts of the stage.
Progress = Callable[[str, int, int], None]

K, V = TypeVar("K"), TypeVar("V")

STAGES = ("source", "filter", "decontaminate", "dedupe", "mix")


def _silent(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Plan:
    """A recipe with its inputs found: files, revisions, tokenizer. Nothing of the data has been read yet."""

    recipe: Recipe
    sources: Mapping[str, Source]
    tokenizer: tokens.LoadedTokenizer | None
    fingerprints: Mapping[str, list[tuple[str, str]]]

    @property
    def revisions(self) -> dict[str, str]:
        found = {name: source.revision for name, source in self.sources.items() if source.revision}
        return found | ({"tokenizer": self.tokenizer.revision} if self.tokenizer and self.tokenizer.revision else {})

    @property
    def recipe_digest(self) -> str:
        return self.recipe.digest(self.revisions)


@dataclass(frozen=True)
class Curated:
    """The rows of every subset, each with its reason or its split, before anything is written."""

    plan: Plan
    rows: Mapping[Kind, pl.DataFrame]
    kept: Mapping[Kind, pl.DataFrame]
    audit: Mapping[str, Any]

    def funnel(self) -> list[dict[str, Any]]:
        """`{"stage", "in", "dropped": {reason: count}, "out"}` for every stage that dropped or added rows."""
        dropped = self.dropped()
        by_reason: dict[str, int] = {}
        for reasons in dropped.values():
            for reason, count in reasons.items():
                by_reason[reason] = by_reason.get(reason, 0) + count
        left = sum(frame.height for frame in self.rows.values())
        stages: list[dict[str, Any]] = [{"stage": "read", "in": left, "dropped": {}, "out": left}]
        for stage in STAGES:
            reasons = {reason: count for reason, count in sorted(by_reason.items()) if reason.startswith(f"{stage}/")}
            if reasons:
                stages.append({"stage": stage, "in": left, "dropped": reasons, "out": left - sum(reasons.values())})
                left = stages[-1]["out"]
        copies = sum(int(frame["copies"].sum()) for frame in self.kept.values())
        if copies != left:
            stages.append({"stage": "repeat", "in": left, "dropped": {}, "added": copies - left, "out": copies})
        return stages

    def dropped(self) -> dict[str, dict[str, int]]:
        """Per source, the number of rows for each reason."""
        found: dict[str, dict[str, int]] = {name: {} for name in self.plan.sources}
        for frame in self.rows.values():
            counts = frame.filter(~ALIVE).group_by(pl.col("source").cast(pl.String), "reason").len()
            for source, reason, count in counts.sort("source", "reason").rows():
                found[source][reason] = count
        return found


def build(recipe: Recipe | str | Path, *, store: str | Path | None = None, progress: Progress = _silent) -> Mixture:
    """Builds the mixture of a recipe (or of its file), or gives back the version that is already there.

    Raises RecipeError, SourceError, HubError or BuildError; the store is then as it was.
    """
    planned = plan(load_recipe(recipe) if isinstance(recipe, str | Path) else recipe)
    shelf = Store(store)
    return built(planned, shelf) or publish(curate(planned, progress=progress), shelf, progress)


def plan(recipe: Recipe) -> Plan:
    """Finds every input of a recipe: files, revisions on the Hub, the tokenizer."""
    if refused := unsupported(recipe):
        raise UsageError("\n".join(refused))
    found = {name: sources.resolve(name, source, recipe.root) for name, source in recipe.sources.items()}
    settings = recipe.format
    tokenizer = tokens.load(settings.tokenizer, settings.tokenizer_revision, recipe.root) if settings.tokenizer else None
    fingerprints = {name: source.fingerprints() for name, source in found.items()}
    if tokenizer:
        fingerprints["[format] tokenizer"] = [("tokenizer.json", tokenizer.sha256)]
    return Plan(recipe, found, tokenizer, fingerprints)


def unsupported(recipe: Recipe) -> list[str]:
    """What a valid recipe asks for that this version of prefmix cannot do, by name; empty for one that can be built."""
    found = []
    if recipe.dedupe.near is not None:
        found.append("dedupe.near: near-duplicates are not part of this version of prefmix. Remove the key to build.")
    if recipe.decontaminate.suites or recipe.decontaminate.against:
        found.append("decontaminate: decontamination is not part of this version of prefmix. Remove its suites and "
                     "[decontaminate.against] to build.")  # fmt: skip
    if pl.select(pl.lit(recipe.format.system).str.contains(chatml.SPECIAL_TOKENS)).item():
        found.append("format.system: the default system message holds a special token of a chat template.")
    return found


def built(planned: Plan, store: Store) -> Mixture | None:
    """The version that was made from just these inputs by this prefmix, if there is one and its files are there."""
    name = planned.recipe.name
    for label in reversed(store.versions(name)):
        mixture = store.find(name, label)
        manifest = mixture.manifest
        same = (manifest["recipe_digest"], manifest["fingerprints"], manifest["tools"]["prefmix"]) == (
            planned.recipe_digest, _fingerprint(planned), version("prefmix"))  # fmt: skip
        if same and mixture.is_whole():
            return mixture
    return None


def curate(planned: Plan, limit: int | None = None, progress: Progress = _silent) -> Curated:
    """Runs the stages in memory. `limit` reads only the first rows of each source: for a look, never for a version, and
    without the shares of [mix], which so few rows need not allow."""
    recipe = planned.recipe
    shares = recipe.mix if limit is None else Mix()
    count_tokens = partial(_count_tokens, planned, progress)

    def filtered(kind: Kind) -> pl.DataFrame:
        marked = filters.apply(read[kind], recipe.filter, kind)
        marked = chatml.with_system(marked, kind, recipe.format.system)
        limits = filters.in_tokens(recipe.filter, kind)
        return mark(count_tokens(marked, kind), limits) if limits else marked

    def mixed(kind: Kind) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, Any]]:
        audited = audit.report(rows[kind], recipe.filter, kind)
        sampled = mix.sample(rows[kind], kind, recipe.sources, shares, recipe.seed)
        kept = mix.split(sampled, kind, recipe.splits, recipe.seed)
        if planned.tokenizer and "prompt_tokens" not in kept.columns:
            kept = count_tokens(kept, kind)
        return sampled, kept, audited

    read = _read(planned, limit, progress)
    rows = _side_by_side("filter", filtered, read, progress)
    progress("dedupe", 0, 1)
    rows = dedupe.exact(rows, recipe.dedupe)
    progress("dedupe", 1, 1)
    results = _side_by_side("mix", mixed, rows, progress)
    curated = Curated(
        planned,
        rows={kind: sampled for kind, (sampled, _, _) in results.items()},
        kept={kind: kept for kind, (_, kept, _) in results.items()},
        audit={source: entry for _, _, audited in results.values() for source, entry in audited.items()},
    )
    _check(read, curated)
    return curated


def publish(curated: Curated, store: Store, progress: Progress = _silent) -> Mixture:
    """Writes the mixture into the store: as a whole, or not at all."""
    if not any(frame.height for frame in curated.kept.values()):
        dropped = ", ".join(f"{r} {n:,}" for stage in curated.funnel() for r, n in stage["dropped"].items())
        raise BuildError(f"No row is left to write. Dropped: {dropped or 'nothing; the sources have no rows'}.")
    try:
        with store.staging(curated.plan.recipe.name) as folder:
            return store.publish(folder, _write(curated, folder, progress))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise BuildError(f"{store.root} cannot be written: {error.strerror}. Make room, or give another --store; "
                         f"nothing was left behind.") from error  # fmt: skip


def _write(curated: Curated, folder: Path, progress: Progress) -> dict[str, Any]:
    planned, recipe = curated.plan, curated.plan.recipe
    subsets: dict[str, dict[str, Any]] = {}
    schemas, digests = {}, {}
    total = sum(int(frame["copies"].sum()) for frame in curated.kept.values())
    done = 0
    for kind in (kind for kind in KINDS if kind in curated.kept and curated.kept[kind].height):
        schemas[kind] = columns(kind, recipe.format.layout, planned.tokenizer is not None)
        subsets[kind], by_split = {}, {}
        for split in ("train", *recipe.splits):
            part = mix.ordered(curated.kept[kind].filter(pl.col("split") == split), kind, recipe.seed)
            if part.height:
                progress("write", done, total)
                subsets[kind][split], by_split[split] = write_split(folder, kind, split, part, schemas[kind])
                done += part.height
        digests[kind] = by_split
    progress("write", total, total)
    manifest = _manifest(curated, subsets, mixture_digest(schemas, digests))
    (folder / "drops").mkdir()
    _ledger(curated).write_parquet(folder / "drops" / "drops.parquet")
    _changes(curated).write_parquet(folder / "drops" / "changes.parquet")
    write_durably(folder / "recipe.toml", recipe.to_toml(planned.revisions))
    write_durably(folder / "README.md", card.card(manifest))
    manifest["records"] = recorded(folder, ("drops/drops.parquet", "drops/changes.parquet", "recipe.toml", "README.md"))
    return manifest


def _manifest(curated: Curated, subsets: Mapping[str, Any], digest: str) -> dict[str, Any]:
    planned, recipe = curated.plan, curated.plan.recipe
    fingerprints = _fingerprint(planned)
    identity = json.dumps([digest, planned.recipe_digest, fingerprints])
    dropped = curated.dropped()
    entries: dict[str, Any] = {}
    for name, source in planned.sources.items():
        frame = next(frame for kind, frame in curated.rows.items() if kind == source.kind)
        own = frame.filter(pl.col("source") == name)
        by_file = dict(own.group_by("source_file").len().rows())
        spec = recipe.sources[name]
        entries[name] = {
            "format": source.format, "kind": source.kind,
            **({"hub": spec.hub} if spec.hub else {"path": spec.path}),
            "revision": source.revision, "licence": _licence(spec),
            "files": [{"path": file, "sha256": sha, "rows": by_file.get(file, 0)} for file, sha in planned.fingerprints[name]],
            "read": own.height, "kept": own.filter(ALIVE).height, "dropped": dropped[name],
        }  # fmt: skip
    loaded = planned.tokenizer
    return {
        "format": 1, "name": recipe.name, "build": sha256(identity.encode()).hexdigest()[:12], "digest": digest,
        "recipe_digest": planned.recipe_digest, "fingerprints": fingerprints, "seed": recipe.seed,
        "license": recipe.license or card.strictest(entry["licence"] for entry in entries.values()),
        "subsets": subsets, "sources": entries, "funnel": curated.funnel(), "audit": curated.audit, "contamination": {},
        "tokenizer": loaded and {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256, "added": loaded.added},
        "tools": {name: version(name) for name in ("prefmix", "polars", "pyarrow", "tokenizers")},
    }  # fmt: skip


def _read(planned: Plan, limit: int | None, progress: Progress) -> dict[Kind, pl.DataFrame]:
    """The rows of all sources by kind; `source` becomes an Enum in the order of the recipe, which is their priority."""
    priority = pl.Enum(list(planned.sources))

    def read(name: str) -> pl.DataFrame:
        frame = planned.sources[name].read(planned.recipe.seed, limit)
        return frame.with_columns(pl.col("source").cast(priority), NO_CHANGES)

    frames = _side_by_side("read", read, planned.sources, progress)
    by_kind = {kind: [frame for name, frame in frames.items() if planned.sources[name].kind == kind] for kind in KINDS}
    return {kind: pl.concat(found) for kind, found in by_kind.items() if found}


def _side_by_side(stage: str, work: Callable[[K], V], keys: Iterable[K], progress: Progress) -> dict[K, V]:
    """`{key: work(key)}`, two at a time: much of the work on one frame keeps one core busy."""
    todo, done = list(keys), {}
    with ThreadPoolExecutor(min(2, pl.thread_pool_size())) as pool:
        for key, result in zip(todo, pool.map(work, todo), strict=True):
            progress(stage, len(done), len(todo))
            done[key] = result
    progress(stage, len(todo), len(todo))
    return done


def _count_tokens(planned: Plan, progress: Progress, rows: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """The rows with token counts, null for those that are dropped."""
    assert planned.tokenizer is not None
    indexed = rows.with_row_index("_index")
    counted = tokens.count(indexed.filter(ALIVE), kind, planned.tokenizer, partial(progress, "tokens"))
    names = [name for name in counted.columns if name not in indexed.columns]
    return indexed.join(counted.select("_index", *names), on="_index", how="left", maintain_order="left").drop("_index")


def _check(read: Mapping[Kind, pl.DataFrame], curated: Curated) -> None:
    def by_source(frames: Iterable[pl.DataFrame]) -> dict[str, int]:
        return {source: rows for frame in frames for source, rows in frame.group_by(pl.col("source").cast(pl.String)).len().rows()}

    dropped = {source: sum(reasons.values()) for source, reasons in curated.dropped().items()}
    check_conservation(by_source(read.values()), by_source(curated.kept.values()), dropped)


def _ledger(curated: Curated) -> pl.DataFrame:
    parts = pl.concat(ledger(frame, kind) for kind, frame in curated.rows.items())
    return parts.sort("kind", "source", "source_row")


def _changes(curated: Curated) -> pl.DataFrame:
    parts = [
        frame.lazy().filter(pl.col("changes").list.len() > 0).select("id", *ORIGIN, "changes", kind=pl.lit(kind))
        .explode("changes", empty_as_null=False).unnest("changes")
        .select(pl.col(name).cast(dtype) for name, dtype in CHANGES.items())
        for kind, frame in curated.rows.items()
    ]  # fmt: skip
    return pl.concat(parts).collect().sort("kind", "source", "source_row")


def _fingerprint(planned: Plan) -> str:
    """64 hex digits over the content of every input file."""
    return sha256(json.dumps({name: sorted(files) for name, files in planned.fingerprints.items()}).encode()).hexdigest()


def _licence(spec: Any) -> str:
    return spec.license or card.KNOWN_LICENCES.get(spec.hub, card.UNKNOWN)
