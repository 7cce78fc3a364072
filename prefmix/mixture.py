"""A mixture on disk: a folder of Arrow files with its manifest, ledger, recipe and card. Immutable once it has one."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import polars as pl
import pyarrow as pa

from prefmix.chatml import render, render_answer, render_prompt
from prefmix.digest import SplitDigest, mixture_digest
from prefmix.errors import MixtureError
from prefmix.schema import PARTS, Kind

if TYPE_CHECKING:
    import datasets

A = TypeVar("A")
B = TypeVar("B")

FORMAT = 1
MANIFEST = "mixture.json"
BATCH_ROWS = 2048
_SHARD_BYTES = 512 * 2**20

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TOKENS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt_tokens", "chosen_tokens", "rejected_tokens"),
    "sft": ("tokens",),
}


def token_columns(kind: Kind) -> tuple[str, ...]:
    """The columns with the tokens of a row's parts, where they are counted."""
    return _TOKENS[kind]


def tokens_of(rows: pl.DataFrame, kind: Kind) -> int | None:
    """The tokens of rows, all parts together; None where they are not counted."""
    counted = [name for name in _TOKENS[kind] if name in rows.columns]
    return sum(int(rows[name].cast(pl.Int64).sum()) for name in counted) if counted else None


_AS_TEXT = {
    "prompt": render_prompt(pl.col("prompt")),
    "chosen": render_answer(pl.col("chosen")),
    "rejected": render_answer(pl.col("rejected")),
    "text": render(pl.col("messages")),
}


def columns(kind: Kind, layout: str, with_tokens: bool) -> pa.Schema:
    """The Arrow schema of a subset, with Hugging Face's feature metadata."""
    text = pa.string() if layout == "text" else _MESSAGES
    fields = [("id", pa.string()), ("source", pa.string())]
    if kind == "preference":
        fields += [("prompt", text), ("chosen", text), ("rejected", text)]
        fields += [("chosen_score", pa.float64()), ("rejected_score", pa.float64())]
    else:
        fields += [("text" if layout == "text" else "messages", text)]
    if with_tokens:
        fields += [(name, pa.int32()) for name in _TOKENS[kind]]
    features = {name: _feature(kind_) for name, kind_ in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        fields = {field.name: _feature(field.type) for field in kind.value_type}
        return {"feature": fields, "_type": "List"}
    return {"dtype": {pa.string(): "string", pa.float64(): "float64", pa.int32(): "int32"}[kind], "_type": "Value"}


def rendered(rows: pl.DataFrame, kind: Kind, schema: pa.Schema) -> pa.RecordBatch:
    """Canonical rows as one record batch of the mixture's columns."""
    is_text = {field.name for field in schema if field.type == pa.string()}
    table = rows.select(
        _AS_TEXT[name].alias(name) if name in is_text and name in _AS_TEXT else pl.col(name) for name in schema.names
    )
    return table.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema).combine_chunks().to_batches()[0]


def write_split(
    folder: Path, kind: Kind, split: str, rows: pl.DataFrame, schema: pa.Schema
) -> tuple[dict, SplitDigest]:
    """Writes ordered canonical rows as `<kind>/<split>-00000-of-00001.arrow`; gives the manifest's entry and the digest
    of the content. Batches are rendered by a few threads ahead of the one that hashes and writes them."""
    digest = SplitDigest(schema)
    (folder / kind).mkdir(exist_ok=True)
    shards = max(1, -(-int(rows.select(PARTS[kind]).estimated_size()) // _SHARD_BYTES))
    per_shard = -(-rows.height // shards)
    files = []
    with ThreadPoolExecutor(pl.thread_pool_size()) as pool, ThreadPoolExecutor(1) as hasher:
        for shard in range(shards):
            path = f"{kind}/{split}-{shard:05d}-of-{shards:05d}.arrow"
            slices = rows.slice(shard * per_shard, per_shard).iter_slices(BATCH_ROWS)
            batches = _ahead(pool, lambda part: rendered(part, kind, schema), slices)
            files.append(write_shard(folder / path, path, schema, digested(batches, digest, hasher)))
    return {"rows": rows.height, "tokens": tokens_of(rows, kind), "files": files}, digest


def write_shard(file: Path, path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> dict[str, Any]:
    """Writes record batches of at most `BATCH_ROWS` rows as one Arrow file; gives the manifest's entry for it at `path`."""
    with _HashingFile(file) as opened, pa.ipc.new_file(opened, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return {"path": path, "sha256": opened.hexdigest(), "bytes": opened.bytes}


def digested(
    batches: Iterable[pa.RecordBatch], digest: SplitDigest, hasher: ThreadPoolExecutor
) -> Iterator[pa.RecordBatch]:
    """The batches, each of which `hasher` takes into the digest while it is being written."""
    for batch in batches:
        hashed = hasher.submit(digest.update, batch)
        yield batch
        hashed.result()


def _ahead(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` in order, a few items ahead of the one that is asked for: memory stays bounded."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 2 * pl.thread_pool_size():
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def recorded(folder: Path, paths: Sequence[str]) -> list[dict[str, Any]]:
    """The manifest's entries for files that are there already; they are on the disk afterwards."""
    entries = []
    for path in paths:
        with (folder / path).open("rb+") as file:
            os.fsync(file.fileno())
            entries.append({"path": path, "sha256": file_digest(file, "sha256").hexdigest(), "bytes": file.tell()})
    return entries


def write_durably(path: Path, text: str) -> None:
    """Writes a text file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _HashingFile:
    """A binary file for writing that hashes what goes through it and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.closed = True

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Mixture:
    """An opened mixture. `manifest` is its mixture.json; `is_new` tells whether this call built it; `address` is where it
    lies when `folder` is a copy."""

    folder: Path
    manifest: Mapping[str, Any]
    is_new: bool = False
    address: str | None = None

    @property
    def place(self) -> str:
        """Where it lies, for people: its address, else its folder."""
        return self.address or str(self.folder)

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def version(self) -> str:
        return self.manifest["version"]

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    @property
    def build(self) -> str:
        """The first 12 hex digits of the build, which is the name of its folder in a store."""
        return self.manifest["build"]

    @property
    def funnel(self) -> list[dict[str, Any]]:
        """From rows read to rows in the mixture: `{"stage", "in", "dropped": {reason: count}, "out"}`."""
        return self.manifest["funnel"]

    @property
    def splits(self) -> dict[Kind, list[str]]:
        """The names of the splits of each subset."""
        return {subset: list(splits) for subset, splits in self.manifest["subsets"].items()}

    def scan(self, subset: Kind, split: str | None = None) -> pl.LazyFrame:
        """The rows of one split, or of all of them with a column `split`, memory-mapped."""
        splits = self._subset(subset)
        if split is not None:
            if split not in splits:
                raise MixtureError(f"{self}: {subset} has no split {split}; it has {', '.join(splits)}.")
            return pl.scan_ipc(self._paths(subset, split))
        return pl.concat(pl.scan_ipc(self._paths(subset, name)).with_columns(split=pl.lit(name)) for name in splits)

    def dataset_dict(self, subset: Kind) -> datasets.DatasetDict:
        """The splits of a subset as `datasets.Dataset`s over the same memory-mapped files."""
        import datasets

        tables = {split: [str(path) for path in self._paths(subset, split)] for split in self._subset(subset)}
        return datasets.DatasetDict(
            {
                split: datasets.concatenate_datasets([datasets.Dataset(_mapped(path)) for path in paths])
                for split, paths in tables.items()
            }
        )

    @property
    def drops(self) -> pl.LazyFrame:
        """The ledger: every input row that is not in the mixture, with its reason (`prefmix.ledger.LEDGER`)."""
        return pl.scan_parquet(self._record("drops/drops.parquet"))

    @property
    def changes(self) -> pl.LazyFrame:
        """The rows that are not as they were read: swapped, stripped (`prefmix.ledger.CHANGES`)."""
        return pl.scan_parquet(self._record("drops/changes.parquet"))

    def verify(self) -> None:
        """Reads every file. Raises MixtureError naming the first one that is missing or is not what was written."""
        schemas: dict[str, pa.Schema] = {}
        digests: dict[str, dict[str, SplitDigest]] = {}
        for subset, splits in self.manifest["subsets"].items():
            for split, entry in splits.items():
                for file in entry["files"]:
                    self._check_file(file)
                for batch in self._batches(subset, split):
                    schemas.setdefault(subset, batch.schema)
                    digests.setdefault(subset, {}).setdefault(split, SplitDigest(batch.schema)).update(batch)
        for file in self.manifest["records"]:
            self._check_file(file)
        if mixture_digest(schemas, digests) != self.digest:
            raise MixtureError(f"{self.folder}: the content is not that of digest {self.digest[:12]}. Build it again.")

    def is_whole(self) -> bool:
        """Whether every file is there with its size: a quick look, where `verify` reads everything."""
        files = [
            file for splits in self.manifest["subsets"].values() for entry in splits.values() for file in entry["files"]
        ]
        files += self.manifest["records"]
        return all((p := self.folder / file["path"]).is_file() and p.stat().st_size == file["bytes"] for file in files)

    def _record(self, path: str) -> Path:
        found = self.folder / path
        if not found.is_file():
            raise MixtureError(
                f"{self} has no ledger ({found} is missing): it was pushed to the Hub without, or is damaged."
            )
        return found

    def _check_file(self, file: Mapping[str, Any]) -> None:
        path = self.folder / file["path"]
        remedy = "Remove this version with `prefmix rm` and build it again."
        if not path.is_file():
            raise MixtureError(f"{path} is missing. {remedy}")
        with path.open("rb") as opened:
            if file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                raise MixtureError(f"{path} is not the file that was written (its sha256 differs). {remedy}")

    def _batches(self, subset: str, split: str) -> Iterator[pa.RecordBatch]:
        for path in self._paths(subset, split):
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)

    def _subset(self, subset: str) -> Mapping[str, Any]:
        subsets = self.manifest["subsets"]
        if subset not in subsets:
            raise MixtureError(f"{self} has no {subset} rows; it has {', '.join(subsets)}.")
        return subsets[subset]

    def _paths(self, subset: str, split: str) -> list[Path]:
        return [self.folder / file["path"] for file in self._subset(subset)[split]["files"]]

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def _mapped(path: str) -> Any:
    from datasets.table import MemoryMappedTable

    return MemoryMappedTable(pa.ipc.open_file(pa.memory_map(path)).read_all(), path)


class Unreadable(MixtureError):
    """A folder whose manifest is missing or cannot be read."""


def open_folder(folder: Path) -> Mixture:
    """Opens a mixture's folder. Raises Unreadable when it is none, MixtureError when a newer prefmix wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        newer = manifest["format"] > FORMAT
    except FileNotFoundError as error:
        raise Unreadable(f"{folder} is not a mixture: it has no {MANIFEST}.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Unreadable(f"{folder / MANIFEST} cannot be read ({error}). Build the mixture again.") from error
    if newer:
        raise MixtureError(
            f"{folder} has format {manifest['format']}, this prefmix reads up to {FORMAT}: upgrade prefmix."
        )
    return Mixture(folder, manifest)
