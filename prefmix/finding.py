"""Which files are meant: by a path, a folder or a pattern, on this machine or at an address.

The same rules hold in both places. Files at an address are copied into the cache (see storage.py).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from prefmix import storage
from prefmix.errors import SourceError
from prefmix.storage import Remote

FILE_TYPES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = ".parquet, .arrow, .jsonl, .json, .csv (the last three also with .gz or .zst)"
#: Files beside the data that describe it, by the names that Hugging Face tools and prefmix give them.
_METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"} | {
    "mixture.json",
    "versions.json",
}
_MIXTURE_SUBSETS = ("preference", "sft")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class SourceFile:
    """A file that is read. `name` is what the ledger says: relative to the recipe, the path in the Hub repository, or the
    address; `path` is where it is on this machine, which for a file at an address is a copy in the cache."""

    name: str
    path: Path
    remote: storage.Remote | None = None


def here(file: SourceFile) -> Path:
    """Where a file is on the machine that asks: one at an address is fetched where its copy is not.

    Raises StorageError, also when the file at the address is no longer the one that was found.
    """
    if file.remote is None or file.path.is_file():
        return file.path
    return storage.fetched(file.remote)


def find(patterns: str | Sequence[str], root: Path, split: str | None = None) -> list[SourceFile]:
    """The data files that some patterns mean, relative to `root` or at an address: each once, in sorted order of names.

    A pattern is a file, a folder (all data files below it) or a glob (`**` for any folders). Hidden files do not count;
    of a prefmix mixture only the rows do. `split` keeps the files of one split by the names Hugging Face gives them.
    Files at an address are fetched into the cache.

    Raises:
        SourceError: a pattern matches no data file, or none of the split. StorageError: an address cannot be read.
    """
    found: dict[str, Path | storage.Remote] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        below = _at_address(pattern) if storage.is_address(pattern) else _expand(pattern, root)
        chosen = below if split is None else {name: each for name, each in below.items() if in_split(name, split)}
        if not chosen:
            raise SourceError(
                f'{pattern}: no file of the split "{split}" among {_listing(below)}: '
                "name one that is there, or leave `split` out"
            )
        for each in chosen.values():
            found[relative_name(each, root) if isinstance(each, Path) else each.address] = each
    remotes = [each for each in found.values() if not isinstance(each, Path)]
    copies = dict(zip(remotes, storage.fetched_all(remotes), strict=True))
    return [
        SourceFile(name, each) if isinstance(each, Path) else SourceFile(name, copies[each], each)
        for name, each in sorted(found.items())
    ]


def find_files(patterns: str | Sequence[str], root: Path, split: str | None = None) -> list[Path]:
    """As `find`, for those who need no names."""
    return [each.path for each in find(patterns, root, split)]


def find_file(name: str, root: Path) -> SourceFile:
    """A file that is named by its path, relative to `root`, or by its address, from which it is fetched.

    Raises SourceError or StorageError when there is none at the address; of a path, whoever reads it does.
    """
    if not storage.is_address(name):
        return SourceFile(name, root / name)
    if (remote := storage.look(name)) is None:
        raise SourceError(f"{storage.shown(name)}: no such file")
    return SourceFile(name, storage.fetched(remote), remote)


def relative_name(path: Path, root: Path) -> str:
    """A file's name as recorded: relative to the recipe's folder, with forward slashes; of a copy in the cache its address."""
    return storage.address_of(path) or Path(os.path.relpath(path, root)).as_posix()


def in_split(name: str, split: str) -> bool:
    """Whether a file belongs to a split by its name: the word stands in its path between `-._ `, digits or slashes.

    Example: `data/train-00000-of-00001.parquet`, `train_prefs.jsonl` and `sft/train/0.arrow` are in "train".
    """
    words = "|".join(re.escape(word) for word in _SPLIT_WORDS.get(split, (split,)))
    return re.search(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)", name) is not None


def is_data_file(name: str) -> bool:
    """Whether a file name is one that is read when its folder is named."""
    path = Path(name)
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.parts)
    return not hidden and path.name not in _METADATA and type_of(path) is not None


def _expand(pattern: str, root: Path) -> dict[str, Path]:
    """The data files that a pattern means, by their names in the folder that was searched."""
    base, paths = _searched(pattern, root)
    return {Path(os.path.relpath(path, base)).as_posix(): path for path in paths}


def _searched(pattern: str, root: Path) -> tuple[Path, list[Path]]:
    """The folder that was searched and the data files found in it."""
    path = root / pattern
    if path.is_file():
        file_type(path)
        return path.parent, [path]
    if path.is_dir():
        folders = [path]
        if (path / "mixture.json").is_file():
            folders = [path / subset for subset in _MIXTURE_SUBSETS if (path / subset).is_dir()]
            if len(folders) > 1:  # a source has rows of one kind
                raise _mixed(pattern)
        below = [each for folder in folders for each in folder.rglob("*") if each.is_file()]
        paths = [each for each in below if is_data_file(os.path.relpath(each, path))]
        if not paths:
            raise SourceError(f"{pattern}: no data files in the folder {path}: prefmix reads {_KNOWN}")
        return path, paths
    base = root.joinpath(*_fixed_parts(pattern))
    matches = [Path(each) for each in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (it may be absolute)
    paths = [each for each in matches if each.is_file() and is_data_file(each.name)]
    if paths:
        return base, paths
    if matches:
        raise SourceError(
            f"{pattern}: no data file among {_listing(each.name for each in matches)}: prefmix reads {_KNOWN}"
        )
    raise SourceError(f"{pattern}: no such file, searched in {base}{_near(pattern, base)}: correct `path`")


def _fixed_parts(pattern: str) -> list[str]:
    """The folders of a pattern before its first wildcard; its own name is not among them."""
    parts = Path(pattern).parts[:-1]
    return list(parts[: next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))])


def _at_address(pattern: str) -> dict[str, Remote]:
    """As `_expand`, for a pattern that is an address."""
    if (file := storage.look(pattern)) is not None:
        name = PurePosixPath(pattern).name
        file_type(Path(name))
        return {name: file}
    if glob.has_magic(pattern):
        return _matches_at(pattern)
    there = storage.below(pattern)
    if not there:
        base, _, name = pattern.rstrip("/").rpartition("/")
        raise SourceError(
            f"{pattern}: no such file, searched in {base}{_nearest(name, _names_at(base))}: correct `path`"
        )
    if "mixture.json" in there:
        subsets = [subset for subset in _MIXTURE_SUBSETS if any(name.startswith(f"{subset}/") for name in there)]
        if len(subsets) > 1:
            raise _mixed(pattern)
        there = {name: each for name, each in there.items() if name.partition("/")[0] in subsets}
    found = {name: each for name, each in there.items() if is_data_file(name)}
    if not found:
        raise SourceError(f"{pattern}: no data files in the folder: prefmix reads {_KNOWN}")
    return found


def _matches_at(pattern: str) -> dict[str, Remote]:
    """The data files at an address that a glob means, by their names below the folders before its first wildcard."""
    protocol, _, rest = pattern.partition("://")
    parts = rest.split("/")
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    if first == 0:
        raise SourceError(f"{pattern}: the first part of an address has no wildcards: name it in full")
    base, wanted = f"{protocol}://{'/'.join(parts[:first])}", parts[first:]
    there = storage.below(base, None if "**" in wanted else len(wanted))
    matches = {name: each for name, each in there.items() if _is_match(name.split("/"), wanted)}
    found = {name: each for name, each in matches.items() if is_data_file(PurePosixPath(name).name)}
    if found:
        return found
    if matches:
        raise SourceError(f"{pattern}: no data file among {_listing(matches)}: prefmix reads {_KNOWN}")
    raise SourceError(
        f"{pattern}: no such file, searched in {base}{_nearest(wanted[-1], _names_at(base))}: correct `path`"
    )


def _is_match(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, as Python's own matches: a wildcard is never a hidden name."""
    if not wanted or not parts:
        return not parts and all(each == "**" for each in wanted)
    is_hidden = parts[0].startswith(".")
    if wanted[0] == "**":
        return _is_match(parts, wanted[1:]) or (not is_hidden and _is_match(parts[1:], wanted))
    is_named = fnmatchcase(parts[0], wanted[0]) and (not is_hidden or wanted[0].startswith("."))
    return is_named and _is_match(parts[1:], wanted[1:])


def _names_at(base: str) -> list[str]:
    return storage.names(base) if storage.is_address(f"{base}/") and not base.endswith(":/") else []


def _mixed(pattern: str) -> SourceError:
    named = " or ".join(f"{pattern.rstrip('/')}/{subset}" for subset in _MIXTURE_SUBSETS)
    return SourceError(f"{pattern}: a mixture of preference and sft rows: name one of them, {named}")


def _near(pattern: str, base: Path) -> str:
    """Names like the one that was asked for, for an error message."""
    while not base.is_dir() and base != base.parent:
        base = base.parent
    return _nearest(Path(pattern).name, [each.name for each in base.iterdir()] if base.is_dir() else [])


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(each for each in names if not each.startswith("."))
    near = get_close_matches(name, names, n=3, cutoff=0.5) or names[:5]
    return f" (there: {', '.join(near)})" if near else " (the folder is empty)"


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def type_of(path: Path) -> tuple[str, str | None] | None:
    suffix = path.suffix.lower()
    compression = COMPRESSIONS.get(suffix)
    kind = FILE_TYPES.get(path.with_suffix("").suffix.lower() if compression else suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return kind, compression


def file_type(path: Path) -> tuple[str, str | None]:
    if (known := type_of(path)) is None:
        raise SourceError(f"{path}: unknown file type: prefmix reads {_KNOWN}; rename or convert the file")
    return known
