"""What two mixtures have different, and why: the recipe, the sources, or the rows that compete."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from prefmix.inspect.rows import as_text
from prefmix.mixture import Mixture
from prefmix.schema import KINDS, Kind

NEW = "new in the source"
GONE = "no longer in the source"
NEW_SOURCE = "its source is new"
NO_SOURCE = "its source was removed"
MORE = "more copies"
FEWER = "fewer copies"

#: What made a row come or go: its source has other rows, a benchmark other items, the recipe treats it otherwise, one of
#: them; where nothing of the input has changed, prefmix has.
Cause = Literal["source", "benchmark", "recipe", "source or recipe", "prefmix"]

_ROWS = {"subset": pl.String, "id": pl.String, "source": pl.String}
_ABSENT = object()
_BENCHMARK = "benchmark "  # before the name of one, among the sources


@dataclass(frozen=True)
class RecipeChange:
    """A dotted key of the two recipes; None where a recipe does not have it."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class FileChange:
    """A file of a source: "added", "removed", "changed" or "renamed" (the same content under another name).

    `source` is `benchmark <name>` for a file of a benchmark.
    """

    source: str
    change: str
    path: str
    old_path: str | None = None


@dataclass(frozen=True)
class Diff:
    """What `b` has different from `a`. Rows are counted with their copies: came + stayed = the rows of b, went + stayed
    = the rows of a.

    came, went: `subset, id, source, split, copies, reason, cause`; `reason` is the one in the other ledger, or one of
    this module's phrases. moved: `subset, id, source, old, new` (splits). changed: `subset, id, source, columns`.
    """

    a: Mixture
    b: Mixture
    recipe: list[RecipeChange]
    files: list[FileChange]
    stayed: int
    came: pl.DataFrame
    went: pl.DataFrame
    moved: pl.DataFrame
    changed: pl.DataFrame

    @property
    def counts(self) -> dict[str, int]:
        """How many rows came, went, moved, changed and stayed, copies included for those that came, went or stayed."""
        copies = {"came": int(self.came["copies"].sum()), "went": int(self.went["copies"].sum())}
        return {**copies, "moved": self.moved.height, "changed": self.changed.height, "stayed": self.stayed}

    @property
    def is_empty(self) -> bool:
        """Whether both have the same rows in the same splits with the same contents."""
        return not (self.came.height or self.went.height or self.moved.height or self.changed.height)


def diff(a: Mixture, b: Mixture) -> Diff:
    """Compares two mixtures by the ids of their rows. Texts are compared as ChatML, whatever the layouts."""
    recipe, files = _recipe_changes(a, b), _file_changes(a, b)
    rows = pl.concat([_joined(a, b, kind) for kind in KINDS])
    old, new = pl.col("copies").fill_null(0), pl.col("copies_new").fill_null(0)
    both = rows.filter(pl.col("copies").is_not_null(), pl.col("copies_new").is_not_null())
    stayed = rows.select(pl.min_horizontal(old, new).sum()).item()
    went = rows.filter(old > new).select(*_ROWS, "split", copies=old - new, still=new > 0)
    came = rows.filter(new > old).select(
        "subset", "id", source="source_new", split="split_new", copies=new - old, still=old > 0
    )
    order = ["subset", "source", "id"]
    return Diff(
        a=a,
        b=b,
        recipe=recipe,
        files=files,
        stayed=int(stayed),
        came=_explained(came, b, a, recipe, files, (NEW, NEW_SOURCE, MORE)).sort("subset", "source", "reason", "id"),
        went=_explained(went, a, b, recipe, files, (GONE, NO_SOURCE, FEWER)).sort("subset", "source", "reason", "id"),
        moved=both.filter(pl.col("split") != pl.col("split_new"))
        .select("subset", "id", source="source_new", old="split", new="split_new").sort(order),
        changed=_changed(a, b, both).sort(order),
    )  # fmt: skip


def _recipe_changes(a: Mixture, b: Mixture) -> list[RecipeChange]:
    """The keys of the recipes that differ, without [train] and `root`. A source that one has not is one change."""
    old, new = _recipe(a), _recipe(b)
    changes = []
    shared = [name for name in old["sources"] if name in new["sources"]]
    for name in [*old["sources"], *(name for name in new["sources"] if name not in old["sources"])]:
        if name not in shared:
            tables = (_origin(recipe["sources"].pop(name, None)) for recipe in (old, new))
            changes.append(RecipeChange(f"sources.{name}", *tables))
    priority = [name for name in new["sources"] if name in shared]
    if priority != shared:
        changes.append(RecipeChange("sources (order)", shared, priority))
    keys_old, keys_new = dict(_flat(old)), dict(_flat(new))
    for key in dict.fromkeys([*keys_old, *keys_new]):
        if keys_old.get(key, _ABSENT) != keys_new.get(key, _ABSENT):
            changes.append(RecipeChange(key, keys_old.get(key), keys_new.get(key)))
    return changes


def _file_changes(a: Mixture, b: Mixture) -> list[FileChange]:
    """The files of the sources and the benchmarks that both have, as far as they differ."""
    old, new = _inputs(a), _inputs(b)
    return [change for name, files in old.items() if name in new for change in _changed_files(name, files, new[name])]


def _inputs(mixture: Mixture) -> dict[str, dict[str, str]]:
    """The sha256 of every file by source, and by benchmark."""
    benchmarks = {f"{_BENCHMARK}{name}": each for name, each in mixture.manifest.get("benchmarks", {}).items()}
    inputs = mixture.manifest["sources"] | benchmarks
    return {name: {file["path"]: file["sha256"] for file in each["files"]} for name, each in inputs.items()}


def _changed_files(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[FileChange]:
    changes = []
    added = {path: sha for path, sha in new.items() if path not in old}
    for path, sha in old.items():
        if path in new:
            if sha != new[path]:
                changes.append(FileChange(name, "changed", path))
            continue
        renamed = next((other for other, other_sha in added.items() if other_sha == sha), None)
        if renamed is None:
            changes.append(FileChange(name, "removed", path))
        else:
            del added[renamed]
            changes.append(FileChange(name, "renamed", renamed, path))
    return changes + [FileChange(name, "added", path) for path in added]


def _joined(a: Mixture, b: Mixture, kind: Kind) -> pl.DataFrame:
    """Every id of a subset with what both mixtures have of it; null where one has not got it."""
    joined = _keys(a, kind).join(_keys(b, kind), on="id", how="full", suffix="_new", coalesce=True)
    return joined.with_columns(subset=pl.lit(kind)).collect()


def _keys(mixture: Mixture, kind: Kind) -> pl.LazyFrame:
    """`id, source, split, copies, low, high`: copies of a row are in one split; low and high are hashes of all they
    contain (which are compared within this process only)."""
    if kind not in mixture.splits:
        empty = {"id": pl.String, "source": pl.String, "split": pl.String, "copies": pl.Int64, "low": pl.UInt64}
        return pl.LazyFrame(schema=empty | {"high": pl.UInt64})
    contents = pl.struct("source", *_contents(mixture, kind).values()).hash()
    rows = mixture.scan(kind).select("id", "source", "split", content=contents)
    return rows.group_by("id").agg(
        pl.col("source").min(),
        pl.col("split").min(),
        copies=pl.len().cast(pl.Int64),
        low=pl.col("content").min(),
        high=pl.col("content").max(),
    )


def _contents(mixture: Mixture, kind: Kind) -> dict[str, pl.Expr]:
    """What counts as the content of a row: its texts and its scores (token counts follow from the texts)."""
    scores = {"chosen_score": pl.col("chosen_score"), "rejected_score": pl.col("rejected_score")}
    return as_text(mixture, kind) | (scores if kind == "preference" else {})


def _changed(a: Mixture, b: Mixture, both: pl.DataFrame) -> pl.DataFrame:
    """The rows in both whose contents differ, with the names of the columns that do.

    An id may have several contents (`dedupe.exact = "off"`): one that came besides the others is a copy, not a change.
    """
    low, high = (pl.col(name) != pl.col(f"{name}_new") for name in ("low", "high"))
    as_many = pl.col("copies") == pl.col("copies_new")
    differ = both.filter(pl.when(as_many).then(low | high).otherwise(low & high))
    frames = [pl.DataFrame(schema=_ROWS | {"columns": pl.List(pl.String)})]
    for kind in KINDS:
        ids = differ.filter(pl.col("subset") == kind)["id"]
        if ids.is_empty():
            continue
        names = ["source", *_contents(b, kind)]
        sides = []
        for mixture in (a, b):
            rows = mixture.scan(kind).filter(pl.col("id").is_in(ids.implode()))
            rows = rows.select("id", source="source", **_contents(mixture, kind)).sort(names, nulls_last=True)
            firsts = rows.group_by("id").agg(*(pl.col(names).get(place).name.suffix(f"_{place}") for place in (0, -1)))
            sides.append(firsts)
        differs = {
            name: pl.any_horizontal(
                pl.col(f"{name}_{place}").ne_missing(pl.col(f"{name}_{place}_new")) for place in (0, -1)
            )
            for name in names
        }
        columns = pl.concat_list(pl.when(when).then(pl.lit(name)) for name, when in differs.items()).list.drop_nulls()
        joined = sides[0].join(sides[1], on="id", suffix="_new")
        rows = joined.select(subset=pl.lit(kind), id="id", source="source_0_new", columns=columns)
        frames.append(rows.filter(pl.col("columns").list.len() > 0).collect())
    return pl.concat(frames)


def _explained(
    rows: pl.DataFrame,
    here: Mixture,
    there: Mixture,
    recipe: list[RecipeChange],
    files: list[FileChange],
    phrases: tuple[str, str, str],
) -> pl.DataFrame:
    """Adds `reason` and `cause` to rows that `here` has and `there` has not: the reason in the ledger of `there`, or a
    phrase for a row that is not in it, one whose source is not, and one of which there are copies on both sides."""
    unknown, no_source, copies = phrases
    ids = rows["id"].implode()
    entries, own = (
        mixture.drops.filter(pl.col("id").is_in(ids)).select("id", "source", "reason", "kept_id").collect()
        for mixture in (there, here)
    )
    # What became of a row is not what became of a copy that gave way to it; then its own source's entry counts first.
    entries = entries.sort(pl.col("kept_id").eq(pl.col("id")).fill_null(False), maintain_order=True)
    same = entries.unique(["id", "source"], keep="first", maintain_order=True).select("id", "source", "reason")
    other = entries.unique("id", keep="first", maintain_order=True).select("id", other="reason")
    there_count, own_count = (
        frame.group_by("id").agg(pl.len().alias(name)) for frame, name in ((entries, "there"), (own, "here"))
    )
    rows = (
        rows.join(same, on=["id", "source"], how="left")
        .join(other, on="id", how="left")
        .join(there_count, on="id", how="left")
        .join(own_count, on="id", how="left")
    )
    more = pl.col("there").fill_null(0) > pl.col("here").fill_null(0)
    known = pl.col("source").is_in(list(there.manifest["sources"]))
    absent = pl.when(known).then(pl.lit(unknown)).otherwise(pl.lit(no_source))
    reason = pl.when(pl.col("still") & ~more).then(pl.lit(copies)).otherwise(pl.coalesce("reason", "other", absent))
    return rows.with_columns(reason=reason).select(
        *_ROWS, "split", "copies", "reason", cause=_cause(recipe, files, phrases)
    )


def _cause(recipe: list[RecipeChange], files: list[FileChange], phrases: tuple[str, str, str]) -> pl.Expr:
    """Which of the changes made the difference. A rule on single rows looks at nothing but the row, the recipe and the
    benchmarks; duplicates, samples and copies depend on the other rows as well."""
    unknown, no_source, _ = phrases
    reason = pl.col("reason")
    in_recipe = any(change.key != "name" for change in recipe)
    in_benchmarks = any(change.source.startswith(_BENCHMARK) for change in files)
    in_files = len(files) > 0
    both: dict[tuple[bool, bool], Cause] = {
        (True, True): "source or recipe",
        (True, False): "recipe",
        (False, True): "source",
    }
    competing: Cause = both.get((in_recipe, in_files), "prefmix")
    alone: Cause = "recipe" if in_recipe else competing
    measured: Cause = (
        "benchmark" if in_benchmarks and not in_recipe else both.get((in_recipe, in_benchmarks), competing)
    )
    return (
        pl.when(reason == no_source).then(pl.lit("recipe"))
        .when(reason == unknown).then(pl.lit("source" if in_files else alone))
        .when(reason.str.contains("^(?:filter|source)/")).then(pl.lit(alone))
        .when(reason.str.starts_with("decontaminate/")).then(pl.lit(measured))
        .otherwise(pl.lit(competing))
    )  # fmt: skip


def _recipe(mixture: Mixture) -> dict[str, Any]:
    recipe = tomllib.loads((mixture.folder / "recipe.toml").read_text(encoding="utf-8"))
    return {key: value for key, value in recipe.items() if key not in ("train", "root")}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _origin(source: Mapping[str, Any] | None) -> Any:
    return None if source is None else source.get("hub") or source.get("path")
