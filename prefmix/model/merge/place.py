"""How a merge gets to its place: written into a folder beside it, which is renamed when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from prefmix.errors import ModelError

RECORD = "merge.json"


def abandon(out: Path) -> bool:
    """Takes the folder away from a thread that writes the merge `out`. A rename decides: false when the thread's own came
    first, and the merge is there."""
    staged = _staged(out)
    grave = staged.with_suffix(".interrupted")
    try:
        staged.rename(grave)
    except OSError:
        return False
    shutil.rmtree(grave, ignore_errors=True)
    _lock_of(out).unlink(missing_ok=True)
    return True


def _staged(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


@contextmanager
def alone(out: Path) -> Generator[Path]:
    """An empty folder to write into, which is gone afterwards; no other process writes this merge meanwhile.
    What a process that was killed left behind is removed."""
    staged, lock = _staged(out), FileLock(_lock_of(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ModelError(
            f"Another process is merging into {out}: wait for it, or name another folder with --out."
        ) from error
    try:
        for left in (staged, staged.with_suffix(".interrupted"), staged.with_suffix(".old")):
            shutil.rmtree(left, ignore_errors=True)
        staged.mkdir()
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def put(staged: Path, out: Path) -> None:
    """Puts the merge in its place; one that is there is removed when the new one has it."""
    old = staged.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        staged.rename(out)
    except OSError:  # it was abandoned
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(out: Path) -> Generator[None]:
    """Turns what goes wrong on the disk into a ModelError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{out} cannot be written ({reason}); nothing of it is left. Make room, or name another folder "
                         f"with --out.") from error  # fmt: skip
