"""A build in pieces of work: what they share, and how they are run, once each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl

from prefmix.files import Span
from prefmix.manifest import Progress
from prefmix.overlap import Index
from prefmix.plan import Plan
from prefmix.scale.scratch import Scratch
from prefmix.scale.sizes import Sizes
from prefmix.schema import Kind

#: What the folders of files with texts of rows are called, or end with.
_TEXTS = ("texts", "copies", "shards")
Result = dict[str, Any]


class Unit(NamedTuple):
    """What is read at once: a part of a file of a source (by its number among them)."""

    source: str
    file: int
    span: Span


class Part(NamedTuple):
    """Rows that were read together. `first` is the number of the first one among all rows of the build, `base` that in its
    source of the first one of its unit, from which `source_row` counts in what was written of the part."""

    name: str
    kind: Kind
    source: str
    file: str
    rows: int
    first: int
    base: int


@dataclass(frozen=True)
class Job:
    """What every piece of work may look at. `rows` has an array for each thing that is known of every row by its number."""

    planned: Plan
    sizes: Sizes
    scratch: Scratch
    index: Index | None = None
    types: Mapping[str, Mapping[str, pl.DataType]] = field(default_factory=dict)
    parts: Sequence[Part] = ()
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of which there are sources, preference first."""
        present = {source.kind for source in self.planned.sources.values()}
        kinds: tuple[Kind, ...] = ("preference", "sft")
        return [kind for kind in kinds if kind in present]

    @property
    def priority(self) -> pl.Enum:
        """The type of `source`: the sources in the order of the recipe."""
        return pl.Enum(list(self.planned.sources))

    def knowing(self, **rows: np.ndarray) -> Job:
        """The job with more arrays in `rows`."""
        return replace(self, rows={**self.rows, **rows})

    def with_facts(self, **facts: Any) -> Job:
        """The job with more of what its pieces of work look at."""
        return replace(self, facts={**self.facts, **facts})

    def gathered(
        self, stage: str, kind: Kind, cut: int | None = None, columns: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """One cut of what `stage` wrote of all parts of a kind, with `_index` (the number of a row, in place of `place`)
        and `source`; `source_row` counts as it does in the source."""
        found = [
            self.numbered(self.scratch.read(f"{stage}/{part.name}", cut, columns), part)
            for part in self.parts
            if part.kind == kind
        ]
        return pl.concat([frame for frame in found if frame.height] or found[:1], rechunk=True)

    def numbered(self, rows: pl.DataFrame, part: Part) -> pl.DataFrame:
        """What was written of a part, as `gathered` gives it."""
        named = rows.with_columns(
            _index=pl.col("place") + pl.lit(part.first, pl.UInt32), source=pl.lit(part.source, self.priority)
        )
        if "source_row" in rows.columns:
            named = named.with_columns(pl.col("source_row") + part.base)
        return named.drop("place")


#: A piece of work: it writes files into `job.scratch`, and what it gives can be written as JSON.
Task = Callable[[Job, Any], Result]


class Engine(Protocol):
    """Where pieces of work run. The seam between a build and its machines: nothing else knows of them."""

    def map(self, task: Task, job: Job, items: Sequence[Any]) -> Iterator[Result]:
        """`task(job, item)` for each item, in the order of the items, several at a time; a few ahead of what was taken."""
        ...


@dataclass
class Run:
    """The pieces of work of one build: done ones are not done again, and each stage is timed."""

    engine: Engine
    progress: Progress
    #: For each stage its seconds, pieces (and how many of them were done before), and the bytes that they wrote into the
    #: scratch folder: `text_bytes` of them are rows' texts, the others keys, edges and decisions.
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def map(self, stage: str, task: Task, job: Job, items: Sequence[Any]) -> Iterator[Result]:
        """The results of a stage, in the order of the items."""
        started, written, texts = time.monotonic(), 0, 0
        names = [f"done/{stage}-{number:06d}.json" for number in range(len(items))]
        before = {name: result for name in names if (result := job.scratch.result(name)) is not None}
        todo = [(item, task, name) for item, name in zip(items, names, strict=True) if name not in before]
        fresh = self.engine.map(_recorded, job, todo)
        self.progress(stage, 0, len(items))
        for number, name in enumerate(names, 1):
            result = before[name] if name in before else next(fresh)
            written += result["bytes"]
            texts += result["text_bytes"]
            self.progress(stage, number, len(items))
            yield result["result"]
        next(fresh, None)
        self.stages[stage] = {
            "seconds": round(time.monotonic() - started, 3),
            "pieces": len(items),
            "done_before": len(before),
            "bytes_written": written,
            "text_bytes": texts,
        }


def _recorded(job: Job, item: tuple[Any, Task, str]) -> Result:
    """Does a piece of work and notes that it is done."""
    inner, task, record = item
    scratch = job.scratch.at_work()
    result = task(replace(job, scratch=scratch), inner)
    texts = sum(size for name, size in scratch.written.items() if name.partition("/")[0].endswith(_TEXTS))
    noted = {"result": result, "bytes": sum(scratch.written.values()), "text_bytes": texts}
    scratch.done(record, noted)
    return noted
