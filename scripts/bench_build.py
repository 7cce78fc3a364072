"""How fast a build is, beside the same steps written with `datasets.map` and `filter` on two processes.

    python scripts/bench_build.py [--data ../shared/data] [--tokenizer FOLDER] [--runs 3]

Both sides read 115,337 real rows (six Parquet files of pairs, two of SFT rows), turn them into messages, judge them with
the same rules, write the dropped rows with their reasons to a ledger, report rules, lengths and repeated prompts, drop
exact duplicates, assign splits by prompt, put the rows into an order by hash, render ChatML, count tokens when there is a
tokenizer, write Arrow and hash the files. prefmix also gives evidence for each drop, the digest of the content and a card;
the peer does not. Each side runs as a process of its own, in turn, and the medians are printed: wall time, and the peak of
the resident memory, summed over the process and its children (RSS), beside the same with shared pages split (PSS).

`--tokenizer` is a folder with a tokenizer.json (scripts/mistral_chatml_tokenizer.py makes the one of
OpenHermes-2.5); with it, prefmix runs once as users run it, which counts distinct pieces of the texts, and once with every
distinct message given to Hugging Face's tokenizers as a whole, as with a tokenizer whose texts have no pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PAIRS = {
    "intel": "orca_dpo_pairs/real_intel_rows.parquet",
    "orca": "orca_dpo_pairs/converted.parquet",
    "hh": "orca_dpo_pairs/converted_hh_harmless.parquet",
    "ultrafeedback": "ultrafeedback_binarized/real_ultrafeedback_rows.parquet",
    "alpaca_eval": "ultrafeedback_binarized/converted_alpaca_eval.parquet",
    "other": "ultrafeedback_binarized/converted_other_scored.parquet",
}
CHATS = {"hermes": "openhermes/converted_hermes_sources.parquet", "t0": "openhermes/converted_t0_p3.parquet"}
PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=["prefmix", "datasets"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(
            f"{options.data} is missing: give --data, the folder with orca_dpo_pairs/, ultrafeedback_binarized/, openhermes/"
        )
    if options.side == "prefmix":
        return run_prefmix(options.data, options.tokenizer, options.out, options.whole)
    if options.side == "datasets":
        return run_datasets(options.data, options.tokenizer, options.out)
    compare(options.data, options.tokenizer, options.runs)


def compare(data: Path, tokenizer: Path | None, runs: int) -> None:
    sides = [("datasets map/filter", "datasets", []), ("prefmix", "prefmix", [])]
    if tokenizer:
        sides.append(("prefmix, whole texts", "prefmix", ["--whole"]))
    found: dict[str, list[dict]] = {name: [] for name, _, _ in sides}
    for _ in range(runs):
        for name, side, extra in sides:
            found[name].append(measure(side, data, tokenizer, extra))
    peer_wall = median(run["wall_s"] for run in found["datasets map/filter"])
    peer_memory = median(run["rss_mb"] for run in found["datasets map/filter"])
    head = ("rows in", "rows out", "wall s", "CPU s", "MB/s", "RSS MB", "PSS MB", "faster", "of its RSS")
    print(f"{'':22}" + "".join(f"{word:>11}" for word in head))
    for name, runs_ in found.items():
        wall, cpu, rss, pss = (median(run[key] for run in runs_) for key in ("wall_s", "cpu_s", "rss_mb", "pss_mb"))
        last = runs_[-1]
        print(f"{name:22}{last['read']:>11,}{last['kept']:>11,}{wall:>11.2f}{cpu:>11.2f}{last['text_mb'] / wall:>11.0f}"
              f"{rss:>11.0f}{pss:>11.0f}{peer_wall / wall:>10.1f}x{rss / peer_memory:>11.2f}")  # fmt: skip
    for name, runs_ in found.items():
        if stages := runs_[-1].get("stages"):
            whole = sum(stages.values())
            print(
                f"\n{name}, share of each stage: "
                + ", ".join(f"{stage} {part / whole:.0%}" for stage, part in stages.items())
            )


def measure(side: str, data: Path, tokenizer: Path | None, extra: list[str]) -> dict:
    """One run as a process of its own, timed from outside from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--side", side, "--data", str(data), "--out", folder]
        command += [*extra, *(["--tokenizer", str(tokenizer)] if tokenizer else [])]
        full = {**os.environ, "HF_HOME": folder, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        before = os.times()
        started = time.perf_counter()
        process = subprocess.Popen(command, env=full, stdout=subprocess.DEVNULL)
        peaks = {"Rss:": 0.0, "Pss:": 0.0}
        while process.poll() is None:
            for key, total in memory_mb(process.pid).items():
                peaks[key] = max(peaks[key], total)
            time.sleep(0.1)  # reading the sizes of a process stops it for a moment
        wall = time.perf_counter() - started
        after = os.times()
        if process.returncode:
            sys.exit(f"{side} failed with exit code {process.returncode}")
        report = json.loads((Path(folder) / "report.json").read_text())
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {**report, "wall_s": wall, "cpu_s": cpu, "rss_mb": peaks["Rss:"], "pss_mb": peaks["Pss:"]}


def memory_mb(pid: int) -> dict[str, float]:
    """Resident and proportional set size of a process and its children (Linux)."""
    total = {"Rss:": 0.0, "Pss:": 0.0}
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        try:
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                key, _, rest = line.partition(" ")
                if key in total:
                    total[key] += int(rest.split()[0]) / 1024
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return total


def run_prefmix(data: Path, tokenizer: Path | None, out: Path, whole: bool) -> None:
    lines = ['name = "bench"']
    for name, path in {**PAIRS, **CHATS}.items():
        lines += [f"[sources.{name}]", f"path = {json.dumps(str(data.resolve() / path))}"]
    if tokenizer:
        lines += ["[format]", f"tokenizer = {json.dumps(str(tokenizer.resolve()))}"]
    (out / "bench.toml").write_text("\n".join(lines))

    from prefmix import tokens
    from prefmix.build import build

    if whole:
        setattr(tokens, "piece_counter", lambda tokenizer: None)  # noqa: B010

    stages: dict[str, float] = {}
    since, current = time.perf_counter(), "start"

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal since, current
        now = time.perf_counter()
        stages[current] = stages.get(current, 0.0) + now - since
        since, current = now, stage if done < total else "other"

    mixture = build(out / "bench.toml", store=out / "store", progress=progress)
    progress("end", 1, 1)
    sources = mixture.manifest["sources"].values()
    text = sum(
        file["bytes"]
        for splits in mixture.manifest["subsets"].values()
        for entry in splits.values()
        for file in entry["files"]
    )
    report(out, sum(s["read"] for s in sources), sum(s["kept"] for s in sources), text, stages)


def report(out: Path, read: int, kept: int, text_bytes: int, stages: dict[str, float] | None = None) -> None:
    (out / "report.json").write_text(
        json.dumps({"read": read, "kept": kept, "text_mb": text_bytes / 1e6, "stages": stages})
    )


def run_datasets(data: Path, tokenizer: Path | None, out: Path) -> None:
    """The same steps as one would write them with `datasets`: batched maps, two processes, rules as compiled regexes."""
    import re
    import unicodedata
    from collections import Counter
    from hashlib import blake2b, file_digest

    import datasets

    from prefmix.chatml import SPECIAL_TOKENS
    from prefmix.filters import DISCLAIMER, PLACEHOLDER, REFUSAL

    datasets.disable_progress_bars()
    special, refusal, disclaimer = re.compile(SPECIAL_TOKENS), re.compile(REFUSAL), re.compile(DISCLAIMER)
    placeholder = re.compile(re.sub(r"\(\?i:", "(?i:", PLACEHOLDER))
    blank, words = re.compile(r"^[\s\u200b-\u200f\ufeff]*$"), re.compile(r"[^\w]+|_")
    cut_off = re.compile(r"[\w,(\[{“‘]$")
    counter = None
    if tokenizer:
        from tokenizers import Tokenizer

        counter = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def squeeze(text: str) -> str:
        return unicodedata.normalize("NFC", " ".join(text.split()))

    def judge(prompt: list[str], answers: list[str], scores: tuple) -> str:
        contents = [*prompt, *answers]
        if any(special.search(text) for text in contents):
            return "filter/injection"
        if any(blank.match(text) for text in contents):
            return "filter/empty"
        if len(answers) == 2 and (answers[0] == answers[1] or squeeze(answers[0]) == squeeze(answers[1])):
            return "filter/identical"
        if scores[0] is not None and scores[1] is not None:
            if scores[0] < scores[1]:
                return "filter/inverted"
            if scores[0] == scores[1]:
                return "filter/tie"
        opening = answers[0][:400]
        if refusal.search(opening) and not disclaimer.search(opening):
            return "filter/refusal"
        return ""

    def flags(prompt: list[str], answer: str) -> tuple[bool, bool, bool]:
        """What is only reported."""
        ending = answer.rstrip()
        unfinished = len(ending) >= 200 and bool(cut_off.search(ending[-1])) and len(ending.rsplit("\n", 1)[-1]) > 40
        return bool(disclaimer.search(answer[:400])), any(placeholder.search(t) for t in [*prompt, answer]), unfinished

    def add_id(result: dict, content: str) -> None:
        result["id"].append(blake2b(content.encode(), digest_size=16).hexdigest())
        order = blake2b(f"42 {result['id'][-1]}".encode(), digest_size=8).digest()
        result["order"].append(int.from_bytes(order, "big") >> 1)

    def pairs(batch: dict) -> dict:
        rows = len(batch["question" if "question" in batch else "instruction"])
        orca = "question" in batch
        system = batch.get("system") or [""] * rows
        result: dict = {
            key: []
            for key in ("id", "order", "prompt", "chosen", "rejected", "prompt_text", "reason", "flags", "chars")
        }
        for n in range(rows):
            user = batch["question" if orca else "instruction"][n]
            chosen, rejected = (batch[key if orca else f"{key}_response"][n] for key in ("chosen", "rejected"))
            scores = (None, None) if orca else (batch["chosen_avg_rating"][n], batch["rejected_avg_rating"][n])
            prompt = [system[n], user] if system[n] else [user]
            result["reason"].append(judge(prompt, [chosen, rejected], scores))
            result["flags"].append(flags(prompt, chosen))
            turns = [f"<|im_start|>system\n{system[n]}<|im_end|>\n"] if system[n] else []
            turns.append(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
            result["prompt"].append("".join(turns))
            result["chosen"].append(f"{chosen}<|im_end|>")
            result["rejected"].append(f"{rejected}<|im_end|>")
            result["prompt_text"].append(user)
            content = "\x00".join([*prompt, chosen, rejected])
            result["chars"].append([len(chosen), len(rejected)])
            add_id(result, content)
        return result

    def chats(batch: dict) -> dict:
        result: dict = {key: [] for key in ("id", "order", "text", "answer", "prompt_text", "reason", "flags", "chars")}
        for instruction, given, output in zip(batch["instruction"], batch["input"], batch["output"], strict=True):
            user = f"{instruction}\n{given}" if given else instruction
            result["reason"].append(judge([user], [output], (None, None)))
            result["flags"].append(flags([user], output))
            result["text"].append(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{output}<|im_end|>")
            result["answer"].append(output)
            result["prompt_text"].append(user)
            result["chars"].append([len(output)])
            add_id(result, f"{user}\x00{output}")
        return result

    def split_point(batch: dict) -> dict:
        normal = [words.sub(" ", unicodedata.normalize("NFKC", text.lower())).strip() for text in batch["prompt_text"]]
        points = [int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64 for text in normal]
        return {"split": ["test" if point < 0.02 else "train" for point in points]}

    def count_tokens(batch: dict) -> dict:
        names = [name for name in ("prompt", "chosen", "rejected", "text") if name in batch]
        assert counter is not None
        encoded = {name: counter.encode_batch_fast(batch[name], add_special_tokens=False) for name in names}
        return {f"{name}_tokens": [len(encoding) for encoding in encodings] for name, encodings in encoded.items()}

    read = kept = text_bytes = 0
    for subset, files, convert, contents in (
        ("preference", PAIRS, pairs, ("chosen", "rejected")),
        ("sft", CHATS, chats, ("answer",)),
    ):
        parts = []
        for source, path in files.items():
            rows = datasets.load_dataset("parquet", data_files=str(data / path), split="train")
            read += len(rows)
            rows = rows.map(convert, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names)
            parts.append(rows.add_column("source", [source] * len(rows)))
        whole = datasets.concatenate_datasets(parts)
        dropped = whole.filter(
            lambda batch: [bool(reason) for reason in batch["reason"]], batched=True, num_proc=PROCESSES
        )
        dropped.select_columns(["id", "source", "reason"]).to_parquet(out / f"{subset}-drops.parquet")
        whole = whole.filter(lambda batch: [not reason for reason in batch["reason"]], batched=True, num_proc=PROCESSES)
        seen: set[tuple] = set()

        def is_first(batch: dict, contents: tuple = contents, seen: set = seen) -> list[bool]:
            verdicts = []
            for row in zip(batch["prompt_text"], *(batch[name] for name in contents), strict=True):
                key = hash(row)
                verdicts.append(key not in seen)
                seen.add(key)
            return verdicts

        whole = whole.filter(is_first, batched=True)  # one process: the set must see every row
        table = whole.select_columns(["source", "prompt_text", "flags", "chars"]).to_dict()
        prompts = Counter(zip(table["source"], table["prompt_text"], strict=True))
        audit = {
            "repeated": sum(n for n in prompts.values() if n > 1),
            "flags": [sum(column) for column in zip(*table["flags"], strict=True)],
            "chars": [sum(column) for column in zip(*table["chars"], strict=True)],
            "chosen_longer": sum(chars[0] > chars[-1] for chars in table["chars"]),
        }
        (out / f"{subset}-audit.json").write_text(json.dumps(audit))
        whole = whole.map(split_point, batched=True, num_proc=PROCESSES)
        if counter:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # two processes of one thread each
            whole = whole.map(count_tokens, batched=True, num_proc=PROCESSES)
        drop = ["prompt_text", "reason", "flags", "chars", "order", "split", *(["answer"] if subset == "sft" else [])]
        whole = whole.sort("order")
        for split in ("train", "test"):
            part = whole.filter(lambda batch, split=split: [s == split for s in batch["split"]], batched=True)
            part.remove_columns(drop).save_to_disk(out / "peer" / subset / split, num_proc=PROCESSES)
            kept += len(part)
    for path in (out / "peer").rglob("*.arrow"):
        with path.open("rb") as file:
            file_digest(file, "sha256")
    text_bytes = sum(path.stat().st_size for path in (out / "peer").rglob("*.arrow"))
    report(out, read, kept, text_bytes)


if __name__ == "__main__":
    main()
