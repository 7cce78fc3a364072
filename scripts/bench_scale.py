"""How the cost of `prefmix build` grows with the rows: larger than memory, beside the build in memory where that fits.

    python scripts/bench_scale.py --data FOLDER [--rows 100k,1M,3M,10M] [--memory 4GB] [--engine disk] [--compare]

The rows are those of scale_rows.py, made from ../shared/data: pairs with and without scores and chats, 1.3 kB of text each, with
exact copies, near copies, repeated prompts and benchmark questions in the same proportion at every size. `--data` keeps them, a
folder for each size; what is there is not made again. The recipe has the default filters, decontamination against GSM8K's test and
TruthfulQA, exact and near-duplicates, a test split and a `take`; with `--tokenizer` tokens are counted.

Each build runs as a process of its own, `python -m prefmix build`, and is measured from outside, by what Linux says of it and of
all its descendants:

- wall: from its start to its end. CPU: user and system, of all processes.
- driver: the peak of the resident memory of the main process (VmHWM), which runs no task where the engine has workers.
- RSS: the peak of the resident memory, summed over the processes, ten times a second: pages that two share count twice. anon: the
  same without pages of files, which the system may take back. PSS: with shared pages split, once a second, because asking
  stops a process for a moment.
- read, written: bytes from and to the disk; what is read out of the page cache is not among the first.
- scratch: the peak size of the scratch folder, once a second. store: what the build leaves.

`--compare` also builds in memory, as long as that fits, and fails unless digest, funnel and ledger are the same. `--memory 0`
builds in memory only. A slope is the exponent of the growth from one size to the next: 1 is a constant cost for each row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
from scale_rows import BENCHMARKS, REAL, SEED, write

# Bytes a row, for the check of the disk and of the memory before anything starts.
SOURCE_BYTES, SCRATCH_BYTES, STORE_BYTES, IN_MEMORY_BYTES = 650, 1_600, 1_300, 4_000
SAMPLE_S, SLOW_SAMPLE_S = 0.1, 1.0
IN_MEMORY = "in memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=sizes, default=sizes("100k,1M,3M,10M"), metavar="N,N", help="sizes, as 100k,1M")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "prefmix-scale", help="keeps the rows"
    )
    parser.add_argument("--work", type=Path, help="folder for stores and scratch (default: work, inside --data)")
    parser.add_argument("--real", type=Path, default=REAL, help="folder with the real rows")
    parser.add_argument("--seed", type=int, default=SEED, help="of the rows")
    parser.add_argument("--memory", default="4GB", help="of the build; 0: only the build in memory")
    parser.add_argument("--engine", choices=["disk", "ray"], default="disk", help="of the build in parts")
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json")
    parser.add_argument("--compare", action="store_true", help="also build in memory: the results must be equal")
    parser.add_argument("--keep", action="store_true", help="leave the stores")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    if not options.real.is_dir():
        sys.exit(
            f"{options.real} is missing: give --real, the folder with orca_dpo_pairs/, openhermes/, benchmarks/ ..."
        )
    work = options.work or options.data / "work"
    for folder in (options.data, work):
        folder.mkdir(parents=True, exist_ok=True)
    check_disk(options, work)
    runs: list[dict[str, Any]] = []
    for rows in options.rows:
        about = write(options.data / str(rows), rows, options.seed, 2, options.real)
        note(f"{rows:,} rows, {about['text_bytes'] / 1e9:.2f} GB of text, {about['bytes'] / 1e9:.2f} GB of files")
        runs += measure_size(options, work, about)
    if options.json:
        print(json.dumps(runs, indent=2))
    else:
        print("\n\n".join([build_table(runs), *stage_tables(runs), funnel_table(runs)]))


def sizes(text: str) -> list[int]:
    """`100k,1M` as numbers."""
    factors = {"k": 1_000, "M": 1_000_000}
    return sorted(int(float(each.rstrip("kM")) * factors.get(each[-1], 1)) for each in text.split(","))


def check_disk(options: argparse.Namespace, work: Path) -> None:
    missing = sum(rows for rows in options.rows if not (options.data / str(rows) / "scale.json").exists())
    stores = [rows * STORE_BYTES * len(builds(options, rows)) for rows in options.rows]
    stored = (sum if options.keep else max)(stores)
    needs = [
        (options.data, "the rows", missing * SOURCE_BYTES),
        (work, "scratch and stores", max(options.rows) * SCRATCH_BYTES + stored),
    ]
    for folder, what, size in needs:
        on_it = sum(more for other, _, more in needs if other.stat().st_dev == folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
        note(f"{what}: about {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free")
        if on_it > free:
            sys.exit(
                f"{folder} has too little room: {on_it / 1e9:.1f} GB are needed. "
                "Give another --data or --work, or fewer --rows."
            )


def builds(options: argparse.Namespace, rows: int) -> list[str]:
    """The memory of each build of so many rows, or `IN_MEMORY`: to compare with, where that fits."""
    if options.memory == "0":
        return [IN_MEMORY]
    fits = rows * IN_MEMORY_BYTES <= available_bytes()
    return [options.memory, IN_MEMORY] if options.compare and fits else [options.memory]


def measure_size(options: argparse.Namespace, work: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The builds of one size; with two of them, their results are compared."""
    rows = about["rows"]
    recipe = work / "scale.toml"
    recipe.write_text(recipe_of(options, about))
    runs: list[dict[str, Any]] = []
    for memory in builds(options, rows):
        note(f"{rows:,} rows, {memory}")
        store, scratch = work / f"store-{rows}-{memory.replace(' ', '-')}", work / "scratch"
        for folder in (store, scratch):
            shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "prefmix", "build", str(recipe), "--store", str(store), "--json"]
        if memory == IN_MEMORY:
            command += ["--engine", "memory"]
        else:
            command += ["--engine", options.engine, "--memory", memory, "--scratch", str(scratch)]
        run: dict[str, Any] = {"rows": rows, "text_bytes": about["text_bytes"], "memory": memory}
        run |= measure(command, scratch)
        run["store_mb"] = size_mb(store)
        runs.append(run)
        shutil.rmtree(scratch, ignore_errors=True)
    if options.compare and len(runs) == 1:
        note(f"{rows:,} rows: not compared, a build in memory takes about {rows * IN_MEMORY_BYTES / 1e9:.0f} GB")
    if len(runs) == 2:
        if found := differences(runs[0]["result"], runs[1]["result"]):
            sys.exit(f"{rows:,} rows: DIFFERENT {', '.join(found)}; the stores are in {work}")
        note(f"{rows:,} rows: EQUAL digest, funnel and ledger")
        runs[0]["equal"] = True
    for run in runs:
        if not options.keep:
            shutil.rmtree(Path(run["result"]["folder"]).parents[1], ignore_errors=True)
        run["result"] = {key: run["result"].get(key) for key in ("digest", "funnel", "stages")}
    return runs


def recipe_of(options: argparse.Namespace, about: dict[str, Any]) -> str:
    folder = (options.data / str(about["rows"])).resolve()
    lines = ['name = "scale"']
    for name, source in about["sources"].items():
        lines += [
            f"[sources.{name}]",
            f'format = "{source["format"]}"',
            f"path = {json.dumps(str(folder / source['files']))}",
        ]
    lines += ["take = 0.5", "[filter]", 'placeholders = "drop"', "[dedupe]", "near = { threshold = 0.8 }"]
    for name, (path, field) in BENCHMARKS.items():
        lines += [f"[decontaminate.against.{name}]", f"path = {json.dumps(str((options.real / path).resolve()))}"]
        lines += [f'fields = ["{field}"]']
    lines += ["[splits]", "test = 0.02"]
    if options.tokenizer:
        lines += ["[format]", f"tokenizer = {json.dumps(str(options.tokenizer.resolve()))}"]
    return "\n".join(lines)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Which of digest, funnel and ledger two results of a build differ in."""
    found = [key for key in ("digest", "funnel") if one[key] != other[key]]
    ledgers = (pl.read_parquet(Path(result["folder"]) / "drops" / "drops.parquet") for result in (one, other))
    left, right = (ledger.sort("source", "source_row") for ledger in ledgers)
    return found if left.equals(right) else [*found, "ledger"]


# From outside.


def measure(command: Sequence[str], scratch: Path) -> dict[str, Any]:
    """Runs a build that prints JSON; gives its figures, and what it printed as `result`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        try:
            peaks, usage = watch(process, scratch)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        wall = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)}\nfailed with exit code {process.returncode}:\n{err.read().decode()[-4000:]}")
        return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, **peaks, "result": json.loads(out.read())}


def watch(process: subprocess.Popen[bytes], scratch: Path) -> tuple[dict[str, float], Any]:
    """The peaks of a process and its descendants in MB until it ends, and what the kernel counted. What cannot be read is 0."""
    peaks = dict.fromkeys(("driver_mb", "rss_mb", "anon_mb", "pss_mb", "read_mb", "written_mb", "scratch_mb"), 0.0)
    slow_at = 0.0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            process.returncode = os.waitstatus_to_exitcode(status)
            return peaks, usage
        family = list(descendants(process.pid))
        found = {
            "driver_mb": numbers(process.pid, "status").get("VmHWM", 0) / 1024,
            "rss_mb": total(family, "status", "VmRSS") / 1024,
            "anon_mb": total(family, "status", "RssAnon") / 1024,
            # A process that has ended counts for the one that waited for it.
            "read_mb": total(family, "io", "read_bytes") / 1e6,
            "written_mb": total(family, "io", "write_bytes") / 1e6,
        }
        if time.perf_counter() - slow_at > SLOW_SAMPLE_S:
            found |= {"pss_mb": total(family, "smaps_rollup", "Pss") / 1024, "scratch_mb": size_mb(scratch)}
            slow_at = time.perf_counter()
        peaks |= {key: max(peaks[key], value) for key, value in found.items()}
        time.sleep(SAMPLE_S)


def descendants(pid: int) -> Iterator[int]:
    """A process and those that come from it."""
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        yield each
        try:
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue


def total(pids: Sequence[int], file: str, key: str) -> int:
    return sum(numbers(pid, file).get(key, 0) for pid in pids)


def numbers(pid: int | str, file: str) -> dict[str, int]:
    """The numbers of a file of `/proc/PID`, of lines as `VmRSS:  1234 kB`; none where the process is gone."""
    try:
        lines = [line.replace(":", " ").split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def available_bytes() -> int:
    return numbers("", "meminfo").get("MemAvailable", 0) * 1024


def size_mb(folder: Path) -> float:
    """The bytes of the files of a folder, which may go while they are counted."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += Path(parent, name).stat().st_size
            except OSError:
                continue
    return size / 1e6


# The tables.


def build_table(runs: Sequence[dict[str, Any]]) -> str:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("rows", lambda run: f"{run['rows']:,}"),
        ("memory", lambda run: run["memory"]),
        ("wall s", lambda run: f"{run['wall_s']:,.1f}"),
        ("us/row", lambda run: f"{run['wall_s'] / run['rows'] * 1e6:.1f}"),
        ("relative", lambda run: f"{relative(run, runs):.2f}x"),
        ("CPU s", lambda run: f"{run['cpu_s']:,.1f}"),
        *((name, megabytes(f"{name.lower()}_mb")) for name in ("driver", "RSS", "anon", "PSS")),
        *((name, gigabytes(f"{name}_mb")) for name in ("read", "written", "scratch", "store")),
        ("scratch B/row", spilled),
        ("as in memory", lambda run: "EQUAL" if run.get("equal") else "-"),
    ]
    table = aligned([name for name, _ in columns], [[cell(run) for _, cell in columns] for run in runs])
    return (
        f"{table}\n\ndriver, RSS, anon, PSS: peaks in MB; read, written, scratch, store: GB; relative: time of a row, "
        "beside that at 1,000,000 rows or the smallest size; scratch B/row: keys + texts"
    )


def megabytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: f"{run[key]:,.0f}"


def gigabytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: f"{run[key] / 1000:,.2f}"


def spilled(run: dict[str, Any]) -> str:
    """What went through the scratch folder for each row: keys, edges and decisions, and texts."""
    stages = (run["result"]["stages"] or {}).values()
    texts = sum(stage["text_bytes"] for stage in stages)
    keys = sum(stage["bytes_written"] for stage in stages) - texts
    return f"{keys / run['rows']:,.0f} + {texts / run['rows']:,.0f}" if stages else "-"


def relative(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> float:
    """The time of a row as a multiple of that at a million rows, or at the smallest size where no build has a million."""
    like = [other for other in runs if other["memory"] == run["memory"]]
    base = next((other for other in like if other["rows"] == 1_000_000), like[0])
    return run["wall_s"] / run["rows"] / (base["wall_s"] / base["rows"])


def stage_tables(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each memory the seconds of the stages at each size, their slopes, and what they write for each row of the last size."""
    for memory in dict.fromkeys(run["memory"] for run in runs):
        like = [run for run in runs if run["memory"] == memory]
        taken = [{"whole": run["wall_s"], **stage_seconds(run)} for run in like]
        spans = list(pairwise(like))
        head = [f"s, {memory}", *(short(run["rows"]) for run in like)]
        head += [f"slope {short(one['rows'])}-{short(other['rows'])}" for one, other in spans]
        head += [f"written B/row {short(like[-1]['rows'])}"]
        lines = []
        for stage in dict.fromkeys(stage for each in taken for stage in each):
            seconds = [each.get(stage, 0.0) for each in taken]
            slopes = [
                f"{math.log(more / less) / math.log(other['rows'] / one['rows']):.2f}" if more > 0 < less else "-"
                for less, more, (one, other) in zip(seconds, seconds[1:], spans, strict=False)
            ]
            written = ((like[-1]["result"]["stages"] or {}).get(stage) or {}).get("bytes_written")
            per_row = "-" if written is None else f"{written / like[-1]['rows']:,.1f}"
            lines.append([stage, *(f"{each:,.1f}" for each in seconds), *slopes, per_row])
        yield aligned(head, lines)


def stage_seconds(run: dict[str, Any]) -> dict[str, float]:
    return {stage: entry["seconds"] for stage, entry in (run["result"]["stages"] or {}).items()}


def funnel_table(runs: Sequence[dict[str, Any]]) -> str:
    """The share of the rows that each reason drops: the same at every size, or the sizes are not alike."""
    by_size = {run["rows"]: run["result"]["funnel"] for run in runs}
    dropped = {
        rows: {k: n for stage in funnel for k, n in stage["dropped"].items()} for rows, funnel in by_size.items()
    }
    reasons = sorted({reason for each in dropped.values() for reason in each})
    lines = [[reason, *(f"{each.get(reason, 0) / rows:.3%}" for rows, each in dropped.items())] for reason in reasons]
    kept = ["kept", *(f"{funnel[-1]['out'] / rows:.3%}" for rows, funnel in by_size.items())]
    return aligned(["of the rows", *map(short, by_size)], [*lines, kept])


def short(rows: int) -> str:
    return f"{rows / 1e6:g}M" if rows >= 1_000_000 else f"{rows / 1e3:g}k"


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in [head, *lines]
    )


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
