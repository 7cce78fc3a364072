"""The store: where mixtures live, what their versions are called, and how a new one appears at once or not at all.

<store>/<name>/<build12>/       a mixture
<store>/<name>/versions.json    {"v1": {"build", "digest", "created"}, ...}
<store>/<name>/.tokens/         token ids that training made, <digest12>-*.arrow (train/data.py)
<store>/<name>/.staging-*/      a build under way; its lock file stands beside it while the process lives
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from filelock import FileLock, Timeout

from prefmix.errors import MixtureError, UsageError
from prefmix.mixture import MANIFEST, Mixture, Unreadable, open_folder, sync, write_durably

#: What a mixture may be called.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_STAGING = ".staging-"
#: The folder beside the versions of a mixture with the token ids that training made.
TOKENS = ".tokens"


def open_mixture(reference: str | Path, store: str | Path | None = None) -> Mixture:
    """Opens a mixture that is here: a folder, `name` (its last version), `name@v2`, `name@<prefix of build or digest>`.

    `store` is the folder that holds the mixtures: else the environment's PREFMIX_STORE, else `./mixtures`.
    Raises MixtureError when there is no such mixture, or more than one that it could mean.
    """
    if (Path(reference) / MANIFEST).is_file():
        return open_folder(Path(reference))
    text = str(reference)
    if text.startswith("hub:"):
        raise UsageError(f"{text} is on the Hub: open it with prefmix.open_mixture, or run `prefmix pull` first.")
    name, _, version = text.partition("@")
    if not NAME.fullmatch(name):
        raise MixtureError(f"{text} is neither a mixture's folder (no {MANIFEST} there) nor a mixture's name.")
    return Store(store).find(name, version or None)


class Store:
    """The mixtures below one folder. Reading takes no lock: what is published is whole."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or os.environ.get("PREFMIX_STORE") or "mixtures")

    def names(self) -> list[str]:
        """The mixtures that have at least one version, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(
            folder.name for folder in self.root.iterdir() if NAME.fullmatch(folder.name) and self.versions(folder.name)
        )

    def versions(self, name: str) -> dict[str, dict[str, str]]:
        """`{"v1": {"build", "digest", "created"}}` of the versions that are there, oldest first."""
        return {label: entry for label, entry in self._labels(name).items() if "removed" not in entry}

    def find(self, name: str, version: str | None = None) -> Mixture:
        """The mixture `name`, at `version` (a label, or a prefix of its build or digest) or at its last version."""
        versions = self.versions(name)
        if not versions:
            known = self.names()
            hint = f" It has: {', '.join(known)}." if known else " It is empty."
            raise MixtureError(
                f"There is no mixture {name} in the store {self.root}.{hint} Run `prefmix build`, or give --store."
            )
        if version is None:
            labels = [list(versions)[-1]]
        elif version in versions:
            labels = [version]
        elif version in (removed := self._labels(name)):
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
        mixture = open_folder(self.root / name / versions[labels[0]]["build"])
        return Mixture(mixture.folder, {**mixture.manifest, "version": labels[0]})

    @contextmanager
    def staging(self, name: str) -> Generator[Path]:
        """A new folder to write a mixture into; gone afterwards unless it was published. Folders that dead processes
        left behind are removed."""
        home = self.root / name
        home.mkdir(parents=True, exist_ok=True)
        with self._lock(name):
            self._sweep(home)
        folder = home / f"{_STAGING}{token_hex(6)}"
        lock = FileLock(f"{folder}.lock")
        with lock:
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)

    def publish(self, staged: Path, manifest: Mapping[str, Any], label: str | None = None) -> Mixture:
        """Turns a staged folder into a version: the manifest last, one rename, then the label.

        A build that exists already adds nothing: its version is given back (and its folder replaced when files of it
        are missing). A new one gets the `label` that is asked for where that was never taken, else the next number.
        """
        name, build = manifest["name"], manifest["build"]
        home = self.root / name
        target = home / build
        with self._lock(name):
            labels = self._adopt_unlabelled(name)
            known = next(
                (
                    known
                    for known, entry in reversed(labels.items())
                    if entry["build"] == build and "removed" not in entry
                ),
                None,
            )
            if known is not None and target.is_dir():
                existing = _readable(target)
                if existing and existing.is_whole():
                    return existing
                os.rename(target, f"{home / _STAGING}{token_hex(6)}")
            wanted = label if label not in labels else None
            label = known or wanted or f"v{max(map(_number, labels), default=0) + 1}"
            created = datetime.now(UTC).isoformat(timespec="seconds")
            full = {**manifest, "version": label, "created": created}
            write_durably(staged / MANIFEST, json.dumps(full, indent=1, ensure_ascii=False) + "\n")
            sync(staged)
            os.rename(staged, target)
            sync(home)
            labels[label] = {"build": build, "digest": manifest["digest"], "created": created}
            self._write_labels(name, labels)
        return Mixture(target, full, is_new=True)

    def remove(self, mixture: Mixture) -> None:
        """Removes one version, and its token ids where no other version has the same content. Its label stays taken: it
        never names other rows later."""
        with self._lock(mixture.name):
            labels = self._labels(mixture.name)
            labels[mixture.version] = {
                **labels[mixture.version],
                "removed": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._write_labels(mixture.name, labels)
            grave = mixture.folder.parent / f"{_STAGING}{token_hex(6)}"
            if mixture.folder.is_dir():  # somebody may have deleted it by hand
                os.rename(mixture.folder, grave)
                shutil.rmtree(grave, ignore_errors=True)
            content = labels[mixture.version]["digest"][:12]  # the folder may be damaged
            if not any(entry["digest"].startswith(content) for entry in labels.values() if "removed" not in entry):
                for path in (self.root / mixture.name / TOKENS).glob(f"{content}-*"):
                    path.unlink(missing_ok=True)

    def _labels(self, name: str) -> dict[str, dict[str, str]]:
        path = self.root / name / "versions.json"
        try:
            labels = json.loads(path.read_text(encoding="utf-8"))
            return dict(sorted(labels.items(), key=lambda item: _number(item[0])))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            raise MixtureError(f"{path} cannot be read ({error}). Restore it, or move it away: the next build makes a new one "
                               f"from the mixtures that are there.") from error  # fmt: skip

    def _write_labels(self, name: str, labels: Mapping[str, Any]) -> None:
        path = self.root / name / "versions.json"
        fresh = path.with_name(f"{_STAGING}{token_hex(6)}.json")
        write_durably(fresh, json.dumps(labels, indent=1) + "\n")
        os.replace(fresh, path)
        sync(path.parent)

    def _adopt_unlabelled(self, name: str) -> dict[str, dict[str, str]]:
        """The labels, with those of mixtures whose build was killed between the rename and the label."""
        labels = self._labels(name)
        known = {entry["build"] for entry in labels.values()}
        for path in sorted((self.root / name).glob(f"*/{MANIFEST}")):
            unlabelled = path.parent.name not in known and not path.parent.name.startswith(".")
            if unlabelled and (found := _readable(path.parent)):
                entry = {key: found.manifest[key] for key in ("build", "digest", "created")}
                labels.setdefault(found.version, entry)
        return labels

    @contextmanager
    def _lock(self, name: str) -> Generator[None]:
        (self.root / name).mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / name / ".lock"):
            yield

    @staticmethod
    def _sweep(home: Path) -> None:
        for left in home.glob(f"{_STAGING}*"):
            if left.suffix == ".lock":
                continue
            lock = FileLock(f"{left}.lock")
            try:
                with lock.acquire(timeout=0):
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
                    Path(lock.lock_file).unlink(missing_ok=True)
            except Timeout:  # its process lives
                continue


def _readable(folder: Path) -> Mixture | None:
    """The mixture in a folder; None when its manifest is damaged, so that a new build may take its place."""
    try:
        return open_folder(folder)
    except Unreadable:
        return None


def _number(label: str) -> int:
    return int(label[1:]) if re.fullmatch(r"v\d+", label) else 0


def _starts(entry: Mapping[str, str], prefix: str) -> bool:
    return len(prefix) >= 4 and (entry["build"].startswith(prefix) or entry["digest"].startswith(prefix))
