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
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa

from prefmix import storage
from prefmix.errors import StorageError

_BLOCK_BYTES = 1 << 20  # that are read at once from an address
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Scratch:
    """Files below one folder, of this machine or one that all machines of a build see."""

    root: Path
    #: Names and sizes of the files that were written by the work at hand.
    written: dict[str, int] = field(default_factory=dict)

    def at_work(self) -> Self:
        """The same folder, for one piece of work that notes what it writes."""
        return replace(self, written={})

    def __str__(self) -> str:
        return str(self.root)

    @contextmanager
    def writing(self, name: str) -> Generator[Path]:
        """A file to be written; it gets its name when all went well."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}-{token_hex(4)}")
        try:
            yield fresh
            self.written[name] = fresh.stat().st_size
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)

    @contextmanager
    def opened(self, name: str) -> Generator[pa.NativeFile]:
        """A file to be read. Raises OSError or StorageError where it is not there."""
        with pa.OSFile(str(self.root / name)) as file:
            yield file

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is not there."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def move_to(self, name: str, target: Path) -> None:
        """Puts a file elsewhere: on the same disk as a second name of it, which takes no room."""
        try:
            os.link(self.root / name, target)
        except OSError:
            shutil.copyfile(self.root / name, target)

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

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
        with self.opened(name) as file:
            reader = pa.ipc.open_file(file)
            if columns is not None:
                wanted = [reader.schema.names.index(column) for column in columns]
                file.seek(0)
                reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=wanted))
            numbers = range(reader.num_record_batches) if cut is None else [cut]
            found = _frame([reader.get_batch(number) for number in numbers], reader.schema)
        return found if columns is None else found.select(columns)

    def batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """The record batches of a file, one after the other."""
        with self.opened(name) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def result(self, record: str) -> dict[str, Any] | None:
        """What a piece of work gave that is done and whose files are there."""
        try:
            if self.size(record) is None:
                return None
            with self.opened(record) as file:
                done = json.loads(file.read())
            if all(self.size(name) == size for name, size in done["files"].items()):
                return done["result"]
        except (ValueError, KeyError):  # not written by this version, or damaged
            pass
        return None

    def done(self, record: str, result: Mapping[str, Any]) -> None:
        """Notes the result of a piece of work, and the files that it wrote."""
        text = json.dumps({"result": result, "files": self.written})
        with self.writing(record) as path:
            path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class SharedScratch(Scratch):
    """Files below an address (see `storage`), for machines that share no disk."""

    address: str = ""

    def __str__(self) -> str:
        return self.address

    @contextmanager
    def writing(self, name: str) -> Generator[Path]:
        with TemporaryDirectory() as folder:
            fresh = Path(folder) / "fresh"
            yield fresh
            storage.put(fresh, f"{self.address}/{name}")
            self.written[name] = fresh.stat().st_size

    @contextmanager
    def opened(self, name: str) -> Generator[pa.NativeFile]:
        client, path = storage.open_fs(f"{self.address}/{name}")
        with storage.reaching(f"{self.address}/{name}"), client.open(path, "rb", block_size=_BLOCK_BYTES) as file:
            yield pa.PythonFile(file, "r")

    def size(self, name: str) -> int | None:
        found = storage.look(f"{self.address}/{name}")
        return None if found is None else found.bytes

    def move_to(self, name: str, target: Path) -> None:
        found = storage.look(f"{self.address}/{name}")
        if found is None:
            raise StorageError(f"{self.address}/{name}: no such file: run the command again.")
        storage.download(found, target)

    def remove(self) -> None:
        storage.delete(found.address for found in storage.below(self.address).values())


def _frame(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pl.DataFrame:
    found = pl.from_arrow(pa.Table.from_batches(batches, schema))
    assert isinstance(found, pl.DataFrame)
    return found


def _slice(table: pa.Table, start: int, stop: int) -> pa.RecordBatch:
    batches = table.slice(start, stop - start).combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
