"""Records of text files: JSON lines, JSON arrays and CSV, one dict each, with the line of every fault.

Nothing here raises for a single bad record: it becomes a fault, with its line, and its text is kept. What makes the
whole file unreadable (an array that is never closed, a CSV without a header) raises `Unreadable`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

_BLOCK_BYTES = 4 << 20
_CHUNK_ROWS = 8192
_SHOWN_CHARS = 200
_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{},"]', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")


class Unreadable(Exception):
    """The file as a whole cannot be read; the text says why, and what would help, without the file's name."""


class Stream(Protocol):
    """What is read from: a file, or a decompressor."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass
class Chunk:
    """Some records in file order. Where `faults[i]` says why there is none, `rows[i]` is {} and `raw[i]` its text."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    faults: dict[int, dict[str, Any]] = field(default_factory=dict)
    raw: dict[int, str] = field(default_factory=dict)

    def add(self, line: int, row: dict[str, Any]) -> None:
        self.lines.append(line)
        self.rows.append(row)

    def add_fault(self, line: int, error: str, text: str, column: int | None = None) -> None:
        place = {"line": line} if column is None else {"line": line, "column": column}
        self.faults[len(self.rows)] = {"error": error, **place, "text": text[:_SHOWN_CHARS]}
        self.raw[len(self.rows)] = text
        self.add(line, {})


def json_lines(stream: Stream, first: int = 1) -> Iterator[Chunk]:
    """One object a line, the first of which has the number `first`. Blank lines and a byte-order mark are skipped; memory
    is bounded by a block and a line."""
    return (_parsed(numbered) for numbered in _numbered_lines(stream, start=first))


def json_array(data: bytes) -> Iterator[Chunk]:
    """The elements of a JSON array, or of the only array in a JSON object, with the line on which each begins.

    A streaming JSON parser would need less memory, but those at hand (yajl) turn a lone surrogate into "?" without a
    word and refuse long integers; so the elements are found here and parsed one by one like JSON lines.
    """
    start = _skip_space(data, 3 if data.startswith(_BOM) else 0, len(data))
    opening = data[start : start + 1]
    if opening == b"{":
        start = _only_array(data, start)
    elif opening != b"[":
        raise Unreadable("it begins with neither [ nor {: write one JSON object a line and name the file .jsonl")
    numbered, line, counted = [], 1, 0
    for begin, end in _elements(data, start, closed=opening == b"["):
        begin = _skip_space(data, begin, end)
        line += data.count(b"\n", counted, begin)
        counted = begin
        numbered.append((line, data[begin:end]))
        if len(numbered) == _CHUNK_ROWS:
            yield _parsed(numbered)
            numbered = []
    if numbered:
        yield _parsed(numbered)


def is_json_lines(data: bytes) -> bool:
    """Whether a .json file holds JSON lines: its first line is an object by itself, and another line follows."""
    first, _, rest = data.removeprefix(_BOM).lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return True


def csv_rows(stream: Stream) -> Iterator[Chunk]:
    """The rows of a CSV file with a header (RFC 4180, comma, UTF-8). The first chunk may be empty: a header alone."""
    csv.field_size_limit(2**31 - 1)
    text = _CsvLines(stream)
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise Unreadable(f"its header (line 1) is not CSV: {error}") from None
    if header is None or text.bad:
        raise Unreadable("it has no header: the first line must name the columns, in UTF-8")
    chunk = Chunk()
    while True:
        text.taken.clear()
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise Unreadable(f"a quoted field that begins in the row of line {line} is never closed") from None
            chunk.add_fault(line, f"invalid CSV: {error}", "".join(text.taken))
        else:
            if values is None:
                break
            if text.bad:
                chunk.add_fault(line, "invalid UTF-8", "".join(text.taken))
            elif not values:  # a blank line
                continue
            elif len(values) != len(header):
                chunk.add_fault(line, f"{len(values)} fields, not {len(header)}", "".join(text.taken))
            else:
                chunk.add(line, dict(zip(header, values, strict=True)))
        text.bad = False
        if len(chunk.rows) == _CHUNK_ROWS:
            yield chunk
            chunk = Chunk()
    yield chunk


def csv_header(stream: Stream) -> list[str]:
    """The names of the columns of a CSV file."""
    try:
        return next(csv.reader(_CsvLines(stream), strict=True), [])
    except csv.Error as error:
        raise Unreadable(f"its header (line 1) is not CSV: {error}") from None


class _CsvLines:
    """Decoded lines for csv.reader; `taken` has those given out since it was cleared, `bad` tells of broken UTF-8."""

    def __init__(self, stream: Stream) -> None:
        self.taken: list[str] = []
        self.bad = False
        self._lines = (line for block in _numbered_lines(stream, blank=True) for _, line in block)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        try:
            text = line.decode()
        except UnicodeDecodeError:
            self.bad = True
            text = line.decode(errors="backslashreplace")
        self.taken.append(text)
        return text


def _numbered_lines(stream: Stream, blank: bool = False, start: int = 1) -> Iterator[list[tuple[int, bytes]]]:
    """Blocks of (line number, line). With `blank`, blank lines and line ends are kept."""
    number, rest, first = start, b"", True
    while block := stream.read(_BLOCK_BYTES):
        if first:
            block, first = bytes(block).removeprefix(_BOM), False
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if blank:
            yield [(number + i, line + b"\n") for i, line in enumerate(lines)]
        else:
            yield [(number + i, line) for i, line in enumerate(lines) if line and not line.isspace()]
        number += len(lines)
    if rest and (blank or not rest.isspace()):
        yield [(number, rest)]


def _parsed(numbered: list[tuple[int, bytes]]) -> Chunk:
    chunk = Chunk()
    for line, raw in numbered:
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            text = raw.decode(errors="backslashreplace")
            reason, column = error.msg, error.colno
            try:
                raw.decode()
            except UnicodeDecodeError as broken:
                reason, column = "bytes that are not UTF-8", broken.start + 1
            chunk.add_fault(line + error.lineno - 1, f"invalid JSON: {reason}", text, column)
            continue
        if type(row) is dict:
            chunk.add(line, row)
        else:
            chunk.add_fault(line, f"{json_type(row)}, not a JSON object", raw.decode())
    return chunk


def json_type(value: object) -> str:
    """What a JSON value is, in the words of an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"


def _skip_space(data: bytes, start: int, end: int) -> int:
    space = _SPACE.match(data, start, end)
    return space.end() if space else start


def _elements(data: bytes, start: int, closed: bool) -> Iterator[tuple[int, int]]:
    """Begin and end of each element of the array that opens at `start`. `closed`: nothing may follow the array."""
    depth, begin = 0, start + 1
    for token in _TOKEN.finditer(data, start + 1):
        mark = data[token.start()]
        if mark == 0x22 and token.end() == token.start() + 1:  # a quote that opens a string without end
            break
        if mark in b"{[":
            depth += 1
        elif depth and mark in b"}]":
            depth -= 1
        elif depth == 0 and mark in b",]":
            if mark == 0x2C or (not data[begin : token.start()].isspace() and begin < token.start()):
                yield begin, token.start()
            begin = token.end()
            if mark == 0x5D:
                if closed and data[begin:].strip():
                    raise Unreadable("text follows the end of its JSON array: the file holds more than one value")
                return
        elif depth == 0 and mark == 0x7D:
            break
    line = data.count(b"\n", 0, begin) + 1
    raise Unreadable(f"its JSON array is never closed (last whole element before line {line}): is the file truncated?")


def _only_array(data: bytes, start: int) -> int:
    """Where the only array directly inside the object at `start` opens."""
    depth, key, arrays = 0, b"", []
    for token in _TOKEN.finditer(data, start):
        mark = data[token.start()]
        if mark in b"{[":
            if depth == 1 and mark == 0x5B:
                arrays.append((key.decode(errors="replace"), token.start()))
            depth += 1
        elif mark in b"}]":
            depth -= 1
        elif mark == 0x22 and depth == 1:
            key = token.group()
    if depth != 0:
        raise Unreadable("its JSON object is never closed: is the file truncated?")
    if len(arrays) != 1:
        found = f"arrays {', '.join(name for name, _ in arrays)}" if arrays else "no array"
        raise Unreadable(f"it is a JSON object with {found}: rows must be one JSON array, or one JSON object a line")
    return arrays[0][1]
