"""Transport to and from the Hub: the only importer of huggingface_hub.

Where the Hub is (`HF_ENDPOINT`), whether it may be asked (`HF_HUB_OFFLINE`) and where its cache is (`HF_HUB_CACHE`,
`HF_HOME`) is read from the environment at each call. What is fetched is always pinned to a commit: a branch is never
served from the cache, which may hold another version of it, and a tag (`resolve_tag`) only as the commit that it meant
when it was last asked for. Tokens are found by huggingface_hub; none is read, kept or printed here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from prefmix.errors import HubError

RepoType = Literal["dataset", "model"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
# hub_errors.HTTPError is the base class of the HTTP client, httpx or httpx2 by the version of huggingface_hub.
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_AGAIN = "run the push again, it goes on where it ended"
_GROUP_BYTES = 32 * 2**20
_DOWNLOADS = 8  # at a time
_STALE, _EXISTS, _BROKEN = 412, 409, 500


class OutOfReach(HubError):
    """The Hub may not be asked, does not answer, or answers that it is broken."""


class NoRepository(HubError):
    """No repository of this name that the token may see."""


@dataclass(frozen=True)
class Refs:
    """What the branches and the tags of a repository point to, and who may see it."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]
    private: bool


@dataclass(frozen=True)
class Blob:
    """A file as the Hub keeps it; `sha256` is known of large files only."""

    bytes: int
    sha256: str | None


def resolve_revision(repo: str, revision: str = "main", repo_type: RepoType = "dataset") -> str:
    """The commit (40 hex digits) that a branch, a tag or an abbreviated commit means now.

    Raises:
        HubError: no such repository or revision, no access, or out of reach. Offline only a full commit is known.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    if is_offline():
        raise HubError(
            f'{repo}: offline (HF_HUB_OFFLINE), the commit that "{revision}" means cannot be known: '
            "set revision to a full commit that is in the cache, or go online"
        )
    with _explained(repo, revision):
        return _required(repo, revision, _api().repo_info(repo, revision=revision, repo_type=repo_type).sha)


def resolve_tag(repo: str, revision: str, repo_type: RepoType = "dataset") -> str:
    """As `resolve_revision`; of a tag that was asked for before, the commit is known without the Hub too.

    Raises:
        HubError: as above; offline or out of reach, and this tag was never asked for.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    kept = _memory(repo, repo_type) / "tags.json"
    known: dict[str, str] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    try:
        found = refs(repo, repo_type)
    except OutOfReach as error:
        if revision in known:
            return known[revision]
        others = f"; fetched were: {', '.join(sorted(known))}" if known else ""
        raise HubError(f'{error}. "{revision}" is no tag that was fetched before{others}') from None
    if revision in found.tags:
        _write(kept, json.dumps({**known, revision: found.tags[revision]}))
        return found.tags[revision]
    if revision in found.branches:
        return found.branches[revision]
    if re.fullmatch(r"[0-9a-f]{7,39}", revision):
        return resolve_revision(repo, revision, repo_type)
    raise HubError(f'{repo}: no tag "{revision}": it has {", ".join(found.tags) or "none"}')


def list_files(repo: str, commit: str, repo_type: RepoType = "dataset") -> list[str]:
    """The paths of all files at a commit, sorted. Kept in the cache, and taken from there: a commit does not change.

    Raises:
        HubError: as above; offline, no list of this commit in the cache.
    """
    kept = _memory(repo, repo_type) / f"{commit}.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))
    if is_offline():
        raise HubError(
            f"{repo} at {commit}: offline (HF_HUB_OFFLINE), and not in the cache: go online once to fetch it"
        )
    with _explained(repo, commit):
        names = sorted(_api().list_repo_files(repo, revision=commit, repo_type=repo_type))
    _write(kept, json.dumps(names))
    return names


def download(
    repo: str, commit: str, files: Sequence[str], repo_type: RepoType = "dataset", *, again: bool = False
) -> list[Path]:
    """Local copies of some files at a commit, in the order given; what is in the cache is not fetched again unless
    `again` says that it cannot be right.

    Raises:
        HubError: as above; no such file at this commit; offline, a file that is not in the cache.
    """

    def one(name: str) -> Path:
        with _explained(repo, commit, name):
            path = hf_hub_download(
                repo,
                name,
                repo_type=repo_type,
                revision=commit,
                cache_dir=_cache_folder(),
                endpoint=_endpoint(),
                local_files_only=is_offline(),
                force_download=again and not is_offline(),
            )
        return Path(path)

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(pool.map(one, files))


def refs(repo: str, repo_type: RepoType = "dataset") -> Refs:
    """What is in a repository now.

    Raises:
        NoRepository: there is none that the token may see.
        HubError: offline, out of reach, no access.
    """
    _check_online(repo)
    with _explained(repo, "main"):
        private = _api().repo_info(repo, repo_type=repo_type).private
        found = _api().list_repo_refs(repo, repo_type=repo_type)
    branches, tags = ({ref.name: ref.target_commit for ref in each} for each in (found.branches, found.tags))
    return Refs(branches, tags, bool(private))


def blobs(repo: str, commit: str, repo_type: RepoType = "dataset") -> dict[str, Blob]:
    """The files of a commit by path. Raises HubError."""
    _check_online(repo)
    with _explained(repo, commit):
        entries = list(_api().list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type))
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: Blob(file.size, file.lfs.sha256 if file.lfs else None) for file in files}


def messages(repo: str, branch: str = "main", repo_type: RepoType = "dataset") -> dict[str, str]:
    """The commits of a branch, the newest first, each with what was said of it. Raises HubError."""
    _check_online(repo)
    with _explained(repo, branch):
        found = _api().list_repo_commits(repo, revision=branch, repo_type=repo_type)
    return {each.commit_id: f"{each.title}\n{each.message}" for each in found}


def create_repository(repo: str, private: bool, repo_type: RepoType = "dataset") -> None:
    """Makes a repository; one that is there stays as it is. Raises HubError."""
    with _sending(repo):
        _api().create_repo(repo, repo_type=repo_type, private=private or None, exist_ok=True)


def create_branch(repo: str, branch: str, commit: str, repo_type: RepoType = "dataset") -> None:
    """Makes a branch that begins at a commit; one that is there stays as it is. Raises HubError."""
    with _sending(repo):
        _api().create_branch(repo, branch=branch, revision=commit, repo_type=repo_type, exist_ok=True)


def delete_branch(repo: str, branch: str, repo_type: RepoType = "dataset") -> None:
    """Removes a branch. Raises HubError."""
    with _sending(repo):
        _api().delete_branch(repo, branch=branch, repo_type=repo_type)


def create_tag(repo: str, tag: str, commit: str, repo_type: RepoType = "dataset") -> None:
    """Makes a tag. Raises HubError, also when there is one of this name."""
    with _sending(repo):
        _api().create_tag(repo, tag=tag, revision=commit, repo_type=repo_type)


def commit(
    repo: str,
    files: Mapping[str, Path],
    *,
    parent: str,
    title: str,
    text: str = "",
    branch: str = "main",
    deleted: Collection[str] = (),
    copied: Mapping[str, str] | None = None,
    sent: Callable[[str], None] = lambda path: None,
    repo_type: RepoType = "dataset",
) -> str:
    """Sends files, removes others and copies others (path: the revision that has it), as one commit. Gives its name.

    Bytes that the Hub has already are not sent again: whole files over LFS, chunks of them over Xet. `sent` is called
    with the path of each file whose bytes are there.

    Raises:
        HubError: as above; `parent` is no longer the head of the branch.
    """
    added = [CommitOperationAdd(path, local) for path, local in files.items()]
    operations = [
        *(CommitOperationDelete(path) for path in deleted),
        *added,
        *(CommitOperationCopy(path, path, src_revision=revision) for path, revision in (copied or {}).items()),
    ]
    with _sending(repo):
        for group in _grouped(added):
            _api().preupload_lfs_files(repo, group, repo_type=repo_type, revision=branch, free_memory=False)
            for each in group:
                sent(each.path_in_repo)
        made = _api().create_commit(
            repo,
            operations,
            commit_message=title,
            commit_description=text,
            repo_type=repo_type,
            revision=branch,
            parent_commit=parent,
        )
    return made.oid


def _grouped(files: Sequence[CommitOperationAdd]) -> list[list[CommitOperationAdd]]:
    """The files in groups that are sent at once: so many that the bars move, so few that small ones cost little."""
    groups: list[list[CommitOperationAdd]] = []
    left = 0
    for each in files:
        if left <= 0:
            groups.append([])
            left = _GROUP_BYTES
        groups[-1].append(each)
        left -= each.upload_info.size
    return groups


def page(repo: str, revision: str, repo_type: RepoType = "dataset") -> str:
    """The address of a repository at a branch or a tag."""
    return f"{_endpoint()}/{'datasets/' if repo_type == 'dataset' else ''}{repo}/tree/{revision}"


def is_offline() -> bool:
    """Whether the environment forbids asking the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} or constants.is_offline_mode()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _api() -> HfApi:
    return HfApi(endpoint=_endpoint())


def _cache_folder() -> Path:
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(constants.HF_HUB_CACHE)


def _memory(repo: str, repo_type: RepoType) -> Path:
    """Where this module keeps what it knows of a repository."""
    return _cache_folder() / "prefmix" / f"{repo_type}s--{repo.replace('/', '--')}"


def _write(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def _check_online(repo: str) -> None:
    if is_offline():
        raise OutOfReach(f"{repo}: offline (HF_HUB_OFFLINE): go online to ask the Hub")


@contextmanager
def quietly() -> Generator[None]:
    """Without the bars and the advice of huggingface_hub, which would stand among the lines of the command."""
    has_bars, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    if has_bars:
        disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            enable_progress_bars()


@contextmanager
def _sending(repo: str) -> Generator[None]:
    """As `_explained`, for what can go wrong when something is written."""
    _check_online(repo)
    with quietly(), _explained(repo, "main"):
        try:
            yield
        except hub_errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status == _STALE:
                raise HubError(f"{repo}: somebody else has pushed meanwhile: run the push again") from None
            if status == _EXISTS:
                raise HubError(f"{repo}: somebody else has made the same tag meanwhile: run the push again") from None
            if status >= _BROKEN:
                raise HubError(f"{repo}: the Hub failed ({_first_line(error)}): {_AGAIN}") from None
            raise
        except hub_errors.HFValidationError:
            raise
        except (RuntimeError, ValueError, OSError, hub_errors.HTTPError) as error:  # LFS, Xet, the check of the card
            reasons = [_first_line(each) for each in (error, error.__cause__) if isinstance(each, Exception)]
            raise HubError(f"{repo}: could not be sent ({': '.join(reasons)}): {_AGAIN}") from None


def _required(repo: str, revision: str, commit: str | None) -> str:
    if commit is None:
        raise HubError(f"{repo}: the Hub names no commit for {revision}: set revision to a full commit")
    return commit


@contextmanager
def _explained(repo: str, revision: str, file: str | None = None) -> Generator[None]:
    """Turns what the client raises into a HubError with the reason and the remedy."""
    try:
        yield
    except hub_errors.GatedRepoError:
        raise HubError(f"{repo}: gated: ask for access on its page, then {_LOG_IN}") from None
    except hub_errors.RepositoryNotFoundError:
        raise NoRepository(
            f"{repo}: no such repository on {_endpoint()}, or a private one: check the name, or {_LOG_IN}"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise HubError(f'{repo}: no revision "{revision}": name a branch, a tag or a commit that it has') from None
    except hub_errors.LocalEntryNotFoundError as error:
        if is_offline():
            raise HubError(
                f"{repo} at {revision}: offline (HF_HUB_OFFLINE), and not in the cache: go online once"
            ) from None
        raise HubError(
            f"{repo} at {revision}: cannot be fetched ({_first_line(error)}): check the connection"
        ) from None
    except hub_errors.EntryNotFoundError:
        raise HubError(f"{repo} at {revision}: no file {file}: name one that it has") from None
    except hub_errors.HFValidationError as error:
        raise HubError(f"{repo}: not a name on the Hub, which has the form owner/name ({_first_line(error)})") from None
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code >= _BROKEN:
            raise OutOfReach(f"{repo} at {revision}: the Hub failed: {_first_line(error)}: try again later") from None
        raise HubError(
            f"{repo} at {revision}: the Hub refused: {_first_line(error)}: {_LOG_IN}, or try again later"
        ) from None
    except (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, OSError) as error:
        reason = _first_line(error) or type(error).__name__
        raise OutOfReach(f"{repo}: {_endpoint()} is out of reach ({reason}): check the connection") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
