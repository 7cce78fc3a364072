"""The store: where mixtures live, what their versions are called, and how a new one appears at once or not at all.

It is a folder, or lies at an address (s3://...) with a copy in the cache (see shelves.py):

<store>/<name>/<build12>/       a mixture
<store>/<name>/versions.json    {"v1": {"build", "digest", "created"}, ...}
<store>/<name>/.tokens/         token ids that training made, <digest12>-*.arrow (train/data.py)
<store>/<name>/.staging-*/      a build under way; its lock file stands beside it while the process lives
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from prefmix.errors import MixtureError, UsageError
from prefmix.mixture import MANIFEST, Mixture, Unreadable, open_folder
from prefmix.shelves import LABELS, LocalShelf, SharedShelf, Shelf, staging, sweep
from prefmix.storage import is_address

#: What a mixture may be called.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
#: The folder beside the versions of a mixture with the token ids that training made.
TOKENS = ".tokens"
_TRIES = 20  # to write labels that others write too


def open_mixture(reference: str | Path, store: str | Path | None = None) -> Mixture:
    """Opens a mixture that is here: a folder, `name` (its last version), `name@v2`, `name@<prefix of build or digest>`.

    `store` is the folder or the address that holds the mixtures: else the environment's PREFMIX_STORE, else `./mixtures`.
    Raises MixtureError when there is no such mixture, or more than one that it could mean; StorageError.
    """
    return _opened(reference, store, Store.find)


def look_at_mixture(reference: str | Path, store: str | Path | None = None) -> Mixture:
    """As `open_mixture`, for those who need no more than the manifest: from an address no files are fetched."""
    return _opened(reference, store, Store.look)


def _opened(
    reference: str | Path, store: str | Path | None, by_name: Callable[[Store, str, str | None], Mixture]
) -> Mixture:
    if (Path(reference) / MANIFEST).is_file():
        return open_folder(Path(reference))
    text = str(reference)
    if text.startswith("hub:"):
        raise UsageError(f"{text} is on the Hub: open it with prefmix.open_mixture, or run `prefmix pull` first.")
    name, _, version = text.partition("@")
    if not NAME.fullmatch(name):
        raise MixtureError(f"{text} is neither a mixture's folder (no {MANIFEST} there) nor a mixture's name.")
    return by_name(Store(store), name, version or None)


class Store:
    """The mixtures below one folder, or at one address. Reading takes no lock: what is published is whole."""

    def __init__(self, root: str | Path | None = None) -> None:
        place = str(root or os.environ.get("PREFMIX_STORE") or "mixtures")
        self._shelf: Shelf = SharedShelf(place) if is_address(place) else LocalShelf(Path(place))
        self.root = self._shelf.root

    @property
    def place(self) -> str:
        """What the user calls it: `root`, or the address of which that is a copy."""
        return self._shelf.place

    def names(self) -> list[str]:
        """The mixtures that have at least one version, sorted."""
        return [name for name in self._shelf.names() if NAME.fullmatch(name) and self.versions(name)]

    def versions(self, name: str) -> dict[str, dict[str, str]]:
        """`{"v1": {"build", "digest", "created"}}` of the versions that are there, oldest first."""
        return {label: entry for label, entry in self._labels(name)[0].items() if "removed" not in entry}

    def find(self, name: str, version: str | None = None) -> Mixture:
        """The mixture `name`, at `version` (a label, or a prefix of its build or digest) or at its last version. Of a store
        at an address its files are fetched and checked, unless they are here."""
        label, build = self._meant(name, version)
        mixture = self._shelf.fetch(name, build)
        return replace(mixture, manifest={**mixture.manifest, "version": label})

    def look(self, name: str, version: str | None = None) -> Mixture:
        """As `find`, for those who need no more than the manifest: of a store at an address no files are fetched."""
        label, build = self._meant(name, version)
        mixture = self._shelf.look(name, build)
        return replace(mixture, manifest={**mixture.manifest, "version": label})

    def labelled(self, name: str, label: str) -> Mixture:
        """A version by its label alone, for one that cannot be opened."""
        build = self.versions(name)[label]["build"]
        manifest = {"name": name, "version": label, "build": build}
        return Mixture(self.root / name / build, manifest, address=self._shelf.address(name, build))

    def size_bytes(self, mixture: Mixture) -> int:
        """The sizes of all files of a version."""
        return self._shelf.size_bytes(mixture.name, mixture.build)

    @contextmanager
    def staging(self, name: str) -> Generator[Path]:
        """A new folder to write a mixture into; gone afterwards unless it was published. Folders that dead processes
        left behind are removed."""
        with self._lock(name):
            sweep(self.root / name)
        with staging(self.root / name) as folder:
            yield folder

    def publish(self, staged: Path, manifest: Mapping[str, Any], label: str | None = None) -> Mixture:
        """Turns a staged folder into a version: the files, the manifest last, then the label.

        A build that exists already adds nothing: its version is given back (and its files replaced when some of them
        are missing). A new one gets the `label` that is asked for where that was never taken, else the next number.
        """
        name, build = manifest["name"], manifest["build"]
        with self._lock(name):
            if existing := self._whole(name, build):
                return existing
            self._shelf.send(name, build, staged)
            folder = staged
            for _ in range(_TRIES):  # once, unless another machine builds the same mixture
                labels, over = self._adopt_unlabelled(name)
                given = _known(labels, build) or (label if label not in labels else None) or _next(labels)
                created = datetime.now(UTC).isoformat(timespec="seconds")
                mixture = self._shelf.seal(name, build, folder, {**manifest, "version": given, "created": created})
                folder = mixture.folder
                labels[given] = {"build": build, "digest": manifest["digest"], "created": created}
                if self._write_labels(name, labels, over):
                    return mixture
        raise self._contended(name)

    def remove(self, mixture: Mixture) -> None:
        """Removes one version, and its token ids where no other version has the same content. Its label stays taken: it
        never names other rows later."""
        name, label = mixture.name, mixture.version
        with self._lock(name):
            for _ in range(_TRIES):
                labels, over = self._labels(name)
                labels[label] = {**labels[label], "removed": datetime.now(UTC).isoformat(timespec="seconds")}
                if self._write_labels(name, labels, over):
                    break
            else:
                raise self._contended(name)
            self._shelf.drop(name, mixture.build)
            content = labels[label]["digest"][:12]  # the folder may be damaged
            if not any(entry["digest"].startswith(content) for entry in labels.values() if "removed" not in entry):
                for path in (self.root / name / TOKENS).glob(f"{content}-*"):
                    path.unlink(missing_ok=True)

    def _meant(self, name: str, version: str | None) -> tuple[str, str]:
        """The label and the build that a reference means."""
        versions = self.versions(name)
        if not versions:
            known = self.names()
            hint = f" It has: {', '.join(known)}." if known else " It is empty."
            raise MixtureError(
                f"There is no mixture {name} in the store {self.place}.{hint} Run `prefmix build`, or give --store."
            )
        if version is None:
            labels = [list(versions)[-1]]
        elif version in versions:
            labels = [version]
        elif version in (removed := self._labels(name)[0]):
            raise MixtureError(
                f"{name}@{version} was removed on {removed[version]['removed'][:10]}. It has: {', '.join(versions)}."
            )
        else:
            by_build = {
                entry["build"]: label for label, entry in versions.items() if version and _starts(entry, version)
            }
            labels = list(by_build.values())
        if len(labels) != 1:
            problem = f"could be {' or '.join(labels)}" if labels else "does not exist"
            raise MixtureError(f"{name}@{version} {problem}. Versions of {name}: {', '.join(versions)}.")
        return labels[0], versions[labels[0]]["build"]

    def _whole(self, name: str, build: str) -> Mixture | None:
        """The version that is this build, if there is one and its files are there."""
        labels, over = self._adopt_unlabelled(name)
        if (label := _known(labels, build)) is None:
            return None
        try:
            mixture = self._shelf.fetch(name, build)
        except Unreadable:  # the new build takes its place
            return None
        if not mixture.is_whole():
            return None
        if label not in self._labels(name)[0]:
            self._write_labels(name, labels, over)
        return replace(mixture, manifest={**mixture.manifest, "version": label})

    def _labels(self, name: str) -> tuple[dict[str, dict[str, str]], Any]:
        """All labels in their order, and what is to be given back when they are written."""
        path = f"{self.place}/{name}/{LABELS}"
        try:
            content, over = self._shelf.labels(name)
            labels = {} if content is None else json.loads(content)
            return dict(sorted(labels.items(), key=lambda item: _number(item[0]))), over
        except (OSError, ValueError, AttributeError) as error:
            raise MixtureError(f"{path} cannot be read ({error}). Restore it, or move it away: the next build makes a new one "
                               f"from the mixtures that are there.") from error  # fmt: skip

    def _write_labels(self, name: str, labels: Mapping[str, Any], over: Any) -> bool:
        """False when another machine has written them since they were read."""
        return self._shelf.set_labels(name, json.dumps(labels, indent=1) + "\n", over)

    def _adopt_unlabelled(self, name: str) -> tuple[dict[str, dict[str, str]], Any]:
        """The labels, with those of mixtures whose build was killed before the label."""
        labels, over = self._labels(name)
        known = {entry["build"] for entry in labels.values()}
        for build in self._shelf.builds(name):
            if build in known:
                continue
            with suppress(Unreadable):  # a new build may take its place
                found = self._shelf.look(name, build)
                label = found.version if found.version not in labels else _next(labels)
                labels[label] = {key: found.manifest[key] for key in ("build", "digest", "created")}
        return labels, over

    def _contended(self, name: str) -> MixtureError:
        return MixtureError(f"{self.place}/{name}/{LABELS} is written by others all the time. Run the command again.")

    @contextmanager
    def _lock(self, name: str) -> Generator[None]:
        (self.root / name).mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / name / ".lock"):
            yield


def _known(labels: Mapping[str, Mapping[str, str]], build: str) -> str | None:
    """The last label of a build that is there."""
    found = [label for label, entry in labels.items() if entry["build"] == build and "removed" not in entry]
    return found[-1] if found else None


def _next(labels: Mapping[str, Any]) -> str:
    return f"v{max(map(_number, labels), default=0) + 1}"


def _number(label: str) -> int:
    return int(label[1:]) if re.fullmatch(r"v\d+", label) else 0


def _starts(entry: Mapping[str, str], prefix: str) -> bool:
    return len(prefix) >= 4 and (entry["build"].startswith(prefix) or entry["digest"].startswith(prefix))
