"""The files of a source: what is in them, and their rows as Polars frames (which ones are meant: see finding.py).

Parquet, Arrow IPC (file and stream), JSON lines, JSON arrays and CSV; the text formats may be compressed (.gz, .zst).
Every failure is a SourceError that names the file and what to do. A bad record in a text file is no failure: its row
says what is wrong with it (see rows.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from prefmix import records
from prefmix.errors import SourceError
from prefmix.finding import (
    COMPRESSIONS,
    FILE_TYPES,
    SourceFile,
    file_type,
    find,
    find_file,
    find_files,
    here,
    in_split,
    is_data_file,
    relative_name,
)
from prefmix.rows import FAULT, RAW, frame, infer
from prefmix.storage import address_of

__all__ = [
    "COMPRESSIONS",
    "FILE_TYPES",
    "SourceFile",
    "Span",
    "batches",
    "content",
    "count_rows",
    "find",
    "find_file",
    "find_files",
    "fingerprint",
    "here",
    "in_split",
    "is_data_file",
    "json_records",
    "knows_columns",
    "knows_types",
    "read",
    "relative_name",
    "schema",
    "spans",
]

_SAMPLE_ROWS = 1000


def fingerprint(path: Path) -> str:
    """sha256 of the content, read in full each time: a time stamp says nothing about content."""
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def knows_columns(path: Path) -> bool:
    """Whether `schema` gives all columns of a file: of a JSON file it has seen only the first rows."""
    return file_type(path)[0] not in ("jsonl", "json")


def knows_types(path: Path) -> bool:
    """Whether `schema` gives the types of all columns of a file as they are read."""
    return file_type(path)[0] in ("parquet", "arrow")


def schema(path: Path) -> dict[str, pl.DataType]:
    """The columns of a file. Of JSON: the keys of the first rows, each with the type that most values have. Of CSV: all
    `Unknown`, for text that may be a number.

    Raises:
        SourceError: the file cannot be read, is empty, or has no record that can be parsed.
    """
    with _reading(path):
        kind, _ = file_type(path)
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: the file is empty: remove it, or fetch it again")
        if kind in ("parquet", "arrow"):
            rows = _scan(path, kind)
            if not rows.select(pl.len()).collect().item():
                raise SourceError(f"{path}: the file has no rows: remove it, or fetch it again")
            return dict(rows.collect_schema())
        if kind == "csv":
            with _open(path) as stream:
                header = records.csv_header(stream)
            if not any(chunk.rows for chunk in _chunks(path)):
                raise SourceError(f"{path}: the file has no rows: remove it, or fetch it again")
            return dict.fromkeys(header, pl.Unknown())
        return _sampled_schema(path)


def count_rows(path: Path) -> int | None:
    """Rows by a file's metadata; None where counting would mean reading."""
    with _reading(path):
        kind, _ = file_type(path)
        if kind in ("parquet", "arrow"):
            return _scan(path, kind).select(pl.len()).collect().item()
    return None


def read(
    path: Path, wanted: Mapping[str, pl.DataType], others: Collection[str] | None = (), limit: int | None = None
) -> pl.DataFrame:
    """All rows of a file in their order, or the first `limit`.

    Columns: those of `wanted` that the file has (in text files with exactly that type), those of `others` (None: all
    there are) as they are, FAULT and RAW. A record of a text file that cannot be parsed, or has a value of a type that
    is not wanted, has null columns and says so in FAULT (JSON); RAW is its text.

    Raises:
        SourceError: the file cannot be read; in a JSON file, not one record can be parsed.
    """
    with _reading(path):
        kind, _ = file_type(path)
        if kind in ("parquet", "arrow"):
            rows = _scan(path, kind)
            names = [name for name in rows.collect_schema() if others is None or name in wanted or name in others]
            rows = rows.select(names) if limit is None else rows.select(names).head(limit)
            return rows.collect().with_columns(pl.lit(None, pl.String).alias(FAULT), pl.lit(None, pl.String).alias(RAW))
        chunks = _chunks(path) if limit is None else _first(_chunks(path), limit)
        rows = frame(chunks, wanted, others, numerals=kind == "csv")
        if rows.is_empty():
            raise SourceError(f"{path}: the file has no rows: remove it, or fetch it again")
        return rows


@dataclass(frozen=True)
class Span:
    """A part of a file that can be read by itself: rows of a Parquet or Arrow file, bytes of JSON lines (whose first line
    has the number `line`); of other files all there is. `stop` is the end, not included; None is that of the file."""

    start: int = 0
    stop: int | None = None
    line: int = 1


def spans(path: Path, rows: int, size: int) -> list[Span]:
    """The parts, in order, in which a file can be read: whole row groups of at least `rows` rows together, `size` bytes of
    JSON lines.

    Raises:
        SourceError: the file cannot be read.
    """
    with _reading(path):
        kind, compression = file_type(path)
        if kind == "jsonl" and not compression:
            return _line_spans(path, size)
        if kind == "parquet":
            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        elif kind == "arrow" and _is_arrow_file(path):
            total = count_rows(path) or 0
            groups = [min(rows, total - start) for start in range(0, total, rows)]
        else:
            return [Span()]
        bounds = [0]
        for end in accumulate(groups):
            if end - bounds[-1] >= rows:
                bounds.append(end)
        bounds = [*bounds, sum(groups)] if bounds[-1] < sum(groups) else bounds
        return [Span(start, stop) for start, stop in pairwise(bounds)]


def batches(
    path: Path, wanted: Mapping[str, pl.DataType], others: Collection[str], span: Span, rows: int
) -> Iterator[pl.DataFrame]:
    """What `read` gives, of a part of a file and in frames of about so many rows. A column of `others` may have another
    type, or be missing, in another frame of a text file.

    Raises:
        SourceError: the file cannot be read.
    """
    with _reading(path):
        kind, _ = file_type(path)
        if kind in ("parquet", "arrow"):
            scan = _scan(path, kind)
            names = [name for name in scan.collect_schema() if name in wanted or name in others]
            part = scan.select(names).slice(span.start, None if span.stop is None else span.stop - span.start)
            marks = [pl.lit(None, pl.String).alias(name) for name in (FAULT, RAW)]
            if span.stop is not None:  # frames of one size, and not a small one at the end
                count = span.stop - span.start
                rows = -(-count // -(-count // rows))
            for batch in part.collect_batches(chunk_size=rows, maintain_order=True):
                yield batch.with_columns(marks)
            return
        if span.stop is None:
            chunks = _chunks(path)
        else:
            with path.open("rb") as stream:
                stream.seek(span.start)
                data = pa.BufferReader(stream.read(span.stop - span.start))
            chunks = records.json_lines(data, span.line)
        for chunk in chunks:
            if chunk.rows:
                yield frame([chunk], wanted, others, numerals=kind == "csv")


def _line_spans(path: Path, size: int) -> list[Span]:
    """Parts of a file of at least `size` bytes that end with a line."""
    found, start, line, at, lines = [], 0, 1, 0, 1
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            end = block.rfind(b"\n") + 1
            if end and at + end - start >= size:
                found.append(Span(start, at + end, line))
                start, line = at + end, lines + block.count(b"\n")
            lines += block.count(b"\n")
            at += len(block)
    return [*found, Span(start, at, line)] if at > start or not found else found


def json_records(path: Path) -> Iterator[records.Chunk]:
    """The records of a JSON file as they were parsed, of any types.

    Raises:
        SourceError: the file cannot be read, or not one record can be parsed.
    """
    with _reading(path):
        yield from _chunks(path)


def content(path: Path) -> bytes:
    """All that is in a text file, decompressed. Raises SourceError when it cannot be read."""
    with _reading(path), _open(path) as stream:
        return stream.read()


def _chunks(path: Path) -> Iterator[records.Chunk]:
    """The records of a text file; raises if not one of a JSON file can be parsed."""
    kind, _ = file_type(path)
    with _open(path) as stream:
        if kind == "csv":
            yield from records.csv_rows(stream)
            return
        if kind == "jsonl":
            chunks = records.json_lines(stream)
        else:
            data = stream.read()
            lines = records.is_json_lines(data)
            chunks = records.json_lines(pa.BufferReader(data)) if lines else records.json_array(data)
        parsed, first_fault = False, None
        for chunk in chunks:
            parsed = parsed or len(chunk.faults) < len(chunk.rows)
            first_fault = first_fault or next(iter(chunk.faults.values()), None)
            yield chunk
    if first_fault and not parsed:
        what = "JSON lines" if kind == "jsonl" else "JSON objects"
        raise records.Unreadable(
            f"it is not {what}: line {first_fault['line']}: {first_fault['error']}: "
            "each row must be one JSON object; rename the file if it is of another type"
        )


def _first(chunks: Iterator[records.Chunk], limit: int) -> Iterator[records.Chunk]:
    left = limit
    for chunk in chunks:
        if left < len(chunk.rows):
            del chunk.rows[left:], chunk.lines[left:]
            chunk.faults = {place: fault for place, fault in chunk.faults.items() if place < left}
            chunk.raw = {place: raw for place, raw in chunk.raw.items() if place < left}
        left -= len(chunk.rows)
        yield chunk
        if left <= 0:
            return


def _sampled_schema(path: Path) -> dict[str, pl.DataType]:
    """Keys and types by the first records of a JSON file."""
    values: dict[str, list[object]] = {}
    rows = (row for chunk in _chunks(path) for place, row in enumerate(chunk.rows) if place not in chunk.faults)
    sample = list(islice(rows, _SAMPLE_ROWS))
    if not sample:
        raise SourceError(f"{path}: the file has no rows: remove it, or fetch it again")
    for row in sample:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return {key: infer(column) for key, column in values.items()}


def _is_arrow_file(path: Path) -> bool:
    """Whether it is of Arrow's file format, and not of its stream format."""
    with path.open("rb") as file:
        return file.read(6) == b"ARROW1"


def _scan(path: Path, kind: str) -> pl.LazyFrame:
    if kind == "parquet":
        return pl.scan_parquet(path, glob=False, hive_partitioning=False)
    if _is_arrow_file(path):
        return pl.scan_ipc(path, glob=False, hive_partitioning=False)
    return pl.read_ipc_stream(path).lazy()


@contextmanager
def _open(path: Path) -> Generator[records.Stream]:
    _, compression = file_type(path)
    with path.open("rb") as file:
        yield pa.CompressedInputStream(file, compression) if compression else file


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turns what the readers raise into a SourceError that names the file and what to do."""
    try:
        yield
    except SourceError as error:
        if address_of(path) is None:
            raise
        raise SourceError(str(error).replace(str(path), _called(path))) from None
    except records.Unreadable as error:
        raise SourceError(f"{_called(path)}: {error}") from None
    except FileNotFoundError:
        raise SourceError(f"{_called(path)}: no such file: it was there a moment ago, or is a broken link") from None
    except PermissionError:
        raise SourceError(f"{_called(path)}: permission denied: make the file readable") from None
    except IsADirectoryError:
        raise SourceError(
            f"{_called(path)}: a folder, not a file: end the pattern with /* to mean the files in it"
        ) from None
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{_called(path)}: the file is truncated, corrupt or not what its name says ({reason}): fetch or write it again"
        ) from error


def _called(path: Path) -> str:
    """What the user calls a file: a copy in the cache by its address."""
    return address_of(path) or str(path)
