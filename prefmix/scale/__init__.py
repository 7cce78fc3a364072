"""Builds larger than memory: the stages of `prefmix.build`, on parts of the rows that lie in files (see pipeline.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefmix.errors import BuildError, PrefmixError
from prefmix.manifest import Progress
from prefmix.plan import Plan
from prefmix.scale.job import Engine, Job, Run
from prefmix.scale.local import Local
from prefmix.scale.pipeline import Settled, settle, write
from prefmix.scale.scratch import Scratch, SharedScratch
from prefmix.scale.sizes import Sizes, in_memory, machine, memory_of, sizes_for

__all__ = ["Engine", "Local", "Settled", "Sizes", "in_memory", "machine", "memory_of", "settled", "sizes_for", "write"]


@contextmanager
def settled(
    planned: Plan,
    home: Path | str,
    sizes: Sizes,
    engine: Engine,
    refuse: Callable[[Mapping[str, Any]], None],
    progress: Progress,
) -> Generator[Settled]:
    """Decides what becomes of every row, with a scratch folder below `home` (a folder, or an address) that is gone when the
    `with` ends well.

    After a kill, an interrupt or a full disk it stays, and the same build goes on from what was done.

    Raises BuildError when the same build is running already.
    """
    with _scratch(home, _fingerprint(planned, sizes)) as scratch:
        try:
            yield settle(Job(planned, sizes, scratch), Run(engine, progress), refuse)
        except PrefmixError as error:
            if not isinstance(error.__cause__, OSError):  # it would come to the same again
                scratch.remove()
            raise
        scratch.remove()


@contextmanager
def _scratch(home: Path | str, name: str) -> Generator[Scratch]:
    """A scratch folder that no other process has. Folders of other builds in the same home are removed, unless they are in
    use; at an address nobody can tell, so there they stay."""
    if isinstance(home, str):
        address = f"{home.rstrip('/')}/{name}"
        yield SharedScratch(Path(), address=address)
        return
    folder = home / name
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            try:
                _sweep(home, folder)
                yield Scratch(folder)
            finally:
                if not folder.exists():
                    Path(f"{folder}.lock").unlink(missing_ok=True)
    except Timeout:
        raise BuildError(f"{folder}: the same build is running in another process: wait for it.") from None
    with suppress(OSError):
        home.rmdir()


def _fingerprint(planned: Plan, sizes: Sizes) -> str:
    """What pieces of work that are done depend on: the recipe, its inputs, the portions, and whose hashes are in files."""
    tools = {name: version(name) for name in ("prefmix", "polars", "numpy")}
    return sha256(json.dumps([planned.recipe_digest, planned.fingerprint, asdict(sizes), tools]).encode()).hexdigest()[
        :12
    ]


def _sweep(home: Path, mine: Path) -> None:
    """Removes what other builds left, as long as none of them is at work."""
    for lock in home.glob("*.lock"):
        other = lock.with_suffix("")
        if other == mine:
            continue
        with suppress(Timeout), FileLock(lock, timeout=0):
            shutil.rmtree(other, ignore_errors=True)
            lock.unlink(missing_ok=True)
