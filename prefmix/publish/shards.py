"""The files of a mixture in both forms: Arrow in a store, Parquet on the Hub.

Parquet is written with content-defined chunking: pages end where the content says, not after a number of bytes, so that
a page that has not changed has the same bytes in the next version, and the Hub's storage (Xet) knows it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefmix.digest import SplitDigest
from prefmix.errors import MixtureError
from prefmix.mixture import BATCH_ROWS, columns, digested, write_shard
from prefmix.schema import Kind

_GROUP_BATCHES = 8  # record batches in a row group: 16,384 rows
#: Bytes of a page before compression: about one chunk of Xet's (64 kB) after it. Larger pages make files 3 % smaller and
#: send half as much again when ten rows in 100,000 change.
_PAGES = {"min_chunk_size": 64 * 2**10, "max_chunk_size": 256 * 2**10, "norm_level": 0}


def write_parquet(arrow: Path, parquet: Path, converted: Callable[[int], None]) -> dict[str, Any]:
    """Writes an Arrow file of a mixture as Parquet; gives `sha256` and `bytes`. `converted` is called with numbers of
    rows. The same rows make the same bytes."""
    parquet.parent.mkdir(parents=True, exist_ok=True)
    with (
        pa.memory_map(str(arrow)) as source,
        pa.ipc.open_file(source) as reader,
        pq.ParquetWriter(
            parquet,
            reader.schema,
            compression="zstd",
            use_dictionary=["source"],
            use_content_defined_chunking=_PAGES,
            write_page_index=True,
        ) as writer,
    ):
        for first in range(0, reader.num_record_batches, _GROUP_BATCHES):
            numbers = range(first, min(first + _GROUP_BATCHES, reader.num_record_batches))
            group = pa.Table.from_batches([reader.get_batch(number) for number in numbers])
            writer.write_table(group, row_group_size=max(group.num_rows, 1))
            converted(group.num_rows)
    return {"sha256": sha256_of(parquet), "bytes": parquet.stat().st_size}


def write_arrow(
    parquets: Mapping[str, Path], folder: Path, kind: Kind, converted: Callable[[int], None]
) -> tuple[list[dict[str, Any]], SplitDigest, pa.Schema]:
    """Writes the Parquet files of a split (by their path on the Hub) as Arrow files into a folder; gives the manifest's
    entries, the digest of the content and its schema.

    Raises MixtureError naming a file that is no Parquet or has other columns than a mixture's.
    """
    (folder / kind).mkdir(exist_ok=True)
    schema = _schema(kind, *next(iter(parquets.items())))
    digest = SplitDigest(schema)
    entries = []
    with ThreadPoolExecutor(1) as hasher:
        for path, parquet in parquets.items():
            _schema(kind, path, parquet, schema)
            batches = _batches(parquet, schema, converted)
            name = f"{path.removesuffix('.parquet')}.arrow"
            entries.append(write_shard(folder / name, name, schema, digested(batches, digest, hasher)))
    return entries, digest, schema


def sha256_of(path: Path) -> str:
    """The hash of a file, 64 hex digits."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _batches(parquet: Path, schema: pa.Schema, converted: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(parquet) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield batch.cast(schema)
            converted(batch.num_rows)


def _schema(kind: Kind, path: str, parquet: Path, wanted: pa.Schema | None = None) -> pa.Schema:
    """The mixture's schema that a Parquet file has."""
    try:
        found = pq.read_schema(parquet)
    except (pa.ArrowException, OSError) as error:
        raise MixtureError(f"{path} is no Parquet file ({error}): ask for it to be pushed again.") from None
    possible: Sequence[pa.Schema] = [wanted] if wanted is not None else [
        columns(kind, layout, with_tokens) for layout in ("text", "messages") for with_tokens in (False, True)
    ]  # fmt: skip
    for schema in possible:
        if _types(found) == _types(schema):
            return schema
    raise MixtureError(f"{path} has not the columns of a mixture's {kind} rows: {', '.join(found.names)}.")


def _types(schema: pa.Schema) -> list[tuple[str, str]]:
    """Names and types; what the elements of a list are called says nothing."""
    return [(field.name, str(field.type).replace("<element:", "<item:")) for field in schema]
