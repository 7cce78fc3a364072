"""The head of a GGUF file: its metadata and what its tensors are, without the weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefmix.errors import ModelError

_STRING, _ARRAY = 8, 9
#: By the number of a type in the file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TENSOR_TYPES = {0: "f32", 1: "f16", 8: "q8_0", 30: "bf16"}


@dataclass(frozen=True)
class Gguf:
    """`metadata` by key; `tensors` by name, each with its shape (the fastest dimension first) and its type (`q8_0`; a
    number for one that prefmix does not write). `places` says where in the file the numbers of an array begin."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    places: Mapping[str, int]


def read_gguf(path: Path) -> Gguf:
    """Reads the head of a file. Raises ModelError for one that is no GGUF of version 3 or ends within its head."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).head()
    except (OSError, ValueError, struct.error, KeyError, OverflowError) as error:
        raise ModelError(f"{path} is not a GGUF file that can be read ({error}).") from error


def write_array(path: Path, head: Gguf, key: str, values: Sequence[float], code: str) -> None:
    """Replaces the numbers of an array in the metadata by as many others; `code` is struct's for their type (f, i)."""
    assert len(values) == len(head.metadata[key])
    with path.open("r+b") as file:
        file.seek(head.places[key])
        file.write(struct.pack(f"<{len(values)}{code}", *values))


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def head(self) -> Gguf:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version, tensors, entries = self.numbers("IQQ")
        if version != 3:
            raise ValueError(f"version {version}")
        metadata: dict[str, Any] = {}
        places: dict[str, int] = {}
        for _ in range(entries):
            key, kind = self.string(), self.numbers("I")[0]
            metadata[key] = self.value(kind)
            if kind == _ARRAY and metadata[key] and not isinstance(metadata[key][0], str):
                places[key] = self.at - self.width * len(metadata[key])
        return Gguf(metadata, dict(self.tensor() for _ in range(tensors)), places)

    def numbers(self, codes: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{codes}")
        found = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return found

    def string(self) -> str:
        length = self.numbers("Q")[0]
        text = self.data[self.at : self.at + length].decode("utf-8", errors="replace")
        self.at += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(_NUMBERS[kind])[0]
        inner, count = self.numbers("IQ")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        self.width = struct.calcsize(f"<{_NUMBERS[inner]}")
        return list(self.numbers(f"{count}{_NUMBERS[inner]}"))

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], str]]:
        name, dimensions = self.string(), self.numbers("I")[0]
        shape = self.numbers(f"{dimensions}Q")
        kind, _ = self.numbers("IQ")
        return name, (shape, _TENSOR_TYPES.get(kind, str(kind)))
