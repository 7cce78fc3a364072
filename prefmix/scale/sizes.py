"""How much memory a build may take, and into how many parts it cuts its work for that."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from prefmix import files
from prefmix.errors import UsageError
from prefmix.plan import Plan
from prefmix.sources import Source

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_ROW_BYTES = 1200  # text of a row, where nothing is known of it
_INFLATED = 4  # times the size of a compressed text file
_IN_MEMORY = 4  # bytes that a build in memory takes for a byte of text, at most (docs/scaling.md)
_ITSELF = 400_000_000  # bytes that a build takes for whatever rows
_BUFFERED = 12  # bytes that work on a batch takes for a byte of its text
_KEYS_BYTES = 1500  # that work on the keys of a row takes
_BAND_BYTES = 64  # that work on the key of a row in a band takes


@dataclass(frozen=True)
class Sizes:
    """In what portions a build works that does not hold its rows in memory."""

    rows: int  # of a part of a source, at most
    part: int  # bytes of text in it, about
    partitions: int  # of the keys, by the hash of a row's prompt
    buckets: int  # of the rows, by their order in the mixture; each is a shard
    ranges: int  # of the keys of a band, each looked at by itself
    group: int  # bytes of text of rows that are compared with each other
    workers: int  # pieces of work at the same time


def memory_of(text: str) -> int:
    """Bytes, of `4GB`, `500 MB` or `4GiB`. Raises UsageError."""
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not matched or not float(matched[1]):
        raise UsageError(f"--memory {text}: write a size as in 4GB or 500MB.")
    return int(float(matched[1]) * _UNITS[matched[2]])


def machine() -> int:
    """Bytes of memory of the machine, or of the control group that this process is in if that has less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return found


def in_memory(planned: Plan) -> int:
    """Bytes that the build takes in memory, about."""
    return _ITSELF + _IN_MEMORY * estimated(planned)[1]


def estimated(planned: Plan) -> tuple[int, int]:
    """(rows, bytes of text) of all sources, by what their files say without being read."""
    totals = [_estimated(source) for source in planned.sources.values()]
    return sum(rows for rows, _ in totals), sum(size for _, size in totals)


def _estimated(source: Source) -> tuple[int, int]:
    rows = size = 0
    for path in (each.path for each in source.files):
        stored = path.stat().st_size
        if path.suffix == ".parquet":
            metadata = pq.read_metadata(path)
            rows += metadata.num_rows
            size += sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        else:
            text = stored * (_INFLATED if path.suffix in files.COMPRESSIONS else 1)
            size += text
            rows += text // _ROW_BYTES + 1
    return rows, size


def sizes_for(planned: Plan, memory: int, workers: int | None = None) -> Sizes:
    """The portions in which a build keeps to `memory` bytes, of which about half are its own and not the work's."""
    rows, size = estimated(planned)
    workers = workers or pl.thread_pool_size()
    share = memory // 2 // workers
    repeated = max(source.repeat for source in planned.recipe.sources.values())
    part = max(share // (2 * _BUFFERED), 1 << 12)
    each = max(size // max(rows, 1), 100)
    return Sizes(
        rows=max(part // each, 16),
        part=part,
        partitions=_parts(rows * _KEYS_BYTES, share),
        buckets=_parts(size * repeated * _BUFFERED // 2, share),
        ranges=_parts(rows * _BAND_BYTES, share),
        group=max(share // _BUFFERED, 1 << 12),
        workers=workers,
    )


def _parts(total: int, share: int) -> int:
    return min(max(-(-total // share), 1), 4096)
