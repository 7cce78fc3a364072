"""How fast text of benchmarks is found in training rows, beside a Python set of 13-grams, and how surely.

    python scripts/bench_decontaminate.py [--data ../shared/data] [--repeats 3] [--markdown]

Texts: every prompt and answer of the eight real files that bench_build.py builds, 115,337 rows. Benchmarks: all of
../shared/data/benchmarks but rephrased_llm_decontaminator, which is measured apart. The two versions of TruthfulQA, and the
two splits of GSM8K, are benchmarks of their own: a short question that two items of one benchmark have is nobody's.

Speed. Each side runs as a process of its own on one core (where the system can pin it), in turn, after a warm-up; imports and
reading the files come before the clock. The seconds of the core (CPU) are shown beside those of the clock: on a machine that
others use too they say more. prefmix makes its index and searches raw texts. The peer normalises texts with
`prefmix.shingles.normalise`, makes a set of all 13-grams of the benchmarks as strings, and asks of each text whether one of
its own is in it; it can say that a text is hit, and not of what. Its lookup is also shown without the time for normalising.

Recall. Items are drawn from each benchmark alike and planted in texts of their own, edited in several ways; an item counts as
found when a text of this item is named in the hit. What is edited is the question; where choices are there they stand below it,
except with changed numbers and swapped words, where the question is alone.

False positives. T0 rows, made before these benchmarks without them: every hit is listed, to be judged by a human.

Paraphrases. The files of rephrased_llm_decontaminator hold rephrasings (and translations) of every other item of GSM8K, HumanEval
and MMLU subjects: the answers of all 660 of GSM8K agree, and the others were compared by eye. Its two CSV files are the MMLU
questions themselves and are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import polars as pl
from bench_build import CHATS, PAIRS

from prefmix import decontaminate
from prefmix.benchmarks import Benchmark, resolve
from prefmix.overlap import Index
from prefmix.schema import CANONICAL
from prefmix.shingles import normalise

SHARED = Path(__file__).resolve().parents[2] / "shared"
NGRAM, SEED = 13, 7
LEAST_WORDS = 8  # a shorter question is looked for as a sentence only

#: (benchmark, files, fields); the fields in ASIDE are neither questions nor choices.
BENCHMARKS = [
    ("agieval", "agieval/*.jsonl", ["passage", "question", "options"]),
    ("arena_hard", "arena_hard/*.jsonl", ["prompt"]),
    ("bbh", "bbh/*.json", ["input"]),
    ("gpt4all", "gpt4all/arc_*.validation.parquet", ["question", "choices.text"]),
    ("gpt4all", "gpt4all/*.test.jsonl", ["query"]),
    ("gpt4all", "gpt4all/boolq.validation.parquet", ["passage", "question"]),
    ("gpt4all", "gpt4all/hellaswag.validation.parquet", ["ctx", "endings"]),
    ("gpt4all", "gpt4all/openbookqa.validation.parquet", ["question_stem", "choices.text"]),
    ("gpt4all", "gpt4all/piqa.validation.parquet", ["goal", "sol1", "sol2"]),
    ("gpt4all", "gpt4all/winogrande_xl.validation.parquet", ["sentence"]),
    ("gsm8k", "gsm8k/test.jsonl", ["question", "answer"]),
    ("gsm8k_train", "gsm8k/train.jsonl.gz", ["question", "answer"]),
    ("humaneval", "humaneval/HumanEval.jsonl.gz", ["prompt", "canonical_solution"]),
    ("mmlu", "mmlu/test.parquet", ["question", "choices"]),
    ("mt_bench", "mt_bench/question.jsonl", ["turns", "reference"]),
    ("mt_bench", "mt_bench/reference_answer_gpt-4.jsonl", ["choices.turns"]),
    ("truthfulqa", "truthfulqa/TruthfulQA.csv", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]),
    ("truthfulqa_v0", "truthfulqa/TruthfulQA.v0.csv", ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]),
    ("wizardlm", "wizardlm/WizardLM_testset.jsonl", ["Instruction"]),
]  # fmt: skip
QUESTIONS = [
    *("question", "query", "prompt", "input", "goal", "ctx", "sentence", "question_stem", "Question", "Instruction"),
    "turns[0]",
]
PASSAGES = ["passage"]
ANSWERS = ["answer", "canonical_solution", "reference", "choices.turns", *BENCHMARKS[-2][2][1:]]

#: (file, benchmark, MMLU subject, what it is); its row n is made from the item 2n.
REPHRASED = [
    ("rephrase__rephrase_gsm8k.jsonl", "gsm8k", "", "English"),
    ("rephrase__humaneval_python.jsonl", "humaneval", "", "Python"),
    ("rephrase__humaneval_js.jsonl", "humaneval", "", "JavaScript"),
    ("rephrase__humaneval_c.jsonl", "humaneval", "", "C"),
    ("rephrase__abstract_algebra_test_rephrase_english_filtered_question.jsonl", "mmlu", "abstract_algebra", "English"),
    ("rephrase__abstract_algebra_test_chinese.jsonl", "mmlu", "abstract_algebra", "Chinese"),
    ("rephrase__abstract_algebra_test_chinese_filtered_question.jsonl", "mmlu", "abstract_algebra", "Chinese"),
    ("rephrase__high_school_us_history_test_chinese_filtered_question.jsonl", "mmlu", "high_school_us_history", "Chinese"),
    ("rephrase__sociology_test_chinese_filtered_question.jsonl", "mmlu", "sociology", "Chinese"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with the real data")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--markdown", action="store_true", help="print the section for docs/benchmarks.md")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return work(options.side, options.threads, options.corpus)
    if not (options.data / "benchmarks").is_dir():
        sys.exit(
            f"{options.data} is missing: give --data, the folder with benchmarks/, orca_dpo_pairs/, openhermes/ ..."
        )
    pieces = [*report(options.data, options.repeats)]
    if options.markdown:
        print("## Text of benchmarks in 115,337 rows\n\n    python scripts/bench_decontaminate.py\n")
        print("\n".join(f"```text\n{each.text}\n```\n" if each.is_table else f"{each.text}\n" for each in pieces))
    else:
        print("\n\n".join(each.text for each in pieces))


class Piece(NamedTuple):
    """Part of the report: a paragraph, or a table."""

    text: str
    is_table: bool = False


def report(data: Path, repeats: int) -> Iterator[Piece]:
    benchmarks = real_benchmarks(data)
    items = read(benchmarks)
    texts = real_texts(data)
    yield describe(items, texts)
    yield from speed(items, texts, repeats)
    index = Index(items, NGRAM)
    yield from hits_of_real_rows(data, benchmarks)
    yield from recall(items, index, clean_texts(data, index))
    yield from false_positives(data, items)
    yield from paraphrases(data, items, index)


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Piece:
    """Columns as wide as they need to be; the first one, and those without a head, which hold words, to the left."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, ["", *head[1:]], strict=True)
        return "  ".join(cell.rjust(width) if name else cell.ljust(width) for cell, width, name in cells).rstrip()

    return Piece("\n".join(map(line, [head, *rows])), is_table=True)


# What is read.


def real_benchmarks(data: Path) -> list[Benchmark]:
    found: dict[str, Benchmark] = {}
    for name, path, fields in BENCHMARKS:
        (each,) = resolve(settings({name: {"path": path, "fields": fields}}), data / "benchmarks")
        sections = found[name].sections if name in found else ()
        found[name] = Benchmark(name, name, (*sections, *each.sections), {})
    return list(found.values())


def settings(against: dict[str, Any]) -> Any:
    from prefmix.recipe import Decontaminate

    return Decontaminate.model_validate({"against": against})


def read(benchmarks: Sequence[Benchmark]) -> pl.DataFrame:
    parts = [each.read().with_columns(benchmark=pl.lit(each.name)) for each in benchmarks]
    return pl.concat(parts).select("benchmark", "item", "field", "text")


def without(items: pl.DataFrame, fields: Sequence[str]) -> pl.DataFrame:
    return items.filter(~pl.col("field").str.replace(r"(\[\d+\])+$", "").is_in(fields))


def real_rows(data: Path, **sources: str) -> dict:
    """Canonical rows of some files, none dropped."""
    from prefmix.build import curate
    from prefmix.plan import plan
    from prefmix.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "bench.toml"
        lines = ['name = "bench"', "[filter]", 'default = "off"', "[dedupe]", 'exact = "off"']
        for name, path in sources.items():
            lines += [f"[sources.{name}]", f"path = {json.dumps(str(data.resolve() / path))}"]
        recipe.write_text("\n".join(lines))
        return dict(curate(plan(load_recipe(recipe))).rows)


def real_texts(data: Path) -> pl.Series:
    """Every prompt and answer, repeats included."""
    from prefmix.schema import answers, prompt_text

    rows = real_rows(data, **PAIRS, **CHATS)
    parts = [frame.select(text=part).to_series() for kind, frame in rows.items() for part in (prompt_text(kind), *answers(kind))]  # fmt: skip
    return pl.concat(parts).rechunk().alias("text")


def megabytes(texts: pl.Series) -> float:
    return int(texts.str.len_bytes().sum()) / 1e6


def describe(items: pl.DataFrame, texts: pl.Series) -> Piece:
    count = items.select("benchmark", "item").n_unique()
    return Piece(
        f"{len(texts):,} texts, {megabytes(texts):.1f} MB; {items['benchmark'].n_unique()} benchmarks with {count:,} items, "
        f"{len(items):,} texts, {megabytes(items['text']):.1f} MB."
    )


# Speed: from outside, and inside the process that is measured.


def speed(items: pl.DataFrame, texts: pl.Series, repeats: int) -> Iterator[Piece]:
    sides = [("prefmix", 1), ("set", 1), ("prefmix", 2)]
    runs: dict[tuple[str, int], list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        items.write_parquet(Path(folder) / "items.parquet")
        texts.to_frame().write_parquet(Path(folder) / "texts.parquet")
        for _ in range(repeats):
            for side in sides:
                runs[side].append(measure(*side, Path(folder)))
                note(f"{side[0]}, {side[1]} threads: {runs[side][-1]['search_s']:.1f} s")
    size = megabytes(texts)

    def medians(side: tuple[str, int]) -> dict[str, float]:
        return {key: median(run[key] for run in runs[side]) for key in runs[side][0] if key != "rows"}

    peer, one, two = (medians(side) for side in (("set", 1), ("prefmix", 1), ("prefmix", 2)))
    bare = {
        **peer,
        "index_s": 0.0,
        **{f"search{unit}": peer[f"search{unit}"] - peer[f"normalise{unit}"] for unit in ("_s", "_cpu_s")},
    }
    lines = []
    for label, own in (
        ("prefmix", one),
        ("set", peer),
        ("set, texts normalised before", bare),
        ("prefmix, two threads", two),
    ):
        clock, core = own["search_s"], own["search_cpu_s"]
        lines.append([
            label, f"{own['index_s']:.2f}" if own["index_s"] else "-", f"{clock:.2f}", f"{size / clock:.1f}",
            f"{peer['search_s'] / clock:.2f}x", f"{core:.2f}", f"{size / core:.1f}", f"{peer['search_cpu_s'] / core:.2f}x",
            f"{own['rss_mb']:,.0f}",
        ])  # fmt: skip
    yield table(["", "index s", "search s", "MB/s", "of the set", "CPU s", "MB/CPU s", "of the set", "RSS MB"], lines)
    ours, theirs = (set(runs[side, 1][0]["rows"]) for side in ("prefmix", "set"))
    both = [each["index_cpu_s"] + each["search_cpu_s"] for each in (one, peer)]
    yield Piece(
        f"Medians of {repeats} runs in turn. On one core prefmix searches {peer['search_cpu_s'] / one['search_cpu_s']:.1f} times as "
        f"fast as the set by the time of the core, {peer['search_s'] / one['search_s']:.1f} times by the clock; with the index "
        f"{both[1] / both[0]:.1f} times ({size / both[0]:.0f} against {size / both[1]:.0f} MB per second of the core). Two threads "
        f"search {one['search_s'] / two['search_s']:.1f} times as fast as one."
    )
    yield Piece(
        f"The set hits {len(theirs):,} texts. prefmix names {len(ours & theirs):,} of them and {len(ours - theirs):,} others "
        f"(short items, edited items); the {len(theirs - ours):,} that it leaves share 13 words with an item, but less than a "
        f"third of it, or boilerplate alone."
    )


def measure(side: str, threads: int, corpus: Path) -> dict:
    command = [sys.executable, __file__, "--side", side, "--threads", str(threads), "--corpus", str(corpus)]
    limits = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS"), str(threads))
    run = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{side}: {run.stderr}")
    return json.loads(run.stdout)


def work(side: str, threads: int, corpus: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    items, texts = pl.read_parquet(corpus / "items.parquet"), pl.read_parquet(corpus / "texts.parquet")["text"]
    SIDES[side](items.head(1000), texts.head(1000))
    print(json.dumps({**SIDES[side](items, texts), "rss_mb": peak_mb()}))


def peak_mb() -> float:
    """The highest resident memory of this process so far. (On Linux ru_maxrss begins with that of the parent.)"""
    try:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def run_prefmix(items: pl.DataFrame, texts: pl.Series) -> dict:
    started = now()
    index = Index(items, NGRAM)
    indexed = now()
    found = index.search(texts)
    return {
        **took("index", started, indexed),
        **took("search", indexed, now()),
        "rows": found["row"].unique().to_list(),
    }


def run_set(items: pl.DataFrame, texts: pl.Series) -> dict:
    started = now()
    known: set[str] = set()
    for text in normalise(items["text"]):
        known.update(grams(text))
    indexed = now()
    plain = normalise(texts)
    normalised = now()
    rows = [row for row, text in enumerate(plain) if not known.isdisjoint(grams(text))]
    times = took("index", started, indexed) | took("normalise", indexed, normalised) | took("search", indexed, now())
    return {**times, "rows": rows}


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def took(name: str, start: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    """Seconds of the clock and of the core."""
    return {f"{name}_s": end[0] - start[0], f"{name}_cpu_s": end[1] - start[1]}


def grams(text: str) -> Iterator[str]:
    words = text.split(" ")
    return map(" ".join, zip(*(words[nth:] for nth in range(NGRAM)), strict=False))


SIDES: Mapping[str, Callable[[pl.DataFrame, pl.Series], dict]] = {"prefmix": run_prefmix, "set": run_set}


# What is found in the real rows.


def hits_of_real_rows(data: Path, benchmarks: Sequence[Benchmark]) -> Iterator[Piece]:
    rows = real_rows(data, **PAIRS, **CHATS)
    started = time.perf_counter()
    index = decontaminate.index_of(benchmarks, NGRAM)
    indexed = time.perf_counter()
    prompts = decontaminate.find(rows, index)
    asked = time.perf_counter()
    everything = decontaminate.find(rows, index, with_answers=True)
    done = time.perf_counter()
    yield Piece(
        f"In the rows of a build, whose equal texts are searched once: index (and reading the benchmarks) {indexed - started:.1f} "
        f"s, prompts {asked - indexed:.1f} s, prompts and answers {done - asked:.1f} s, on all cores."
    )
    reports = decontaminate.report(prompts, index), decontaminate.report(everything, index)
    lines = []
    for name, entry in reports[0].items():
        answers = reports[1][name]
        counts = [entry["items"], entry["touched"], entry["rows"], *(entry["rules"].get(r, 0) for r in decontaminate.RULES.categories)]  # fmt: skip
        lines.append([name, *(f"{count:,}" for count in (*counts, answers["touched"], answers["rows"]))])
    head = ["", "items", "touched", "rows", *decontaminate.RULES.categories, "and answers: touched", "rows"]
    yield table(head, lines)
    row, text = ["kind", "place"], ["kind", "place", "text"]
    is_contained = pl.col("rule") == "containment"
    alone = everything.filter(is_contained.all().over(text))
    nothing_else = everything.filter(is_contained.all().over(row))
    yield Piece(
        f"Rows hit: {prompts.select(row).n_unique():,} by their prompt, {everything.select(row).n_unique():,} with answers. "
        f"Containment is the only rule for {alone.height:,} pairs of a row and a text, {alone['text'].n_unique():,} texts; "
        f"{nothing_else.select(row).n_unique():,} rows hold nothing else. Some of these texts, drawn at random, each with the "
        f"words of a row (coverage; the text; the row from where it begins to be like it):"
    )
    drawn = alone.sort("coverage", "place").unique("text", keep="first", maintain_order=True).sample(fraction=1, seed=SEED, shuffle=True)  # fmt: skip
    yield Piece("\n".join(line for hit in drawn.head(15).to_dicts() for line in shown(hit, rows, index)), is_table=True)


def shown(hit: dict[str, Any], rows: Mapping, index: Index) -> list[str]:
    """An item and the words of a row from the first shingle on that they share, for a human to judge."""
    from prefmix.schema import answers, prompt_text

    parts = {"prompt": prompt_text(hit["kind"]), "chosen": answers(hit["kind"])[0], "answer": answers(hit["kind"])[0]}
    part = parts.get(hit["part"], answers(hit["kind"])[-1])
    words = normalise(rows[hit["kind"]][[hit["place"]]].select(part).to_series()).item().split(" ")
    wanted = index.texts["text"][hit["text"]].split(" ")
    known = {tuple(wanted[start : start + 5]) for start in range(len(wanted) - 4)}
    first = next((start for start in range(len(words)) if tuple(words[start : start + 5]) in known), 0)
    return [
        f"{hit['benchmark']} {hit['item']} {hit['field']}, coverage {hit['coverage']:.2f}, {hit['source']} {hit['part']}",
        f"    {' '.join(wanted[:24])}",
        f"    {' '.join(words[max(first - 4, 0) :][:28])}",
    ]


# Planted items.


class Planted(NamedTuple):
    benchmark: str
    item: str
    question: str
    choices: list[str]

    def __str__(self) -> str:
        lettered = (
            f"({letter}) {choice}" for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", self.choices, strict=False)
        )
        return "\n".join([self.question, *lettered])


def draw_items(items: pl.DataFrame, each: int, chance: random.Random) -> list[Planted]:
    """So many items of each benchmark that have a question, with their choices."""
    found: dict[tuple[str, str], Planted] = {}
    for benchmark, item, field, text in without(items, [*PASSAGES, *ANSWERS]).rows():
        if field in QUESTIONS:
            found.setdefault((benchmark, item), Planted(benchmark, item, text, []))
        elif (benchmark, item) in found and field != "turns[1]":
            found[benchmark, item].choices.append(text)
    by_benchmark: dict[str, list[Planted]] = {}
    for planted in found.values():
        by_benchmark.setdefault(planted.benchmark, []).append(planted)
    return [item for own in by_benchmark.values() for item in chance.sample(own, min(each, len(own)))]


def in_other_case(text: str, chance: random.Random) -> str:
    """Words of other case, other punctuation in the place of what is there."""
    words = (word.swapcase() if word.isascii() and chance.random() < 0.5 else word for word in re.split("( )", text))
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: chance.choice(',;!?:.-*"'), "".join(words))


def with_a_number_changed(text: str, chance: random.Random) -> str | None:
    numbers = list(re.finditer(r"\d+", text))
    if not numbers:
        return None
    found = chance.choice(numbers)
    return f"{text[: found.start()]}{int(found[0]) + chance.randint(1, 9)}{text[found.end() :]}"


def with_words_swapped(text: str, chance: random.Random) -> str | None:
    words = text.split(" ")
    places = [at for at in range(len(words) - 1) if words[at].lower() != words[at + 1].lower()]
    if not places:
        return None
    at = chance.choice(places)
    return " ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])


def with_choices_reordered(item: Planted, chance: random.Random) -> str | None:
    if len(item.choices) < 2:
        return None
    return str(item._replace(choices=chance.sample(item.choices, len(item.choices))))


def in_two_turns(text: str) -> list[dict[str, str]]:
    words = text.split(" ")
    half = (len(words) + 1) // 2
    turns = [("user", " ".join(words[:half])), ("assistant", "Go on."), ("user", " ".join(words[half:]))]
    return [{"role": role, "content": content} for role, content in (*turns, ("assistant", "I see."))]


def clean_texts(data: Path, index: Index) -> list[str]:
    """Prompts of T0 and Hermes rows of 60 to 300 words of which nothing is found."""
    prompts = pl.concat([pl.read_parquet(data / path)["instruction"] for path in CHATS.values()]).unique(
        maintain_order=True
    )
    words = prompts.str.count_matches(" ")
    prompts = prompts.filter((words >= 60) & (words <= 300))
    hit = set(index.search(prompts)["row"])
    return [text for row, text in enumerate(prompts) if row not in hit]


def recall(items: pl.DataFrame, index: Index, around: list[str]) -> Iterator[Piece]:
    chance = random.Random(SEED)
    planted = draw_items(items, 150, chance)
    kinds: dict[str, list[str | None]] = {
        "verbatim": [str(item) for item in planted],
        "other case and punctuation": [in_other_case(str(item), chance) for item in planted],
        "inside a longer prompt": [f"{chance.choice(around)}\n\n{item}\n\n{chance.choice(around)}" for item in planted],
        "spread over two turns": [str(item) for item in planted],
        "choices reordered": [with_choices_reordered(item, chance) for item in planted],
        "the question alone": [item.question for item in planted],
        "one number changed": [with_a_number_changed(item.question, chance) for item in planted],
        "two words swapped": [with_words_swapped(item.question, chance) for item in planted],
    }
    own = index.items.join(index.texts.with_row_index("text_number"), on=["benchmark", "text"])
    own = own.select("benchmark", "item", text=pl.col("text_number").cast(pl.Int64)).unique()
    words = normalise(pl.Series([item.question for item in planted])).str.count_matches(" ") + 1
    short = (words < LEAST_WORDS).to_list()
    lines = []
    for kind, texts in kinds.items():
        rows = [row for row, text in enumerate(texts) if text is not None]
        chosen = [texts[row] or "" for row in rows]
        hits = found_in_turns(chosen, index) if kind == "spread over two turns" else index.search(pl.Series(chosen))
        owners = pl.DataFrame(
            [(at, planted[row].benchmark, planted[row].item) for at, row in enumerate(rows)],
            schema={"row": pl.Int64, "benchmark": pl.String, "item": pl.String},
            orient="row",
        )
        named = hits.select("row", "text", "rule").join(owners, on="row").join(own, on=["benchmark", "item", "text"])
        found = set(named["row"])
        contained = set(named.filter(pl.col("rule") == "containment")["row"])
        cells = [kind]
        for is_short in (False, True):
            among = {at for at, row in enumerate(rows) if short[row] == is_short}
            cells += [f"{len(among):,}", share(found & among, among), share(contained & among, among)]
        lines.append(cells)
    drawn = len(planted)
    yield Piece(
        f"{drawn:,} items, up to 150 of each benchmark, {drawn - sum(short):,} with a question of {LEAST_WORDS} words or more and "
        f"{sum(short)} with a shorter one; recall, and recall by containment alone:"
    )
    yield table(["planted", "items", "recall", "contained", f"< {LEAST_WORDS} words", "recall", "contained"], lines)


def share(part: set[int], whole: set[int]) -> str:
    return f"{len(part) / len(whole):.3f}" if whole else "-"


def shortened(text: str) -> str:
    return " ".join(text.split()[:20])


def found_in_turns(texts: Sequence[str], index: Index) -> pl.DataFrame:
    """Hits in rows that have each text in two turns of the user: `row`, `text`, `rule`."""
    rows = [{"source": "planted", "messages": in_two_turns(text)} for text in texts]
    found = decontaminate.find({"sft": pl.DataFrame(rows, schema=CANONICAL["sft"])}, index)
    return found.select(pl.col("rule").cast(pl.String), row=pl.col("place").cast(pl.Int64), text="text")


# Rows that hold nothing.


def false_positives(data: Path, items: pl.DataFrame) -> Iterator[Piece]:
    prompts = pl.read_parquet(data / CHATS["t0"])["instruction"]
    for label, left_out in (("questions and choices", [*PASSAGES, *ANSWERS]), ("all texts, passages as well", [])):
        index = Index(without(items, left_out), NGRAM)
        found = index.search(prompts)
        named = found.hstack(index.evidence(found))
        rows = named.group_by("benchmark", "item", "field", maintain_order=True).agg(
            pl.col("rule").first(), pl.col("coverage").max(), pl.col("matched").first(), rows=pl.col("row").n_unique()
        )
        yield Piece(
            f"{len(prompts):,} T0 rows against {label}: {found['row'].n_unique()} rows hit, {rows.height} different texts:"
        )
        lines = [
            [f"{hit['benchmark']} {hit['item'].rpartition('/')[2]} {hit['field']}", hit["rule"], f"{hit['coverage']:.2f}", str(hit["rows"]), shortened(hit["matched"])]
            for hit in rows.to_dicts()
        ]  # fmt: skip
        yield table(["", "rule", "coverage", "rows", ""], lines)


# Paraphrases.


def paraphrases(data: Path, items: pl.DataFrame, index: Index) -> Iterator[Piece]:
    folder = data / "benchmarks" / "rephrased_llm_decontaminator"
    subjects = pl.read_parquet(data / "benchmarks" / "mmlu" / "test.parquet").with_row_index("row")
    files = {"gsm8k": "gsm8k/test.jsonl", "humaneval": "humaneval/HumanEval.jsonl.gz", "mmlu": "mmlu/test.parquet"}
    own = index.items.join(index.texts.with_row_index("number"), on=["benchmark", "text"])
    lines = []
    for name, benchmark, subject, language in REPHRASED:
        texts = [json.loads(line)["text"] for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        of_subject = subjects.filter(pl.col("config") == subject)["row"].to_list() if subject else range(2 * len(texts))
        made_from = {row: f"{files[benchmark]}:{of_subject[2 * row]}" for row, text in enumerate(texts) if text.strip()}
        hits = index.search(pl.Series(texts)).join(
            own.select("benchmark", "item", text=pl.col("number").cast(pl.Int64)), on="text"
        )
        pairs = set(hits.filter(pl.col("benchmark") == benchmark).select("row", "item").rows())
        found = sum((row, item) in pairs for row, item in made_from.items())
        contained = set(hits.filter((pl.col("benchmark") == benchmark) & (pl.col("rule") == "containment")).select("row", "item").rows())  # fmt: skip
        lines.append([
            f"{benchmark} {subject}".strip(), language, str(len(made_from)), str(found), f"{found / len(made_from):.3f}",
            f"{sum((row, item) in contained for row, item in made_from.items()) / len(made_from):.3f}",
            str(hits.filter(pl.col("row").is_in(list(made_from)))["row"].n_unique()),
        ])  # fmt: skip
    yield Piece("Rephrased items (rephrased_llm_decontaminator), found with the item that they were made from:")
    yield table(["made from", "into", "texts", "found", "recall", "contained", "any hit"], lines)


if __name__ == "__main__":
    main()
