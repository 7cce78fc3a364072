"""Which rows an optimiser step sees, and how they are laid out in micro-batches.

The order of an epoch is the order of hash(seed, stage, epoch, id): the same on every machine. A step is the next
`batch_size` rows of the epochs laid end to end; how its rows fall into micro-batches and onto processes changes speed and
memory, never the step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np


@dataclass(frozen=True)
class Steps:
    """The optimiser steps of a stage. `order` is int64 [rows seen]: row numbers, step by step."""

    order: np.ndarray
    batch_size: int
    epochs: float

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size], fewer in the last step: the rows of a 0-based step."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]


def plan_steps(
    ids: Sequence[str], *, seed: int, stage: str, batch_size: int, epochs: float, max_steps: int | None = None
) -> Steps:
    """The steps over rows with these ids. `max_steps` wins over `epochs`, which may be a fraction."""
    seen = max_steps * batch_size if max_steps else max(1, round(epochs * len(ids)))
    passes = -(-seen // len(ids))
    order = np.concatenate([epoch_order(ids, seed, stage, epoch) for epoch in range(passes)])[:seen]
    return Steps(order, batch_size, seen / len(ids))


def epoch_order(ids: Sequence[str], seed: int, stage: str, epoch: int) -> np.ndarray:
    """int64 [rows]: the row numbers of one epoch. Copies of a row share its hash and stay in their own order."""
    key = blake2b(f"{seed}/{stage}/{epoch}".encode(), digest_size=32).digest()
    hashes = np.frombuffer(b"".join(blake2b(i.encode(), digest_size=8, key=key).digest() for i in ids), dtype=">u8")
    return np.argsort(hashes, kind="stable").astype(np.int64)


def by_budget(lengths: np.ndarray, budget: int, sequences: int = 1) -> list[np.ndarray]:
    """Micro-batches of rows of similar length: int64 positions into `lengths`, longest rows first.

    A row takes `sequences` sequences of `lengths[row]` tokens, padded to the longest of its micro-batch; a micro-batch
    has at most `budget` tokens with its padding, or one row.
    """
    descending = np.argsort(-lengths, kind="stable")
    groups: list[np.ndarray] = []
    start = 0
    while start < len(descending):
        longest = max(1, int(lengths[descending[start]])) * sequences
        stop = start + max(1, budget // longest)
        groups.append(descending[start:stop])
        start = stop
    return groups


def best_fit(sizes: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Packs: int64 positions into `sizes`, by best-fit decreasing.

    The sizes of a pack add up to at most `capacity`, or it is one row that is larger.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, pack), sorted
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[place])
        tightest = bisect_left(free, (size, 0))
        if tightest == len(free):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room, pack = free.pop(tightest)
        packs[pack].append(place)
        if room > size:
            insort(free, (room - size, pack))
    return [np.array(pack, dtype=np.int64) for pack in packs]


def share_of(lengths: np.ndarray, rank: int, world: int) -> np.ndarray:
    """int64 positions: the rows of a step that process `rank` of `world` works on, with about as many tokens each."""
    descending = np.argsort(-lengths, kind="stable")
    lap = np.arange(len(descending)) // world
    seat = np.arange(len(descending)) % world
    dealt = np.where(lap % 2 == 0, seat, world - 1 - seat)
    return np.sort(descending[dealt == rank])
