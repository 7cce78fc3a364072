"""How fast and how right near-duplicates are found, beside other tools, on real texts with an exact truth.

    python scripts/bench_dedupe.py [--data ../shared/data] [--python PEERS/bin/python] [--repeats 3] [--only NAME] [--million]

Corpus: every distinct answer of the real data with at least 30 words, and for one text in four a copy with planted edits
(words replaced, deleted, inserted or swapped, a sentence moved, only case and punctuation changed), from one word up to a
Jaccard similarity well below 0.8. The order is shuffled, all by a fixed seed. `--prompts` adds the SFT prompts: T0's ask about
one passage in several ways, so that a quarter of the texts are near-duplicates by nature.

Truth: all pairs whose sets of distinct word 5-grams of the normalised text have Jaccard >= 0.8. Every 5-gram is a number of
its own (no hash); the product of the matrix of texts by 5-grams with its transpose, an inverted index of every 5-gram, holds the
size of every intersection, so no pair is missed and none is estimated.

Measures, on rows in their order:

- recall: of the rows that exact greedy drops (a row goes when an earlier kept row has Jaccard >= 0.8), the share that the tool
  drops; "J < .85" is the same for those whose nearest earlier kept row is just above the threshold.
- precision: of the rows that the tool drops, the share that truly have an earlier row at Jaccard >= 0.8.
- pairs: of all true pairs, the share that the tool proposes, where it gives pairs.

A tool that gives clusters is taken to keep the first row of each. Each side runs as a process of its own on one core, in
turn, from raw text in memory to the list of dropped rows; imports, reading the file and a warm-up on 1,000 texts come before
the clock. RSS is the peak of the whole process, from its start.

The peers get the normalised text (by Polars, inside their time), so that all measure the same sets, and are asked for word
5-grams, 128 permutations and threshold 0.8; the rest is their default, bands included. datasketch hashes with xxhash,
text-dedup with xxh3 and 32 bits (the fastest it has); datatrove keeps its 14 bands of 8 and its tokenizer; daft only has the
signatures, the bands beside it (9 of 13, as datasketch chooses) are in Polars. None of these four verifies its candidates.
rensa's deduplicators compare signatures; its rho pipeline is left out: it flags every member of a group and names none to
keep. The sketch is the experiment before prefmix, ../shared/sketches/minhash_sketch.py, with exact verification added here.

`--python` is an interpreter that has polars, numpy and those of datasketch, xxhash<4, rensa, daft, text-dedup, datatrove, regex,
tokenizers and spacy that are wanted; a peer that is not installed is skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import polars as pl

COLUMNS = {
    "orca_dpo_pairs/real_intel_rows.parquet": ["chosen", "rejected"],
    "orca_dpo_pairs/converted.parquet": ["chosen", "rejected"],
    "orca_dpo_pairs/converted_hh_harmless.parquet": ["chosen", "rejected"],
    "ultrafeedback_binarized/real_ultrafeedback_rows.parquet": ["chosen_response", "rejected_response"],
    "ultrafeedback_binarized/converted_alpaca_eval.parquet": ["chosen_response", "rejected_response"],
    "ultrafeedback_binarized/converted_other_scored.parquet": ["chosen_response", "rejected_response"],
    "openhermes/converted_hermes_sources.parquet": ["output"],
    "openhermes/converted_t0_p3.parquet": ["output"],
}
PROMPTS = ["openhermes/converted_hermes_sources.parquet", "openhermes/converted_t0_p3.parquet"]
SHARED = Path(__file__).resolve().parents[2] / "shared"
sys.path.append(str(SHARED / "sketches"))  # for the side called sketch
MINIMUM_WORDS, PLANTED, SEED = 30, 0.25, 7
THRESHOLD, SHINGLE, PERMUTATIONS = 0.8, 5, 128
UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"
DATASKETCH_BANDS = (9, 13)  # what datasketch's optimiser gives for 128 permutations and 0.8; for tools without one
SLOW_S = 100  # a side that takes longer runs once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with the real data")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="interpreter that has the peers")
    parser.add_argument("--repeats", type=int, default=3, help=f"runs of each; one where a run takes over {SLOW_S} s")
    parser.add_argument("--only", action="append", choices=list(CONTESTANTS), metavar="NAME",
                        help=f"one side alone; may be given again: {', '.join(CONTESTANTS)}")  # fmt: skip
    parser.add_argument("--prompts", action="store_true", help="add the SFT prompts to the corpus")
    parser.add_argument("--million", action="store_true", help="also time prefmix on 1,000,000 texts")
    parser.add_argument("--markdown", action="store_true", help="print the section for docs/benchmarks.md")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        return work(options.contestant, options.corpus, options.threads, options.out)
    if not options.data.is_dir():
        sys.exit(
            f"{options.data} is missing: give --data, the folder with orca_dpo_pairs/, ultrafeedback_binarized/, openhermes/"
        )
    compare(options)


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus"
        path.mkdir()
        corpus = make_corpus(options.data, options.prompts)
        corpus.select("text").write_parquet(path / "texts.parquet")
        note(f"corpus of {len(corpus):,} texts written; now the exact truth")
        started = time.perf_counter()
        truth = exact_truth(corpus["text"])
        about = [*describe_corpus(corpus), *describe_truth(corpus, truth, time.perf_counter() - started)]

        runs: dict[str, list[dict]] = {name: [] for name in options.only or CONTESTANTS}
        for _ in range(options.repeats):
            for name, earlier in list(runs.items()):
                if earlier and earlier[0]["wall_s"] > SLOW_S:
                    continue
                run = measure(name, path, 1, options.python)
                if "error" in run:
                    note(f"{name}: skipped, {run['error']}")
                    about.append(f"Skipped: {name} ({run['error']}).")
                    del runs[name]
                    continue
                note(f"{name}: {run['wall_s']:.1f} s")
                earlier.append(run)
        tables = [contest_table(runs, truth)] if runs else []
        if "prefmix" in runs:
            about.append(check_claims(runs["prefmix"][-1], truth))
            tables.append(growth_table(corpus["text"], path, Path(folder), options))
        if apart := [run["normalise_s"] for each in runs.values() for run in each if "normalise_s" in run]:
            about.append(f"Normalising takes {median(apart):.1f} s of the time of each peer and of the sketch.")
        versions = {CONTESTANTS[name].package: run[0]["version"] for name, run in runs.items() if run[0]["version"]}
        if versions:
            about.append(
                "Versions: " + ", ".join(f"{package} {version}" for package, version in versions.items()) + "."
            )
    if options.markdown:
        command = "python scripts/bench_dedupe.py --python PEERS/bin/python" + " --million" * options.million
        print(f"## Near-duplicates among {len(corpus):,} texts\n\n    {command}\n")
        print("\n".join(f"- {line}" for line in about))
        print("\n".join(f"\n```text\n{table}\n```" for table in tables))
    else:
        print("\n".join(about))
        print("".join(f"\n{table}\n" for table in tables))


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The corpus.


def make_corpus(data: Path, prompts: bool) -> pl.DataFrame:
    """`text` (distinct), and for a planted copy the `row` and the `original` row that it was made from, else null."""
    columns = [pl.read_parquet(data / file)[name].rename("text") for file, names in COLUMNS.items() for name in names]
    if prompts:
        columns += [pl.read_parquet(data / file)["instruction"].rename("text") for file in PROMPTS]
    texts = pl.concat(columns).drop_nulls().unique(maintain_order=True)
    texts = texts.filter(count_words(normalised(texts)) >= MINIMUM_WORDS)
    chance = random.Random(SEED)
    vocabulary = [word for text in texts.gather_every(50) for word in text.split(" ") if word.strip()]
    originals = sorted(chance.sample(range(len(texts)), int(len(texts) * PLANTED)))
    copies = [edited(texts[original], vocabulary, chance) for original in originals]
    schema = {"text": pl.String, "was": pl.Int64, "made_from": pl.Int64}
    real = pl.DataFrame({"text": texts, "was": range(len(texts)), "made_from": None}, schema)
    planted = pl.DataFrame({"text": copies, "was": None, "made_from": originals}, schema)
    both = pl.concat([real, planted]).unique("text", keep="first", maintain_order=True)
    both = both[np.random.default_rng(SEED).permutation(len(both))].with_row_index("row")
    place = both.select(made_from="was", original="row").drop_nulls()
    return both.join(place, on="made_from", how="left", maintain_order="left").select("row", "text", "original")


def edited(text: str, vocabulary: list[str], chance: random.Random) -> str:
    """A copy with edits that cost it up to about three tenths of its Jaccard similarity, or none of it."""
    words = text.split(" ")
    wanted = chance.uniform(0.7, 1.0)
    # An edited word costs 5 of m shingles and adds 5: J = (m - 5k) / (m + 5k).
    count = max(1, round(len(words) * (1 - wanted) / (1 + wanted) / SHINGLE))
    kind = chance.choice(["replace", "delete", "insert", "swap", "move", "surface"])
    sentences = re.split(r"(?<=[.!?])\s+", text)
    if kind == "move" and len(sentences) > 2:
        sentence = sentences.pop(chance.randrange(len(sentences)))
        sentences.insert(chance.randrange(len(sentences) + 1), sentence)
        return " ".join(sentences)
    if kind == "surface":
        return re.sub("[,.;:!?]", " -", " ".join(word.swapcase() if chance.random() < 0.3 else word for word in words))
    for at in sorted(chance.sample(range(len(words) - 1), min(count, len(words) - 1)), reverse=True):
        if kind == "replace":
            words[at] = chance.choice(vocabulary)
        elif kind == "delete":
            del words[at]
        elif kind == "insert":
            words.insert(at, chance.choice(vocabulary))
        else:
            words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def normalised(texts: pl.Series) -> pl.Series:
    """As prefmix defines it: no format characters, lower case, NFKC, words apart by one space. Words are runs of letters,
    marks and numbers that do not begin with a mark; where a script puts no space between words, each letter is one."""
    ascii_only = texts.str.len_bytes() == texts.str.len_chars()  # only lower case and the spaces are left to do
    other = texts.filter(~ascii_only).str.replace_all(r"\p{Cf}", "").str.to_lowercase().str.normalize("NFKC")
    other = other.str.to_lowercase().str.replace_all(UNSPACED, " $1 ")
    other = other.str.replace_all(r"(?:[^\p{L}\p{M}\p{N}]|^)\p{M}+", " ")
    joined = pl.concat([texts.filter(ascii_only).str.to_lowercase(), other])
    order = np.argsort(np.argsort(~ascii_only.to_numpy(), kind="stable"), kind="stable")
    return joined.gather(order).str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ").str.strip_chars(" ")


def count_words(texts: pl.Series) -> pl.Series:
    return texts.str.count_matches(" ", literal=True) + 1


def describe_corpus(corpus: pl.DataFrame) -> list[str]:
    words = count_words(normalised(corpus["text"]))
    size, total = int(corpus["text"].str.len_bytes().sum()), int(words.sum())
    planted = corpus["original"].count()
    return [
        f"Corpus: {len(corpus):,} distinct texts, {len(corpus) - planted:,} real and {planted:,} planted copies, "
        f"{total / len(corpus):.0f} words each, {total / 1e6:.1f} M words, {size / 1e6:.0f} MB."
    ]


# The truth.


class Truth(NamedTuple):
    """All pairs at or above the threshold, and what follows from them; the arrays have one element for each row."""

    pairs: pl.DataFrame  # left < right (rows), jaccard
    has_earlier: np.ndarray  # bool: a true near-duplicate comes before
    dropped: np.ndarray  # bool: exact greedy drops it
    nearest: np.ndarray  # float: Jaccard with the nearest earlier row that greedy keeps, 0 where there is none


def exact_truth(texts: pl.Series) -> Truth:
    pairs = exact_pairs(texts)
    has_earlier = np.zeros(len(texts), bool)
    has_earlier[pairs["right"]] = True
    dropped, nearest = np.zeros(len(texts), bool), np.zeros(len(texts))
    for right, lefts, jaccards in pairs.sort("right").group_by("right", maintain_order=True).all().iter_rows():
        kept = [jaccard for left, jaccard in zip(lefts, jaccards, strict=True) if not dropped[left]]
        dropped[right], nearest[right] = bool(kept), max(kept, default=0)
    return Truth(pairs, has_earlier, dropped, nearest)


def exact_pairs(texts: pl.Series) -> pl.DataFrame:
    """All pairs of rows (`left` < `right`) with `jaccard` >= 4/5, in whole numbers until the last division."""
    from scipy.sparse import csr_array

    words = normalised(texts).str.split(" ")
    lengths = words.list.len().to_numpy().astype(np.int64)
    word = words.explode().rank("dense").to_numpy().astype(np.uint64)  # equal words, equal numbers
    assert len(word) == lengths.sum()
    assert lengths.min() >= SHINGLE
    row = np.repeat(np.arange(len(texts), dtype=np.uint32), lengths)
    gram = word
    for nth in range(1, SHINGLE):  # a gram of n + 1 words is the pair of its first n words and the last one
        gram = gram[:-1] * (word.max() + np.uint64(1)) + word[nth:]
        gram = pl.Series(gram).rank("dense").to_numpy().astype(np.uint64)
    inside = row[: 1 - SHINGLE] == row[SHINGLE - 1 :]
    sets = pl.DataFrame({"row": row[: 1 - SHINGLE][inside], "gram": gram[inside]}).unique().sort("row", "gram")
    sizes = np.bincount(sets["row"]).astype(np.int64)
    where = (np.ones(len(sets), np.int32), sets["gram"].to_numpy(), np.append(0, np.cumsum(sizes)))
    grams_of_rows = csr_array(where, shape=(len(texts), int(gram.max()) + 1))
    rows_of_grams = grams_of_rows.T.tocsr()
    found = []
    for start in range(0, len(texts), 500):
        common = (grams_of_rows[start : start + 500] @ rows_of_grams).tocoo()
        left, right = common.row.astype(np.int64) + start, common.col.astype(np.int64)
        union = sizes[left] + sizes[right] - common.data
        near = (left < right) & (common.data * 5 >= union * 4)
        part = {"left": left[near], "right": right[near], "jaccard": common.data[near] / union[near]}
        found.append(pl.DataFrame(part, {"left": pl.UInt32, "right": pl.UInt32, "jaccard": pl.Float64}))
    return pl.concat(found)


def describe_truth(corpus: pl.DataFrame, truth: Truth, seconds: float) -> list[str]:
    planted = corpus.drop_nulls("original").select(
        left=pl.min_horizontal("row", "original"), right=pl.max_horizontal("row", "original")
    )
    found = planted.join(truth.pairs, on=["left", "right"])["jaccard"]
    pairs, hard = truth.pairs["jaccard"], truth.dropped & (truth.nearest < 0.85)
    return [
        f"Truth: {len(truth.pairs):,} pairs with Jaccard >= {THRESHOLD} by exact all-pairs ({seconds:.0f} s), "
        f"{(pairs < 0.85).sum():,} of them below 0.85; {truth.has_earlier.sum():,} rows have an earlier near-duplicate, "
        f"exact greedy drops {truth.dropped.sum():,}, {hard.sum():,} of them with nothing nearer than 0.85.",
        f"Planted: {len(found):,} of {len(planted):,} copies are at or above the threshold, {(found < 0.85).sum():,} below "
        f"0.85, {(found == 1).sum():,} equal after normalising; the others are below it.",
    ]


# One run: from outside, and inside its process.


class Found(NamedTuple):
    """What a side found: rows it drops; pairs of rows (n, 2), if it gives them; Jaccard of each pair, if it claims one."""

    dropped: np.ndarray
    pairs: np.ndarray | None = None
    jaccard: np.ndarray | None = None


def measure(name: str, corpus: Path, threads: int, peers: str) -> dict:
    """Runs one side in a process of its own; its report, or {"error": why}."""
    with tempfile.TemporaryDirectory() as out:
        python = sys.executable if CONTESTANTS[name].ours else str(Path(peers).absolute())
        command = [python, __file__, "--contestant", name, "--corpus", str(corpus), "--out", out]
        command += ["--threads", str(threads)]
        limits = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        quiet = {"HF_HOME": out, "HF_HUB_OFFLINE": "1", "DAFT_PROGRESS_BAR": "0"}
        run = subprocess.run(command, env={**os.environ, **limits, **quiet}, capture_output=True, text=True, cwd=out)
        if run.returncode:
            return {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
        report = json.loads((Path(out) / "report.json").read_text())
        return {**report, **np.load(Path(out) / "found.npz")}


def work(name: str, corpus: Path, threads: int, out: Path) -> None:
    """Runs in the process that is measured."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    contestant = CONTESTANTS[name]
    started = time.perf_counter()
    try:
        modules = [import_module(module) for module in contestant.modules]
    except ImportError as error:
        sys.exit(f"not installed: {error}")
    import_s = time.perf_counter() - started
    texts = pl.read_parquet(corpus)["text"]
    contestant.find(texts.head(1000), *modules)

    started, cpu = time.perf_counter(), cpu_s()
    found = contestant.find(texts, *modules)
    wall, cpu = time.perf_counter() - started, cpu_s() - cpu
    report = {"texts": len(texts), "wall_s": wall, "cpu_s": cpu, "rss_mb": peak_mb(), "import_s": import_s}
    report["version"] = metadata.version(contestant.package) if contestant.package else None
    if contestant.normalises:
        started = time.perf_counter()
        normalised(texts)
        report["normalise_s"] = time.perf_counter() - started
    (out / "report.json").write_text(json.dumps(report))
    np.savez(out / "found.npz", **{key: value for key, value in found._asdict().items() if value is not None})


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_mb() -> float:
    """The highest resident memory of this process so far. (On Linux ru_maxrss begins with that of the parent.)"""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


# The sides. Each takes raw texts and the modules that it needs, imported, and gives the rows to drop.


def find_prefmix(texts: pl.Series, minhash: ModuleType) -> Found:
    found = minhash.near_duplicates(
        texts, threshold=THRESHOLD, shingle=SHINGLE, unit="word", permutations=PERMUTATIONS, recall=0.99
    )
    return Found(found["row"].to_numpy(), found.select("row", "kept").to_numpy(), found["jaccard"].to_numpy())


def find_sketch(texts: pl.Series, sketch: ModuleType) -> Found:
    """The experiment that came before prefmix: 20 bands of 6, what the signatures rule out is left, then exact Jaccard."""
    grams, starts = sketch.shingles(normalised(texts), SHINGLE)
    signatures = sketch.signatures(grams.astype(np.uint32), starts)
    left, right = sketch.band_pairs(signatures)
    least = THRESHOLD - 3 * math.sqrt(THRESHOLD * (1 - THRESHOLD) / PERMUTATIONS)
    likely = np.concatenate(
        [
            (signatures[left[at : at + 100_000]] == signatures[right[at : at + 100_000]]).mean(axis=1) >= least
            for at in range(0, len(left), 100_000)
        ]
    )
    pairs = np.stack([left, right], axis=1)[likely]
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    members = {row: np.unique(grams[starts[row] : starts[row + 1]]) for row in np.unique(pairs).tolist()}
    dropped: set[int] = set()
    for first, second in pairs.tolist():
        if first not in dropped and second not in dropped:
            a, b = members[first], members[second]
            common = overlap(a, b)
            if common >= THRESHOLD * (len(a) + len(b) - common):
                dropped.add(second)
    return Found(np.array(sorted(dropped), np.int64), pairs)


def overlap(a: np.ndarray, b: np.ndarray) -> int:
    """How many members two sets have in common; a set is an array of distinct numbers."""
    both = np.concatenate((a, b))
    both.sort()
    return int(np.count_nonzero(both[1:] == both[:-1]))


def grams_of(text: str) -> list[str]:
    words = text.split(" ")
    return [" ".join(gram) for gram in zip(*(words[nth:] for nth in range(SHINGLE)), strict=False)]


def find_datasketch(texts: pl.Series, datasketch: ModuleType, xxhash: ModuleType) -> Found:
    index = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    grams = ([gram.encode() for gram in grams_of(text)] for text in normalised(texts))
    minhashes = datasketch.MinHash.generator(grams, num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
    pairs = []
    for row, minhash in enumerate(minhashes):
        pairs += [(earlier, row) for earlier in index.query(minhash)]
        index.insert(row, minhash, check_duplication=False)
    return Found(np.unique([right for _, right in pairs]).astype(np.int64), np.array(pairs, np.int64).reshape(-1, 2))


def find_rensa_r(texts: pl.Series, rensa: ModuleType) -> Found:
    return rensa_drops(rensa.RMinHashDeduplicator(THRESHOLD, PERMUTATIONS, use_lsh=True), texts)


def find_rensa_c(texts: pl.Series, rensa: ModuleType) -> Found:
    return rensa_drops(rensa.CMinHashDeduplicator(THRESHOLD, PERMUTATIONS), texts)


def rensa_drops(deduplicator: Any, texts: pl.Series) -> Found:
    keep = deduplicator.add_pairs((str(row), grams_of(text)) for row, text in enumerate(normalised(texts)))
    return Found(np.flatnonzero(~np.array(keep)))


def find_daft(texts: pl.Series, daft: ModuleType, functions: ModuleType) -> Found:
    """daft's minhash; the bands in Polars, which is quicker than daft's own explode and groupby."""
    bands, rows = DATASKETCH_BANDS
    hashes = functions.minhash(daft.col("text"), num_hashes=bands * rows, ngram_size=SHINGLE, hash_function="xxhash")
    frame = daft.from_arrow(normalised(texts).alias("text").to_frame().to_arrow()).select(hashes.alias("signature"))
    signatures = pl.Series(pl.from_arrow(frame.to_arrow()["signature"])).to_numpy()
    dropped = np.zeros(len(texts), bool)
    for band in range(bands):
        part = pl.DataFrame(np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows]))
        dropped |= ~part.select(pl.struct(pl.all()).hash().is_first_distinct()).to_series().to_numpy()
    return Found(np.flatnonzero(dropped))


def find_text_dedup(texts: pl.Series, minhash: ModuleType, utils: ModuleType) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        normalised(texts).alias("text").to_frame().write_parquet(f"{folder}/texts.parquet")
        files = {"data_files": f"{folder}/texts.parquet", "cache_dir": f"{folder}/cache", "output": f"{folder}/out"}
        minhash.main.callback(
            io_args=utils.IOArgs(path="parquet", split="train", num_proc=None, **files),
            meta_args=utils.MetaArgs(column="text"),
            minhash_args=utils.MinHashArgs(
                ngram=SHINGLE, num_perm=PERMUTATIONS, threshold=THRESHOLD, hash_func="xxh3", hash_bits=32
            ),
        )
    clusters = np.arange(len(texts))
    for row in list(minhash.uf.parent):
        clusters[row] = minhash.uf.find(row)
    return Found(all_but_first(clusters))


def find_datatrove(
    texts: pl.Series, data: ModuleType, dedup: ModuleType, minhash: ModuleType, text: ModuleType
) -> Found:
    config = minhash.MinhashConfig(n_grams=SHINGLE, norm_config=text.TextNormConfig(*[False] * 7))  # is normalised
    minhash.logger.remove()
    clusters = np.arange(len(texts))
    with tempfile.TemporaryDirectory() as folder:
        documents = (data.Document(text=each, id=str(row)) for row, each in enumerate(normalised(texts)))
        dedup.MinhashDedupSignature(f"{folder}/signatures", config).run(documents, 0, 1)
        buckets = dedup.MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config)
        for bucket in range(config.num_buckets):
            buckets.run(None, bucket, config.num_buckets)
        cluster_step = dedup.MinhashDedupCluster(
            f"{folder}/buckets", f"{folder}/clusters", config, save_cluster_id=True
        )
        cluster_step.run(None, 0, 1)
        if (members := Path(folder) / "clusters" / "000000.clusters").exists():
            row, cluster = np.fromfile(members, "<u4").reshape(-1, 2).T
            clusters[row] = len(texts) + cluster.astype(np.int64)
    return Found(all_but_first(clusters))


def all_but_first(clusters: np.ndarray) -> np.ndarray:
    _, first = np.unique(clusters, return_index=True)
    return np.setdiff1d(np.arange(len(clusters)), first)


class Contestant(NamedTuple):
    find: Callable[..., Found]
    modules: tuple[str, ...]  # imported before the clock starts and handed to `find`
    package: str | None = None  # whose version is named
    ours: bool = False  # runs with this interpreter, not with --python
    normalises: bool = True  # calls `normalised`


CONTESTANTS = {
    "prefmix": Contestant(find_prefmix, ("prefmix.minhash",), ours=True, normalises=False),
    "sketch": Contestant(find_sketch, ("minhash_sketch",), ours=True),
    "daft": Contestant(find_daft, ("daft", "daft.functions"), "daft"),
    "rensa-r": Contestant(find_rensa_r, ("rensa",), "rensa"),
    "rensa-c": Contestant(find_rensa_c, ("rensa",), "rensa"),
    "datasketch": Contestant(find_datasketch, ("datasketch", "xxhash"), "datasketch"),
    "text-dedup": Contestant(find_text_dedup, ("text_dedup.minhash", "text_dedup.utils"), "text-dedup"),
    "datatrove": Contestant(
        find_datatrove,
        ("datatrove.data", "datatrove.pipeline.dedup", "datatrove.pipeline.dedup.minhash", "datatrove.utils.text"),
        "datatrove",
    ),
}


# The tables.


def contest_table(runs: dict[str, list[dict]], truth: Truth) -> str:
    head = ["texts/s", "wall s", "CPU s", "RSS MB", "recall", "J < .85", "precision", "pairs", "runs", "speed", "memory"]  # fmt: skip
    lines = [f"{'':12}" + "".join(f"{word:>10}" for word in head)]
    own = medians(runs["prefmix"]) if "prefmix" in runs else None
    hard = truth.dropped & (truth.nearest < 0.85)
    pairs = truth.pairs.select("left", "right")
    for name, each in runs.items():
        wall, cpu, rss = medians(each)
        dropped = np.zeros(len(truth.dropped), bool)
        dropped[each[-1]["dropped"]] = True
        proposed = "-"
        if "pairs" in each[-1] and "jaccard" not in each[-1]:
            given = pl.DataFrame(np.sort(each[-1]["pairs"], axis=1), schema=["left", "right"]).cast(pl.UInt32).unique()
            proposed = f"{len(pairs.join(given, on=['left', 'right'], how='semi')) / len(pairs):.4f}"
        cells = [
            f"{each[0]['texts'] / wall:,.0f}", f"{wall:.2f}", f"{cpu:.2f}", f"{rss:,.0f}", f"{dropped[truth.dropped].mean():.4f}",
            f"{dropped[hard].mean():.4f}", f"{truth.has_earlier[dropped].mean():.4f}", proposed, str(len(each)),
            *([f"{wall / own[0]:.1f}x", f"{own[2] / rss:.2f}"] if own else ["-", "-"]),
        ]  # fmt: skip
        lines.append(f"{name:12}" + "".join(f"{cell:>10}" for cell in cells))
    if own:
        lines.append("\nspeed: prefmix is so many times as fast; memory: prefmix's RSS as a share of this one's")
    return "\n".join(lines)


def medians(runs: list[dict]) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak MB."""
    wall, cpu, rss = (median(run[key] for run in runs) for key in ("wall_s", "cpu_s", "rss_mb"))
    return wall, cpu, rss


def check_claims(run: dict, truth: Truth) -> str:
    """Whether each row that prefmix drops, and the Jaccard that it names, are as in the truth."""
    rows = np.sort(run["pairs"], axis=1)
    claims = pl.DataFrame({"left": rows[:, 0], "right": rows[:, 1], "claimed": run["jaccard"]})
    claims = claims.cast({"left": pl.UInt32, "right": pl.UInt32})
    true = claims.join(truth.pairs, on=["left", "right"])
    equal = ((true["claimed"] - true["jaccard"]).abs() < 1e-9).sum()
    earlier = (run["pairs"][:, 1] < run["pairs"][:, 0]).sum()
    survivors = (~np.isin(run["pairs"][:, 1], run["dropped"])).sum()
    return (
        f"prefmix drops {len(claims):,} rows and names for each the row that stays: {equal:,} are true pairs with exactly the "
        f"Jaccard that it gives, {earlier:,} stay with an earlier row, {survivors:,} with one that is itself kept."
    )


def growth_table(texts: pl.Series, corpus: Path, folder: Path, options: argparse.Namespace) -> str:
    """prefmix with one and two threads on the corpus, and alone on more and more texts."""
    lines = [f"{'prefmix':28}" + "".join(f"{word:>10}" for word in ("texts/s", "wall s", "CPU s", "RSS MB", "dropped"))]

    def add(label: str, path: Path, threads: int, repeats: int) -> None:
        note(f"prefmix, {label}")
        each = [measure("prefmix", path, threads, options.python) for _ in range(repeats)]
        if "error" in each[-1]:
            lines.append(f"{label:28}  {each[-1]['error']}")
            return
        wall, cpu, rss = medians(each)
        speed, drops = each[0]["texts"] / wall, len(each[-1]["dropped"])
        lines.append(f"{label:28}{speed:>10,.0f}{wall:>10.2f}{cpu:>10.2f}{rss:>10,.0f}{drops:>10,}")

    for threads in (1, 2):
        add(f"the corpus, {threads} thread{'s' * (threads > 1)}", corpus, threads, options.repeats)
    chance = np.random.default_rng(SEED)
    for rows in (60_000, 250_000, *([1_000_000] if options.million else [])):
        path = folder / str(rows)
        path.mkdir()
        size = write_perturbed(texts, rows, path, chance)
        add(f"{rows:,} texts, {size / 1e6:,.0f} MB", path, 1, 1)
    return "\n".join(lines)


def write_perturbed(texts: pl.Series, rows: int, folder: Path, chance: np.random.Generator) -> int:
    """Nine in ten: a text of the corpus with three words in ten replaced, unlike any other; one in ten: a near copy of one
    of those, with one word in a hundred replaced. Gives the bytes of the texts."""
    size = 0
    for start in range(0, rows, 25_000):
        count = min(25_000, rows - start)
        copies = count // 10
        unlike = replaced(texts.gather(chance.integers(len(texts), size=count - copies)), 0.3, chance)
        near = replaced(unlike.gather(chance.choice(len(unlike), copies, replace=False)), 0.01, chance)
        part = pl.concat([unlike, near])
        size += int(part.str.len_bytes().sum())
        part.alias("text").to_frame().write_parquet(folder / f"{start:07}.parquet")
    return size


def replaced(texts: pl.Series, share: float, chance: np.random.Generator) -> pl.Series:
    """The texts with this share of their words replaced by words of all of them."""
    words = texts.str.split(" ")
    flat = words.explode()
    at = np.arange(len(flat))
    swap = chance.random(len(flat)) < share
    at[swap] = chance.integers(len(flat), size=swap.sum())
    row = np.repeat(np.arange(len(texts)), words.list.len().to_numpy())
    frame = pl.DataFrame({"row": row, "word": flat.gather(at)})
    return frame.group_by("row", maintain_order=True).agg(pl.col("word").str.join(" "))["word"]


if __name__ == "__main__":
    main()
