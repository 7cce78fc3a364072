"""What is in a mixture: lengths, rows by source, size; what is in a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from prefmix.errors import MixtureError
from prefmix.inspect.rows import as_text
from prefmix.mixture import Mixture
from prefmix.store import Store

_BINS, _FEW_BINS, _FEW_ROWS = 40, 20, 2000
_TAIL = 0.002  # the share of rows at each end that the first and the last bin take in
_MARKS = r"<\|im_start\|>[a-z]+\n|<\|im_end\|>\n?"


@dataclass(frozen=True)
class Lengths:
    """How long the texts of one part of a subset are, in `unit` ("tokens", or "characters" without ChatML's marks).

    `counts[i]` rows have a length in [`edges[i]`, `edges[i + 1]`); the bins are equal on a log scale, the same for all
    parts of a subset, and the first and the last one take in the few rows that are shorter or longer.
    """

    subset: str
    part: str
    unit: str
    edges: list[int]
    counts: list[int]
    median: int
    p95: int
    longest: int


@dataclass(frozen=True)
class Listed:
    """A version in a store; `problem` says why it cannot be opened (the numbers are then zero)."""

    name: str
    version: str
    build: str
    digest: str
    created: str
    rows: Mapping[str, int]
    size_bytes: int
    problem: str | None = None


def overview(mixture: Mixture) -> dict[str, Any]:
    """All that `prefmix show` shows: the manifest's numbers, lengths, rows by source and the size on disk."""
    manifest = mixture.manifest
    names = ("name", "version", "digest", "build", "recipe_digest", "created", "license", "seed", "tokenizer", "tools")
    parts = ("subsets", "sources", "funnel", "audit", "contamination")
    return {
        **{name: manifest.get(name) for name in names},
        "folder": mixture.place,
        "size_bytes": size_bytes(mixture.folder),
        **{name: manifest[name] for name in parts},
        "rows_by_source": rows_by_source(mixture),
        "lengths": [asdict(each) for each in lengths(mixture)],
    }


def rows_by_source(mixture: Mixture) -> dict[str, int]:
    """Rows in the mixture, copies included, of each source in the order of the recipe."""
    found = pl.concat(mixture.scan(kind).select("source") for kind in mixture.splits)
    counts = dict(found.group_by("source").len().collect().rows())
    return {name: counts.get(name, 0) for name in mixture.manifest["sources"]}


def lengths(mixture: Mixture) -> list[Lengths]:
    """The lengths of every part of every subset, in tokens where the mixture has counted them."""
    found: list[Lengths] = []
    for kind in mixture.splits:
        rows = mixture.scan(kind)
        texts = as_text(mixture, kind)
        counted = {part: "tokens" if part == "messages" else f"{part}_tokens" for part in texts}
        in_tokens = set(counted.values()) <= set(rows.collect_schema())
        if in_tokens:
            columns = {part: pl.col(name) for part, name in counted.items()}
        else:
            columns = {part: text.str.replace_all(_MARKS, "").str.len_chars() for part, text in texts.items()}
        frame = rows.select(**columns).collect()
        edges = _edges(frame)
        unit = "tokens" if in_tokens else "characters"
        found += [_lengths(kind, part, unit, frame[part].to_numpy(), edges) for part in frame.columns]
    return found


def listing(store: Store) -> list[Listed]:
    """Every version of every mixture in a store, by name, oldest first."""
    found = []
    for name in store.names():
        for label, entry in store.versions(name).items():
            rows, size, problem = {}, 0, None
            try:
                mixture = store.look(name, label)
                rows = {
                    kind: sum(each["rows"] for each in splits.values())
                    for kind, splits in mixture.manifest["subsets"].items()
                }
                size = store.size_bytes(mixture)
            except MixtureError as error:
                problem = str(error)
            found.append(Listed(name, label, entry["build"], entry["digest"], entry["created"], rows, size, problem))
    return found


def check_whole(mixture: Mixture) -> None:
    """Raises MixtureError, naming the file, when one is missing or is not as long as it was written."""
    files = [
        file for splits in mixture.manifest["subsets"].values() for entry in splits.values() for file in entry["files"]
    ]
    for file in [*files, *mixture.manifest["records"]]:
        path = mixture.folder / file["path"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            what = "is not as long as it was written" if path.exists() else "is missing"
            raise MixtureError(f"{path} {what}. Remove this version with `prefmix rm` and build it again.")


def size_bytes(folder: Path) -> int:
    """The sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _edges(frame: pl.DataFrame) -> np.ndarray:
    """int64: edges of at most 40 bins (20 for few rows), equal on a log scale as far as whole numbers allow."""
    bins = _BINS if frame.height >= _FEW_ROWS else _FEW_BINS
    low = min(frame[part].quantile(_TAIL, "nearest") or 0 for part in frame.columns)
    high = max(frame[part].quantile(1 - _TAIL, "nearest") or 0 for part in frame.columns)
    low, high = max(int(low), 1), max(int(high), 2)
    return np.unique(np.geomspace(low, high + 1, bins + 1).round().astype(np.int64))


def _lengths(kind: str, part: str, unit: str, values: np.ndarray, edges: np.ndarray) -> Lengths:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1] - 1), edges)
    median, p95 = (int(np.quantile(values, share, method="nearest")) for share in (0.5, 0.95))
    return Lengths(kind, part, unit, edges.tolist(), counts.tolist(), median, p95, int(values.max()))
