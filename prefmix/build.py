"""From a recipe to a mixture: the stages in their order.

read, where, split                      sources
validity, injection, filters            filters
text of benchmarks                      decontaminate
exact duplicates, near-duplicates       dedupe
take, shares, repeat                    mix
splits by cluster of prompts            mix
token counts                            tokens
rendering, writing, manifest, card      manifest, mixture
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from prefmix import audit, batch, decontaminate, dedupe, mix
from prefmix.errors import BuildError, GateError
from prefmix.ledger import check_conservation
from prefmix.manifest import Curated, Progress, write
from prefmix.mixture import Mixture, Unreadable
from prefmix.plan import Plan, plan
from prefmix.recipe import Mix, Recipe, load_recipe
from prefmix.schema import KINDS, NO_CHANGES, Kind
from prefmix.store import Store

#: What `fail_on` may name.
CONTAMINATION = "contamination"

K = TypeVar("K")
V = TypeVar("V")


def _silent(stage: str, done: int, total: int) -> None:
    pass


def build(
    recipe: Recipe | str | Path,
    *,
    store: str | Path | None = None,
    fail_on: Collection[str] = (),
    progress: Progress = _silent,
) -> Mixture:
    """Builds the mixture of a recipe (or of its file), or gives back the version that is already there.

    With `fail_on=["contamination"]` a row that holds text of a benchmark fails the build, and is not dropped.

    Raises RecipeError, SourceError, HubError, BuildError or GateError; the store is then as it was.
    """
    planned = plan(load_recipe(recipe) if isinstance(recipe, str | Path) else recipe)
    shelf = Store(store)
    return built(planned, shelf, fail_on) or publish(curate(planned, None, fail_on, progress), shelf, progress)


def built(planned: Plan, store: Store, fail_on: Collection[str] = ()) -> Mixture | None:
    """The version that was made from just these inputs by this prefmix, if there is one and its files are there.

    Raises GateError as `build` does.
    """
    name = planned.recipe.name
    for label in reversed(store.versions(name)):
        try:
            manifest = store.look(name, label).manifest
            same = (manifest["recipe_digest"], manifest["fingerprints"], manifest["tools"]["prefmix"]) == (
                planned.recipe_digest, planned.fingerprint, version("prefmix"))  # fmt: skip
            if not same:
                continue
            mixture = store.find(name, label)
        except Unreadable:  # the new build takes its place
            continue
        if mixture.is_whole():
            if CONTAMINATION in fail_on:
                _refuse(manifest["contamination"])
            return mixture
    return None


def curate(
    planned: Plan, limit: int | None = None, fail_on: Collection[str] = (), progress: Progress = _silent
) -> Curated:
    """Runs the stages in memory. `limit` reads only the first rows of each source: for a look, never for a version, and
    without the shares of [mix], which so few rows need not allow. `fail_on` as in `build`."""
    recipe = planned.recipe
    shares = recipe.mix if limit is None else Mix()

    def filtered(kind: Kind) -> pl.DataFrame:
        return batch.filtered(read[kind], kind, planned, partial(progress, "tokens"))

    def audited(kind: Kind) -> dict[str, Any]:
        return audit.report(rows[kind], recipe.filter, kind)

    def sampled(kind: Kind) -> pl.DataFrame:
        return mix.sample(rows[kind], kind, recipe.sources, shares, recipe.seed)

    def parted(kind: Kind) -> pl.DataFrame:
        kept = mix.split(rows[kind], kind, recipe.splits, recipe.seed, joined)
        return batch.counted(kept, kind, planned, partial(progress, "tokens"))

    read = _read(planned, limit, progress)
    rows = _side_by_side("filter", filtered, read, progress)
    contamination: dict[str, Any] = {}
    if planned.benchmarks:
        progress("decontaminate", 0, 1)
        index = decontaminate.index_of(planned.benchmarks, recipe.decontaminate.ngram)
        found = decontaminate.find(rows, index, recipe.decontaminate.answers)
        contamination = decontaminate.report(found, index)
        if CONTAMINATION in fail_on:
            _refuse(contamination)
        rows = decontaminate.drop(rows, found)
        progress("decontaminate", 1, 1)
    near = recipe.dedupe.near
    progress("dedupe", 0, 1)
    rows = dedupe.exact(rows, recipe.dedupe)
    if near is not None:
        rows = dedupe.near(rows, near, recipe.dedupe.across)
    progress("dedupe", 1, 1)
    rows = _side_by_side("mix", sampled, rows, progress)
    joined = mix.near_prompts(rows, near) if near is not None else {}
    results = _side_by_side("split", _run, product((parted, audited), rows), progress)
    curated = Curated(
        planned,
        rows=rows,
        kept={kind: results[parted, kind] for kind in rows},
        audit={source: entry for kind in rows for source, entry in results[audited, kind].items()},
        contamination=contamination,
    )
    _check(read, curated)
    return curated


def publish(curated: Curated, store: Store, progress: Progress = _silent) -> Mixture:
    """Writes the mixture into the store: as a whole, or not at all."""
    if not any(frame.height for frame in curated.kept.values()):
        dropped = ", ".join(f"{r} {n:,}" for stage in curated.tally.funnel() for r, n in stage["dropped"].items())
        raise BuildError(f"No row is left to write. Dropped: {dropped or 'nothing; the sources have no rows'}.")
    try:
        with store.staging(curated.plan.recipe.name) as folder:
            return store.publish(folder, write(curated, folder, progress))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise BuildError(f"{store.root} cannot be written: {error.strerror}. Make room, or give another --store; "
                         f"nothing was left behind.") from error  # fmt: skip


def _refuse(contamination: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises GateError when rows hold text of a benchmark."""
    held = [(name, entry) for name, entry in contamination.items() if entry["rows"]]
    if held:
        lines = [
            f"  {name}: {entry['rows']:,} rows ({', '.join(entry['sources'])}) hold {entry['touched']:,} of its "
            f"{entry['items']:,} items; most often {entry['worst'][0]['item']}: “{entry['worst'][0]['text']}”"
            for name, entry in held
        ]
        raise GateError("\n".join(["rows hold text of benchmarks; nothing was written:", *lines]))


def _read(planned: Plan, limit: int | None, progress: Progress) -> dict[Kind, pl.DataFrame]:
    """The rows of all sources by kind; `source` becomes an Enum in the order of the recipe, which is their priority."""
    priority = pl.Enum(list(planned.sources))

    def read(name: str) -> pl.DataFrame:
        frame = planned.sources[name].read(planned.recipe.seed, limit)
        return frame.with_columns(pl.col("source").cast(priority), NO_CHANGES)

    def size(name: str) -> int:
        return sum(file.path.stat().st_size for file in planned.sources[name].files)

    # The largest first: at the end no core waits for one of them.
    frames = _side_by_side("read", read, sorted(planned.sources, key=size, reverse=True), progress)
    by_kind = {
        kind: [frames[name] for name, source in planned.sources.items() if source.kind == kind] for kind in KINDS
    }
    return {kind: pl.concat(found, rechunk=True) for kind, found in by_kind.items() if found}


def _side_by_side(stage: str, work: Callable[[K], V], keys: Iterable[K], progress: Progress) -> dict[K, V]:
    """`{key: work(key)}`, two at a time: much of the work on one frame keeps one core busy."""
    todo, done = list(keys), {}
    progress(stage, 0, len(todo))
    with ThreadPoolExecutor(min(2, pl.thread_pool_size())) as pool:
        for key, result in zip(todo, pool.map(work, todo), strict=True):
            done[key] = result
            progress(stage, len(done), len(todo))
    return done


def _run(job: tuple[Callable[[Kind], Any], Kind]) -> Any:
    work, kind = job
    return work(kind)


def _check(read: Mapping[Kind, pl.DataFrame], curated: Curated) -> None:
    def by_source(frames: Iterable[pl.DataFrame]) -> dict[str, int]:
        return {
            source: rows
            for frame in frames
            for source, rows in frame.group_by(pl.col("source").cast(pl.String)).len().rows()
        }

    dropped = {source: sum(reasons.values()) for source, reasons in curated.tally.dropped.items()}
    check_conservation(by_source(read.values()), by_source(curated.kept.values()), dropped)
