"""Which files belong together: the data that a user names, in groups that become one source each."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefmix import files
from prefmix.errors import SourceError
from prefmix.mixture import MANIFEST
from prefmix.schema import KINDS
from prefmix.storage import is_address

#: `path` or `hub` of a source, as the recipe has it.
Origin = Mapping[str, str | list[str]]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBERS = re.compile(r"(?:[-_. ]*(?:of[-_. ]*)?\d+)+")
_SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = re.compile(
    r"(?<![^\W_])(?:train(?:ing)?|valid(?:ation)?|dev|val|test(?:ing)?|eval(?:uation)?)(?![^\W_])"
)


@dataclass(frozen=True)
class Group:
    """Data that becomes one source, if a format fits. `beside` names files of other splits, which are not in it."""

    title: str
    origin: Origin
    beside: tuple[str, ...] = ()


def grouped(data: Sequence[str], root: Path) -> list[Group]:
    """Files, folders, glob patterns (relative to the current folder), addresses and Hub names as groups in the order given.

    A `path` is relative to `root`, or absolute where it was named so. Raises SourceError where nothing is meant.
    """
    here = Path.cwd()
    groups: dict[object, Group] = {}
    alike: dict[object, list[Path]] = {}
    for each in data or _lying_here(here):
        path = here / each
        if is_address(each):  # one source, as it is written
            groups[each] = Group(_title([Path(each)], _NUMBERS), {"path": each})
        elif path.is_file():
            key = (path.parent, _NUMBERS.sub("", path.name))
            alike.setdefault(key, []).append(path)
            groups[key] = Group(_title(alike[key], _NUMBERS), _origin(alike[key], root, Path(each).is_absolute()))
        elif _is_hub_name(each, path):
            groups[each] = Group(plain_name(each.rpartition("/")[2]), {"hub": each})
        else:
            subsets = [
                f"{each.rstrip('/')}/{kind}" for kind in KINDS if (path / MANIFEST).is_file() and (path / kind).is_dir()
            ]
            for below in subsets or [each]:
                groups |= {str(group.origin): group for group in _below(below, root)}
    return list(groups.values())


def plain_name(name: str) -> str:
    """A name of letters, digits and underscores, as a bare key of TOML may be."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _lying_here(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and files.is_data_file(path.name))
    names += ["data"] if (folder / "data").is_dir() else []
    if not names:
        raise SourceError(
            f"no data files in {folder} or in data/ below it: name files, folders, glob patterns or data sets on the "
            "Hub (owner/name), or take a shipped recipe with --recipe"
        )
    return names


def _is_hub_name(name: str, path: Path) -> bool:
    """Whether `owner/name` can only be meant as a data set on the Hub: nothing here has that name or would have it."""
    local = path.exists() or path.parent.exists() or glob.has_magic(name) or files.is_data_file(name)
    return not local and _HUB_NAME.fullmatch(name) is not None


def _below(pattern: str, root: Path) -> Iterator[Group]:
    """What a folder or a glob pattern means: a group for each kind of file name, of its train split if it has one."""
    here = Path.cwd()
    paths, base = files.find_files(pattern, here), here / pattern
    names = {path: path.relative_to(base).as_posix() if base in path.parents else path.name for path in paths}
    splits = {path: next((split for split in _SPLITS if files.in_split(names[path], split)), None) for path in paths}
    aside = [path for path in paths if "train" in splits.values() and splits[path] not in ("train", None)]
    alike: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        if path not in aside:
            alike.setdefault((path.parent, _SPLIT_WORDS.sub("", _NUMBERS.sub("", path.name))), []).append(path)
    beside = tuple(sorted(names[path] for path in aside))
    for group in alike.values():
        yield Group(_title(group, _NUMBERS, _SPLIT_WORDS), _origin(group, root, Path(pattern).is_absolute()), beside)
        beside = ()


def _title(paths: Sequence[Path], *without: re.Pattern[str]) -> str:
    """A source's name: that of its file, or what its files have in common; else that of their folder."""
    path = paths[0]
    whole = common = path.with_suffix("").stem if path.suffix.lower() in files.COMPRESSIONS else path.stem
    for pattern in (_NUMBERS, _SPLIT_WORDS) if len(paths) == 1 else without:
        common = pattern.sub("", common)
    if plain_name(common):
        return plain_name(whole if len(paths) == 1 else common)
    folders = (plain_name(folder.name) for folder in path.parents)
    return next((name for name in folders if name not in ("", "data")), "data")


def _origin(paths: Sequence[Path], root: Path, absolute: bool) -> Origin:
    """`path` of a source: a file, a glob pattern that means just these files, or a list of them."""

    def written(path: Path) -> str:
        return path.as_posix() if absolute else files.relative_name(path, root)

    if len(paths) == 1:
        return {"path": written(paths[0])}
    numbered = {_NUMBERS.sub("*", path.name) for path in paths}
    if len(numbered) == 1 and len({path.parent for path in paths}) == 1:
        pattern = written(paths[0].with_name(numbered.pop()))
        if [os.path.realpath(path) for path in files.find_files(pattern, root)] == sorted(map(os.path.realpath, paths)):
            return {"path": pattern}
    return {"path": [written(path) for path in paths]}
