"""From a tag on the Hub to a version in a store."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefmix import card, hub
from prefmix.digest import SplitDigest, mixture_digest
from prefmix.errors import MixtureError, UsageError
from prefmix.mixture import FORMAT, MANIFEST, Mixture, recorded, write_durably
from prefmix.publish.shards import sha256_of, write_arrow
from prefmix.publish.to_hub import Progress, manifest_at
from prefmix.schema import KINDS
from prefmix.store import NAME, Store

_REFERENCE = re.compile(r"(?:hub:)?(?P<repo>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^@\s]+))?")
_SHARD = re.compile(r"(?P<subset>preference|sft)/(?P<split>[A-Za-z0-9_.-]+)-\d{5}-of-\d{5}\.parquet")
_RECORDS = {"recipe.toml", "drops/drops.parquet", "drops/changes.parquet"}
_KEYS = {
    "name", "version", "build", "digest", "recipe_digest", "fingerprints", "seed", "license", "subsets", "sources",
    "funnel", "audit", "contamination", "tokenizer", "tools", "records",
}  # fmt: skip
_FETCHED = 8  # files at a time


def pull(
    reference: str,
    store: str | Path | None = None,
    *,
    name: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Mixture:
    """Pulls `hub:user/repo@v2` (or without `hub:`; without a revision, what is on main) into a store.

    It is called as it was where it was pushed, or `name`, and keeps its version's label where the store has it free, else
    it gets the next one. What is in the store adds nothing (`is_new` tells). Without the Hub, a tag that was fetched
    before is served as it was then, and nothing else is.

    Raises:
        UsageError: not a reference, or no name for a mixture.
        MixtureError: no mixture at this revision, or a file, named, that is not what was pushed.
        HubError: no such repository or revision; no access; out of reach and not in the cache.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference} is no mixture on the Hub, which is written user/repo@v2.")
    if name is not None and not NAME.fullmatch(name):
        raise UsageError(f"{name} is no name for a mixture: use a-z, 0-9, '.', '_' and '-'.")
    repo, revision = match["repo"], match["revision"] or "main"
    with hub.quietly():
        commit = hub.resolve_tag(repo, revision)
        manifest = _checked(manifest_at(repo, commit), f"{repo}@{revision}")
        manifest["name"] = name or manifest["name"]
        shelf = Store(store)
        if found := _stored(shelf, manifest):
            return found
        files = _fetched(repo, commit, manifest, f"{repo}@{revision}", progress)
    origin = {"repo": repo, "revision": revision, "commit": commit, "version": manifest["version"]}
    with shelf.staging(manifest["name"]) as folder:
        full = _unpacked(files, folder, {**manifest, "hub": origin}, f"{repo}@{revision}", progress)
        label = manifest["version"] if re.fullmatch(r"v[1-9]\d*", manifest["version"]) else None
        return shelf.publish(folder, full, label)


def _checked(manifest: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """The manifest, which somebody else wrote: nothing in it may name a place outside the folder of the mixture."""
    if manifest is None:
        raise MixtureError(f"{where} is no mixture that prefmix pushed: it has no {MANIFEST} that can be read.")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise MixtureError(f"{where} has format {manifest.get('format')}, this prefmix reads up to {FORMAT}: upgrade.")
    try:
        shards = [(subset, split, file["path"]) for subset, split, file in _shards(manifest)]
        records = {file["path"] for file in manifest["records"]}
        files = [*(file for _, _, file in _shards(manifest)), *manifest["records"]]
        is_right = (
            set(manifest) >= _KEYS
            and all(isinstance(file["bytes"], int) and isinstance(file["sha256"], str) for file in files)
            and set(manifest["subsets"]) <= set(KINDS)
            and bool(shards)
            and all((m := _SHARD.fullmatch(path)) and (m["subset"], m["split"]) == (a, b) for a, b, path in shards)
            and records <= _RECORDS
            and "recipe.toml" in records
            and bool(NAME.fullmatch(manifest["name"]) and re.fullmatch(r"[\w.-]+", manifest["version"]))
            and bool(re.fullmatch(r"[0-9a-f]{12}", manifest["build"]))
            and bool(re.fullmatch(r"[0-9a-f]{64}", manifest["digest"]))
            and bool(card.card(manifest))
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        is_right = False
    if not is_right:
        raise MixtureError(f"{where}: its {MANIFEST} is not one that `prefmix push` wrote. Ask those who pushed it.")
    return manifest


def _shards(manifest: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(subset, split, entry) of every file with rows."""
    return [
        (subset, split, file)
        for subset, splits in manifest["subsets"].items()
        for split, entry in splits.items()
        for file in entry["files"]
    ]


def _stored(shelf: Store, manifest: Mapping[str, Any]) -> Mixture | None:
    """The version of the store that is this build, if it has one whose files are there."""
    for label, entry in shelf.versions(manifest["name"]).items():
        if entry["build"] == manifest["build"]:
            if entry["digest"] != manifest["digest"]:
                raise MixtureError(
                    f"{manifest['name']}@{label} is of build {entry['build']} too and has another digest: one of the two "
                    "was tampered with. Pull it under another --name to compare them."
                )
            found = shelf.find(manifest["name"], label)
            if found.is_whole():
                return found
    return None


def _fetched(repo: str, commit: str, manifest: Mapping[str, Any], where: str, progress: Progress) -> dict[str, Path]:
    """The files of the manifest by their path on the Hub, each with the hash that it must have.

    One that has another is fetched once more: it may have been damaged on its way here, or in the cache."""
    entries = {file["path"]: file for file in (*(file for _, _, file in _shards(manifest)), *manifest["records"])}
    there = set(hub.list_files(repo, commit))
    for path in entries:
        if path not in there:
            raise MixtureError(f"{where}: {path} is missing. Ask those who pushed it to push it again.")
    names, total, done = list(entries), sum(file["bytes"] for file in entries.values()) // 1000, 0
    found: dict[str, Path] = {}
    progress("fetch", 0, total)
    for first in range(0, len(names), _FETCHED):
        part = names[first : first + _FETCHED]
        found |= dict(zip(part, hub.download(repo, commit, part), strict=True))
        wrong = [path for path in part if sha256_of(found[path]) != entries[path]["sha256"]]
        found |= dict(zip(wrong, hub.download(repo, commit, wrong, again=True), strict=True))
        for path in wrong:
            if sha256_of(found[path]) != entries[path]["sha256"]:
                raise MixtureError(
                    f"{where}: {path} is not the file that was pushed (its sha256 differs). Nothing was pulled."
                )
        done += sum(entries[path]["bytes"] for path in part)
        progress("fetch", done // 1000, total)
    return found


def _unpacked(
    files: Mapping[str, Path], folder: Path, manifest: dict[str, Any], where: str, progress: Progress
) -> dict[str, Any]:
    """Writes a mixture's folder without its manifest, and gives that."""
    total = sum(entry["rows"] for splits in manifest["subsets"].values() for entry in splits.values())
    done = 0

    def converted(rows: int) -> None:
        nonlocal done
        done += rows
        progress("convert", done, total)

    subsets: dict[str, dict[str, Any]] = {}
    schemas: dict[str, pa.Schema] = {}
    digests: dict[str, dict[str, SplitDigest]] = {}
    for kind in KINDS:
        for split, entry in manifest["subsets"].get(kind, {}).items():
            shards = {file["path"]: files[file["path"]] for file in entry["files"]}
            entries, digest, schemas[kind] = write_arrow(shards, folder, kind, converted)
            digests.setdefault(kind, {})[split] = digest
            subsets.setdefault(kind, {})[split] = {**entry, "rows": digest.rows, "files": entries}
    if mixture_digest(schemas, digests) != manifest["digest"]:
        raise MixtureError(f"{where}: its rows are not those of digest {manifest['digest'][:12]}. Nothing was pulled.")
    records = [file["path"] for file in manifest["records"]]
    for path in records:
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(files[path], folder / path)
    full = {**manifest, "subsets": subsets}
    write_durably(folder / "README.md", card.card(full))
    full["records"] = recorded(folder, [*records, "README.md"])
    return full
