from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from prefmix.errors import TrainError
from prefmix.model_card import model_card
from prefmix.stages import eos_table
from prefmix.train.curves import curves
from prefmix.train.report import write_report

SVG = "{http://www.w3.org/2000/svg}"
DIGEST = "bd18d7aebc7e5fc9553e612a5a68fee46d8e23cbf46edd56cc6630fa928a56ee"
COMMIT = "24c0bea14d53e6f67f1fbe2eca5bfe7cae389b33"


def a_manifest() -> dict[str, Any]:
    source = {"kind": "preference", "format": "orca_dpo_pairs", "revision": None, "licence": "mit", "files": []}
    return {
        "name": "small",
        "version": "v1",
        "digest": DIGEST,
        "license": "apache-2.0",
        "subsets": {"preference": {"train": {"rows": 198, "tokens": None, "files": []}}},
        "sources": {
            "orca": {**source, "hub": "Intel/orca_dpo_pairs", "revision": COMMIT, "read": 12859, "kept": 198,
                     "dropped": {"filter/tie": 7, "dedupe/pair": 12654}},
            "mine": {**source, "path": "/home/someone/private.jsonl", "read": 4, "kept": 4, "dropped": {}},
        },
        "contamination": {},
    }  # fmt: skip


def a_run(**changes: Any) -> dict[str, Any]:
    run = {
        "stage": "dpo",
        "method": "dpo",
        "recipe_digest": "f30f5785" * 8,
        "mixture": {"name": "small", "version": "v1", "digest": DIGEST},
        "base": {"name": "teknium/OpenHermes-2.5-Mistral-7B", "revision": COMMIT},
        "tokenizer": {"sha256": "7e0b8f35" * 8, "added": []},
        "after_stage": None,
        "seed": 42,
        "hyperparameters": {
            "name": "dpo", "method": "dpo", "subset": "preference", "epochs": 0.6, "max_steps": None, "rows": None,
            "batch_size": 32, "token_budget": "auto", "learning_rate": 5e-06, "scheduler": "cosine", "beta": 0.1,
            "loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "quantization": "nf4", "dtype": "bfloat16",
            "adapter": "lora", "lora": {"r": 64, "alpha": 64.0, "dropout": 0.05, "target": "all-linear"},
            "eos": {"min_stop_rate": 0.95, "on_fail": "warn", "prompts": 64, "max_new_tokens": 256},
        },
        "rows": 129,
        "left_out": {"tokens/too_long": 69},
        "shortened": 14,
        "steps": 2391,
        "epochs": 0.6001,
        "started": "2026-11-23T15:04:08+00:00",
        "finished": "2026-11-23T18:04:50+00:00",
        "hardware": {"device": "NVIDIA H200", "memory_bytes": 150_110_011_392, "processes": 1},
        "versions": {"python": "3.11.7", "prefmix": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
        "tokens": 38_412_317,
        "wall_s": 11_041.867,
        "pairs_per_s": 6.927,
        "tokens_per_s": 3478.8,
        "mfu": 0.4127,
        "peak_memory_bytes": 41_635_676_160,
        "token_budget": 16384,
        "losses": {"first": 1.772369623184204, "last": 0.7095482349395752, "mean": 0.9},
        "adapter_sha256": "45ab58cc" * 8,
    }  # fmt: skip
    return run | changes


def a_measurement(p_eos: float, greedy: int, sampled: int) -> dict[str, Any]:
    def stops(stopped: int) -> dict[str, Any]:
        return {"n": 64, "stopped": stopped, "other_eos": 0, "cut": 64 - stopped, "mean_tokens": 101.5}

    stopped = greedy + sampled
    return {"p_eos": p_eos, "log_p_eos": math.log(p_eos) - 0.02, "stop_rate": stopped / 128, "cut": 128 - stopped,
            "n": 128, "greedy": stops(greedy), "sampled": stops(sampled)}  # fmt: skip


def an_eos(**changes: Any) -> dict[str, Any]:
    before, after = a_measurement(0.9134512, 63, 62), a_measurement(0.8712345, 61, 55)
    history = [{"step": 1000, **a_measurement(0.88, 60, 60)}, {"step": 2391, **after}]
    return {"stage": "dpo", "rows": 64, "split": "test", "before": before, "after": after, "history": history} | changes


def some_metrics(steps: int, every: int = 0, method: str = "dpo") -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        values = {"loss": 2 / (1 + step / 100) + step % 7 / 50}
        if method == "dpo":
            values |= {"rewards/margins": step / 500, "rewards/accuracies": 0.5 + step % 3 / 10}
        lines.append({"step": step, **values, "learning_rate": 5e-6 * (1 - step / steps), "grad_norm": 1.0})
        if every and step % every == 0:
            lines.append({"step": step, **{f"eval_{name}": value * 1.1 for name, value in values.items()}})
    return lines


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def cells(card: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    rows = [line[2:-2].split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def number(cell: str) -> float:
    return float(re.sub(r"[,%]|/s.*| [a-zA-Z].*|\(.*", "", cell).strip())


def drawn(svg: str, kind: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{SVG}{kind}")


# The card.


def test_the_head_is_what_the_hub_reads():
    card = model_card(a_run(), an_eos(), [], a_manifest())
    assert head_of(card) == {
        "base_model": "teknium/OpenHermes-2.5-Mistral-7B",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["Intel/orca_dpo_pairs"],
        "tags": ["dpo", "qlora", "chatml", "prefmix", "trl"],
    }
    data = ModelCard(card).data
    assert data.to_dict() == head_of(card)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quantization": "none"}, ("peft", "adapter", ["lora"])),
        ({"quantization": "none", "adapter": "none"}, ("transformers", "finetune", [])),
    ],
)
def test_the_head_tells_an_adapter_from_a_whole_model(changes, expected):
    run = a_run()
    run["hyperparameters"] |= changes
    card = model_card(run, an_eos(), [], a_manifest())
    head = head_of(card)
    kinds = [tag for tag in head["tags"] if "lora" in tag]
    assert (head["library_name"], head["base_model_relation"], kinds) == expected
    assert ("PeftModel" in card) == (expected[0] == "peft")


def test_a_base_that_is_a_folder_is_not_given_to_the_hub_as_a_model_of_its_own():
    card = model_card(a_run(base={"name": "gpt2", "revision": None}), an_eos(), [], a_manifest())
    assert "base_model" not in head_of(card)
    assert "`gpt2`, a folder" in card


def test_a_base_without_an_owner_may_be_on_the_hub():
    card = model_card(a_run(base={"name": "gpt2", "revision": COMMIT}), an_eos(), [], a_manifest())
    assert head_of(card)["base_model"] == "gpt2"
    assert f'"gpt2", revision="{COMMIT}"' in card


def test_an_unlisted_licence_is_named_as_other():
    head = head_of(model_card(a_run(), an_eos(), [], a_manifest() | {"license": "my-terms"}))
    assert (head["license"], head["license_name"]) == ("other", "my-terms")


def test_every_figure_is_that_of_the_record():
    run, eos = a_run(), an_eos()
    rows = cells(model_card(run, eos, some_metrics(2391, every=1000), a_manifest()))
    for place, each in enumerate((eos["before"], eos["after"])):
        assert number(rows["P(EOS) where held-out answers end, mean"][place]) == pytest.approx(each["p_eos"], rel=1e-3)
        assert number(rows["log P(EOS), mean"][place]) == pytest.approx(each["log_p_eos"], abs=1e-3)
        assert number(rows["stop rate"][place]) == pytest.approx(100 * each["stop_rate"], abs=0.05)
        for mode in ("greedy", "sampled"):
            assert rows[f"stop rate, {mode}"][place].endswith(f"({each[mode]['stopped']} of {each[mode]['n']})")
        assert number(rows["cut at 256 tokens"][place]) == each["cut"]
        assert number(rows["generations (n)"][place]) == each["n"]
    for name, value in (("rows", 129), ("rows with a shortened prompt", 14), ("steps", 2391), ("tokens", 38_412_317)):
        assert number(rows[name][0]) == value
    assert rows["epochs"] == ["0.6001"]
    assert rows["rows left out"] == ["`tokens/too_long` 69"]
    assert rows["speed"] == ["6.927 pairs/s, 3,479 tokens/s"]
    assert rows["model FLOP utilisation"] == ["41.3 %"]
    assert rows["wall clock"] == ["3 h 4 min"]
    assert rows["peak memory"] == ["41.64 GB (41,635,676,160 bytes)"]
    assert rows["hardware"] == ["`NVIDIA H200, 150 GB`"]
    assert number(rows["loss, first step"][0]) == pytest.approx(run["losses"]["first"], rel=1e-3)
    assert number(rows["loss, last step"][0]) == pytest.approx(run["losses"]["last"], rel=1e-3)
    assert number(rows["reward margin, held-out rows"][0]) == pytest.approx(2000 / 500 * 1.1, rel=1e-3)
    for name, version in run["versions"].items():
        assert rows[f"`{name}`"] == [f"`{version}`"]
    for name, value in (("learning_rate", "5e-06"), ("lora.alpha", "64.0"), ("loss", "sigmoid, sft"),
                        ("loss_weights", "1.0, 0.1"), ("eos.min_stop_rate", "0.95")):  # fmt: skip
        assert rows[f"`{name}`"] == [f"`{value}`"]
    assert "`max_steps`" not in rows


def test_the_sources_are_told_with_their_rows_and_without_paths_of_ones_own():
    card = model_card(a_run(), an_eos(), [], a_manifest())
    rows = cells(card)
    link = "[Intel/orca_dpo_pairs](https://huggingface.co/datasets/Intel/orca_dpo_pairs) at `24c0bea14d53`"
    dropped = "`dedupe/pair` 12,654, `filter/tie` 7"
    assert rows["`orca`"] == ["`preference`", link, "`mit`", "12,859", "198", dropped]
    assert rows["`mine`"] == ["`preference`", "files in the format `orca_dpo_pairs`", "`mit`", "4", "4", "none"]
    assert "someone" not in card
    for fact in (DIGEST, "f30f5785" * 8, "129 rows, of 198 in its train split", "`small@v1`"):
        assert fact in card


@pytest.mark.parametrize(
    ("stopped", "verdict"), [((61, 55), "**Not passed**"), ((61, 61), "**Passed**"), ((0, 0), "**Not passed**")]
)
def test_the_verdict_is_the_gates(stopped, verdict):
    assert verdict in model_card(a_run(), an_eos(after=a_measurement(0.9, *stopped)), [], a_manifest())


def test_a_rate_just_below_all_is_not_rounded_to_all():
    after = a_measurement(0.9, 64, 64) | {"stop_rate": 0.99999}
    card = model_card(a_run(), an_eos(after=after), [], a_manifest())
    assert cells(card)["stop rate"][1] == "> 99.9 %"


def test_decontamination_is_told_or_said_to_be_missing():
    assert "**Not decontaminated**" in model_card(a_run(), an_eos(), [], a_manifest())
    report = {"truthfulqa": {"items": 817, "sought": 810, "touched": 9, "rows": 12, "dropped": 11}}
    card = model_card(a_run(), an_eos(), [], a_manifest() | {"contamination": report})
    assert cells(card)["`truthfulqa`"] == ["817", "9", "12", "11"]
    assert "Not decontaminated" not in card


def test_a_stage_that_was_not_measured_or_not_finished_has_a_card():
    run = {name: value for name, value in a_run(finished=None).items() if name not in ("tokens", "wall_s", "losses")}
    card = model_card(run, {"stage": "dpo", "before": None, "after": None, "history": []}, [], a_manifest())
    assert cells(card)["stop rate"] == ["not measured", "not measured"]
    assert "**Not judged**" in card
    assert cells(card)["finished"] == ["no"]


def test_an_eos_on_rows_of_the_train_split_is_owned_up_to():
    assert "also trained on" in model_card(a_run(), an_eos(split="train"), [], a_manifest())


@pytest.mark.parametrize("added", [[], ["<|im_start|>", "<|im_end|>"]])
@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("name", ["org/model", 'a "folder"\n```\n# of "mine"', "it's", "größe 😀\\"])
def test_the_code_is_python_that_names_the_base(adapter, added, name):
    run = a_run(base={"name": name, "revision": COMMIT if name == "org/model" else None})
    run["hyperparameters"]["adapter"], run["tokenizer"]["added"] = adapter, added
    blocks = [
        token for token in MarkdownIt().parse(model_card(run, an_eos(), [], a_manifest())) if token.info == "python"
    ]
    assert len(blocks) == 1
    found: list[Any] = []

    class Anything:
        def __getattr__(self, _: str) -> Any:
            return lambda *values, **named: found.append((values, named)) or self

    program = blocks[0].content.split("messages =")[0].replace("len(tokenizer) > ", "")
    names: dict[str, Any] = dict.fromkeys(("PeftModel", "AutoModelForCausalLM", "AutoTokenizer"), Anything())
    exec(compile(re.sub(r"(?m)^from .*|if .*:\n.*", "", program), "card", "exec"), names)
    compile(blocks[0].content, "card", "exec")
    if adapter == "lora":
        revision = {"revision": COMMIT} if name == "org/model" else {}
        assert ((name,), {**revision, "device_map": "auto"}) in found
    assert ("resize_token_embeddings" in program) == bool(added and adapter == "lora")


EVIL = "x`](javascript:alert(1)) | <img src=x onerror=alert(1)>\n---\n# Owned\n\n![](http://evil.example/p.png) \"'\\|\u202e\ud800\x00"


def everywhere(value: Any, evil: str) -> Any:
    """A JSON value with other strings in the place of its own; keys of objects that count rows are data as well."""
    if isinstance(value, dict):
        counts = value and all(isinstance(each, int) for each in value.values()) and any("/" in key for key in value)
        return {(f"{key}{evil}" if counts else key): everywhere(each, evil) for key, each in value.items()}
    if isinstance(value, list):
        return [everywhere(each, evil) for each in value]
    return f"{value}{evil}" if isinstance(value, str) else value


@pytest.mark.parametrize(
    "evil",
    [
        f"{each}owned"
        for each in (EVIL, "`", "``` \n```", " | ", "\\|", "\r\n\r\n## Owned", " www.evil.example", "<b>", "*_~")
    ],
)
def test_what_comes_from_data_stays_text(evil):
    manifest, run = everywhere(a_manifest(), evil), everywhere(a_run(), evil)
    manifest["sources"] = {f"{name}{evil}": entry for name, entry in manifest["sources"].items()}
    manifest["contamination"] = {f"gsm8k{evil}": {"items": 1, "touched": 1, "rows": 1, "dropped": 1}}
    for keep in ("method", "adapter", "quantization", "subset"):
        run["hyperparameters"][keep] = a_run()["hyperparameters"][keep]
    run["method"], run["after_stage"] = "dpo", f"sft{evil}"
    plain = a_manifest() | {"contamination": {"gsm8k": {"items": 1, "touched": 1, "rows": 1, "dropped": 1}}}
    eos = an_eos(stage=f"dpo{evil}", split=f"test{evil}")
    card = model_card(run, eos, [], manifest)
    card.encode()

    def tokens(text: str) -> list[Token]:
        found = MarkdownIt().enable("table").parse(text.split("---\n", 2)[2])
        return [each for token in found for each in (token, *(token.children or []))]

    def shape(text: str) -> list[str]:
        return [
            token.type for token in tokens(text) if token.type not in ("text", "link_open", "link_close", "code_inline")
        ]

    assert shape(card) == shape(model_card(a_run(after_stage="sft"), an_eos(), [], plain))
    assert not [token for token in tokens(card) if token.type == "text" and "owned" in token.content]
    targets = {token.attrs.get("href", token.attrs.get("src")) for token in tokens(card)} - {None}
    assert targets == {"curves.svg"}
    head = head_of(card)
    assert not {"base_model", "datasets"} & set(head), "these names are none that the Hub takes"
    assert set(head) == {"base_model_relation", "library_name", "pipeline_tag", "license", "license_name", "tags"}
    assert ModelCard(card).data.to_dict() == head
    ElementTree.fromstring(curves([], eos))


# The run.


def a_folder(folder, run: dict[str, Any], eos: dict[str, Any], metrics: list[dict[str, Any]]):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "eos.json").write_text(json.dumps(eos))
    (folder / "mixture.json").write_text(json.dumps(a_manifest()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def test_the_report_of_a_later_stage_tells_the_eos_of_those_before_it(tmp_path):
    a_folder(tmp_path / "dpo", a_run(), an_eos(), some_metrics(5))
    rest = {"before": an_eos()["after"], "after": a_measurement(0.999, 64, 64)}
    middle = a_folder(tmp_path / "more", a_run(stage="more", after_stage="dpo"), an_eos(stage="more", **rest), [])
    last = a_folder(tmp_path / "eos", a_run(stage="eos", after_stage="more"), an_eos(stage="eos", **rest), [])
    a_folder(tmp_path / "aside", a_run(stage="aside"), an_eos(), [])
    write_report(last)
    card = (last / "README.md").read_text()
    assert eos_table([tmp_path / "dpo", middle, last]) in card
    rows = cells(card)
    assert rows["`dpo`"] == ["0.9135 → 0.8712", "97.7 % → 90.6 %"]
    assert rows["`eos`"] == ["0.8712 → 0.999", "90.6 % → 100.0 %"]
    assert "`aside`" not in rows
    write_report(tmp_path / "dpo")
    assert "Over the stages" not in (tmp_path / "dpo" / "README.md").read_text()


def test_the_report_is_two_files_and_comes_out_the_same_again(tmp_path):
    folder = a_folder(tmp_path / "dpo", a_run(), an_eos(), some_metrics(5, every=2))
    there = {path.name for path in folder.iterdir()}
    write_report(folder)
    first = {name: (folder / name).read_bytes() for name in ("README.md", "curves.svg")}
    write_report(folder)
    assert {path.name for path in folder.iterdir()} == there | set(first)
    assert {name: (folder / name).read_bytes() for name in first} == first
    assert "](curves.svg)" in first["README.md"].decode()


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    folder = a_folder(tmp_path / "dpo", a_run(), an_eos(), [])
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with pytest.raises(TrainError, match=r"metrics\.jsonl, line 2"):
        write_report(folder)
    (folder / "eos.json").unlink()
    with pytest.raises(TrainError, match=r"eos\.json.*--force"):
        write_report(folder)


@pytest.mark.parametrize("after", ["dpo", "gone", "../other/sft", "/"])
def test_a_chain_of_stages_that_leads_nowhere_or_in_a_circle_or_out_of_the_run_ends(tmp_path, after):
    a_folder(tmp_path / "other" / "sft", a_run(stage="sft"), an_eos(stage="sft"), [])
    folder = a_folder(tmp_path / "run" / "dpo", a_run(after_stage=after), an_eos(), [])
    write_report(folder)
    assert "Over the stages" not in (folder / "README.md").read_text()


def test_the_report_needs_no_torch():
    code = "import sys, prefmix.model_card, prefmix.train.report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# The curves.


@pytest.mark.parametrize("steps", [1, 5, 20_000])
@pytest.mark.parametrize("every", [0, 1, 1000])
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_the_picture_is_small_well_formed_and_inside_its_frame(steps, every, method):
    eos = an_eos(history=[{"step": steps, **a_measurement(0.9, 60, 60)}])
    svg = curves(some_metrics(steps, every, method), eos)
    assert len(svg.encode()) < 200_000
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    names = {text.text for text in drawn(svg, "text") if text.get("class") == "name"}
    both = {"Stage dpo", "Loss", "P(EOS) at the end of answers", "Stop rate of generations", "Learning rate"}
    assert names == both | ({"Reward margin", "Reward accuracy"} if method == "dpo" else set())
    for path in drawn(svg, "path"):
        for x, y in re.findall(r"[ML](\S+?) ([\d.]+)", path.get("d", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    for mark in drawn(svg, "circle"):
        assert 0 <= float(mark.get("cx", "")) <= width
        assert 0 <= float(mark.get("cy", "")) <= height


def test_the_picture_says_what_it_shows_to_those_who_do_not_see_it():
    root = ElementTree.fromstring(curves(some_metrics(5, every=5), an_eos()))
    assert (root.get("role"), root.get("aria-labelledby")) == ("img", "title desc")
    assert root.findtext(f"{SVG}title") == "Curves of the stage dpo"
    told = root.findtext(f"{SVG}desc") or ""
    assert "5 optimiser steps" in told
    assert "P(EOS) at the end of answers: held out from 0.9135 to 0.8712." in told


def test_points_stand_where_their_values_are():
    metrics = [{"step": step, "loss": loss} for step, loss in ((1, 4.0), (2, 0.0), (4, 2.0))]
    svg = curves(metrics, {"stage": "s", "before": None, "history": []})
    (line,) = [path for path in drawn(svg, "path") if path.get("class") == "line train"]
    (x1, y1), (x2, y2), (x4, y4) = [
        (float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([\d.]+)", line.get("d", ""))
    ]
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert y1 < y4 < y2
    assert y4 == pytest.approx((y1 + y2) / 2, abs=0.1)


def test_many_steps_are_averaged_and_none_is_left_out():
    metrics = [{"step": step, "loss": float(step % 2)} for step in range(1, 10_001)]
    svg = curves(metrics, {"stage": "s", "before": None, "history": []})
    (line,) = [path for path in drawn(svg, "path") if path.get("class") == "line train"]
    points = re.findall(r"[ML](\S+) ([\d.]+)", line.get("d", ""))
    assert 100 < len(points) <= 360
    assert len({y for _, y in points}) == 1
    assert "a point of a line is the mean of 28 steps" in svg


def test_a_value_that_is_not_a_number_is_a_gap():
    losses = [1.0, 2.0, math.nan, 3.0, 2.0, math.inf, None]
    metrics = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    svg = curves(metrics, {"stage": "s", "before": None, "history": []})
    (line,) = [path for path in drawn(svg, "path") if path.get("class") == "line train"]
    assert line.get("d", "").count("M") == 2
    assert line.get("d", "").count("L") == 2


def test_the_picture_has_light_and_dark_colours_and_nothing_from_outside():
    svg = curves(some_metrics(5), an_eos())
    assert "@media (prefers-color-scheme: dark)" in svg
    assert not re.search(r"(?:href|src|url\(|@import|<script)", svg)


NUMBERS = st.one_of(st.none(), st.floats(), st.integers(), st.booleans(), st.text(max_size=3))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["loss", "eval_loss", "rewards/margins", "learning_rate", "step"]), NUMBERS)
    ),
    st.lists(st.fixed_dictionaries({"step": NUMBERS, "p_eos": NUMBERS, "stop_rate": NUMBERS}), max_size=4),
)
def test_no_number_breaks_the_picture(metrics, history):
    svg = curves(metrics, {"stage": "s", "before": history[0] if history else None, "history": history})
    ElementTree.fromstring(svg)
    assert not re.search(r'(?:d|x|y|cx|cy)="[^"]*(?:nan|inf)', svg)


REAL = st.one_of(st.none(), st.floats())


@settings(max_examples=100, deadline=None)
@given(REAL, REAL, REAL, REAL)
def test_no_number_breaks_the_card(p_eos, log_p_eos, rate, loss):
    measured = copy.deepcopy(an_eos()["after"]) | {"p_eos": p_eos, "log_p_eos": log_p_eos, "stop_rate": rate}
    run = a_run(losses={"first": loss, "last": loss}, mfu=rate)
    card = model_card(run, an_eos(after=measured), [{"step": 1, "eval_loss": loss}], a_manifest())
    shown = cells(card)["loss, held-out rows"][0]
    if loss is None:
        assert shown == "not measured"
    else:
        assert float(shown.replace(",", "")) == pytest.approx(loss, rel=1e-3, nan_ok=True) or abs(loss) > 1e300
