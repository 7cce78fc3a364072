"""What a model has answered so far, on disk, so that an evaluation that was stopped goes on where it was.

A file of JSON lines: the first says what was asked of which model, each other one holds a batch. A batch is kept whole or
not at all: what is left is then cut into the same batches as it would have been, and gives the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import IO, Any


def key_of(kind: str, request: Iterable[Any]) -> str:
    """64 hex digits for a request: `loglikelihood` or `generate_until`, and its arguments."""
    return sha256(json.dumps([kind, *request], ensure_ascii=False).encode()).hexdigest()


class Journal:
    """The answers to requests by their keys, in `done`. A file about something else, or none, is begun anew.

    It has the method `add_partial` of lm-eval's CacheHook, which a model calls with each answer. `told` is called with
    the number of answers, and how many are expected, after each batch.
    """

    def __init__(self, path: Path, asked: str, told: Callable[[int, int], None] = lambda done, expected: None) -> None:
        self.path, self.told = path, told
        self.expected = 0
        self.done: dict[str, Any] = {}
        self.seconds = 0.0
        self._batch: dict[str, Any] = {}
        whole = self._read(asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("r+b" if whole else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write({"asked": asked})
        self._since = time.monotonic()

    def expect(self, requests: int) -> None:
        self.expected = requests
        self.told(len(self.done), requests)

    def add_partial(self, kind: str, request: Iterable[Any], answer: Any) -> None:
        self._batch[key_of(kind, request)] = answer

    def commit(self) -> None:
        """The answers since the last time were one batch."""
        now = time.monotonic()
        if self._batch:
            self._write({"seconds": round(now - self._since, 3), "answers": self._batch})
            self._take(self._batch, now - self._since)
            self._batch = {}
            self.told(len(self.done), self.expected)
        self._since = now

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _take(self, answers: dict[str, Any], seconds: float) -> None:
        self.done |= {key: tuple(answer) if isinstance(answer, list) else answer for key, answer in answers.items()}
        self.seconds += seconds

    def _read(self, asked: str) -> int:
        """Takes what is in the file; gives the bytes of its whole lines, 0 when it is about something else."""
        if not self.path.is_file():
            return 0
        whole = 0
        with self.path.open("rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    line = None
                if not isinstance(line, dict) or (not whole and line != {"asked": asked}):
                    break
                if whole:
                    self._take(line["answers"], line["seconds"])
                whole += len(raw)
        return whole
