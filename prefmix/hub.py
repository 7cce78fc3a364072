"""Transport to and from the Hub: the only importer of huggingface_hub.

Where the Hub is (`HF_ENDPOINT`), whether it may be asked (`HF_HUB_OFFLINE`) and where its cache is (`HF_HUB_CACHE`,
`HF_HOME`) is read from the environment at each call. What is fetched is always pinned to a commit: a branch or tag is
never served from the cache, which may hold another version of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub import errors as hub_errors

from prefmix.errors import HubError

RepoType = Literal["dataset", "model"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
# hub_errors.HTTPError is the base class of the HTTP client, httpx or httpx2 by the version of huggingface_hub.
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_DOWNLOADS = 8  # at a time


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


def list_files(repo: str, commit: str, repo_type: RepoType = "dataset") -> list[str]:
    """The paths of all files at a commit, sorted. Kept in the cache, and taken from there: a commit does not change.

    Raises:
        HubError: as above; offline, no list of this commit in the cache.
    """
    kept = _cache_folder() / "prefmix" / f"{repo_type}s--{repo.replace('/', '--')}" / f"{commit}.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))
    if is_offline():
        raise HubError(
            f"{repo} at {commit}: offline (HF_HUB_OFFLINE), and not in the cache: go online once to fetch it"
        )
    with _explained(repo, commit):
        names = sorted(_api().list_repo_files(repo, revision=commit, repo_type=repo_type))
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(names), "utf-8")
    partial.replace(kept)
    return names


def download(repo: str, commit: str, files: Sequence[str], repo_type: RepoType = "dataset") -> list[Path]:
    """Local copies of some files at a commit, in the order given; what is in the cache is not fetched again.

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
            )
        return Path(path)

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(pool.map(one, files))


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
        raise HubError(
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
        raise HubError(
            f"{repo} at {revision}: the Hub refused: {_first_line(error)}: {_LOG_IN}, or try again later"
        ) from None
    except (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, OSError) as error:
        reason = _first_line(error) or type(error).__name__
        raise HubError(
            f"{repo}: {_endpoint()} is out of reach ({reason}): check the connection, or build from files"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
