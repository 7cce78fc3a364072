"""From a recipe to a mixture: the stages in their order.

read, where, split                      sources
validity, injection, filters            filters
text of benchmarks                      decontaminate
exact duplicates, near-duplicates       dedupe
take, shares, repeat                    mix
splits by cluster of prompts            mix
token counts                            tokens
rendering, writing, manifest, card      manifest, mixture

Here all rows are in memory. When they do not fit, the same functions work on parts of them: scale/pipeline.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import polars as pl

from prefmix import audit, batch, decontaminate, dedupe, mix
from prefmix.errors import BuildError, GateError
from prefmix.ledger import check_conservation
from prefmix.manifest import Curated, Progress, write
from prefmix.mixture import Mixture, Unreadable
from prefmix.plan import Plan, plan
from prefmix.recipe import Mix, Recipe, load_recipe
from prefmix.scale import Engine, Local, Settled, in_memory, machine, settled, sizes_for
from prefmix.scale import write as write_parts
from prefmix.schema import KINDS, NO_CHANGES, Kind
from prefmix.storage import is_address
from prefmix.store import Store

#: What `fail_on` may name.
CONTAMINATION = "contamination"
_SHARE = 0.6  # of the machine's memory, for a build that is not told how much it may take

K = TypeVar("K")
V = TypeVar("V")


def _silent(stage: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Means:
    """With what a build is made.

    `engine`: "memory" holds all rows in memory; "disk" works on parts of them in a scratch folder; "ray" does that on a
    cluster (at `address`, else one of this machine); "auto" is memory if that is enough, else disk. `memory` is what the
    build may take, in bytes; without it a share of what the machine has. `scratch` is the folder or address for scratch
    folders, else one in the store. The mixture is the same in every case.
    """

    engine: Literal["auto", "memory", "disk", "ray"] = "auto"
    memory: int | None = None
    scratch: Path | str | None = None
    address: str | None = None


def build(
    recipe: Recipe | str | Path,
    *,
    store: str | Path | None = None,
    fail_on: Collection[str] = (),
    means: Means = Means(),
    progress: Progress = _silent,
) -> Mixture:
    """Builds the mixture of a recipe (or of its file), or gives back the version that is already there.

    With `fail_on=["contamination"]` a row that holds text of a benchmark fails the build, and is not dropped.

    Raises RecipeError, SourceError, HubError, BuildError or GateError; the store is then as it was.
    """
    planned = plan(load_recipe(recipe) if isinstance(recipe, str | Path) else recipe)
    shelf = Store(store)
    return built(planned, shelf, fail_on) or made(planned, shelf, fail_on, means, progress)


def made(
    planned: Plan,
    store: Store,
    fail_on: Collection[str] = (),
    means: Means = Means(),
    progress: Progress = _silent,
    stages: dict[str, dict[str, float]] | None = None,
) -> Mixture:
    """Builds what is not there yet. `stages` takes what `scale.Run` notes of each stage of a build that is not in memory."""
    with curating(planned, store, None, fail_on, means, progress) as rows:
        mixture = publish(rows, store, progress)
        if stages is not None and isinstance(rows, Settled):
            stages |= rows.run.stages
        return mixture


@contextmanager
def curating(
    planned: Plan,
    store: Store,
    limit: int | None = None,
    fail_on: Collection[str] = (),
    means: Means = Means(),
    progress: Progress = _silent,
) -> Generator[Curated | Settled]:
    """The rows with all that was decided of them, before anything is written into the store; `limit` as in `curate`."""
    memory = means.memory or int(_SHARE * machine())
    fits = means.engine == "auto" and in_memory(planned) <= memory
    if limit is not None or fits or means.engine == "memory":
        yield curate(planned, limit, fail_on, progress)
        return
    home = scratch_home(planned, store, means)
    refuse = _refuse if CONTAMINATION in fail_on else _allow
    sizes = sizes_for(planned, memory)
    at_work: AbstractContextManager[Engine] = nullcontext(Local(sizes.workers))
    if means.engine == "ray":
        from prefmix.scale.cluster import Cluster

        at_work = Cluster(means.address)
    with (
        _writing(home, "--scratch"),
        at_work as engine,
        settled(planned, home, sizes, engine, refuse, progress) as rows,
    ):
        yield rows


def scratch_home(planned: Plan, store: Store, means: Means) -> Path | str:
    """The folder, or the address, of the scratch folder of a build that is not in memory."""
    if means.scratch is None:
        return store.root / planned.recipe.name / ".scratch"
    return str(means.scratch) if is_address(str(means.scratch)) else Path(means.scratch)


def _allow(contamination: Mapping[str, Any]) -> None:
    pass


@contextmanager
def _writing(place: Path | str, option: str) -> Generator[None]:
    """Says of a disk that is full or may not be written where that was, and what helps."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        left = (
            "nothing was left behind" if option == "--store" else "what is done is kept there, and goes on from there"
        )
        raise BuildError(
            f"{place} cannot be written: {error.strerror}. Make room, or give another {option}; {left}."
        ) from error


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
    joined = mix.near_prompts(rows, near) if near is not None and recipe.splits else {}
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


def publish(rows: Curated | Settled, store: Store, progress: Progress = _silent) -> Mixture:
    """Writes the mixture into the store: as a whole, or not at all."""
    if not rows.tally.copies:
        dropped = ", ".join(f"{r} {n:,}" for stage in rows.tally.funnel() for r, n in stage["dropped"].items())
        raise BuildError(f"No row is left to write. Dropped: {dropped or 'nothing; the sources have no rows'}.")
    with _writing(store.place, "--store"), store.staging(rows.plan.recipe.name) as folder:
        manifest = write(rows, folder, progress) if isinstance(rows, Curated) else write_parts(rows, folder)
        return store.publish(folder, manifest)


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
