"""The store behind the Xet leg of our stand-in: it takes xorbs (many chunks in one body) and shards (which chunks of which
xorbs a file is made of), and puts the files together again. Formats as in the Xet protocol specification."""

from __future__ import annotations

import struct

import pyarrow as pa

_RECORD = 48  # bytes of every record of a shard
_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30


class Store:
    """`files` gets the bytes of every file that was put together, by its sha256."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self._xorbs: dict[str, list[bytes]] = {}

    def add_xorb(self, name: str, body: bytes) -> bool:
        """Keeps the chunks of a xorb; False when it was there."""
        is_new = name not in self._xorbs
        self._xorbs[name] = _chunks(body)
        return is_new

    def add_shard(self, body: bytes) -> None:
        """Puts the files of a shard together. Raises KeyError for a xorb that never came."""
        place = _RECORD
        while body[place : place + 32] != _END:
            flags, terms = struct.unpack_from("<II", body, place + 32)
            place += _RECORD
            parts: list[bytes] = []
            for _ in range(terms):
                _, _, first, end = struct.unpack_from("<IIII", body, place + 32)
                parts += self._xorbs[_name(body[place : place + 32])][first:end]
                place += _RECORD
            place += _RECORD * terms * bool(flags & _HAS_VERIFICATION)
            if flags & _HAS_METADATA:
                self.files[_name(body[place : place + 32])] = b"".join(parts)
                place += _RECORD


def _name(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers of 8 bytes, each in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _chunks(body: bytes) -> list[bytes]:
    """The chunks of a xorb, each after a head of 8 bytes: version, length, compression, length of the content."""
    found: list[bytes] = []
    place = 0
    while place < len(body) and body[place : place + 7] != b"XETBLOB":
        length = int.from_bytes(body[place + 1 : place + 4], "little")
        scheme = body[place + 4]
        content = int.from_bytes(body[place + 5 : place + 8], "little")
        data = body[place + 8 : place + 8 + length]
        if scheme:
            data = pa.Codec("lz4").decompress(data, content).to_pybytes()
        found.append(_regrouped(data) if scheme == 2 else data)
        place += 8 + length
    return found


def _regrouped(data: bytes) -> bytes:
    """Undoes the grouping of every fourth byte."""
    found, place = bytearray(len(data)), 0
    for offset in range(4):
        count = len(range(offset, len(data), 4))
        found[offset::4] = data[place : place + count]
        place += count
    return bytes(found)
