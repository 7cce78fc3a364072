"""The scratch folder of a build: what its pieces of work leave for those that follow, and which of them are done.

A table is kept as one Arrow file, cut by a number: its record batch `i` holds the rows of cut `i`, so that one cut of many
files can be read without the others. A file appears under its name when it is whole. A piece of work that is done has a
record of its result and of its files: a later run of the same build takes the result and does not do the work again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Scratch:
    """Files below one folder."""

    root: Path
    #: Names and sizes of the files that were written by the work at hand.
    written: dict[str, int] = field(default_factory=dict)

    def at_work(self) -> Scratch:
        """The same folder, for one piece of work that notes what it writes."""
        return Scratch(self.root, {})

    def path(self, name: str) -> Path:
        return self.root / name

    @contextmanager
    def writing(self, name: str) -> Generator[Path]:
        """A file to be written; it gets its name when all went well."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}-{token_hex(4)}")
        try:
            yield fresh
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)
        self.written[name] = target.stat().st_size

    def write(self, name: str, rows: pl.DataFrame, cut: np.ndarray | None = None, cuts: int = 1) -> None:
        """Writes rows, each into the cut (0 ... cuts - 1) that `cut` says; the order of the rows in a cut stays."""
        if cut is None:
            cut = np.zeros(rows.height, np.int64)
        order = np.argsort(cut, kind="stable")
        bounds = np.searchsorted(cut[order], np.arange(cuts + 1))
        table = rows[order].rechunk().to_arrow()
        self.write_batches(name, table.schema, (_slice(table, *bounds[at : at + 2]) for at in range(cuts)))

    def write_batches(self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        """Writes a batch for each cut."""
        with (
            self.writing(name) as path,
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, schema, options=_OPTIONS) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)

    def read(self, name: str, cut: int | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rows of one cut of a file, or of all of them."""
        with pa.OSFile(str(self.root / name)) as file:
            fields = pa.ipc.open_file(file).schema.names
            wanted = None if columns is None else [fields.index(column) for column in columns]
            file.seek(0)
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=wanted))
            numbers = range(reader.num_record_batches) if cut is None else [cut]
            table = pa.Table.from_batches([reader.get_batch(number) for number in numbers], reader.schema)
        found = pl.from_arrow(table)
        assert isinstance(found, pl.DataFrame)
        return found if columns is None else found.select(columns)

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """The record batches of a file, one after the other."""
        with pa.OSFile(str(self.root / name)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def move_to(self, name: str, target: Path) -> None:
        """Puts a file elsewhere: on the same disk as a second name of it, which takes no room."""
        try:
            os.link(self.root / name, target)
        except OSError:
            shutil.copyfile(self.root / name, target)

    def result(self, record: str) -> dict[str, Any] | None:
        """What a piece of work gave that is done and whose files are there."""
        try:
            done = json.loads((self.root / record).read_text(encoding="utf-8"))
            if all((self.root / name).stat().st_size == size for name, size in done["files"].items()):
                return done["result"]
        except (OSError, ValueError, KeyError):  # not done, or not to its end
            pass
        return None

    def done(self, record: str, result: Mapping[str, Any]) -> None:
        """Notes the result of a piece of work, and the files that it wrote."""
        text = json.dumps({"result": result, "files": self.written})
        with self.writing(record) as path:
            path.write_text(text, encoding="utf-8")

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def _slice(table: pa.Table, start: int, stop: int) -> pa.RecordBatch:
    batches = table.slice(start, stop - start).combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
