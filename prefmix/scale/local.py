"""Pieces of work in threads of this process: Polars, Arrow and NumPy leave Python's lock alone for most of the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from prefmix.scale.job import Job, Result, Task


@dataclass(frozen=True)
class Local:
    """So many pieces of work at a time."""

    workers: int

    def map(self, task: Task, job: Job, items: Sequence[Any]) -> Iterator[Result]:
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[Future[Result]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(task, job, item))
                    if len(waiting) > self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
