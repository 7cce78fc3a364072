"""Where the versions of a store lie: in a folder, or at an address with a copy of what was asked for in the cache.

A version is there when its mixture.json is, which is written last; what it is called is in versions.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import Any, Protocol

from filelock import FileLock, Timeout

from prefmix import storage
from prefmix.errors import MixtureError, StorageError
from prefmix.mixture import FORMAT, MANIFEST, Mixture, Unreadable, open_folder, sync, write_durably
from prefmix.storage import Remote

Labels = dict[str, dict[str, str]]

LABELS = "versions.json"
STAGING = ".staging-"
_DEAD_S = 24 * 3600
_AT_A_TIME = 8


class Shelf(Protocol):
    """The versions of the mixtures of a store, by name and build, and their labels."""

    root: Path  # where mixtures are written, and opened from
    place: str  # what the user calls it

    def address(self, name: str, build: str) -> str | None:
        """Where a version lies, if that is not the folder that it is opened from."""
        ...

    def names(self) -> list[str]:
        """What may be the name of a mixture, sorted."""
        ...

    def labels(self, name: str) -> tuple[bytes | None, Any]:
        """The content of versions.json, if there is one, and what `set_labels` needs to know of it."""
        ...

    def set_labels(self, name: str, content: str, over: Any) -> bool:
        """Writes versions.json; False when somebody else has written it since it was read."""
        ...

    def builds(self, name: str) -> list[str]:
        """The builds that have a mixture.json, sorted."""
        ...

    def look(self, name: str, build: str) -> Mixture:
        """A mixture whose manifest is read, and whose files need not be here. Raises Unreadable."""
        ...

    def fetch(self, name: str, build: str) -> Mixture:
        """A mixture whose files are here. Raises Unreadable, also where one at an address is not what was written."""
        ...

    def size_bytes(self, name: str, build: str) -> int:
        """The sizes of all files of a version."""
        ...

    def send(self, name: str, build: str, folder: Path) -> None:
        """Puts all but the manifest where it belongs."""
        ...

    def seal(self, name: str, build: str, folder: Path, manifest: Mapping[str, Any]) -> Mixture:
        """Writes the manifest, with which the version is there, and moves the folder to where it is opened from."""
        ...

    def drop(self, name: str, build: str) -> None:
        """Removes a version, the manifest first."""
        ...


class LocalShelf:
    """A folder: what is written beside is renamed into it."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, str(root)

    def address(self, name: str, build: str) -> str | None:
        return None

    def names(self) -> list[str]:
        return sorted(folder.name for folder in self.root.iterdir()) if self.root.is_dir() else []

    def labels(self, name: str) -> tuple[bytes | None, Any]:
        try:
            return (self.root / name / LABELS).read_bytes(), None
        except FileNotFoundError:
            return None, None

    def set_labels(self, name: str, content: str, over: Any) -> bool:
        path = self.root / name / LABELS
        fresh = path.with_name(f"{STAGING}{token_hex(6)}.json")
        write_durably(fresh, content)
        os.replace(fresh, path)
        sync(path.parent)
        return True

    def builds(self, name: str) -> list[str]:
        folders = [path.parent.name for path in (self.root / name).glob(f"*/{MANIFEST}")]
        return sorted(build for build in folders if not build.startswith("."))

    def look(self, name: str, build: str) -> Mixture:
        return open_folder(self.root / name / build)

    fetch = look

    def size_bytes(self, name: str, build: str) -> int:
        return sum(path.stat().st_size for path in (self.root / name / build).rglob("*") if path.is_file())

    def send(self, name: str, build: str, folder: Path) -> None:
        pass

    def seal(self, name: str, build: str, folder: Path, manifest: Mapping[str, Any]) -> Mixture:
        write_durably(folder / MANIFEST, _text(manifest))
        sync(folder)
        return Mixture(moved(folder, self.root / name / build), manifest, is_new=True)

    def drop(self, name: str, build: str) -> None:
        folder = self.root / name / build
        grave = folder.with_name(f"{STAGING}{token_hex(6)}")
        if folder.is_dir():  # somebody may have deleted it by hand
            os.rename(folder, grave)
            shutil.rmtree(grave, ignore_errors=True)


class SharedShelf:
    """An address, with a folder of the cache as its mirror: a mixture is written and opened there, and memory-mapped.

    Objects cannot be renamed. Files are sent first, the manifest after them, the label last; a build that was killed
    leaves files without a manifest, which the next build of that name writes over, or removes when they are a day old.
    """

    def __init__(self, address: str) -> None:
        # What is wrong with the address, or not installed, is told before anything is built.
        storage.check_store(address)
        self.place = address.rstrip("/")
        self.root = storage.cache_folder() / "stores" / sha256(self.place.encode()).hexdigest()[:12]

    def address(self, name: str, build: str) -> str:
        return f"{self.place}/{name}/{build}"

    def names(self) -> list[str]:
        return storage.names(self.place)

    def labels(self, name: str) -> tuple[bytes | None, Any]:
        found = storage.read(f"{self.place}/{name}/{LABELS}")
        return found or (None, None)

    def set_labels(self, name: str, content: str, over: Any) -> bool:
        return storage.write(f"{self.place}/{name}/{LABELS}", content.encode(), over)

    def builds(self, name: str) -> list[str]:
        return sorted(build for build, files in self._folders(name).items() if MANIFEST in files)

    def look(self, name: str, build: str) -> Mixture:
        return self._look(name, build)[0]

    def fetch(self, name: str, build: str) -> Mixture:
        mixture, content = self._look(name, build)
        entries, there = _files(mixture.manifest), storage.below(self.address(name, build))
        for file in entries:
            found = there.get(file["path"])
            if found is None or found.bytes != file["bytes"]:
                what = "is missing" if found is None else "is not as long as it was written"
                raise Unreadable(f"{mixture.place}/{file['path']} {what}. {_REMEDY}")
        kept = mixture.folder / MANIFEST
        if kept.is_file() and kept.read_bytes() == content and mixture.is_whole():
            return mixture
        with storage.making_room(self.root), staging(self.root / name) as folder:
            sweep(self.root / name)

            def one(file: Mapping[str, Any]) -> None:
                path = folder / file["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.download(there[file["path"]], path)
                with path.open("rb") as opened:
                    if file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                        raise Unreadable(f"{mixture.place}/{file['path']} is not the file that was written (its sha256 "
                                         f"differs). {_REMEDY}")  # fmt: skip

            with ThreadPoolExecutor(_AT_A_TIME) as pool:
                list(pool.map(one, entries))
            (folder / MANIFEST).write_bytes(content)
            with self._mirror_lock(name):
                if not (kept.is_file() and kept.read_bytes() == content and mixture.is_whole()):
                    moved(folder, mixture.folder)
        return mixture

    def size_bytes(self, name: str, build: str) -> int:
        return sum(each.bytes or 0 for each in storage.below(self.address(name, build)).values())

    def send(self, name: str, build: str, folder: Path) -> None:
        paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        base = self.address(name, build)
        storage.delete(f"{base}/{path}" for path in sorted(storage.below(base).keys() - {*paths, MANIFEST}))
        self._sweep(name, build)
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(lambda path: storage.put(folder / path, f"{base}/{path}"), paths))
        there = storage.below(base)
        for path in paths:
            if path not in there or there[path].bytes != (folder / path).stat().st_size:
                raise StorageError(f"{base}/{path} did not arrive as it was sent: run the command again.")

    def seal(self, name: str, build: str, folder: Path, manifest: Mapping[str, Any]) -> Mixture:
        write_durably(folder / MANIFEST, _text(manifest))
        kept = self.root / name / build
        if folder != kept:
            sync(folder)
            with self._mirror_lock(name):
                moved(folder, kept)
        # The manifest decides: with it the version is there.
        storage.put(kept / MANIFEST, f"{self.address(name, build)}/{MANIFEST}")
        return Mixture(kept, manifest, is_new=True, address=self.address(name, build))

    def drop(self, name: str, build: str) -> None:
        if not _BUILD.fullmatch(build):  # somebody else may have written it
            return
        base = self.address(name, build)
        files = sorted(storage.below(base), key=lambda path: path != MANIFEST)
        storage.delete(f"{base}/{path}" for path in files)
        shutil.rmtree(self.root / name / build, ignore_errors=True)

    def _mirror_lock(self, name: str) -> FileLock:
        """Held while a folder of the mirror is put into its place, for no longer: a fetch may be part of a build."""
        return FileLock(self.root / name / ".mirror.lock")

    def _look(self, name: str, build: str) -> tuple[Mixture, bytes]:
        """The mixture with its manifest, as far as it says nothing that leads out of its folder, and that as it is."""
        base = self.address(name, build)
        if not _BUILD.fullmatch(build):
            raise Unreadable(f"{base} is no build. {_REMEDY}")
        found = storage.read(f"{base}/{MANIFEST}")
        if found is None:
            raise Unreadable(f"{base} is not a mixture: it has no {MANIFEST}. {_REMEDY}")
        mixture = _parsed(found[0], base, self.root / name / build)
        return mixture, found[0]

    def _folders(self, name: str) -> dict[str, dict[str, Remote]]:
        """The files of each folder below a name."""
        found: dict[str, dict[str, Remote]] = {}
        for path, file in storage.below(f"{self.place}/{name}").items():
            build, slash, below = path.partition("/")
            if slash:
                found.setdefault(build, {})[below] = file
        return found

    def _sweep(self, name: str, build: str) -> None:
        """Removes what builds that were killed have sent, a day after their last file."""
        for dead, files in self._folders(name).items():
            written = [each.modified for each in files.values()]
            if MANIFEST in files or dead == build or not _BUILD.fullmatch(dead) or None in written:
                continue
            if max(each for each in written if each is not None) < time.time() - _DEAD_S:
                storage.delete(f"{self.address(name, dead)}/{path}" for path in files)


@contextmanager
def staging(home: Path) -> Generator[Path]:
    """A new folder beside the versions, gone afterwards unless it was moved. Its lock stands beside it while the process
    lives."""
    home.mkdir(parents=True, exist_ok=True)
    folder = home / f"{STAGING}{token_hex(6)}"
    lock = FileLock(f"{folder}.lock")
    with lock:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def sweep(home: Path) -> None:
    """Removes the staging folders of processes that are dead."""
    for left in home.glob(f"{STAGING}*"):
        if left.suffix == ".lock":
            continue
        lock = FileLock(f"{left}.lock")
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
                Path(lock.lock_file).unlink(missing_ok=True)
        except Timeout:  # its process lives
            continue


def moved(folder: Path, target: Path) -> Path:
    """Renames a folder to where it belongs; one that lies there makes way."""
    grave = target.with_name(f"{STAGING}{token_hex(6)}")
    if target.is_dir():
        os.rename(target, grave)
    os.rename(folder, target)
    sync(target.parent)
    shutil.rmtree(grave, ignore_errors=True)
    return target


_REMEDY = "Build it again."
_BUILD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def _files(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The manifest's entries of all files."""
    rows = [file for splits in manifest["subsets"].values() for split in splits.values() for file in split["files"]]
    return [*rows, *manifest["records"]]


def _is_inside(path: object) -> bool:
    """Whether a path of a manifest, which somebody else may have written, lies in the folder of the mixture."""
    if not isinstance(path, str) or "\\" in path:
        return False
    parts = PurePosixPath(path).parts
    return bool(parts) and not any(part in ("/", "..") or part.startswith(".") for part in parts)


def _parsed(content: bytes, place: str, folder: Path) -> Mixture:
    """A mixture whose manifest was read from elsewhere. Raises Unreadable."""
    try:
        manifest = json.loads(content)
        is_right = all(_is_inside(file["path"]) and isinstance(file["bytes"], int) for file in _files(manifest))
        newer = manifest["format"] > FORMAT
    except (ValueError, TypeError, KeyError, AttributeError):
        is_right, newer, manifest = False, False, {}
    if newer:
        raise MixtureError(
            f"{place} has format {manifest['format']}, this prefmix reads up to {FORMAT}: upgrade prefmix."
        )
    if not is_right:
        raise Unreadable(f"{place}/{MANIFEST} cannot be read. {_REMEDY}")
    return Mixture(folder, manifest, address=place)
