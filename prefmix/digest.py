"""The digest of a mixture: sha256 over its content and nothing else.

Column by column in row order, the values themselves go in: which are valid, their lengths, their bytes. So it sees
every change of content, and none of time, machine, threads, file order, shards, chunks or file format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class SplitDigest:
    """Reads one split batch by batch. Memory: a few hash states per column, whatever the number of rows."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self._columns = {field.name: _ColumnDigest(field.type) for field in schema}

    def update(self, batch: pa.RecordBatch) -> None:
        self.rows += batch.num_rows
        for name, column in self._columns.items():
            column.update(batch.column(name))

    def summary(self) -> dict:
        return {"rows": self.rows, "columns": {name: column.summary() for name, column in self._columns.items()}}


def mixture_digest(schemas: Mapping[str, pa.Schema], splits: Mapping[str, Mapping[str, SplitDigest]]) -> str:
    """64 hex digits for the subsets of a mixture: `splits[subset][split]`, `schemas[subset]` (names and types)."""
    content = {
        subset: {
            "schema": [[field.name, str(field.type)] for field in schemas[subset]],
            "splits": {split: digest.summary() for split, digest in sorted(by_split.items())},
        }
        for subset, by_split in splits.items()
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _ColumnDigest:
    def __init__(self, kind: pa.DataType) -> None:
        self._validity, self._lengths, self._values = sha256(), sha256(), sha256()
        self._children: dict[str, _ColumnDigest] = {}
        if pa.types.is_list(kind):
            self._children = {"item": _ColumnDigest(kind.value_type)}
        elif pa.types.is_struct(kind):
            self._children = {field.name: _ColumnDigest(field.type) for field in kind}

    def update(self, array: pa.Array) -> None:
        kind = array.type
        self._validity.update(array.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8).tobytes())
        if pa.types.is_string(kind):
            values = pc.fill_null(array, "") if array.null_count else array
            offsets = np.frombuffer(values.buffers()[1], dtype=np.int32)[
                values.offset : values.offset + len(values) + 1
            ]
            self._lengths.update(np.diff(offsets).astype("<i8").tobytes())
            if len(values) and values.buffers()[2] is not None:
                self._values.update(memoryview(values.buffers()[2])[offsets[0] : offsets[-1]])
        elif pa.types.is_list(kind):
            lengths = pc.call_function("list_value_length", [array])
            self._lengths.update(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            self._children["item"].update(array.flatten())
        elif pa.types.is_struct(kind):
            for child, values in zip(self._children.values(), array.flatten(), strict=True):
                child.update(values)
        else:  # a number, as 8 bytes; one bit pattern for every NaN
            width = "<f8" if pa.types.is_floating(kind) else "<i8"
            numbers = pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(width)
            if width == "<f8":
                numbers = np.where(np.isnan(numbers), np.nan, numbers + 0.0)
            self._values.update(numbers.tobytes())

    def summary(self) -> dict:
        hashes = {"validity": self._validity, "lengths": self._lengths, "values": self._values}
        own = {name: state.hexdigest() for name, state in hashes.items()}
        return own | {name: child.summary() for name, child in self._children.items()}
