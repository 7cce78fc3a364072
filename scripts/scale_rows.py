"""As many rows as are wanted, made from the real ones by seeded edits, with duplicates in the same proportion at every size.

    python scripts/scale_rows.py 1000000 FOLDER [--seed 7] [--processes 2] [--real ../shared/data]

Three rows in ten are pairs (orca_dpo_pairs without scores, ultrafeedback_binarized with them), seven are chats (openhermes),
in Parquet files of 250,000 rows (zstd); one source of chats is JSON lines. A row has the lengths, the scores and the refusals
of a real row, drawn by chance: about 1.2 kB of text, some of 20 kB, and ties, inverted pairs and empty answers as they are.

Of a thousand rows 845 are new: sentences of several real rows one after the other, in which 30 words in 100 (60 in a short
text) are replaced by words drawn as often as they occur, so that no two rows are near. The others, see `ROLES`:

- 50 have the contents of another row, most often of one, of eight at most; in another source too, with scores of their own;
- 70 are near copies, in 20 clusters of 2 to 20: so many words are replaced that the Jaccard similarity with the first of them,
  over word 5-grams of prompt and chosen answer, is about what was drawn between 0.82 and 0.98;
- 30 have the prompt of another row, with answers of their own;
- 5 begin with a question of GSM8K's test or of TruthfulQA.

Which thousand a row belongs to is a permutation of all rows of its kind: copies lie anywhere, in other files and sources. A
row depends on the seed, the number of rows and its own number alone, not on the processes that share the work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from bench_build import CHATS, PAIRS

from prefmix.filters import DISCLAIMER, REFUSAL

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
SEED, FILE_ROWS, GROUP_ROWS, BATCH_ROWS = 7, 250_000, 16_000, 2_000
FORMAT = 1  # of what is written: a folder of another one is written anew


class Source(NamedTuple):
    kind: str
    format: str
    suffix: str
    share: float  # of all rows


#: In the order of their priority.
SOURCES = {
    "orca": Source("preference", "orca_dpo_pairs", "parquet", 0.12),
    "ultrafeedback": Source("preference", "ultrafeedback_binarized", "parquet", 0.18),
    "hermes": Source("sft", "openhermes", "parquet", 0.65),
    "chats": Source("sft", "openhermes", "jsonl", 0.05),
}
#: The texts of a row by kind, the answer that is trained towards at `CHOSEN`; what comes before it is the prompt.
PARTS = {"preference": ("prompt", "chosen", "rejected"), "sft": ("instruction", "input", "output")}
CHOSEN = {"preference": 1, "sft": 2}
#: What stands beside the pairs that have scores.
SCORED = {
    "source": pl.String,
    "chosen_avg_rating": pl.Float64,
    "rejected_avg_rating": pl.Float64,
    "chosen_model": pl.String,
}
#: Whose questions are in some rows: file and field.
BENCHMARKS = {
    "gsm8k": ("benchmarks/gsm8k/test.jsonl", "question"),
    "truthfulqa": ("benchmarks/truthfulqa/TruthfulQA.csv", "Question"),
}

# One real row in so many is read: what is drawn from must not take longer to read than 5,000 rows take to write.
_SAMPLED = 12
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"  # every letter of these is a word
_WORD = rf"[{_UNSPACED}]\s*|[^\s{_UNSPACED}]+\s*"
_SENTENCE_END = r"[.!?:;][^\p{L}\p{N}]*$|\n"
_SENTENCE_WORDS = (3, 40)
_OPENING_CHARS = 200
_VOCABULARY_BYTES = 24  # longer words are addresses and rules
LEAST_PROMPT, LEAST_NEAR = 12, 60  # words: a short text has few that differ, one edit of a short text is a large one
_SHORT, _REPLACED, _REPLACED_IN_SHORT = 40, 0.3, 0.6
_JACCARD = (0.82, 0.98)

NEW, EXACT, PROMPT, NEAR, BENCHMARK = range(5)
_CLUSTERS = [19, 11, 8, 6, 4, 3, 3, 2, 2, 2, *[1] * 10]  # near copies of the first row of each


def _roles() -> tuple[np.ndarray, np.ndarray]:
    """(role, the row whose contents it has) of each row of a thousand, well mixed: a part of it has its part of each role."""
    exact = np.arange(50) ** 2 // 50
    prompt = 100 + np.arange(30) ** 2 // 30
    near = 200 + np.repeat(np.arange(len(_CLUSTERS)), _CLUSTERS)
    role = np.repeat([NEW, BENCHMARK, EXACT, PROMPT, NEAR], [845, 5, 50, 30, 70])
    origin = np.concatenate([np.arange(850), exact, prompt, near])
    at = np.arange(1000) * 387 % 1000
    roles, origins = np.empty(1000, np.int64), np.empty(1000, np.int64)
    roles[at], origins[at] = role, at[origin]
    return roles, origins


ROLES, ORIGINS = _roles()
UNIT = len(ROLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--real", type=Path, default=REAL, help="folder with the real rows")
    options = parser.parse_args()
    if not options.real.is_dir():
        sys.exit(
            f"{options.real} is missing: give --real, the folder with orca_dpo_pairs/, openhermes/, benchmarks/ ..."
        )
    print(json.dumps(write(options.folder, options.rows, options.seed, options.processes, options.real), indent=2))


def write(
    folder: Path, rows: int, seed: int = SEED, processes: int = 1, real: Path = REAL, file_rows: int = FILE_ROWS
) -> dict[str, Any]:
    """Writes the rows into a folder, or finds that they are there. Gives what `scale.json`, written last, says: the rows and
    the bytes of text and of files of each source, and the pattern of its files."""
    stamp = {"format": FORMAT, "rows": rows, "seed": seed, "file_rows": file_rows}
    path = folder / "scale.json"
    if path.exists():
        about = json.loads(path.read_text())
        if {key: about.get(key) for key in stamp} == stamp:
            return about
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    sources: dict[str, dict[str, Any]] = {}
    jobs = []
    for name, (start, stop) in row_ranges(rows).items():
        pattern = f"{name}-*.{SOURCES[name].suffix}"
        for old in folder.glob(pattern):
            old.unlink()
        sources[name] = {"format": SOURCES[name].format, "files": pattern, "rows": stop - start}
        for number, first in enumerate(range(start, stop, file_rows)):
            file = folder / f"{name}-{number:05}.{SOURCES[name].suffix}"
            jobs.append((name, file, rows, first, min(first + file_rows, stop), seed, real))
    if processes > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            texts = list(pool.map(_write_file, *zip(*jobs, strict=True)))
    else:
        texts = [_write_file(*job) for job in jobs]
    for name, about in sources.items():
        about["bytes"] = sum(file.stat().st_size for file in folder.glob(about["files"]))
        about["text_bytes"] = sum(text for job, text in zip(jobs, texts, strict=True) if job[0] == name)
    totals = {key: sum(about[key] for about in sources.values()) for key in ("bytes", "text_bytes")}
    written = {**stamp, **totals, "seconds": round(time.perf_counter() - started, 1), "sources": sources}
    path.write_text(json.dumps(written, indent=2))
    return written


def row_ranges(rows: int) -> dict[str, tuple[int, int]]:
    """The first row of each source among those of its kind, and the first one behind it; the sources lie end to end."""
    found: dict[str, tuple[int, int]] = {}
    pairs = sum(source.share for source in SOURCES.values() if source.kind == "preference")
    for kind, whole in {"preference": round(pairs * rows), "sft": rows - round(pairs * rows)}.items():
        names = [name for name, source in SOURCES.items() if source.kind == kind]
        shares = np.cumsum([SOURCES[name].share for name in names])
        ends = [0, *np.rint(shares / shares[-1] * whole).astype(int).tolist()]
        found |= {name: (ends[place], ends[place + 1]) for place, name in enumerate(names)}
    return found


def _write_file(name: str, path: Path, rows: int, first: int, stop: int, seed: int, real: Path) -> int:
    """Writes rows of a source, those from `first` to before `stop` of its kind; gives the bytes of their texts."""
    pool = read_pool(real)
    kind = SOURCES[name].kind
    of_kind = sum(end - start for other, (start, end) in row_ranges(rows).items() if SOURCES[other].kind == kind)
    spots = np.random.default_rng([seed, rows, of_kind]).permutation(of_kind)[first:stop]
    size = 0
    tables = []
    with path.open("wb") as file:
        writer: pq.ParquetWriter | None = None
        for at in range(0, len(spots), BATCH_ROWS):
            batch = spots[at : at + BATCH_ROWS]
            columns = texts_of(pool, kind, batch, seed)
            size += sum(len(column.buffers()[2]) for column in columns.values())
            tables.append(_table(pool, name, columns, batch, seed))
            if sum(map(len, tables)) < GROUP_ROWS and at + BATCH_ROWS < len(spots):
                continue
            table = pa.concat_tables(tables)
            tables = []
            if path.suffix == ".jsonl":
                pl.DataFrame(table).write_ndjson(file)
                continue
            if writer is None:
                repeated = [column for column in ("system", *SCORED) if column in table.column_names]
                writer = pq.ParquetWriter(
                    file, table.schema, compression="zstd", compression_level=3, use_dictionary=repeated
                )
            writer.write_table(table, row_group_size=GROUP_ROWS)
        if writer is not None:
            writer.close()
    return size


def _table(pool: Pool, name: str, texts: dict[str, pa.Array], spots: np.ndarray, seed: int) -> pa.Table:
    """The columns of a source's format."""
    if SOURCES[name].kind == "sft":
        return pa.table(texts)
    prompt, chosen, rejected = texts.values()
    draw = _draws(seed, "preference", "beside", spots)
    if name == "orca":
        system = pool.systems.take(pa.array(_scaled(draw, len(pool.systems))))
        return pa.table({"system": system, "question": prompt, "chosen": chosen, "rejected": rejected})
    beside = pool.scored.take(pa.array(_scaled(draw, len(pool.scored))))
    columns = {"instruction": prompt, "chosen_response": chosen, "rejected_response": rejected}
    return pa.table({**columns, **{column: beside[column] for column in beside.column_names}})


# What real rows give.


class Pool(NamedTuple):
    """Parts of real rows. A word comes with the white space behind it."""

    words: pa.Array  # every distinct one
    bare: np.ndarray  # int32, for each word the same one without the white space
    text: np.ndarray  # int32, numbers of words: real texts end to end
    vocabulary: np.ndarray  # int32, words as often as they occur
    starts: np.ndarray  # int64, of the sentences in `text`
    sizes: np.ndarray  # int64, their words
    sentences: int  # so many come first; behind them those that are taken as they are: openings, questions
    questions: tuple[int, int]  # the sentences that are questions of benchmarks
    lengths: dict[str, np.ndarray]  # int64 (rows, 3), words of the parts of real rows by kind
    openings: dict[str, np.ndarray]  # int64 (rows, 3), the sentence with which a part refuses, or -1
    identical: np.ndarray  # bool, real pairs with equal answers
    scored: pa.Table  # scores of real pairs, with what names their origin
    systems: pa.Array


@cache
def read_pool(real: Path) -> Pool:
    """What is drawn from; a process reads it once."""
    rows, scored, systems = _real_rows(real)
    openings, refusals = _refusals(rows)
    questions = [_benchmark(real / path)[field] for path, field in BENCHMARKS.values()]
    verbatim = pl.concat([refusals, *questions])
    texts = pl.concat([*(frame[:, part] for frame in rows.values() for part in range(3)), verbatim])
    split = texts.str.strip_chars().filter(texts != "").str.extract_all(_WORD)
    # The last word of a text has white space too: sentences of several texts come to stand side by side.
    flat = split.explode(empty_as_null=False).str.replace(r"(\S)$", "$1 ")
    distinct = flat.unique(maintain_order=True)
    words = pl.concat([distinct, distinct.str.strip_chars_end()]).unique(maintain_order=True)
    text = _numbers_of(flat, words)
    ends = np.cumsum(split.list.len().to_numpy().astype(np.int64))
    real_ends, verbatim_ends = np.split(ends, [len(ends) - len(verbatim)])
    starts, sizes = _sentences(text[: real_ends[-1]], words, real_ends)
    verbatim_starts = np.append(real_ends[-1], verbatim_ends[:-1])
    is_short = (words.str.len_bytes() <= _VOCABULARY_BYTES).to_numpy()
    return Pool(
        words=words.to_arrow().cast(pa.string()),
        bare=_numbers_of(words.str.strip_chars_end(), words),
        text=text,
        vocabulary=text[: real_ends[-1]][is_short[text[: real_ends[-1]]]],
        starts=np.append(starts, verbatim_starts),
        sizes=np.append(sizes, verbatim_ends - verbatim_starts),
        sentences=len(starts),
        questions=(len(starts) + len(refusals), len(starts) + len(verbatim)),
        lengths={
            kind: frame.select(pl.all().str.count_matches(r"\S+")).to_numpy().astype(np.int64)
            for kind, frame in rows.items()
        },
        openings={kind: np.where(number >= 0, len(starts) + number, -1) for kind, number in openings.items()},
        identical=(rows["preference"]["chosen"] == rows["preference"]["rejected"]).to_numpy(),
        scored=scored.to_arrow(),
        systems=systems.to_arrow().cast(pa.string()),
    )


def _real_rows(real: Path) -> tuple[dict[str, pl.DataFrame], pl.DataFrame, pl.Series]:
    """One real row in `_SAMPLED` by kind, as `PARTS`; the scores of pairs, the distinct system prompts."""
    renamed = dict(zip(("question", "chosen", "rejected"), PARTS["preference"], strict=True))
    renamed |= dict(zip(("instruction", "chosen_response", "rejected_response"), PARTS["preference"], strict=True))
    pairs, scored, systems = [], [], [pl.Series("system", [""])]
    for path in PAIRS.values():
        frame = pl.read_parquet(real / path)
        sampled = frame.gather_every(_SAMPLED)
        pairs.append(sampled.rename(renamed, strict=False).select(pl.col(PARTS["preference"]).fill_null("")))
        if "system" in frame.columns:
            systems.append(frame["system"])
        else:
            scored.append(sampled.select(pl.col(name).cast(dtype) for name, dtype in SCORED.items()))
    chats = [
        pl.read_parquet(real / path).gather_every(_SAMPLED).select(pl.col(PARTS["sft"]).fill_null(""))
        for path in CHATS.values()
    ]
    rows = {"preference": pl.concat(pairs), "sft": pl.concat(chats)}
    return rows, pl.concat(scored), pl.concat(systems).unique().sort()


def _benchmark(path: Path) -> pl.DataFrame:
    return pl.read_csv(path) if path.suffix == ".csv" else pl.read_ndjson(path)


def _refusals(rows: dict[str, pl.DataFrame]) -> tuple[dict[str, np.ndarray], pl.Series]:
    """The openings of answers that refuse, and for each part of each row, by kind, the number of its opening or -1."""
    numbers, refusals, count = {}, [], 0
    for kind, frame in rows.items():
        numbers[kind] = np.full((frame.height, 3), -1)
        for part in range(CHOSEN[kind], 3):
            opening = frame[:, part].str.head(_OPENING_CHARS).str.replace(r"\s+\S*$", " ")
            refuses = (opening.str.contains(REFUSAL) & ~opening.str.contains(DISCLAIMER)).arg_true()
            numbers[kind][refuses.to_numpy(), part] = count + np.arange(len(refuses))
            refusals.append(opening.gather(refuses))
            count += len(refuses)
    return numbers, pl.concat(refusals)


def _numbers_of(column: pl.Series, words: pl.Series) -> np.ndarray:
    """int32: the place of each word in `words`."""
    numbers = words.to_frame("word").with_row_index("number")
    return (
        column.to_frame("word")
        .join(numbers, on="word", how="left", maintain_order="left")["number"]
        .to_numpy()
        .astype(np.int32)
    )


def _sentences(text: np.ndarray, words: pl.Series, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start, words) of the sentences of texts that end at `ends`; very short ones are left out, long ones cut."""
    stops = words.str.contains(_SENTENCE_END).to_numpy()[text]
    stops[ends - 1] = True
    behind = np.flatnonzero(stops) + 1
    sizes = np.diff(behind, prepend=0)
    least, most = _SENTENCE_WORDS
    return (behind - sizes)[sizes >= least], np.minimum(sizes, most)[sizes >= least]


# The texts of rows.


def texts_of(pool: Pool, kind: str, spots: np.ndarray, seed: int) -> dict[str, pa.Array]:
    """The texts of rows by the name of their part. A spot says to which thousand a row belongs, and where in it it stands."""
    role, origin = ROLES[spots % UNIT], spots // UNIT * UNIT + ORIGINS[spots % UNIT]
    near = role == NEAR
    clustered = near | np.isin(spots % UNIT, ORIGINS[ROLES == NEAR])
    answered_by = np.where(role == PROMPT, spots, origin)  # whose answers a row has
    least, most = _JACCARD
    jaccard = least + (most - least) * _draws(seed, kind, "jaccard", spots) / 2.0**64
    # A replaced word changes five of the shingles of both texts.
    rate = np.where(near, (1 - jaccard) / (1 + jaccard) / 5, 0)
    made = {}
    for part, name in enumerate(PARTS[kind]):
        is_prompt, is_chosen = part < CHOSEN[kind], part == CHOSEN[kind]
        of = origin if is_prompt else answered_by
        real = _scaled(_draws(seed, kind, "lengths", of), len(pool.lengths[kind]))
        sizes, opening = pool.lengths[kind][real, part], pool.openings[kind][real, part]
        keys = _draws(seed, kind, name, of)
        if kind == "preference" and name == "rejected":
            same = pool.identical[real]
            sizes = np.where(same & clustered, np.maximum(sizes, LEAST_NEAR), sizes)
            keys[same] = _draws(seed, kind, "chosen", of[same])
        if part == 0:
            sizes = np.maximum(sizes, LEAST_PROMPT)
            first, behind = pool.questions
            question = first + _scaled(_draws(seed, kind, "question", of), behind - first)
            opening = np.where(role == BENCHMARK, question, opening)
        if is_chosen:
            sizes = np.where(clustered, np.maximum(sizes, LEAST_NEAR), sizes)
        edits = np.where(sizes < LEAST_NEAR, 0, np.rint(rate * sizes)).astype(np.int64)
        edits = np.maximum(edits, near) if is_chosen else edits * is_prompt
        made[name] = _spelled(pool, keys, sizes, opening, edits, _draws(seed, kind, f"edit {name}", spots))
    return made


def _spelled(
    pool: Pool, keys: np.ndarray, sizes: np.ndarray, opening: np.ndarray, edits: np.ndarray, edit_keys: np.ndarray
) -> pa.Array:
    """Texts of about `sizes` words, a text for each of the keys: its opening as it is, if there is one (not -1), and behind
    it sentences with words replaced. Then so many words of it, far from one another, are edited."""
    opened = opening >= 0
    verbatim = np.where(opened, pool.sizes[opening], 0)
    sizes = np.where(sizes > 0, np.maximum(sizes, verbatim), 0)
    most = np.where(sizes > 0, sizes // 8 + 2, 0)  # sentences; a few texts stay shorter
    text, number = np.repeat(np.arange(len(keys)), most), _counted(most)
    sentence = _scaled(_mix64(keys[text] + number.astype(np.uint64) * _STEP), pool.sentences)
    sentence = np.where((number == 0) & opened[text], opening[text], sentence)
    length = pool.sizes[sentence]
    whole = np.bincount(text, length, len(keys)).astype(np.int64)
    before = np.cumsum(length) - length - np.repeat(np.cumsum(whole) - whole, most)
    length = np.clip(sizes[text] - before, 0, length)
    count = np.minimum(sizes, whole)
    ends = np.cumsum(count)
    words = pool.text[np.repeat(pool.starts[sentence], length) + _counted(length)]
    # Each word draws: whether it is replaced, and by which one.
    place = _counted(count)
    draw = _mix64(np.repeat(_mix64(keys), count) + place.astype(np.uint64) * _STEP)
    share = np.where(sizes < _SHORT, _REPLACED_IN_SHORT, _REPLACED)
    replaced = (draw & _LOW16) < np.repeat((share * 2**16).astype(np.uint64), count)
    replaced &= place >= np.repeat(verbatim, count)
    words[replaced] = pool.vocabulary[_scaled(draw[replaced], len(pool.vocabulary))]
    edits = np.minimum(edits, count // 6)
    edited, which = np.repeat(np.arange(len(keys)), edits), _counted(edits)
    draw = _mix64(edit_keys[edited] + which.astype(np.uint64) * _STEP)
    inside = ((which + (draw & _LOW16) / 2**16) * count[edited] / np.maximum(edits[edited], 1)).astype(np.int64)
    words[(ends - count)[edited] + inside] = pool.vocabulary[_scaled(draw, len(pool.vocabulary))]
    last = ends[count > 0] - 1
    words[last] = pool.bare[words[last]]
    spelled = pool.words.take(pa.array(words))
    offsets = np.frombuffer(spelled.buffers()[1], np.int32)[np.append(0, ends)]
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), spelled.buffers()[2])


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... for each of the sizes, end to end."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)


# Chance: numbers that follow from what they are drawn for.

_STEP = np.uint64(0x9E3779B97F4A7C15)
_LOW16 = np.uint64(0xFFFF)


def _draws(seed: int, kind: str, purpose: str, numbers: np.ndarray) -> np.ndarray:
    """uint64, uniform, one for each number."""
    salt = np.frombuffer(blake2b(f"{seed} {kind} {purpose}".encode(), digest_size=8).digest(), np.uint64)
    return _mix64(numbers.astype(np.uint64) * _STEP + salt)


def _scaled(draws: np.ndarray, below: int) -> np.ndarray:
    """int64, from 0 to before `below`."""
    return ((draws >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)


def _mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


if __name__ == "__main__":
    main()
