"""Files at an address: `s3://bucket/data/x.parquet`, `gs://...`, any protocol that fsspec has a client for.

Credentials come from the environment or the files of the provider, which the clients read themselves. An address that
holds one is refused, and no error repeats what a client said: neither can put a secret into a manifest or a log.
What is read is copied into the cache first, so that everything else reads local files.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path, PurePosixPath
from secrets import token_hex
from typing import Any

from filelock import FileLock

from prefmix.errors import StorageError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)  # two letters at least: C: is a drive
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_S3 = {"s3", "s3a"}
_OBJECTS = {*_EXTRAS, "abfs", "abfss", "az", "adl", "oci", "oss", "r2"}  # have no folders that would have to be made
_WEB = {"http", "https"}
_OTHERWISE = {
    "file": "name a file on this machine by its path",
    "local": "name a file on this machine by its path",
    "hf": "name a data set on the Hub with `hub`",
    "hub": "a mixture on the Hub is written hub:user/repo@v2",
}
_LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
}
_TAGS = ("ETag", "etag", "generation", "md5Hash", "content_md5")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modify", "modified", "created")
_AT_A_TIME = 8
_DEAD_S = 24 * 3600
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_fetched_here: set[str] = set()
#: One for all threads, where fsspec keeps one for each; another when the environment says something else than before.
_clients: dict[int, Any] = {}
_LOGGERS = ("adlfs", "aiobotocore", "botocore", "fsspec", "gcsfs", "google.auth", "s3fs")
_ENVIRONMENT = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_")


@dataclass(frozen=True)
class Remote:
    """A file at an address. `mark` differs when the content does: its ETag, else the time it was written, else empty."""

    address: str
    bytes: int | None
    mark: str
    modified: float | None = None  # seconds since the epoch


def is_address(text: str) -> bool:
    """Whether a text is written as an address: `protocol://...`. `hub:user/repo` and `C:\\data` are none."""
    return _ADDRESS.fullmatch(text) is not None


def open_fs(address: str) -> tuple[Any, str]:
    """The fsspec client of an address and the path that it knows it by.

    Raises StorageError: the address holds a credential; no such protocol; its package is not installed, or cannot be set up.
    """
    protocol, _ = _parts(address)
    if protocol in _OTHERWISE:
        raise StorageError(f"{shown(address)} is no address that prefmix reads: {_OTHERWISE[protocol]}.")
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise StorageError(f"{shown(address)}: there is no protocol {protocol}://: correct the address.") from None
    except ImportError:
        package = f"'prefmix[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else f"the fsspec client of {protocol}"
        raise StorageError(
            f"{shown(address)}: the package for {protocol}:// is not installed: pip install {package}"
        ) from None
    _hush()
    with reaching(address):
        settings = _settings(protocol) | kind._get_kwargs_from_urls(address)
        environment = sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT))
        key = hash((kind, os.getpid(), str(settings), tuple(environment)))
        if (client := _clients.get(key)) is None:
            client = _clients[key] = kind(use_listings_cache=False, skip_instance_cache=True, **settings)
        return client, client._strip_protocol(address)


def shown(address: str) -> str:
    """An address as it may be shown: of one that holds a credential only the protocol."""
    match = _ADDRESS.fullmatch(address)
    return address if match is None or not _holds_credential(match[1].lower(), match[2]) else f"{match[1].lower()}://…"


@contextmanager
def reaching(address: str) -> Generator[None]:
    """Turns whatever a client raises into a StorageError that names the address and what to do, and says nothing else: what
    clients say may hold keys, signatures or tokens."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"{shown(address)}: {_told(error, address)}") from None


def look(address: str) -> Remote | None:
    """What is known of the file at an address; None where there is none. Raises StorageError."""
    client, path = open_fs(address)
    with reaching(address):
        try:
            info = client.info(path)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None
        return _remote(address, info) if info["type"] == "file" else None


def below(address: str, depth: int | None = None) -> dict[str, Remote]:
    """The files below an address by their relative paths, sorted, at most `depth` folders deep. Raises StorageError."""
    client, base = open_fs(address)
    with reaching(address):
        try:
            found = client.find(base, maxdepth=depth, detail=True)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return {}
    base = base.rstrip("/")
    relative = {path[len(base) :].lstrip("/"): info for path, info in found.items() if path.startswith(f"{base}/")}
    return {
        name: _remote(f"{address.rstrip('/')}/{name}", info)
        for name, info in sorted(relative.items())
        if name and info["type"] == "file"
    }


def names(address: str) -> list[str]:
    """The names of the files and folders at an address, sorted; none where nothing is. Raises StorageError."""
    client, base = open_fs(address)
    with reaching(address):
        try:
            found = client.ls(base, detail=False)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return []
    return sorted({PurePosixPath(path).name for path in found if path.rstrip("/") != base.rstrip("/")} - {""})


def fetched(what: Remote | str) -> Path:
    """The local copy of a file, fetched unless the cache has this content of it. Several processes may ask at once.

    Raises StorageError: no such file, out of reach, refused, changed meanwhile; no room in the cache.
    """
    remote = look(what) if isinstance(what, str) else what
    if remote is None:
        raise StorageError(f"{shown(str(what))}: no such file: correct the address.")
    key = sha256(f"{remote.address}\n{remote.mark}".encode()).hexdigest()[:32]
    files = cache_folder() / "files"
    path = files / key / PurePosixPath(remote.address).name
    if _is_there(path, remote, key):
        return path
    with making_room(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(files)
        lock = FileLock(files / f".{key}.lock")
        with lock:
            try:
                if not _is_there(path, remote, key):
                    (path.parent / ".address").write_text(remote.address, "utf-8")
                    _fetch(remote, path, files / f".{key}-{token_hex(6)}.part")
                    _fetched_here.add(key)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    return path


def fetched_all(remotes: Sequence[Remote]) -> list[Path]:
    """As `fetched`, of several files at a time, in their order."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(fetched, remotes))


def check_store(address: str) -> None:
    """Raises StorageError for an address that no mixture can be written to: one that `open_fs` refuses, or a web page."""
    open_fs(address)
    if (protocol := _parts(address)[0]) in _WEB:
        raise StorageError(
            f"{shown(address)}: {protocol}:// can only be read: name a bucket or a folder for the store."
        )


def address_of(path: Path) -> str | None:
    """The address that a file of the cache is a copy of; None of other files."""
    try:
        path.relative_to(cache_folder() / "files")
        return (path.parent / ".address").read_text("utf-8")
    except (ValueError, OSError):
        return None


def download(remote: Remote, path: Path) -> None:
    """Copies a file to a path, which is a half-written file when this fails. Raises StorageError, also where it is not as
    long as it was said to be or changed meanwhile; OSError of the disk."""
    client, there = open_fs(remote.address)
    path.open("wb").close()  # what is wrong with the disk shows here, and not as the fault of the address
    with reaching(remote.address):
        try:
            client.get_file(there, str(path))
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise _DiskFull(error) from None
            raise
    now = look(remote.address)
    if now is None or (remote.mark and now.mark != remote.mark) or remote.bytes not in (None, path.stat().st_size):
        raise StorageError(f"{shown(remote.address)}: the file changed while it was fetched: run the command again.")


def read(address: str) -> tuple[bytes, Remote] | None:
    """The content of a small file; None where there is none. Written meanwhile, the content is the newer one, and what is
    known of it that of the older: a `write` over it fails. Raises StorageError."""
    known = look(address)
    if known is None:
        return None
    client, path = open_fs(address)
    with reaching(address):
        return client.cat_file(path), known


def write(address: str, data: bytes, over: Remote | None) -> bool:
    """Writes a small file over the one that was read, or where there was none; False when somebody else was faster.

    S3 decides by itself which of two writers was first. Elsewhere the file is compared before it is written, which leaves
    a moment. Raises StorageError.
    """
    client, path = open_fs(address)
    protocol, _ = _parts(address)
    if protocol in _S3:
        with reaching(address):
            try:
                if over is None:
                    client.pipe_file(path, data, mode="create")
                else:
                    client.pipe_file(path, data, IfMatch=f'"{over.mark}"')
                return True
            except Exception as error:
                if isinstance(error, FileExistsError) or _code(error) in _FASTER:
                    return False
                if _code(error) not in ("NotImplemented", "501"):
                    raise
    now = look(address)
    if (now and now.mark) != (over and over.mark):
        return False
    _make_folder(client, protocol, path)
    with reaching(address):
        client.pipe_file(path, data)
    return True


def put(path: Path, address: str) -> None:
    """Copies a local file to an address; it appears there as a whole. Raises StorageError."""
    client, there = open_fs(address)
    _make_folder(client, _parts(address)[0], there)
    with reaching(address):
        client.put_file(str(path), there)


def delete(addresses: Iterable[str]) -> None:
    """Removes files; those that are not there do not count. Raises StorageError."""
    for address in addresses:
        client, path = open_fs(address)
        with reaching(address):
            try:
                client.rm_file(path)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise


def cache_folder() -> Path:
    """Where copies of files and mixtures are kept: PREFMIX_CACHE, else prefmix in the user's cache folder."""
    if folder := os.environ.get("PREFMIX_CACHE"):
        return Path(folder).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "prefmix"


_FASTER = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey"}


class _DiskFull(StorageError):
    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"{cache_folder()} cannot be written: {os.strerror(error.errno or 0)}: make room, or set PREFMIX_CACHE."
        )


def _parts(address: str) -> tuple[str, str]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise StorageError(f"{address} is no address: it is written s3://bucket/folder.")
    protocol, rest = match[1].lower(), match[2]
    if _holds_credential(protocol, rest):
        raise StorageError(
            f"{protocol}://…: the address holds a user, a password or a query, as in user:password@ or ?token=: an address "
            "is written into every mixture, so leave them out; credentials come from the environment."
        )
    return protocol, rest


def _holds_credential(protocol: str, rest: str) -> bool:
    """Whether an address holds what may be a secret, which may itself hold any character."""
    if protocol in _WEB and re.search(r"[?#]|^[^/]*@", rest):
        return True
    return re.search(r"^[^/]*:.*@|[?#][^/?#]*=", rest, re.DOTALL) is not None


def _settings(protocol: str) -> dict[str, Any]:
    """A refused port is told in seconds, not in minutes; what the environment says of retries wins."""
    if protocol not in _S3:
        return {}
    settings: dict[str, Any] = {"connect_timeout": 10}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        settings["retries"] = {"max_attempts": 3, "mode": "standard"}
    return {"config_kwargs": settings}


def _hush() -> None:
    """Keeps clients from logging what they raise, with its addresses and headers, unless they were told to."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)


def _remote(address: str, info: dict[str, Any]) -> Remote:
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "").removeprefix("W/").strip('"')
    written = next((info[key] for key in _TIMES if info.get(key)), None)
    if isinstance(written, datetime):
        modified: float | None = (written if written.tzinfo else written.replace(tzinfo=UTC)).timestamp()
    else:
        modified = float(written) if isinstance(written, int | float) else None
    return Remote(address, info.get("size"), tag or str(modified or written or ""), modified)


def _is_there(path: Path, remote: Remote, key: str) -> bool:
    if not path.is_file() or remote.bytes not in (None, path.stat().st_size):
        return False
    return bool(remote.mark) or key in _fetched_here


def _fetch(remote: Remote, path: Path, partial: Path) -> None:
    try:
        download(remote, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sweep(files: Path) -> None:
    """Removes what killed processes left half-written."""
    for left in files.glob(".*.part"):
        try:
            if left.stat().st_mtime < time.time() - _DEAD_S:
                left.unlink()
        except FileNotFoundError:  # another process was faster
            continue


@contextmanager
def making_room(folder: Path) -> Generator[None]:
    """Turns what the disk says of a folder of the cache into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or type(error).__name__}: make room, or set PREFMIX_CACHE."
        ) from None


def _make_folder(client: Any, protocol: str, path: str) -> None:
    if protocol not in _OBJECTS and "/" in path:
        with reaching(f"{protocol}://{path}"):
            client.makedirs(path.rpartition("/")[0], exist_ok=True)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found:
        found.append(each)
        each = each.__cause__ or each.__context__
    return found


def _code(error: BaseException) -> str:
    """The code that the service gave, of letters and digits; empty where it gave none."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        for name in ("status", "status_code", "code"):
            found = getattr(each, name, None) if found is None else found
        if found is not None and re.fullmatch(r"[A-Za-z0-9]{1,60}", str(found)):
            return str(found)
    return ""


_NO_CREDENTIALS = re.compile(r"NoCredentials|PartialCredentials|DefaultCredentials|CredentialRetrieval|ProfileNotFound|NoAuthToken|SSO|TokenRetrieval|RefreshError")  # fmt: skip
_OUT_OF_REACH = re.compile(r"Connection|Connector|Timeout|HTTPClientError|SSL|ProxyConn|ServerDisconnected|gaierror")
_BAD_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired",
             "InvalidClientTokenId", "RequestTimeTooSkewed", "AuthorizationHeaderMalformed", "401"}  # fmt: skip
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "502", "503", "504", "429"}


def _told(error: BaseException, address: str) -> str:
    """What went wrong and what to do, in our own words."""
    match = _ADDRESS.fullmatch(address)
    protocol = match[1].lower() if match else ""
    log_in = _LOG_IN.get(_EXTRAS.get(protocol, ""), "give the credentials that its client reads")
    code = _code(error)
    said = f" ({code})" if code else ""
    kinds = [type(each).__name__ for each in _chain(error)]
    if any(_NO_CREDENTIALS.search(kind) for kind in kinds):
        return f"no credentials were found: {log_in}."
    if code == "NoSuchBucket":
        bucket = f" {match[2].partition('/')[0]}" if match and shown(address) == address else ""
        return f"there is no bucket{bucket}: correct the address, or make the bucket."
    if code in _BAD_KEYS:
        return f"the credentials were refused{said}: {log_in}."
    if isinstance(error, PermissionError) or code in ("403", "AccessDenied"):
        return f"access was refused{said}: check the credentials and what they allow ({log_in})."
    if isinstance(error, FileNotFoundError) or code in ("NoSuchKey", "404"):
        return "no such file: correct the address."
    if code in _BUSY:
        return f"the service failed or is busy{said}: try again later."
    if isinstance(error, TimeoutError | ConnectionError) or any(_OUT_OF_REACH.search(kind) for kind in kinds):
        endpoint = " and AWS_ENDPOINT_URL" if protocol in _S3 else ""
        return f"out of reach: check the connection{endpoint}."
    if isinstance(error, NotImplementedError):
        return f"{protocol}:// can only be read: name another place."
    return f"the client of {protocol}:// failed ({code or type(error).__name__}): check the address and its settings."
