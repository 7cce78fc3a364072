"""The lines of the keys of a TOML text, and `--set a.b=c`.

`tomllib` gives values without their places. This scanner reads the same text a second time and notes only keys: it
expects a text that `tomllib` has accepted, so it need not look for mistakes.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from typing import Any

#: Where a value is in the parsed data: keys of tables and indexes of arrays.
KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")'  # up to two quotes may stand before the closing three
    r"|'''.*?'{3,5}(?!')"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]*")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The 1-based line of every key, table and array item of a valid TOML text.

    >>> key_lines("[train]\\nlora = { r = 64 }\\n[[train.stages]]\\n")
    {('train',): 1, ('train', 'lora'): 2, ('train', 'lora', 'r'): 2, ('train', 'stages'): 3, ('train', 'stages', 0): 3}
    """
    return _Scanner(text).scan()


def parse_override(text: str) -> tuple[KeyPath, object]:
    """Key and value of `a.b.0=c`: the value as TOML, else as text. Raises ValueError without a key or `=`."""
    scanner = _Scanner(text)
    try:
        path = scanner.key()
    except ValueError:
        path = ()
    if not path or not text.startswith("=", scanner.at):
        raise ValueError("expected key=value")
    raw = text[scanner.at + 1 :].strip()
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return path, raw
    return path, parsed["value"] if len(parsed) == 1 else raw


def set_value(data: dict[str, Any], path: KeyPath, value: object) -> KeyPath:
    """Sets `path` in parsed TOML, making tables on the way; gives the path with its array indexes as numbers.

    Raises ValueError where the path passes through something that is neither a table nor an array.
    """
    here: Any = data
    done: KeyPath = ()
    for position, part in enumerate(path):
        key: str | int = part
        place = ".".join(map(str, done))
        if isinstance(here, list):
            if not here:
                raise ValueError(f"{place} is an empty array")
            if not str(part).isdecimal() or int(part) >= len(here):
                raise ValueError(f"{place} has items 0 to {len(here) - 1}")
            key = int(part)
        elif not isinstance(here, dict):
            raise ValueError(f"{place} is not a table")
        done = (*done, key)
        if position == len(path) - 1:
            here[key] = value
        else:
            here = here[key] if isinstance(here, list) else here.setdefault(key, {})
    return done


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.table_counts: dict[KeyPath, int] = {}  # arrays of tables
        self.newlines = [match.start() for match in re.finditer("\n", text)]

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.text.startswith("[", self.at):
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)
        return self.lines

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise ValueError("not TOML")
        self.at = match.end()
        return match.group()

    def line(self) -> int:
        return bisect_right(self.newlines, self.at - 1) + 1

    def key(self) -> tuple[str, ...]:
        """A dotted key with the blanks around it."""
        parts = []
        while True:
            self.skip(_SPACE)
            if self.text[self.at : self.at + 1] in ('"', "'"):
                quoted = self.skip(_STRING)
                parts.append(next(iter(tomllib.loads(f"{quoted} = 0"))))
            else:
                parts.append(self.skip(_BARE_KEY))
            self.skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def header(self) -> KeyPath:
        line = self.line()
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        *parents, last = self.key()
        self.at += brackets
        path: KeyPath = ()
        for part in parents:
            path = self.latest((*path, part), line)
        path = (*path, last)
        if brackets == 1:
            self.lines[path] = line  # its own header, rather than that of [path.child] further up
            return path
        self.lines.setdefault(path, line)
        index = self.table_counts.get(path, 0)
        self.table_counts[path] = index + 1
        path = (*path, index)
        self.lines[path] = line
        return path

    def latest(self, path: KeyPath, line: int) -> KeyPath:
        """What a part of a header stands for: for an array of tables, its last table."""
        self.lines.setdefault(path, line)
        return (*path, self.table_counts[path] - 1) if path in self.table_counts else path

    def pair(self, table: KeyPath) -> None:
        line = self.line()
        path = table
        for part in self.key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self.at += 1  # =
        self.skip(_SPACE)
        self.value(path)

    def value(self, path: KeyPath) -> None:
        first = self.text[self.at]
        if first in "\"'":
            self.skip(_STRING)
        elif first == "[":
            self.items(path, "]")
        elif first == "{":
            self.items(path, "}")
        else:
            self.skip(_SCALAR)

    def items(self, path: KeyPath, close: str) -> None:
        """An array, or an inline table."""
        self.at += 1
        self.skip(_BLANK)
        index = 0
        while not self.text.startswith(close, self.at):
            if close == "}":
                self.pair(path)
            else:
                self.lines[(*path, index)] = self.line()
                self.value((*path, index))
                index += 1
            self.skip(_BLANK)
            if self.text.startswith(",", self.at):
                self.at += 1
                self.skip(_BLANK)
        self.at += 1
