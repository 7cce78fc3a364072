"""Our stand-in for the Hub: what the real huggingface_hub client needs of its HTTP surface to find and fetch files.

It listens on a loopback port and keeps everything in memory. One route is one function; what a client asks beyond the
routes is answered with 404 and stands in `requests`, so that a missing route is easily seen and added.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Refusal(Exception):
    """An error as the Hub answers it: a status and, for the client to tell what it means, an X-Error-Code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


@dataclass
class Repo:
    """A repository: the files of every commit, and what its branches and tags point to."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str:
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class LoopbackHub:
    """A Hub on 127.0.0.1. `requests` has (method, path) of all that was asked; `token` opens private repositories."""

    token = "hf_loopback"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        repo_type: str = "dataset",
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Makes `files` the content of a branch, creating the repository where needed. Returns the commit."""
        repo = self.repos.setdefault((repo_type, name), Repo(name, private, gated))
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        commit = hashlib.sha1(repr((repo.refs.get(branch), content)).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[branch] = commit
        return commit

    def tag(self, name: str, tag: str, revision: str = "main", repo_type: str = "dataset") -> None:
        repo = self.repos[repo_type, name]
        repo.refs[tag] = repo.commit_of(revision)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Answer(NamedTuple):
    body: bytes | dict[str, Any] | list[Any]
    headers: dict[str, str] = {}  # noqa: RUF012


_Route = Callable[["_Handler", re.Match[str]], _Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Route]] = []
_API = r"/api/(?P<kind>dataset|model)s/(?P<repo>[^/]+/[^/]+)"
_FILES = r"/((?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+)"


def _route(methods: str, pattern: str) -> Callable[[_Route], _Route]:
    def register(function: _Route) -> _Route:
        _ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return register


@_route("GET", _API + r"(/revision/(?P<revision>[^/]+))?")
def _info(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    commit = repo.commit_of(unquote(match["revision"] or "main"))
    files = [{"rfilename": path} for path in sorted(repo.commits[commit])]
    about = {"id": repo.name, "_id": repo.name, "sha": commit, "private": repo.private, "gated": repo.gated}
    return _Answer({**about, "tags": [], "downloads": 0, "likes": 0, "disabled": False, "siblings": files})


@_route("GET", _API + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def _tree(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    files = repo.commits[repo.commit_of(unquote(match["revision"]))]
    prefix = f"{unquote(match['folder'])}/" if match["folder"] else ""
    recursive = handler.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    entries: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        below = path.removeprefix(prefix)
        if not path.startswith(prefix):
            continue
        if "/" in below and not recursive:
            folder = prefix + below.split("/")[0]
            entries[folder] = {"type": "directory", "path": folder, "oid": _git_hash(folder.encode()), "size": 0}
        else:
            entries[path] = {"type": "file", "path": path, "oid": _git_hash(data), "size": len(data)}
    return _Answer(list(entries.values()))


@_route("HEAD GET", _FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _file(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    if repo.gated:
        raise Refusal(403, "GatedRepo", f"Access to {repo.name} is restricted")
    commit = repo.commit_of(unquote(match["revision"]))
    data = repo.commits[commit].get(unquote(match["path"]))
    if data is None:
        raise Refusal(404, "EntryNotFound", f"{unquote(match['path'])} is not in {commit}")
    return _Answer(data, {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(data)}"'})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    query: dict[str, list[str]]

    def repo(self, match: re.Match[str]) -> Repo:
        """The repository that a request names. A private one does not exist for those who have no token."""
        repo = self.hub.repos.get((match["kind"] or "model", match["repo"]))
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        return repo

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, self.path))
        try:
            for method, pattern, function in _ROUTES:
                if method == self.command and (match := pattern.fullmatch(url.path)):
                    return self._reply(200, function(self, match))
            raise Refusal(404, "", f"no route for {self.command} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._reply(refusal.status, _Answer({"error": refusal.message}, headers))

    do_HEAD = do_GET

    def _reply(self, status: int, answer: _Answer) -> None:
        is_file = isinstance(answer.body, bytes)
        body = answer.body if is_file else json.dumps(answer.body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
