"""Our stand-in for the Hub: what the real huggingface_hub and `datasets` clients need of its HTTP surface.

It listens on a loopback port and keeps everything in memory. One route is one function; what a client asks beyond the
routes is answered with 404 and stands in `requests`, so that a missing route is easily seen and added. It is strict where
the Hub is: a commit on another parent than the head is refused (412), so are a tag that exists (409), a write without a
token, an upload that is not what its sha256 says, and a commit of a file whose bytes never came.

`faults` makes requests fail, `uploaded` counts the bytes of large files that came in (LFS, or Xet in hub/xet.py),
`downloaded` those of files that went out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub import xet

#: What stands in the .gitattributes of a new repository as large, and what is large without.
_LARGE_NAMES, _LARGE_BYTES = (".parquet", ".arrow", ".safetensors"), 10 * 2**20
_LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "odc-by", "unknown", "other"}


class Refusal(Exception):
    """An error as the Hub answers it: a status and, for the client to tell what it means, an X-Error-Code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Commit:
    """The files of a commit, its first parent and what it says."""

    files: dict[str, bytes]
    parent: str | None
    title: str = ""
    text: str = ""


@dataclass
class Repo:
    """A repository: its commits, and what its branches and tags point to."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def add(self, branch: str, files: Mapping[str, bytes], title: str = "", text: str = "") -> str:
        """Makes `files` the content of a branch. Returns the commit."""
        parent = self.branches.get(branch)
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        commit = hashlib.sha1(repr((parent, content, title)).encode()).hexdigest()
        self.commits[commit] = Commit(dict(files), parent, title, text)
        self.branches[branch] = commit
        return commit

    def history(self, commit: str | None) -> list[str]:
        """The commits from this one back to the first."""
        found = []
        while commit:
            found.append(commit)
            commit = self.commits[commit].parent
        return found


@dataclass
class Fault:
    """Makes the next `times` requests that match fail: with a status; cut, when it is None; done but not answered, when
    it is `lost`; with other bytes, when it is `spoilt`; after half of the answer, when it is `halved`; never, when it
    `hangs`. `after` of them pass first."""

    method: str
    pattern: str
    status: int | None = None
    times: int = 1
    after: int = 0
    lost: bool = False
    spoilt: bool = False
    halved: bool = False
    hangs: bool = False


class LoopbackHub:
    """A Hub on 127.0.0.1. `requests` has (method, path) of all that was asked; `token` opens private repositories."""

    token = "hf_loopback"
    user = "someone"

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.large: dict[str, bytes] = {}
        self.uploaded = self.downloaded = 0
        self.closing = threading.Event()
        self.cas = xet.Store(self.large)
        self.lock = threading.RLock()
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
        return self.repos.setdefault((repo_type, name), Repo(name, private, gated)).add(branch, files)

    def tag(self, name: str, tag: str, revision: str = "main", repo_type: str = "dataset") -> None:
        repo = self.repos[repo_type, name]
        repo.tags[tag] = repo.commit_of(revision)

    def fail(self, method: str, pattern: str, **what: Any) -> None:
        """Injects a fault: the keywords are those of `Fault`."""
        self.faults.append(Fault(method, pattern, **what))

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Answer(NamedTuple):
    body: bytes | dict[str, Any] | list[Any]
    headers: dict[str, str] = {}  # noqa: RUF012
    status: int = 200


_Route = Callable[["_Handler", re.Match[str]], _Answer]
_ROUTES: list[tuple[str, re.Pattern[str], _Route]] = []
_API = r"/api/(?P<kind>dataset|model)s/(?P<repo>[^/]+/[^/]+)"
_FILES = r"/((?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"


def _route(methods: str, pattern: str) -> Callable[[_Route], _Route]:
    def register(function: _Route) -> _Route:
        _ROUTES.extend((method, re.compile(pattern), function) for method in methods.split())
        return function

    return register


# What there is


@_route("GET", "/api/whoami-v2")
def _whoami(handler: _Handler, match: re.Match[str]) -> _Answer:
    handler.check_token()
    return _Answer({"type": "user", "name": handler.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@_route("GET", _API + rf"(/revision{_REVISION})?")
def _info(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    commit = repo.commit_of(unquote(match["revision"] or "main"))
    files = [{"rfilename": path} for path in sorted(repo.commits[commit].files)]
    about = {"id": repo.name, "_id": repo.name, "sha": commit, "private": repo.private, "gated": repo.gated}
    return _Answer({**about, "tags": [], "downloads": 0, "likes": 0, "disabled": False, "siblings": files})


@_route("GET", _API + "/refs")
def _refs(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)

    def listed(kind: str, table: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in table.items()]

    return _Answer({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})


@_route("GET", _API + rf"/commits{_REVISION}")
def _commits(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    about = {"authors": [{"user": handler.hub.user}], "date": "2026-01-01T00:00:00.000Z"}
    history = repo.history(repo.commit_of(unquote(match["revision"])))
    return _Answer(
        [{"id": c, "title": repo.commits[c].title, "message": repo.commits[c].text, **about} for c in history]
    )


@_route("GET", _API + rf"/tree{_REVISION}(/(?P<folder>.*))?")
def _tree(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    files = repo.commits[repo.commit_of(unquote(match["revision"]))].files
    folder = unquote(match["folder"] or "").strip("/")
    prefix = f"{folder}/" if folder else ""
    recursive = handler.query.get("recursive", ["false"])[0].lower() in ("1", "true")
    entries: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        below = path.removeprefix(prefix)
        if not path.startswith(prefix):
            continue
        if "/" in below and not recursive:
            inner = prefix + below.split("/")[0]
            entries[inner] = {"type": "directory", "path": inner, "oid": _git_hash(inner.encode()), "size": 0}
        else:
            entries[path] = _entry(path, data)
    if folder and not entries:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
    return _Answer(list(entries.values()))


@_route("POST", _API + rf"/paths-info{_REVISION}")
def _paths_info(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    files = repo.commits[repo.commit_of(unquote(match["revision"]))].files
    is_json = "json" in (handler.headers.get("Content-Type") or "")
    paths = json.loads(handler.body)["paths"] if is_json else parse_qs(handler.body.decode()).get("paths", [])
    return _Answer([_entry(path, files[path]) for path in paths if path in files])


@_route("HEAD GET", _FILES + rf"/resolve{_REVISION}/(?P<path>.+)")
def _file(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match)
    if repo.gated:
        raise Refusal(403, "GatedRepo", f"Access to {repo.name} is restricted")
    commit = repo.commit_of(unquote(match["revision"]))
    path = unquote(match["path"])
    data = repo.commits[commit].files.get(path)
    if data is None:
        raise Refusal(404, "EntryNotFound", f"{path} is not in {commit}")
    headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(data)}"', "Accept-Ranges": "bytes"}
    if _is_large(path, data):
        sha = hashlib.sha256(data).hexdigest()
        headers |= {"ETag": f'"{sha}"', "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if not asked:
        return _Answer(data, headers)
    first, last = int(asked[1]), int(asked[2] or len(data) - 1)
    return _Answer(data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, 206)


# What changes it


@_route("POST", "/api/validate-yaml")
def _validate_card(handler: _Handler, match: re.Match[str]) -> _Answer:
    """What the Hub checks of a card's head, as far as the cards of mixtures and models have it."""
    content = json.loads(handler.body)["content"]
    head = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
    errors = []
    if head.get("license") not in _LICENCES:
        errors.append('"license" must be one of the known licences')
    if head.get("license") == "other" and "license_name" not in head:
        errors.append('"license_name" is required for other licences')
    for config in head.get("configs", []):
        if not isinstance(config.get("config_name"), str) or "data_files" not in config:
            errors.append('"configs" need a config_name and data_files')
    names = {key: head.get(key, []) for key in ("base_model", "datasets")}
    for key, value in names.items():
        if not all(
            re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) for name in ([value] if isinstance(value, str) else value)
        ):
            errors.append(f'"{key}" has a name that no repository can have')
    if head.get("base_model_relation", "finetune") not in {"adapter", "finetune", "quantized", "merge"}:
        errors.append('"base_model_relation" is not a known relation')
    for model in head.get("model-index", []):
        for result in model["results"] if "name" in model and "results" in model else [{}]:
            named = all({"name", "type"} <= result.get("dataset", {}).keys() and {"type"} <= metric.keys() and "value" in metric
                        for metric in result.get("metrics", []))  # fmt: skip
            if not (named and "type" in result.get("task", {}) and result.get("metrics")):
                errors.append('"model-index" needs a name and results with task, dataset and metrics')
    if errors:
        return _Answer({"errors": [{"message": error} for error in errors], "warnings": []}, status=400)
    return _Answer({"errors": [], "warnings": []})


@_route("POST", "/api/repos/create")
def _create(handler: _Handler, match: re.Match[str]) -> _Answer:
    handler.check_token()
    asked = json.loads(handler.body)
    kind, name = asked.get("type", "model"), f"{asked.get('organization') or handler.hub.user}/{asked['name']}"
    url = f"{handler.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if (kind, name) in handler.hub.repos:
        return _Answer({"error": "You already created this repo", "url": url}, status=409)
    if name.split("/")[0] != handler.hub.user:
        raise Refusal(403, "", f"You don't have the rights to create a repo under {name.split('/')[0]}")
    repo = handler.hub.repos[kind, name] = Repo(name, asked.get("visibility") == "private")
    repo.add("main", {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
    return _Answer({"url": url, "name": name, "id": name})


@_route("POST", _API + rf"/preupload{_REVISION}")
def _preupload(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match, write=True)
    there = repo.commits[repo.commit_of(unquote(match["revision"]))].files
    files = []
    for asked in json.loads(handler.body)["files"]:
        path, old = asked["path"], there.get(asked["path"])
        mode = "lfs" if path.endswith(_LARGE_NAMES) or asked["size"] > _LARGE_BYTES else "regular"
        oid = None if old is None else hashlib.sha256(old).hexdigest() if _is_large(path, old) else _git_hash(old)
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return _Answer({"files": files})


@_route("POST", _FILES + r"\.git/info/lfs/objects/batch")
def _lfs_batch(handler: _Handler, match: re.Match[str]) -> _Answer:
    handler.repo(match, write=True)
    objects = []
    for asked in json.loads(handler.body)["objects"]:
        upload = {"upload": {"href": f"{handler.hub.url}/lfs/{asked['oid']}", "header": {}}}
        missing = asked["oid"] not in handler.hub.large
        objects.append({"oid": asked["oid"], "size": asked["size"], **({"actions": upload} if missing else {})})
    return _Answer({"transfer": "basic", "objects": objects})


@_route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
def _lfs_put(handler: _Handler, match: re.Match[str]) -> _Answer:
    if hashlib.sha256(handler.body).hexdigest() != match["oid"]:
        raise Refusal(400, "BadDigest", "the sha256 of the body is another")
    handler.hub.large[match["oid"]] = handler.body
    handler.hub.uploaded += len(handler.body)
    return _Answer({})


@_route("POST", _API + rf"/commit{_REVISION}")
def _commit(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo, branch = handler.repo(match, write=True), unquote(match["revision"])
    if branch not in repo.branches:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
    head, *operations = (json.loads(line) for line in handler.body.splitlines() if line)
    parent = head["value"].get("parentCommit")
    if parent and parent != repo.branches[branch]:
        raise Refusal(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[repo.branches[branch]].files)
    for operation in operations:
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in handler.hub.large:
                raise Refusal(400, "LfsMissing", f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = handler.hub.large[value["oid"]]
        elif key == "deletedFile":
            if value["path"] not in files:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            del files[value["path"]]
        else:
            raise Refusal(400, "", f"{key} is not known here")
    commit = repo.add(branch, files, head["value"]["summary"], head["value"].get("description", ""))
    url = f"{handler.hub.url}/datasets/{repo.name}/commit/{commit}"
    return _Answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


@_route("POST", _API + rf"/(?P<what>tag|branch){_REVISION}")
def _add_ref(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo, asked = handler.repo(match, write=True), json.loads(handler.body)
    is_tag, named = match["what"] == "tag", unquote(match["revision"])
    table, name = (repo.tags, asked["tag"]) if is_tag else (repo.branches, named)
    if name in table:
        raise Refusal(409, "", f"Reference already exists: refs/{match['what']}s/{name}")
    table[name] = repo.commit_of(named if is_tag else asked.get("startingPoint", "main"))
    return _Answer({})


@_route("DELETE", _API + rf"/(?P<what>tag|branch){_REVISION}")
def _remove_ref(handler: _Handler, match: re.Match[str]) -> _Answer:
    repo = handler.repo(match, write=True)
    table = repo.tags if match["what"] == "tag" else repo.branches
    if table.pop(unquote(match["revision"]), None) is None:
        raise Refusal(404, "RevisionNotFound", "no such reference")
    return _Answer({})


# The Xet leg: its own store, which knows files by their chunks


@_route("GET", _API + rf"/xet-(read|write)-token{_REVISION}")
def _xet_token(handler: _Handler, match: re.Match[str]) -> _Answer:
    handler.repo(match, write=True)
    end = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": handler.hub.url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(end)}
    return _Answer({"casUrl": handler.hub.url, "exp": end, "accessToken": "xet"}, headers)


@_route("POST", r"/v1/xorbs/[^/]+/(?P<hash>[0-9a-f]{64})")
def _xorb(handler: _Handler, match: re.Match[str]) -> _Answer:
    is_new = handler.hub.cas.add_xorb(match["hash"], handler.body)
    handler.hub.uploaded += len(handler.body)
    return _Answer({"was_inserted": is_new})


@_route("POST", r"/v1/shards")
def _shard(handler: _Handler, match: re.Match[str]) -> _Answer:
    handler.hub.cas.add_shard(handler.body)
    handler.hub.uploaded += len(handler.body)
    return _Answer({"result": 1})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    about = {"type": "file", "path": path, "oid": _git_hash(data), "size": len(data)}
    return about | ({"lfs": large} if _is_large(path, data) else {})


def _is_large(path: str, data: bytes) -> bool:
    return path.endswith(_LARGE_NAMES) or len(data) > _LARGE_BYTES


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms
    hub: LoopbackHub
    query: dict[str, list[str]]
    body: bytes

    def repo(self, match: re.Match[str], write: bool = False) -> Repo:
        """The repository that a request names. A private one does not exist for those who have no token."""
        repo = self.hub.repos.get((match["kind"] or "model", match["repo"]))
        known = self._has_token()
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if write:
            self.check_token()
        return repo

    def check_token(self) -> None:
        if not self._has_token():
            raise Refusal(401, "", "Invalid username or password.")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault = self._fault(url.path)
        if fault and fault.hangs:
            self.hub.closing.wait()
        if fault and fault.status is None and not (fault.lost or fault.spoilt or fault.halved):
            self.hub.requests.append((self.command, self.path))
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            return self._hang_up()
        self.body = self._read()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            try:
                if fault and fault.status is not None:
                    raise Refusal(fault.status, "", "injected fault")
                answer = self._route(url.path)
            except Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                answer = _Answer({"error": refusal.message}, headers, refusal.status)
        if fault and fault.lost:
            return self._hang_up()
        if fault and fault.spoilt and isinstance(answer.body, bytes) and self.command == "GET":
            answer = answer._replace(body=answer.body[:-9] + b"otherwise"[: len(answer.body)])
        self._reply(answer, halved=bool(fault and fault.halved))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _route(self, path: str) -> _Answer:
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := pattern.fullmatch(path)):
                return function(self, match)
        raise Refusal(404, "", f"no route for {self.command} {path}")

    def _fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times <= 0 or fault.method != self.command or not re.search(fault.pattern, path):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _read(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, answer: _Answer, halved: bool = False) -> None:
        is_file = isinstance(answer.body, bytes)
        body = answer.body if is_file else json.dumps(answer.body).encode()
        sent = body[: len(body) // 2] if halved else body
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
            self.hub.downloaded += len(sent) if is_file else 0
        if halved:
            self._hang_up()

    def log_message(self, format: str, *args: Any) -> None:
        pass
