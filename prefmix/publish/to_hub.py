"""From a mixture to a tag on the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefmix import card, hub
from prefmix.errors import HubError, MixtureError
from prefmix.inspect import lengths
from prefmix.mixture import MANIFEST, Mixture
from prefmix.publish.shards import sha256_of, write_parquet
from prefmix.recipe import portable

#: Called as `progress(stage, done, total)`: "convert" counts rows, "send" and "fetch" kB.
Progress = Callable[[str, int, int], None]

_COMMIT_FILES = 100
_OWN = re.compile(r"(preference|sft|drops)/[^/]+\.parquet")
HARMLESS = re.compile(r"\.git.*|README\.md|LICEN[CS]E.*")


@dataclass(frozen=True)
class Sent:
    """A file of a push: its path in the repository, its size and hash, and whether the Hub had all of its bytes already."""

    path: str
    bytes: int
    sha256: str
    is_there: bool


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with `dry_run` would do.

    `commit` is the commit that has the mixture (None where there is none yet); without `is_new_commit` it was there, and
    `files` is empty. `removed` are files of the version before.
    """

    repo: str
    tag: str
    url: str
    commit: str | None
    files: tuple[Sent, ...]
    removed: tuple[str, ...]
    is_new_commit: bool
    is_new_tag: bool
    dry_run: bool

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def bytes_there(self) -> int:
        """The size of the files that the Hub had already. Of the others it may know chunks, which are not sent again."""
        return sum(file.bytes for file in self.files if file.is_there)


def push(
    mixture: Mixture,
    repo: str,
    *,
    tag: str | None = None,
    private: bool = False,
    message: str | None = None,
    drops: bool = True,
    dry_run: bool = False,
    scratch: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Pushed:
    """Pushes a mixture to a data set repository on the Hub as one commit, then makes the tag (default: its version).

    `private` makes a new repository private, `message` is the title of the commit, `drops=False` leaves the ledger out.
    The Parquet files are written below `scratch` (default: where temporary files go) until they are sent.
    It can be run again after any failure: content that is there makes no commit, and a missing tag is made.

    Raises:
        MixtureError: a file of the mixture is not what was written; the repository holds something else.
        HubError: the tag is on other content; somebody else pushed meanwhile; no access; out of reach.
    """
    tag = tag or mixture.version
    there = look(repo, private)
    url = hub.page(repo, tag)
    if there and (commit := _tagged(mixture, repo, tag, there)):
        return Pushed(repo, tag, url, commit, (), (), is_new_commit=False, is_new_tag=False, dry_run=dry_run)
    commit = _committed(mixture, repo, there) if there else None
    if commit is not None:
        files, removed = (), ()
    else:
        mixture.verify()
        with _laid_out(mixture, repo, tag, drops, scratch, progress) as folder:
            files, removed = _compared(folder, repo, there)
            if not dry_run:
                title = message or _title(mixture)
                if there is None:
                    hub.create_repository(repo, private)
                head = (there or hub.refs(repo)).branches
                commit = _send(mixture, folder, files, removed, repo, head, title, progress)
    if not dry_run:
        assert commit is not None
        hub.create_tag(repo, tag, commit)
        _clear(mixture, repo)
    return Pushed(repo, tag, url, commit, files, removed, is_new_commit=bool(files), is_new_tag=True, dry_run=dry_run)


def manifest_at(repo: str, commit: str) -> dict[str, Any] | None:
    """The mixture.json of a commit; None where there is none that can be read."""
    if MANIFEST not in hub.list_files(repo, commit):
        return None
    try:
        return json.loads(hub.download(repo, commit, [MANIFEST])[0].read_text("utf-8"))
    except ValueError:
        return None


def look(repo: str, private: bool, repo_type: hub.RepoType = "dataset") -> hub.Refs | None:
    """What the repository holds; None where it has to be made."""
    try:
        refs = hub.refs(repo, repo_type)
    except hub.NoRepository:
        return None
    if "main" not in refs.branches:
        raise HubError(f"{repo} has no branch main, which is pushed to: make one, or push to another repository.")
    if private and not refs.private:
        raise HubError(f"{repo} is there and is public: make it private in its settings, or leave --private out.")
    return refs


def _tagged(mixture: Mixture, repo: str, tag: str, there: hub.Refs) -> str | None:
    """The commit of the tag, which has this content; None where there is no such tag."""
    if tag in there.branches:
        raise HubError(f"{repo} has a branch {tag}, which a tag must not be called too: give another --tag.")
    commit = there.tags.get(tag)
    if commit is None:
        return None
    digest = (manifest_at(repo, commit) or {}).get("digest", "none")
    if digest != mixture.digest:
        raise HubError(
            f"{repo} has a tag {tag} with other content (digest {digest[:12]}, that of {mixture} is "
            f"{mixture.digest[:12]}): tags are not moved. Give another --tag."
        )
    return commit


def _committed(mixture: Mixture, repo: str, there: hub.Refs) -> str | None:
    """A commit on main that an earlier push of this build made, and did not come to tag."""
    wanted = (mixture.digest, mixture.build)
    head = there.branches["main"]
    named = [commit for commit, text in hub.messages(repo).items() if _mark(mixture) in text]
    for commit in dict.fromkeys([head, *named]):
        found = manifest_at(repo, commit)
        if found and (found.get("digest"), found.get("build")) == wanted and _is_whole(repo, commit, found):
            return commit
    return None


def _is_whole(repo: str, commit: str, manifest: Mapping[str, Any]) -> bool:
    """Whether the rows that a manifest names are at its commit: others may have removed some since."""
    there = hub.blobs(repo, commit)
    files = [file for each in manifest["subsets"].values() for entry in each.values() for file in entry["files"]]
    return all((blob := there.get(file["path"])) and blob.sha256 == file["sha256"] for file in files)


def _mark(mixture: Mixture) -> str:
    """What a commit says, whatever its title, so that the next push knows it again."""
    return f"build {mixture.build}, digest {mixture.digest}"


def _title(mixture: Mixture) -> str:
    rows = {kind: sum(entry["rows"] for entry in splits.values()) for kind, splits in _subsets(mixture).items()}
    return f"{mixture}: {', '.join(f'{count:,} {kind} rows' for kind, count in rows.items())}"


def _subsets(mixture: Mixture) -> Mapping[str, Any]:
    return mixture.manifest["subsets"]


@contextmanager
def _laid_out(
    mixture: Mixture, repo: str, tag: str, drops: bool, scratch: Path | None, progress: Progress
) -> Generator[Path]:
    """A folder with the files of the repository, for as long as it is needed."""
    total = sum(entry["rows"] for splits in _subsets(mixture).values() for entry in splits.values())
    done = 0

    def converted(rows: int) -> None:
        nonlocal done
        done += rows
        progress("convert", done, total)

    def as_parquet(file: Mapping[str, Any]) -> dict[str, Any]:
        path = f"{file['path'].removesuffix('.arrow')}.parquet"
        return {"path": path, **write_parquet(mixture.folder / file["path"], folder / path, converted)}

    with TemporaryDirectory(prefix="prefmix-push-", dir=scratch, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        subsets = {
            subset: {
                split: {**entry, "files": [as_parquet(file) for file in entry["files"]]}
                for split, entry in each.items()
            }
            for subset, each in _subsets(mixture).items()
        }
        recipe = portable((mixture.folder / "recipe.toml").read_text("utf-8"))
        (folder / "recipe.toml").write_text(recipe, "utf-8", newline="\n")
        records = ["recipe.toml"]
        for file in mixture.manifest["records"] if drops else ():
            if file["path"].startswith("drops/"):
                (folder / "drops").mkdir(exist_ok=True)
                shutil.copyfile(mixture.folder / file["path"], folder / file["path"])
                records.append(file["path"])
        manifest = {key: value for key, value in mixture.manifest.items() if key != "hub"} | {
            "subsets": subsets,
            "records": [
                {"path": path, "sha256": sha256_of(folder / path), "bytes": (folder / path).stat().st_size}
                for path in sorted(records)
            ],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8", newline="\n")
        numbers = [
            (each.subset, each.part, each.unit, each.median, each.p95, each.longest) for each in lengths(mixture)
        ]
        (folder / "README.md").write_text(card.card(manifest, repo, tag, numbers), "utf-8", newline="\n")
        yield folder


def _compared(folder: Path, repo: str, there: hub.Refs | None) -> tuple[tuple[Sent, ...], tuple[str, ...]]:
    """The files of the folder against those of the head; and what the head has that goes."""
    old = hub.blobs(repo, there.branches["main"]) if there else {}
    if old and MANIFEST not in old and (others := sorted(path for path in old if not HARMLESS.fullmatch(path))):
        raise MixtureError(
            f"{repo} holds something that is no mixture ({', '.join(others[:3])}): push to a repository of its own."
        )
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = sent_of(paths, old)
    names = {file.path for file in files}
    return files, tuple(path for path in sorted(old) if _OWN.fullmatch(path) and path not in names)


def sent_of(files: Mapping[str, Path], there: Mapping[str, hub.Blob]) -> tuple[Sent, ...]:
    """Files by their path in a repository that has others already."""
    known = {blob.sha256 for blob in there.values() if blob.sha256}
    hashed = {path: sha256_of(local) for path, local in files.items()}
    return tuple(Sent(path, files[path].stat().st_size, sha256, sha256 in known) for path, sha256 in hashed.items())


def _send(
    mixture: Mixture,
    folder: Path,
    files: tuple[Sent, ...],
    removed: tuple[str, ...],
    repo: str,
    head: Mapping[str, str],
    title: str,
    progress: Progress,
    at_most: int = _COMMIT_FILES,
) -> str:
    """Sends the files as one commit on main, and gives it; `head` has the branches as they were looked at.

    More than `at_most` go to a branch first, in several commits, of which a push that is run again keeps what is there;
    the commit on main then names them without their bytes.
    """
    sizes = {file.path: file.bytes for file in files}
    total, done = sum(sizes.values()) // 1000, 0

    def sent(path: str) -> None:
        nonlocal done
        done += sizes[path]
        progress("send", done // 1000, total)

    progress("send", 0, total)
    local = {path: folder / path for path in sizes}
    staged: list[str] = []
    if len(files) > at_most:
        staged = [path for path in sizes if path.endswith(".parquet")]
        branch = _staging(mixture)
        hub.create_branch(repo, branch, head["main"])
        at = head.get(branch, head["main"])
        has = {path: blob.sha256 for path, blob in hub.blobs(repo, at).items()}
        missing = [file.path for file in files if file.path in staged and has.get(file.path) != file.sha256]
        for first in range(0, len(missing), at_most):
            part = {path: local[path] for path in missing[first : first + at_most]}
            at = hub.commit(repo, part, parent=at, title=f"{title}: part", branch=branch, sent=sent)
    return hub.commit(
        repo,
        {path: file for path, file in local.items() if path not in staged},
        parent=head["main"],
        title=title,
        text=_mark(mixture),
        deleted=removed,
        copied={path: _staging(mixture) for path in staged},
        sent=sent,
    )


def _staging(mixture: Mixture) -> str:
    return f"prefmix-{mixture.build}"


def _clear(mixture: Mixture, repo: str) -> None:
    """Removes the branch of a push in parts, also of one that was interrupted."""
    branch = _staging(mixture)
    if branch in hub.refs(repo).branches:
        hub.delete_branch(repo, branch)
