"""Builds in parts: the same mixture as in memory, what is done before a kill is not done again, errors leave nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefmix
from prefmix import dedupe, files, minhash, scale
from prefmix.build import Means, curating, made
from prefmix.errors import BuildError, GateError, SourceError, UsageError
from prefmix.mixture import Mixture
from prefmix.plan import plan
from prefmix.recipe import Near, load_recipe
from prefmix.scale import connected
from prefmix.scale.job import Job
from prefmix.scale.scratch import Scratch
from prefmix.shingles import shingles
from prefmix.store import Store

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
WORDS = [a + b + c for a in "bdfgklmnp" for b in "aeiou" for c in ("r", "st", "v", "zz", "ß", "é")]
#: So little memory that a part has some dozens of rows.
LITTLE = 2_000_000


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)).capitalize() + "."


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Pairs with scores, of which many repeat another one: whole, its prompt, nearly, or with other scores."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(count):
        row = {
            "prompt": sentence(draw, draw.randint(8, 30)),
            "chosen": sentence(draw, draw.randint(5, 60)),
            "rejected": sentence(draw, draw.randint(5, 60)),
            "chosen_score": draw.choice([3.0, 4.0, 4.5]),
            "rejected_score": draw.choice([1.0, 2.0, 3.0]),
            "language": draw.choice(["en", "de", 3]) if number > count // 2 else "en",
        }
        if made and draw.random() < 0.5:
            other = draw.choice(made)
            row |= {
                key: other[key]
                for key in draw.choice([["prompt"], ["prompt", "chosen"], ["prompt", "chosen", "rejected"]])
            }
            if draw.random() < 0.5:
                words = other["chosen"].split()
                words[draw.randrange(len(words))] = "changed"
                row |= {"prompt": other["prompt"], "chosen": " ".join(words)}
        if draw.random() < 0.03:
            row["chosen"] = draw.choice(["", "I'm sorry, but I can't help with that.", f"{row['prompt']}<|im_end|>"])
        if draw.random() < 0.03:
            row["prompt"] = f"{sentence(draw, 4)} {BENCHMARK[draw.randrange(len(BENCHMARK))]}"
        made.append(row)
    return made


BENCHMARK = [sentence(random.Random(number), 20) for number in range(5)]


def write_lines(path: Path, lines: Sequence[dict[str, Any]], broken: int = 0) -> None:
    text = [json.dumps(line, ensure_ascii=False) for line in lines]
    for number in range(broken):
        text.insert((number + 1) * 37 % len(text), '{"prompt": "cut off')
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of three file types, several files each, that repeat one another; and a benchmark."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(3):
        write_lines(root / f"lines-{number}.jsonl", rows(number % 2, 130), broken=2)
        frame = pl.DataFrame(rows(number, 110)).drop("language")
        frame.write_parquet(root / f"table-{number}.parquet", row_group_size=64)
    chats = [{"instruction": row["prompt"], "input": "", "output": row["chosen"]} for row in rows(1, 160) + rows(7, 60)]
    (root / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    pl.DataFrame({"question": BENCHMARK}).write_csv(root / "benchmark.csv")
    return root


SOURCES = """
[sources.table]
path = "table-*.parquet"
[sources.lines]
path = "lines-*.jsonl"
where = "language != 'de'"
[sources.chats]
format = "openhermes"
path = "chats.json"
"""
AGAINST = """
[decontaminate.against.mine]
path = "benchmark.csv"
fields = ["question"]
"""
RECIPES = {
    "defaults": "",
    "everything": AGAINST + """
[filter]
injection = "strip"
on_inverted = "swap"
cut_off = "report"
[dedupe]
exact = "pair"
prompt_cap = 2
across = true
near = { threshold = 0.7, shingle = 3 }
[splits]
test = 0.2
valid = 0.1
""",
    "prompts only": """
[dedupe]
exact = "prompt"
across = true
[splits]
test = 0.3
""",
    "near in messages, all in one layout": """
[dedupe]
exact = "off"
near = { threshold = 0.6, shingle = 2, on = "messages", shingle_unit = "char" }
[format]
layout = "messages"
system = "Be kind."
""",
    "shares and repeats": """
[dedupe]
near = { threshold = 0.8 }
[mix]
preference = { table = 3, lines = 1 }
preference_rows = 260
sft_rows = 60
allow_repeat = true
""",
}  # fmt: skip
TAKES = {"everything": ("lines", "take = 0.6"), "prompts only": ("chats", "take = 50\nrepeat = 3")}


#: What each recipe drops rows for, among other things.
DROPPED = {
    "defaults": {"source/invalid", "source/where", "filter/tie", "filter/empty", "filter/refusal", "filter/injection"},
    "everything": {"decontaminate/mine", "dedupe/pair", "dedupe/prompt_cap", "dedupe/near", "mix/not_sampled"},
    "prompts only": {"dedupe/pair", "dedupe/prompt", "mix/not_sampled"},
    "near in messages, all in one layout": {"dedupe/near"},
    "shares and repeats": {"dedupe/near", "mix/not_sampled"},
}


def recipe_file(folder: Path, name: str) -> Path:
    text = SOURCES
    if name in TAKES:
        source, line = TAKES[name]
        text = text.replace(f"[sources.{source}]", f"[sources.{source}]\n{line}")
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.toml"
    path.write_text(f'name = "parts"\n{text}{RECIPES[name]}', encoding="utf-8")
    return path


def built(recipe: Path, store: Path, means: Means) -> Mixture:
    return prefmix.build(recipe, store=store, means=means)


def assert_same(one: Mixture, other: Mixture) -> None:
    """The same rows, and the same story of them."""
    assert one.digest == other.digest
    for key in ("funnel", "audit", "contamination", "build", "recipe_digest", "license"):
        assert one.manifest[key] == other.manifest[key], key
    assert one.manifest["sources"] == other.manifest["sources"]
    for subset, splits in other.manifest["subsets"].items():
        for split, entry in splits.items():
            mine = one.manifest["subsets"][subset][split]
            assert (mine["rows"], mine["tokens"]) == (entry["rows"], entry["tokens"])
    assert one.drops.collect().equals(other.drops.collect())
    assert one.changes.collect().equals(other.changes.collect())
    one.verify()


@pytest.mark.parametrize("name", RECIPES)
def test_a_build_in_parts_is_the_build_in_memory(folder: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_file(folder, name)
    in_parts = built(recipe, tmp_path / "disk", Means("disk", LITTLE))
    in_memory = built(recipe, tmp_path / "memory", Means("memory"))
    assert in_memory.funnel[0]["in"] == 3 * (110 + 132) + 220
    assert_same(in_parts, in_memory)
    assert not list((tmp_path / "disk").rglob("*scratch*"))
    assert {reason for stage in in_parts.funnel for reason in stage["dropped"]} >= DROPPED[name]


@pytest.mark.parametrize("memory", [1_000_000, 20_000_000])
def test_the_portions_do_not_change_the_mixture(folder: Path, tmp_path: Path, memory: int) -> None:
    recipe = recipe_file(folder, "everything")
    assert_same(
        built(recipe, tmp_path / "disk", Means("disk", memory)), built(recipe, tmp_path / "memory", Means("memory"))
    )


def test_tokens_are_counted_in_parts_too(folder: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    path = recipe_file(folder, "shares and repeats")
    limits = "[filter]\nmax_tokens = 600\n[format]\n" + f'tokenizer = "{tokenizer_folder}"\n'
    for number, text in enumerate((limits, limits.split("\n", 2)[2])):
        recipe = path.with_name(f"tokens-{number}.toml")
        recipe.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
        one = built(recipe, tmp_path / f"disk-{number}", Means("disk", LITTLE))
        assert_same(one, built(recipe, tmp_path / f"memory-{number}", Means("memory")))
        assert all(entry["tokens"] for splits in one.manifest["subsets"].values() for entry in splits.values())


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes."""
    from small_models import byte_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(folder)


def test_real_rows_come_out_the_same(tmp_path: Path, real_data: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from scale_rows import SEED, write

    write(tmp_path / "rows", 5_000, SEED, 1, real_data)
    recipe = tmp_path / "real.toml"
    recipe.write_text(f"""
name = "real"
[sources.orca]
path = "rows/orca-*.parquet"
[sources.ultrafeedback]
path = "rows/ultrafeedback-*.parquet"
[sources.hermes]
path = "rows/hermes-*.parquet"
[sources.chats]
path = "rows/chats-*.jsonl"
take = 0.5
[dedupe]
near = {{ threshold = 0.8 }}
[decontaminate.against.gsm8k]
path = "{real_data}/benchmarks/gsm8k/test.jsonl"
fields = ["question"]
[splits]
test = 0.02
""")
    in_parts = built(recipe, tmp_path / "disk", Means("disk", 40_000_000))
    assert_same(in_parts, built(recipe, tmp_path / "memory", Means("memory")))
    dropped = {reason for stage in in_parts.funnel for reason in stage["dropped"]}
    assert dropped >= {"dedupe/near", "dedupe/pair", "decontaminate/gsm8k", "mix/not_sampled"}


# Near-duplicates: what is decided of rows in parts is what is decided of all of them.


@given(st.integers(0, 2**32), st.integers(0, 40))
def test_texts_that_share_no_bucket_may_be_decided_apart(seed: int, copies: int) -> None:
    draw = random.Random(seed)
    texts = [sentence(draw, draw.randint(1, 15)) for _ in range(20)]
    for _ in range(copies):
        words = draw.choice(texts).split()
        words[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append(" ".join(words))
    settings = dedupe.minhash_settings(Near(threshold=0.6, shingle=2))
    ranked = pl.DataFrame({"_index": range(len(texts)), "text": texts}, schema={"_index": pl.UInt32, "text": pl.String})
    ranked = ranked.with_columns(
        id=pl.col("_index").cast(pl.String).str.zfill(3), source=pl.lit("a", pl.Enum(["a"])), source_row=pl.lit(0),
        margin=pl.lit(None, pl.Float64), chosen_score=pl.lit(None, pl.Float64), rejected_score=pl.lit(None, pl.Float64),
    )  # fmt: skip
    whole = dedupe.near_drops({"sft": ranked}, Near(threshold=0.6, shingle=2), False)["sft"]
    places, bands = minhash.band_keys(ranked["text"], **settings)
    names = np.arange(len(texts))
    for band in bands:
        there, starts = minhash.buckets_of(band)
        for bucket in np.split(places[there], starts[1:]):
            minhash.connect(names, np.full(len(bucket), bucket[:1].min(initial=0)) if len(bucket) else bucket, bucket)
    apart = [
        dedupe.near_drops({"sft": part}, Near(threshold=0.6, shingle=2), False)["sft"]
        for _, part in ranked.with_columns(name=pl.Series(names)).group_by("name")
    ]
    assert pl.concat(apart).sort("_index").equals(whole.sort("_index"))
    assert len(shingles(ranked["text"], 2)[1]) == len(texts) + 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=120), st.integers(1, 5))
def test_contracting_edges_in_parts_finds_the_connected_components(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], cuts: int
) -> None:
    ends = [sorted(pair) for pair in pairs if pair[0] != pair[1]]
    job = Job(None, scale.Sizes(1, 1, cuts, 1, 1, 1, 1), Scratch(tmp_path_factory.mktemp("edges")))  # ty: ignore
    low, high = np.array([*zip(*ends, strict=True)] if ends else [[], []], np.uint32)
    edges, parents = [connected._write_edges(job, "edges/0", low, high)], {}
    rounds = 0
    while edges:
        results = [
            connected.contract(job, connected.Hub("x", rounds, at, edges, parents.get(at))) for at in range(cuts)
        ]
        edges = [result["edges"] for result in results if result["left"]]
        parents = {at: result["parents"] for at, result in enumerate(results)}
        rounds += 1
        assert rounds < 70
    parent = {high: low for name in parents.values() for low, high in job.scratch.read(name).rows()}

    def root(row: int) -> int:
        return root(parent[row]) if row in parent else row

    expected = np.arange(61)
    minhash.connect(expected, low.astype(int), high.astype(int))
    assert [root(row) for row in range(61)] == expected.tolist()


# Reading in parts.


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_the_parts_of_a_file_are_its_rows(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame({"prompt": [f"row {number} – ä" * (number % 50 + 1) for number in range(700)]})
    path = tmp_path / name
    if name.endswith(".parquet"):
        frame.write_parquet(path, row_group_size=90)
    elif name.endswith(".arrow"):
        frame.write_ipc(path)
    elif name.endswith(".csv"):
        frame.write_csv(path)
    else:
        lines = [orjson.dumps(row) for row in frame.iter_rows(named=True)]
        data = b"[" + b",".join(lines) + b"]" if name.endswith(".json") else b"\xef\xbb\xbf" + b"\n\n".join(lines)
        import gzip

        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    spans = files.spans(path, 100, 4096)
    assert len(spans) > 1 or not name.endswith((".parquet", ".arrow", ".jsonl"))
    wanted = {"prompt": pl.String()}
    parts = [list(files.batches(path, wanted, (), span, 64)) for span in spans]
    assert pl.concat([batch for part in parts for batch in part]).equals(files.read(path, wanted))


def test_a_fault_in_a_part_has_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"prompt": "x"}'] * 5000
    lines[4321] = '{"prompt": '
    path.write_text("\n".join(lines))
    spans = files.spans(path, 10, 1)
    assert spans[0].line == 1
    found = pl.concat([batch for span in spans for batch in files.batches(path, {"prompt": pl.String()}, (), span, 64)])
    assert found.equals(files.read(path, {"prompt": pl.String()}))
    assert json.loads(found["_fault"].drop_nulls().item())["line"] == 4322


def test_a_where_over_several_rows_cannot_be_evaluated_in_parts(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(folder, "defaults"), ["sources.table.where=chosen_score > AVG(chosen_score)"])
    with pytest.raises(SourceError, match="may look at several rows at once"):
        prefmix.build(recipe, store=tmp_path, means=Means("disk", LITTLE))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert prefmix.build(recipe, store=tmp_path, means=Means("memory")).is_new


@pytest.mark.parametrize(
    ("where", "by_row"),
    [
        ("prompt != 'de' AND NOT (chosen_score < 3 OR prompt IS NULL)", True),
        ("LENGTH(prompt) > 20 AND LOWER(chosen) LIKE '%bar%' OR STARTS_WITH(prompt, 'Bar')", True),
        ("chosen_score IN (3, 4.5) AND chosen_score BETWEEN 1 AND 4", True),
        ("COALESCE(chosen_score, 1) + 2 * rejected_score > ABS(-3)", True),
        ("CASE WHEN chosen_score > 3 THEN TRUE ELSE FALSE END", True),
        ("CAST(chosen_score AS INTEGER) = 3", True),
        ("chosen_score > AVG(chosen_score)", False),
        ("COUNT(*) > 3", False),
        ("chosen_score = MAX(chosen_score) OVER (PARTITION BY prompt)", False),
        ("chosen_score > QUANTILE_CONT(chosen_score, 0.5)", False),
        ("ROW_NUMBER() OVER (ORDER BY prompt) < 5", False),
    ],
)
def test_conditions_on_a_row_alone_are_told_from_others(folder: Path, where: str, by_row: bool) -> None:
    source = plan(load_recipe(recipe_file(folder, "defaults"), [f"sources.table.where={where}"])).sources["table"]
    if by_row:
        assert source.where_types() == {}
    else:
        with pytest.raises(SourceError, match="may look at several rows at once"):
            source.where_types()


# What is chosen.


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4e9), ("500 MB", 5e8), ("4gib", 4 * 2**30), ("1.5G", 1.5e9), ("1000000", 1e6), ("2 kb", 2e3)],
)
def test_sizes_of_memory_are_read(text: str, size: float) -> None:
    assert scale.memory_of(text) == size


@pytest.mark.parametrize("text", ["", "4 apples", "-1GB", "0", "GB", "1e9"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="write a size as in 4GB"):
        scale.memory_of(text)


def test_rows_that_fit_are_built_in_memory(folder: Path, tmp_path: Path) -> None:
    planned = plan(load_recipe(recipe_file(folder, "defaults")))
    for memory, parts in ((scale.in_memory(planned), False), (scale.in_memory(planned) - 1, True)):
        with curating(planned, Store(tmp_path), means=Means("auto", memory)) as found:
            assert isinstance(found, scale.Settled) == parts


def test_a_look_at_a_build_in_parts_has_its_numbers_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_file(folder, "everything")
    looks = []
    for engine in ("disk", "memory"):
        command = [
            "build",
            str(recipe),
            "--dry-run",
            "--json",
            "--engine",
            engine,
            "--memory",
            "3MB",
            "--store",
            "store",
        ]
        look = json.loads(cli(command, tmp_path).stdout)
        looks.append({key: value for key, value in look.items() if key not in ("seconds", "samples")})
    assert looks[0] == looks[1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def cli(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefmix", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )


# Kills, full disks, errors.


def test_a_build_that_is_killed_goes_on_and_repeats_no_work(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_file(folder, "everything")
    expected = built(recipe, tmp_path / "memory", Means("memory"))
    command = [sys.executable, "-m", "prefmix", "build", str(recipe), "--json", "--engine", "disk", "--memory", "2MB"]
    draw = random.Random(os.urandom(8))
    kills, before = 0, 0
    while True:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_work = time.monotonic() + 60
        while process.poll() is None and records(tmp_path) <= before and time.monotonic() < wait_for_work:
            time.sleep(0.005)
        if kills < 4:
            time.sleep(draw.random() * 0.3)
            process.kill()
        out, err = process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        assert not list(tmp_path.glob("mixtures/parts/*/mixture.json"))
        assert records(tmp_path) >= before
        before, kills = records(tmp_path), kills + 1
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["digest"] == expected.digest
    assert kills
    assert sum(stage["done_before"] for stage in result["stages"].values()) == before > 0
    assert_same(prefmix.open_mixture("parts", tmp_path / "mixtures"), expected)
    assert not [path for path in (tmp_path / "mixtures").rglob("*") if "scratch" in path.name or "staging" in path.name]


def records(folder: Path) -> int:
    """The pieces of work that are done."""
    return len(list(folder.glob("mixtures/parts/.scratch/*/done/[!.]*.json")))


def test_files_that_a_kill_left_damaged_are_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file(folder, "everything")
    with fails_after(monkeypatch, 120, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        built(recipe, tmp_path, Means("disk", LITTLE))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size and ".lock" not in path.name]
    for path in random.Random(1).sample(left, len(left) // 3):
        path.write_bytes(path.read_bytes()[:-1])
    assert_same(built(recipe, tmp_path, Means("disk", LITTLE)), built(recipe, tmp_path / "memory", Means("memory")))


class fails_after:
    """Lets so many files of the scratch folder be written, then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: int, error: BaseException) -> None:
        self.monkeypatch, self.left, self.error = monkeypatch, files, error

    def __enter__(self) -> None:
        write: Callable[..., Any] = Scratch.writing

        def writing(scratch: Scratch, name: str) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error
            return write(scratch, name)

        self.monkeypatch.setattr(Scratch, "writing", writing)

    def __exit__(self, *_: object) -> None:
        self.monkeypatch.undo()


@pytest.mark.parametrize("files", [0, 30, 200])
def test_a_full_scratch_disk_is_said_and_the_next_build_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    recipe = recipe_file(folder, "everything")
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        fails_after(monkeypatch, files, full),
        pytest.raises(BuildError, match=r"cannot be written: No space left .* --scratch"),
    ):
        built(recipe, tmp_path / "store", Means("disk", LITTLE, tmp_path / "scratch"))
    assert not list((tmp_path / "store").rglob("mixture.json"))
    assert not list(tmp_path.rglob(".*-????????"))
    stages: dict[str, dict[str, float]] = {}
    planned = plan(load_recipe(recipe))
    mixture = made(planned, Store(tmp_path / "store"), means=Means("disk", LITTLE, tmp_path / "scratch"), stages=stages)
    assert (sum(stage["done_before"] for stage in stages.values()) > 0) == (files > 0)
    assert_same(mixture, built(recipe, tmp_path / "memory", Means("memory")))
    assert not (tmp_path / "scratch").exists()


def test_a_gate_that_fails_leaves_no_scratch_folder(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_file(folder, "everything")
    with pytest.raises(GateError, match="mine"):
        prefmix.build(recipe, store=tmp_path, fail_on=["contamination"], means=Means("disk", LITTLE))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_two_processes_do_not_work_in_one_scratch_folder(folder: Path, tmp_path: Path) -> None:
    planned = plan(load_recipe(recipe_file(folder, "defaults")))
    means = Means("disk", LITTLE)
    with (
        curating(planned, Store(tmp_path), means=means),
        pytest.raises(BuildError, match="the same build is running in another process"),
        curating(planned, Store(tmp_path), means=means),
    ):
        pass


def test_what_another_recipe_left_behind_is_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fails_after(monkeypatch, 50, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        built(recipe_file(folder, "everything"), tmp_path, Means("disk", LITTLE))
    assert list(tmp_path.rglob("done"))
    built(recipe_file(folder, "prompts only"), tmp_path, Means("disk", LITTLE))
    assert not list(tmp_path.rglob("done"))


def test_nothing_left_to_write_is_said(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(folder, "defaults"), ["filter.min_score=9.0", "sources.chats.take=0"])
    with pytest.raises(BuildError, match=r"No row is left to write.*mix/not_sampled"):
        prefmix.build(recipe, store=tmp_path, means=Means("disk", LITTLE))


@pytest.fixture(autouse=True)
def no_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFMIX_STORE", raising=False)
