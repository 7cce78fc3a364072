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

Origin = Mapping[str, str | list[str]]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBERS = re.compile(r"(?:[-_. ]*(?:of[-_. ]*)?\d+)+")
_SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = re.compile(
    r"(?<![^\W_])(?:train(?:ing)?|valid(?:ation)?|dev|val|test(?:ing)?|eval(?:uation)?)(?![^\W_])"
)


@dataclass(frozen=True)
class _Group:
    """Data that becomes one source, if a format fits."""

    title: str
    origin: Origin
    beside: tuple[str, ...] = ()


def _groups(data: Sequence[str], root: Path) -> list[_Group]:
    here = Path.cwd()
    if not data:
        data = sorted(path.name for path in here.iterdir() if path.is_file() and files.is_data_file(path.name))
        data = [*data, *(["data"] if (here / "data").is_dir() else [])]
        if not data:
            raise SourceError(
                f"no data files in {here} or in data/ below it: name files, folders, glob patterns or data sets on the "
                "Hub (owner/name), or take a shipped recipe with --recipe"
            )
    groups: dict[object, _Group] = {}
    alike: dict[object, list[Path]] = {}
    for each in data:
        path = here / each
        if path.is_file():
            key = (path.parent, _NUMBERS.sub("", path.name))
            alike.setdefault(key, []).append(path)
            title = _title(path, _NUMBERS) if len(alike[key]) > 1 else _title(path)
            groups[key] = _Group(title, _written_path(alike[key], root, Path(each).is_absolute()))
        elif not path.exists() and not glob.has_magic(each) and _HUB_NAME.fullmatch(each) and not files.is_data_file(each):
            groups[each] = _Group(_plain(each.rpartition("/")[2]), {"hub": each})
        else:
            for group in _below(each, root):
                groups[str(group.origin)] = group
    return list(groups.values())


def _below(pattern: str, root: Path) -> Iterator[_Group]:
    """What a folder or a glob pattern means: one source for each kind of file name."""
    here = Path.cwd()
    paths = files.find_files(pattern, here)
    base = here / pattern
    names = {path: path.relative_to(base).as_posix() if base in path.parents else path.name for path in paths}
    held_out: list[Path] = []
    if any(files.in_split(name, "train") for name in names.values()):
        held_out = [path for path in paths if _split_of(names[path]) not in (None, "train")]
    alike: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        if path not in held_out:
            alike.setdefault((path.parent, _SPLIT_WORDS.sub("", _NUMBERS.sub("", path.name))), []).append(path)
    beside = tuple(sorted(names[path] for path in held_out))
    for group in alike.values():
        title = _title(group[0], _NUMBERS, _SPLIT_WORDS)
        yield _Group(title, _written_path(group, root, Path(pattern).is_absolute()), beside)
        beside = ()


def _split_of(name: str) -> str | None:
    return next((split for split in _SPLITS if files.in_split(name, split)), None)


def _title(path: Path, *without: re.Pattern[str]) -> str:
    """A source's name by its file's, without numbers and words that name a split; else by its folder's."""
    stem = path.name.split(".")[0]
    for pattern in without:
        stem = pattern.sub("", stem)
    return _plain(stem) or _plain(path.parent.name) or "data"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _written_path(paths: Sequence[Path], root: Path, absolute: bool) -> Origin:
    """`path` of a source: a file, a glob pattern that means just these files, or a list."""

    def written(path: Path) -> str:
        return path.as_posix() if absolute else Path(os.path.relpath(path, root)).as_posix()

    if len(paths) == 1:
        return {"path": written(paths[0])}
    names = [path.name for path in paths]
    start = re.split(r"\d", os.path.commonprefix(names))[0]
    end = os.path.commonprefix([name[::-1] for name in names])[::-1].lstrip("0123456789")
    pattern = written(paths[0].with_name(f"{glob.escape(start)}*{glob.escape(end)}"))
    if len({path.parent for path in paths}) == 1 and files.find_files(pattern, root) == sorted(paths):
        return {"path": pattern}
    return {"path": [written(path) for path in paths]}
