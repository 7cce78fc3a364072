"""Rows that hold text of a benchmark: what is searched, what is dropped with what evidence, what is reported."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
import pytest
from canonical import chat, frame, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from test_benchmarks import REAL, own

import prefmix
from prefmix import decontaminate
from prefmix.benchmarks import Benchmark
from prefmix.build import curate
from prefmix.cli.main import run
from prefmix.errors import GateError, SourceError
from prefmix.overlap import Index
from prefmix.plan import plan
from prefmix.schema import Kind
from prefmix.shingles import normalise
from prefmix.store import Store

SPIDER = "How many legs has a spider that has lost two of them?"
LAKE = "Which lake is the highest one on which large ships can sail, and between which two countries does it lie?"
STORY = "A man walks into the kitchen with a pan in one hand and an egg in the other, puts the pan on the stove and lights it."


def index(texts: Mapping[str, Sequence[str] | str], field: str = "question") -> Index:
    """An index of benchmarks by name, each with its items in order; every item has a choice that is too short to matter."""
    rows = [
        (name, str(number), *written)
        for name, items in texts.items()
        for number, text in enumerate([items] if isinstance(items, str) else items)
        for written in ((field, text), ("choices[0]", "All of them."))
    ]
    columns = ("benchmark", "item", "field", "text")
    return Index(pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row"))


def find(rows: Sequence[dict], of: Index, kind: Kind = "preference", answers: bool = False) -> pl.DataFrame:
    return decontaminate.find({kind: frame(rows, kind)}, of, answers)


def places(found: pl.DataFrame) -> list[int]:
    return found["place"].unique().sort().to_list()


# What is searched


def test_the_prompt_is_searched_and_no_system_message() -> None:
    rows = [
        pair(f"Please: {LAKE}", "x", "y"),
        pair((("system", LAKE), ("user", "Tell me.")), "x", "y"),
        pair((("system", "Be brief."), ("user", f"{LAKE} Thanks.")), "x", "y"),
        pair("Which lake?", LAKE, LAKE),
    ]
    found = find(rows, index({"quiz": LAKE}))
    assert places(found) == [0, 2]
    assert set(found["part"]) == {"prompt"}
    chats = [
        chat(("user", LAKE), ("assistant", "Titicaca.")),
        chat(("system", LAKE), ("user", "Well?"), ("assistant", "Yes.")),
    ]
    assert places(find(chats, index({"quiz": LAKE}), "sft")) == [0]


def test_what_the_assistant_said_before_is_part_of_the_prompt() -> None:
    turns = (("user", "Ask me something."), ("assistant", LAKE), ("user", "Lake Titicaca."))
    assert places(find([pair(turns, "x", "y")], index({"quiz": LAKE}))) == [0]
    assert places(find([chat(*turns, ("assistant", "Right."))], index({"quiz": LAKE}), "sft")) == [0]


def test_an_item_that_is_spread_over_the_user_s_turns_is_found() -> None:
    first, second = LAKE.split(" ships ")
    turns = (("user", f"{first} ships"), ("assistant", "Go on."), ("user", second))
    (hit,) = find([pair(turns, "x", "y")], index({"quiz": LAKE})).filter(rule="ngram").to_dicts()
    assert (hit["part"], hit["coverage"]) == ("prompt", 1.0)
    assert places(find([chat(*turns, ("assistant", "Yes."))], index({"quiz": LAKE}), "sft")) == [0]
    asked_and_answered = (("user", f"{first} ships"), ("assistant", second), ("user", "Well?"))
    assert places(find([pair(asked_and_answered, "x", "y")], index({"quiz": LAKE}))) == [0]
    interrupted = (("user", first[:30]), ("assistant", "Go on."), ("user", "Later."))
    assert places(find([pair(interrupted, "x", "y")], index({"quiz": LAKE}))) == []


def test_answers_are_searched_when_asked_for() -> None:
    of = index({"quiz": LAKE})
    pairs = [pair("q", LAKE, "y"), pair("q", "x", f"No. {LAKE}"), pair(LAKE, LAKE, "y"), pair("q", "x", "y")]
    assert places(find(pairs, of)) == [2]
    found = find(pairs, of, answers=True)
    assert dict(found.filter(rule="ngram").select("place", "part").rows()) == {0: "chosen", 1: "rejected", 2: "prompt"}
    chats = [chat(("user", "q"), ("assistant", LAKE)), chat(("user", "q"), ("assistant", "a"))]
    assert find(chats, of, "sft", answers=True)["part"].unique().to_list() == ["answer"]
    assert find(chats, of, "sft").is_empty()


def test_rows_that_were_dropped_before_are_not_searched_and_keep_their_reason() -> None:
    rows = frame([pair(LAKE, "x", "y"), pair(LAKE, "x", "z")])
    rows = rows.with_columns(reason=pl.Series(["filter/tie", None]), detail=pl.Series(["{}", None]))
    of = index({"quiz": LAKE})
    found = decontaminate.find({"preference": rows}, of)
    assert places(found) == [1]
    marked = decontaminate.drop({"preference": rows}, found)["preference"]
    assert marked["reason"].to_list() == ["filter/tie", "decontaminate/quiz"]
    assert marked["detail"][0] == "{}"
    gone = rows.with_columns(reason=pl.lit("filter/tie"))
    nothing = decontaminate.find({"preference": gone}, of)
    assert nothing.is_empty()
    assert decontaminate.drop({"preference": gone}, nothing)["preference"].equals(gone)
    assert decontaminate.report(nothing, of)["quiz"]["rows"] == 0


# What is dropped, with what evidence


def dropped(rows: Sequence[dict], of: Index, kind: Kind = "preference") -> list[tuple[str | None, dict | None]]:
    """(reason, detail) of each row."""
    frames = {kind: frame(rows, kind)}
    marked = decontaminate.drop(frames, decontaminate.find(frames, of))[kind]
    assert marked.columns == frames[kind].columns
    return [(reason, detail and json.loads(detail)) for reason, detail in marked.select("reason", "detail").rows()]


def test_a_row_is_dropped_for_its_benchmark_with_the_item_the_rule_and_the_words() -> None:
    of = index({"quiz": ["Who knows?", LAKE]}, "goal")
    clean, held = dropped([pair("Where is it?", "x", "y"), pair(f"Please: {LAKE}", "x", "y")], of)
    assert clean == (None, None)
    words = normalise(pl.Series([LAKE])).item()
    detail = {"item": "1", "field": "goal", "part": "prompt", "rule": "ngram", "coverage": 1.0, "text": words}
    assert held == ("decontaminate/quiz", detail)
    (edited,) = dropped([pair(LAKE.replace("ships", "boats"), "x", "y")], of)
    assert edited[1] is not None
    assert (edited[0], edited[1]["rule"], edited[1]["coverage"]) == ("decontaminate/quiz", "containment", 11 / 16)


def test_the_best_evidence_of_a_row_is_its_reason() -> None:
    half = " ".join(LAKE.split()[:15])
    (partly,) = dropped([pair(f"{half}? {SPIDER}", "x", "y")], index({"lakes": LAKE, "animals": SPIDER}))
    assert partly[1] is not None
    assert (partly[0], partly[1]["rule"]) == ("decontaminate/animals", "whole")
    both = [pair(f"{SPIDER} {STORY} {LAKE}", "x", "y")]
    # Of equal coverage: a run of words before a short text before what is contained, then the earlier benchmark.
    assert dropped(both, index({"animals": SPIDER, "lakes": LAKE}))[0][0] == "decontaminate/lakes"
    assert dropped(both, index({"stories": STORY, "lakes": LAKE}))[0][0] == "decontaminate/stories"
    assert dropped(both, index({"lakes": LAKE, "stories": STORY}))[0][0] == "decontaminate/lakes"


def test_pairs_and_chats_are_each_marked_in_their_frame() -> None:
    rows: dict[Kind, pl.DataFrame] = {
        "preference": frame([pair("q", "x", "y"), pair(SPIDER, "x", "y")]),
        "sft": frame([chat(("user", LAKE), ("assistant", "a")), chat(("user", "q"), ("assistant", "a"))], "sft"),
    }
    of = index({"quiz": [SPIDER, LAKE]})
    marked = decontaminate.drop(rows, decontaminate.find(rows, of))
    assert marked["preference"]["reason"].to_list() == [None, "decontaminate/quiz"]
    assert marked["sft"]["reason"].to_list() == ["decontaminate/quiz", None]


def test_a_prompt_of_many_rows_is_found_in_each_of_them() -> None:
    rows = [pair(SPIDER if n % 3 == 0 else f"Question {n}?", f"a{n}", f"b{n}", source="abc"[n % 2]) for n in range(90)]
    found = find(rows, index({"quiz": SPIDER}))
    assert places(found) == list(range(0, 90, 3))
    ids = frame(rows)["id"]
    assert found["id"].to_list() == [ids[place] for place in found["place"]]
    assert found["source"].to_list() == ["ab"[place % 2] for place in found["place"]]


# What is reported


def item_text(name: str, number: int, words: int) -> str:
    return " ".join(f"{name}{number}x{place}" for place in range(words))


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_the_report_has_the_counts_that_were_planted(seed: int) -> None:
    chance = random.Random(seed)
    # Long items are found by two rules, short ones by one; benchmark "c" is never planted; "b" has an item twice.
    sizes = {"a": [30, 20, 10, 9], "b": [15, 8, 15], "c": [40, 8]}
    texts = {name: [item_text(name, n, words) for n, words in enumerate(each)] for name, each in sizes.items()}
    texts["b"][2] = texts["b"][0]
    of = index(texts)
    planted = [
        [(name, n) for name in "ab" for n in range(len(texts[name])) if chance.random() < 0.15] for _ in range(30)
    ]
    sources = [chance.choice("abc") for _ in planted]
    prompts = [". ".join(["Well", *(texts[name][n] for name, n in held)]) for held in planted]
    rows: dict[Kind, pl.DataFrame] = {
        "preference": frame([pair(p, "x", "y", source=s) for p, s in zip(prompts, sources, strict=True)][:20]),
        "sft": frame([chat(("user", p), ("assistant", "x"), source=s) for p, s in zip(prompts, sources, strict=True)][20:], "sft"),
    }  # fmt: skip
    found = decontaminate.find(rows, of)
    report = decontaminate.report(found, of)
    marked = decontaminate.drop(rows, found)
    assert list(report) == ["a", "b", "c"]
    for name, entry in report.items():
        holding = [{n for other, n in held if other == name} for held in planted]
        items = Counter(0 if name == "b" and n == 2 else n for held in holding for n in held)
        if name == "b":  # a row that has both copies has the item once
            items[0] -= sum({0, 2} <= held for held in holding)
        long = {n for n, words in enumerate(sizes[name]) if words >= 13}
        by_rule = {
            "ngram": sum(bool(held & long) for held in holding),
            "containment": sum(bool(held & long) for held in holding),
            "whole": sum(bool(held - long) for held in holding),
        }
        touched = {n for held in holding for n in held}
        touched |= {0, 2} if name == "b" and touched & {0, 2} else set()
        by_source = Counter(source for source, held in zip(sources, holding, strict=True) if held)
        assert entry == {
            "items": len(texts[name]),
            "sought": len(texts[name]),
            "touched": len(touched),
            "rows": sum(map(bool, holding)),
            "dropped": sum((frame_["reason"] == f"decontaminate/{name}").sum() for frame_ in marked.values()),
            "rules": {rule: count for rule, count in by_rule.items() if count},
            "sources": dict(by_source),
            "worst": [
                {"item": str(n), "rows": rows_, "text": texts[name][n].lower()}
                for n, rows_ in sorted(items.items(), key=lambda each: (-each[1], str(each[0])))
                if rows_
            ][:5],
        }
    assert sum(entry["dropped"] for entry in report.values()) == sum(map(bool, planted))


# In a build

QUESTIONS = [item_text("ask", n, 9 + n) for n in range(12)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int = 60) -> list[dict]:
    """Every fifth row asks a question of the benchmark; every tenth is a copy of the row before."""
    rows = []
    for n in range(count):
        asked = f"Please: {QUESTIONS[n % 12]}" if n % 5 == 0 else f"What is the number after {n - n % 10 // 9}?"
        rows.append({"system": "", "question": asked, "chosen": f"{n + 1 - n % 10 // 9}.", "rejected": "No."})
    return rows


def recipe(folder: Path, rows: list[dict] | None = None, body: str = "", against: str = 'path = "ask.jsonl"') -> Path:
    """A recipe whose benchmark is `ask`, with the files that it names."""
    write_jsonl(folder / "rows.jsonl", pairs() if rows is None else rows)
    if not (folder / "ask.jsonl").exists():
        write_jsonl(folder / "ask.jsonl", [{"q": text} for text in QUESTIONS])
    file = folder / "recipe.toml"
    file.write_text(
        f'name = "mix"\n[sources.orca]\npath = "rows.jsonl"\n[decontaminate]\n{body}\n'
        f'[decontaminate.against.ask]\n{against}\nfields = ["q"]\n'
    )
    return file


def test_every_row_is_kept_or_dropped_and_the_manifest_says_for_what(tmp_path: Path) -> None:
    mixture = prefmix.build(recipe(tmp_path), store=tmp_path / "store")
    mixture.verify()
    manifest = mixture.manifest
    reasons = manifest["sources"]["orca"]["dropped"]
    assert reasons["decontaminate/ask"] == 12
    assert manifest["sources"]["orca"]["kept"] + sum(reasons.values()) == 60
    assert [stage["dropped"] for stage in manifest["funnel"]] == [{}, {"decontaminate/ask": 12}, {"dedupe/pair": 6}]
    assert {key: manifest["contamination"]["ask"][key] for key in ("items", "rows", "dropped", "sources")} == {
        "items": 12,
        "rows": 12,
        "dropped": 12,
        "sources": {"orca": 12},
    }
    drops = mixture.drops.filter(pl.col("reason") == "decontaminate/ask").collect()
    assert drops["source_row"].sort().to_list() == list(range(0, 60, 5))
    for row, detail in drops.select("source_row", "detail").rows():
        assert json.loads(detail)["item"] == f"ask.jsonl:{row % 12}"
        assert json.loads(detail)["text"] == QUESTIONS[row % 12]
    kept = mixture.scan("preference").collect()["prompt"]
    assert not kept.str.contains("ask").any()


def test_a_contaminated_row_does_not_take_its_clean_twin_with_it(tmp_path: Path) -> None:
    same = {"system": "", "chosen": "Eight.", "rejected": "Six."}
    rows = [{**same, "question": f"{QUESTIONS[0]} {n}"} for n in range(3)] + [{**same, "question": "How many legs?"}]
    curated = curate(plan(prefmix.load_recipe(recipe(tmp_path, rows, '[dedupe]\nexact = "pair"'))))
    assert curated.rows["preference"]["reason"].to_list() == ["decontaminate/ask"] * 3 + [None]


def test_answers_count_in_a_build_that_asks_for_them(tmp_path: Path) -> None:
    rows = [{"system": "", "question": "Well?", "chosen": f"{QUESTIONS[3]}!", "rejected": "No."}]
    rows += [{"system": "", "question": "And?", "chosen": "Yes.", "rejected": "No."}]
    for body, expected in (("", {}), ("answers = true", {"decontaminate/ask": 1})):
        curated = curate(plan(prefmix.load_recipe(recipe(tmp_path, rows, body))))
        assert curated.tally.dropped["orca"] == expected


def test_without_benchmarks_nothing_is_looked_for(tmp_path: Path) -> None:
    file = recipe(tmp_path)
    file.write_text(file.read_text().partition("[decontaminate]")[0])
    manifest = prefmix.build(file, store=tmp_path / "store").manifest
    assert manifest["contamination"] == {}
    assert "decontaminate" not in [stage["stage"] for stage in manifest["funnel"]]


def test_the_length_of_the_n_grams_is_that_of_the_recipe(tmp_path: Path) -> None:
    rows = [{"system": "", "question": " ".join(QUESTIONS[11].split()[:8]), "chosen": "Yes.", "rejected": "No."}]
    rows += [{"system": "", "question": "And?", "chosen": "Yes.", "rejected": "No."}]
    for body, expected in (("", {}), ("ngram = 8", {"decontaminate/ask": 1})):
        curated = curate(plan(prefmix.load_recipe(recipe(tmp_path, rows, body))))
        assert curated.tally.dropped["orca"] == expected


def test_neither_the_order_of_the_rows_nor_the_number_of_threads_shows_in_the_digest(tmp_path: Path) -> None:
    digests = set()
    code = "import prefmix, sys; print(prefmix.build(sys.argv[1], store=sys.argv[2]).digest)"
    for threads in ("1", "3"):
        folder = tmp_path / threads
        rows = random.Random(threads).sample(pairs(), 60)
        command = [sys.executable, "-c", code, str(recipe(folder, rows)), str(folder / "store")]
        environment = {**os.environ, "POLARS_MAX_THREADS": threads}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(said.stdout.strip())
    assert len(digests) == 1


def test_a_changed_benchmark_makes_a_new_build(tmp_path: Path) -> None:
    file, store = recipe(tmp_path), tmp_path / "store"
    first = prefmix.build(file, store=store)
    assert not prefmix.build(file, store=store).is_new
    write_jsonl(tmp_path / "ask.jsonl", [{"q": text} for text in QUESTIONS[:-1]])
    second = prefmix.build(file, store=store)
    assert (second.version, second.is_new) == ("v2", True)
    assert second.manifest["sources"]["orca"]["dropped"]["decontaminate/ask"] == 11
    assert second.digest != first.digest


# As a gate


def test_contamination_fails_a_build_that_asks_for_it_and_nothing_is_written(tmp_path: Path) -> None:
    file, store = recipe(tmp_path), tmp_path / "store"
    with pytest.raises(
        GateError, match=r"nothing was written:\n  ask: 12 rows \(orca\) hold 12 of its 12 items"
    ) as caught:
        prefmix.build(file, store=store, fail_on=["contamination"])
    assert caught.value.exit_code == 3
    assert list(store.rglob("*")) == []


def test_the_gate_holds_for_a_version_that_is_in_the_store_already(tmp_path: Path) -> None:
    file, store = recipe(tmp_path), tmp_path / "store"
    prefmix.build(file, store=store)
    before = sorted(store.rglob("*"))
    with pytest.raises(GateError, match="ask: 12 rows"):
        prefmix.build(file, store=store, fail_on=["contamination"])
    assert sorted(store.rglob("*")) == before


def test_the_gate_lets_clean_rows_through(tmp_path: Path) -> None:
    file, store = recipe(tmp_path, [row for row in pairs() if "ask" not in row["question"]]), tmp_path / "store"
    assert prefmix.build(file, store=store, fail_on=["contamination"]).is_new
    assert not prefmix.build(file, store=store, fail_on=["contamination"]).is_new


def test_the_gate_sees_no_row_that_was_dropped_for_something_else(tmp_path: Path) -> None:
    tie = {"system": "", "question": QUESTIONS[0], "chosen": "Yes.", "rejected": "Yes."}
    clean = [row for row in pairs() if "ask" not in row["question"]]
    assert prefmix.build(recipe(tmp_path, [tie, *clean]), store=tmp_path / "store", fail_on=["contamination"]).is_new


def test_the_command_line_fails_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["build", str(recipe(tmp_path)), "--store", "store", "--fail-on", "contamination"]
    assert run(command) == 3
    assert "ask: 12 rows (orca) hold 12 of its 12 items" in " ".join(capsys.readouterr().err.split())
    assert Store(tmp_path / "store").names() == []
    assert run(command[:4]) == 0
    assert run(command) == 3
    assert run([*command, "--dry-run"]) == 3


# What cannot be read


@pytest.mark.parametrize(
    ("against", "content", "problem"),
    [
        ('path = "none/*.jsonl"', None, r"decontaminate\.against\.ask: none/\*\.jsonl: no such file"),
        ('path = "ask.jsonl"', '{"q": "a"}\n{"q": \n', r"decontaminate\.against\.ask: ask\.jsonl, line 2"),
        ('path = "ask.jsonl"', '{"question": "a"}\n', r'decontaminate\.against\.ask: ask\.jsonl: no field "q"'),
        ('path = "ask.jsonl"', '{"q": ""}\n', r'decontaminate\.against\.ask: not one text in "q"'),
        ('path = "ask.parquet"', "PAR1", r"decontaminate\.against\.ask: .*ask\.parquet"),
    ],
)
def test_a_benchmark_that_cannot_be_read_fails_the_build_by_its_name(
    tmp_path: Path, against: str, content: str | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / against.split('"')[1]).write_text(content)
    with pytest.raises(SourceError, match=problem):
        prefmix.build(recipe(tmp_path, against=against), store=tmp_path / "store")
    assert not (tmp_path / "store").exists() or list((tmp_path / "store").rglob("*")) == []


# The real rows


def real_benchmark(root: Path, folder: str, files: str, fields: list[str]) -> Benchmark:
    return own(root / "benchmarks", fields, path=f"{folder}/{files}")


def test_every_row_with_a_question_of_gsm8k_is_found_and_no_other(real_data: Path) -> None:
    """SOURCES.md: 5,245 rows are GSM8K-train questions. Another one of the same file has the end of a question only."""
    rows = pl.read_parquet(real_data / "openhermes" / "converted_hermes_sources.parquet")
    origin = pl.read_parquet(real_data / "openhermes" / "converted_hermes_sources.provenance.parquet")["origin"]
    from_gsm8k = (origin == "FLAN CoT gsm8k_train.tsv").arg_true().to_list()
    assert len(from_gsm8k) == 5246
    gsm8k = real_benchmark(real_data, "gsm8k", "train.jsonl.gz", ["question"])
    prompts = rows["instruction"] + "\n" + rows["input"]
    found = decontaminate.index_of([gsm8k]).search(prompts)["row"].unique().to_list()
    questions = set(normalise(gsm8k.read()["text"]))
    asked = [row for row, text in enumerate(normalise(prompts)) if text in questions]
    assert sorted(found) == asked
    assert len(asked) == 5245
    missed = set(from_gsm8k) - set(found)
    assert [rows["instruction"][row] for row in missed] == ["How many balls are in the box Clive opens?"]
    assert set(found) <= set(from_gsm8k)


def test_no_prompt_of_mt_bench_is_left_in_a_build_from_alpaca_eval(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "ultrafeedback_binarized" / "converted_alpaca_eval.parquet"
    mt_bench = real_data / "benchmarks" / "mt_bench" / "question.jsonl"
    turns = [turn for line in mt_bench.read_text(encoding="utf-8").splitlines() for turn in json.loads(line)["turns"]]
    wanted = [f" {turn} " for turn in normalise(pl.Series(turns)) if turn.count(" ") >= 7]
    rows = pl.read_parquet(source)["instruction"]
    plain = dict(zip(rows.to_list(), normalise(rows), strict=True))
    held = {text for text, words in plain.items() if any(turn in f" {words} " for turn in wanted)}
    contaminated = [row for row, text in enumerate(rows) if text in held]
    assert len(contaminated) == 72
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "mix"\n[sources.uf]\npath = "{source}"\n[filter]\ndefault = "off"\n[dedupe]\nexact = "off"\n'
        f'[decontaminate.against.mt_bench]\npath = "{mt_bench}"\nfields = ["turns"]\n'
    )
    mixture = prefmix.build(recipe, store=tmp_path / "store")
    drops = mixture.drops.filter(pl.col("reason") == "decontaminate/mt_bench").collect()
    assert sorted(drops["source_row"]) == contaminated
    assert mixture.manifest["contamination"]["mt_bench"]["dropped"] == 72
    kept = mixture.scan("preference").collect()["prompt"].unique()
    assert not [text for text in normalise(kept) if any(turn in f" {text} " for turn in wanted)]


def test_clean_rows_are_found_only_where_a_question_is_in_them_word_for_word(real_data: Path) -> None:
    """T0 was made without these benchmarks. Five of its rows ask what MMLU asks too."""
    texts = [
        real_benchmark(real_data, folder, files, [field for field in fields if field != "passage"])
        .read()
        .with_columns(benchmark=pl.lit(f"{folder}/{files}"))
        for folder, files, fields, _ in REAL
        if folder != "rephrased_llm_decontaminator" and fields != ["examples.input"]
    ]
    of = Index(pl.concat(texts).select("benchmark", "item", "field", "text"))
    prompts = pl.read_parquet(real_data / "openhermes" / "converted_t0_p3.parquet")["instruction"]
    found = of.search(prompts)
    originals = pl.concat(texts).group_by("benchmark", "item", "field").agg(pl.col("text").first())
    named = found.hstack(of.evidence(found)).join(
        originals.rename({"text": "asked"}), on=["benchmark", "item", "field"]
    )
    assert Counter(named["asked"]) == {"Who was the first American in space?": 4, "What is an alpha particle?": 1}
    assert all(asked.removesuffix("?") in prompts[row] for row, asked in named.select("row", "asked").rows())


def test_items_that_are_too_short_are_counted_as_not_looked_for() -> None:
    texts = {
        "0": "Who are you?",
        "1": "Where is the highest mountain of Peru?",
        "2": "Where is the highest mountain of Peru?",
    }
    rows = [(item, "question", text, "quiz") for item, text in texts.items()] + [
        ("1", "choices[0]", "Huascarán", "quiz")
    ]
    of = Index(pl.DataFrame(rows, schema=["item", "field", "text", "benchmark"], orient="row"))
    found = decontaminate.find({"sft": frame([chat(("user", "Hm?"), ("assistant", "x"))], "sft")}, of)
    assert {name: decontaminate.report(found, of)["quiz"][name] for name in ("items", "sought")} == {
        "items": 3,
        "sought": 0,
    }
