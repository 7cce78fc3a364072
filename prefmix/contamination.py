"""Which benchmarks any data set holds text of: what `prefmix build` drops rows for, asked without a recipe."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from prefmix import benchmarks, decontaminate, files, recipe, sources
from prefmix.errors import MixtureError, SourceError
from prefmix.fields import listed, read_texts
from prefmix.ledger import ALIVE
from prefmix.mixture import MANIFEST, Mixture
from prefmix.publish import open_mixture
from prefmix.schema import CANONICAL, KINDS, MESSAGES, Kind, with_ids
from prefmix.sources.match import union
from prefmix.starter.groups import Origin, grouped

#: What may be the name of a mixture in the store.
_REFERENCE = re.compile(r"[a-z0-9][a-z0-9._-]*(@.*)?")
_ON_HUB = "hub:"
_LABELS = "versions.json"  # in the folder of a mixture's versions


@dataclass(frozen=True)
class Contamination:
    """What was found: `report` as in a mixture's manifest (see `decontaminate.report`), and the rows themselves.

    `found` has a row for each row of the data, benchmark text and rule: `id, source, source_file, source_row, kind,
    part, benchmark, item, field, rule, coverage, matched`. `rows` counts the rows that were searched by source, `invalid`
    those that do not fit the format of their source and were not.
    """

    report: Mapping[str, Mapping[str, Any]]
    found: pl.DataFrame
    rows: Mapping[str, int]
    invalid: Mapping[str, int]


def contamination(
    data: str | Sequence[str],
    against: str | Sequence[str],
    *,
    fields: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    ngram: int = 13,
    answers: bool = False,
    store: str | Path | None = None,
) -> Contamination:
    """Looks for text of benchmarks in data sets.

    `data`: mixtures (see `prefmix.open_mixture`), files, folders, glob patterns or data sets on the Hub (owner/name). Their
    formats are found from their columns; with `columns` each row's texts in these are searched instead. `against`: suites,
    or files with the `fields` that hold the text of an item (without, those with well-known names).

    Raises:
        SourceError, MixtureError, HubError: data or a benchmark cannot be read, or has no such field.
        UsageError: a suite was given fields.
    """
    with _without_recipe("--field"):
        measured = [benchmarks.from_argument(text, fields) for text in _listed(against)]
    rows: dict[Kind, list[pl.DataFrame]] = {kind: [] for kind in KINDS}
    with _without_recipe("--column"):
        for kind, frame in _read(_listed(data), columns, store):
            rows[kind].append(frame)
    frames = {kind: pl.concat(parts, rechunk=True) for kind, parts in rows.items() if parts}
    with _without_recipe("--field"):
        index = decontaminate.index_of(measured, ngram)
    found = decontaminate.find(frames, index, answers)
    origins = pl.concat(
        frame.with_row_index("place").select("place", "source_file", "source_row", kind=pl.lit(kind))
        for kind, frame in frames.items()
    )
    named = found.join(origins, on=["kind", "place"], maintain_order="left").select(
        "id",
        "source",
        "source_file",
        "source_row",
        "kind",
        pl.col("part").cast(pl.String),
        "benchmark",
        "item",
        "field",
        pl.col("rule").cast(pl.String),
        "coverage",
        "matched",
    )
    return Contamination(decontaminate.report(found, index), named, _counts(frames, ALIVE), _counts(frames, ~ALIVE))


def _listed(given: str | Sequence[str]) -> list[str]:
    """What was given, each once."""
    return [given] if isinstance(given, str) else list(dict.fromkeys(given))


@contextmanager
def _without_recipe(option: str) -> Generator[None]:
    """Gives errors the remedy of a command in place of that of a recipe."""
    try:
        yield
    except SourceError as error:
        raise SourceError(
            str(error).removesuffix(": correct `path`").replace("in `fields`", f"with {option}")
        ) from None


def _read(data: Sequence[str], columns: Sequence[str], store: str | Path | None) -> Iterator[tuple[Kind, pl.DataFrame]]:
    """The canonical rows of data sets."""
    root = Path.cwd()
    if columns:
        for path in files.find_files(data, root):
            yield "sft", _plain_rows(path, columns, root)
    else:
        for name, origin in _origins(data, root, store).items():
            try:
                source = sources.resolve(name, recipe.Source.model_validate(origin), root)
            except SourceError:
                _check_columns(origin, root)
                raise
            yield source.kind, source.read(seed=0)


def _origins(data: Sequence[str], root: Path, store: str | Path | None) -> dict[str, Origin]:
    """The sources that data sets are, by their names: that of the file, or its path where two files have one name."""
    found: dict[str, Origin] = {}
    others = []
    for text in data:
        if _is_mixture(text, root):
            mixture = _mixture(text, store)
            for kind, splits in mixture.manifest["subsets"].items():
                paths = [str(mixture.folder / file["path"]) for split in splits.values() for file in split["files"]]
                found[f"{mixture}/{kind}"] = {"path": paths}
        else:
            others.append(text)
    seen: set[Path] = set()
    groups = [(group.title, _unseen(group.origin, root, seen)) for group in (grouped(others, root) if others else [])]
    titles = [title for title, origin in groups if origin]
    for title, origin in groups:
        if origin:
            place = next(iter(origin.values()))
            place = place if isinstance(place, str) else ", ".join(place)
            found[title if titles.count(title) == 1 else place] = origin
    return found


def _unseen(origin: Origin, root: Path, seen: set[Path]) -> Origin | None:
    """An origin without the files that were seen before, which a folder and a file in it may both name."""
    if "path" not in origin:
        return origin
    paths = files.find_files(origin["path"], root)
    fresh = [path for path in paths if path.resolve() not in seen]
    seen.update(path.resolve() for path in fresh)
    if len(fresh) == len(paths):
        return origin
    return {"path": [files.relative_name(path, root) for path in fresh]} if fresh else None


def _is_mixture(text: str, root: Path) -> bool:
    """Whether a text means a mixture: on the Hub, by a folder, or by its name where no file has it or would have it."""
    if text.startswith(_ON_HUB):
        return True
    path = root / text
    if not path.exists():
        return _REFERENCE.fullmatch(text) is not None and not files.is_data_file(text)
    if names := sorted(labels.parent.name for labels in path.glob(f"*/{_LABELS}")):
        raise MixtureError(f"{text} is a store of mixtures: name one of them ({', '.join(names)}).")
    return any((path / name).is_file() for name in (MANIFEST, _LABELS))


def _mixture(text: str, store: str | Path | None) -> Mixture:
    path = Path(text)
    if (path / _LABELS).is_file():
        return open_mixture(path.resolve().name, path.resolve().parent)
    try:
        return open_mixture(text, store)
    except MixtureError as error:
        if text.startswith(_ON_HUB) or path.exists():
            raise
        raise MixtureError(f"{error} No file or folder is called {text} either.") from None


def _check_columns(origin: Origin, root: Path) -> None:
    """Raises SourceError for files that no format fits, with what to do where there is no recipe to name it in."""
    if "path" not in origin:
        return
    paths = files.find_files(origin["path"], root)
    columns = union(files.schema(path) for path in paths)
    if sources.sniff(columns) is None:
        raise SourceError(
            f"{files.relative_name(paths[0], root)}: no format fits its columns ({listed(columns)}): "
            "leave it out, or name the columns to search with --column"
        )


def _plain_rows(path: Path, columns: Sequence[str], root: Path) -> pl.DataFrame:
    """Rows of any file as prompts without an answer: the texts of a row's columns, one below the other."""
    name = files.relative_name(path, root)
    texts = [(text.row, text.text) for text in read_texts(path, columns, name).texts]
    turns = pl.struct(role=pl.lit("user"), content=pl.col("content").str.join("\n"))
    answer = pl.struct(role=pl.lit("assistant"), content=pl.lit(""))
    rows = (
        pl.DataFrame(texts, schema={"source_row": pl.Int64, "content": pl.String}, orient="row")
        .group_by("source_row", maintain_order=True)
        .agg(turns.alias("turn"))
        .select(
            "source_row",
            messages=pl.concat_list("turn", answer).cast(MESSAGES),
            source=pl.lit(name),
            source_file=pl.lit(name),
        )
    )
    missing = {
        column: pl.lit(None, dtype) for column, dtype in CANONICAL["sft"].items() if column not in (*rows.columns, "id")
    }
    return with_ids(rows.with_columns(**missing), "sft").select(list(CANONICAL["sft"]))


def _counts(frames: Mapping[Kind, pl.DataFrame], which: pl.Expr) -> dict[str, int]:
    return {
        source: rows
        for frame in frames.values()
        for source, rows in frame.filter(which).group_by("source", maintain_order=True).len().rows()
    }
