"""Whole runs on a micro model: records, the EOS guard, kill and resume, two processes, the fixes of the stack."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import byte_tokenizer, micro_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from prefmix.build import build
from prefmix.errors import GateError, MixtureError, TrainError, UsageError
from prefmix.recipe import load_recipe
from prefmix.store import open_mixture
from prefmix.train import trainers, weights
from prefmix.train.run import Watcher, train
from prefmix.train.session import held_out_rows
from prefmix.train.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
RECIPE = """
name = "tiny"
[sources.pairs]
path = "pairs.jsonl"
format = "orca_dpo_pairs"
[sources.chats]
path = "chats.jsonl"
format = "openhermes"
[splits]
test = 0.2
[train]
base = "base"
quantization = "none"
dtype = "float32"
lora = {{ r = 4, alpha = 8, dropout = {dropout} }}
eos = {{ prompts = 4, max_new_tokens = 6, min_stop_rate = 0.0 }}
[[train.stages]]
name = "dpo"
method = "dpo"
subset = "preference"
max_steps = 4
batch_size = 6
learning_rate = 1e-2
token_budget = 400
loss = ["sigmoid", "sft"]
loss_weights = [1.0, 0.1]
eval_every = 2
checkpoint_every = 1
[[train.stages]]
name = "eos"
method = "sft"
subset = "sft"
max_steps = 4
batch_size = 6
token_budget = 200
learning_rate = 1e-2
checkpoint_every = 1
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a base, two sources of our own words, a recipe and its mixture."""
    home = tmp_path_factory.mktemp("home")
    micro_llama(home / "base", tokenizer=byte_tokenizer(tmp_path_factory.mktemp("bytes")))
    pairs = [
        {"system": "", "question": f"Count to {word} by {step}.", "chosen": f"{word} " * step, "rejected": "No" * step}
        for word in NUMBERS
        for step in (1, 2, 3)
    ]
    chats = [
        {"instruction": f"What comes after {word}?", "input": "", "output": after} for word, after in pairwise(NUMBERS)
    ] + [{"instruction": f"Spell {word}.", "input": "", "output": "-".join(word)} for word in NUMBERS]
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.toml").write_text(RECIPE.format(dropout=0.1))
    build(home / "recipe.toml", store=home / "store")
    return home


def run(home: Path, output: Path, *changes: str, **options):
    recipe = load_recipe(home / "recipe.toml", [f"train.output={json.dumps(str(output))}", *changes])
    return train(recipe, store=home / "store", **options)


def changed(home: Path, output: Path, *edits: tuple[str, str]):
    """The recipe with pieces of its text replaced, and another folder for its runs."""
    text = (home / "recipe.toml").read_text()
    for old, new in (*edits, ("[train]\n", f"[train]\noutput = {json.dumps(str(output))}\n")):
        assert old in text
        text = text.replace(old, new, 1)
    (home / "changed.toml").write_text(text)
    return load_recipe(home / "changed.toml")


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    return run(home, tmp_path_factory.mktemp("runs"))


def document(path: Path):
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines(path)]


def test_every_stage_leaves_its_record(home, finished):
    for stage in finished.stages:
        names = {path.name for path in stage.folder.iterdir()}
        records = {"metrics.jsonl", "eos.json", "run.json", "recipe.toml", "mixture.json"}
        assert names == {"adapter", "checkpoints", "README.md", "curves.svg"} | records
        record = document(stage.folder / "run.json")
        assert record == stage.run
        assert record["finished"]
        assert record["steps"] == 4
        assert record["tokens"] > 0
        manifest = document(next((home / "store" / "tiny").glob("*/mixture.json")))
        assert record["mixture"]["digest"] == manifest["digest"]
        assert document(stage.folder / "mixture.json") == manifest
        recipe = tomllib.loads((stage.folder / "recipe.toml").read_text())
        assert "root" not in recipe, "where the recipe lay is no concern of others"
        assert recipe["train"]["stages"][0]["learning_rate"] == 1e-2
        steps = [line["step"] for line in lines(stage.folder / "metrics.jsonl") if "loss" in line]
        assert steps == [1, 2, 3, 4]
    assert finished.stages[1].run["after_stage"] == "dpo"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not begin with the peak of its parent")
def test_the_peak_memory_is_that_of_this_process_and_not_of_the_one_that_started_it():
    large = b"x" * 2**31
    program = "from prefmix.train.records import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert 2**27 < int(child.stdout) < len(large)


def test_nothing_of_a_run_is_a_pickle(finished):
    suffixes = {path.suffix for path in finished.folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".md", ".svg", ".jinja", ".toml"}


def test_the_eos_is_measured_before_during_and_after_every_stage(finished):
    dpo, sft = (document(stage.folder / "eos.json") for stage in finished.stages)
    assert [entry["step"] for entry in dpo["history"]] == [2, 4]
    for measured in (dpo["before"], dpo["after"], *dpo["history"], sft["before"], sft["after"]):
        assert 0 < measured["p_eos"] < 1
        assert measured["n"] == 8
        assert measured["greedy"]["n"] == measured["sampled"]["n"] == 4
        assert measured["cut"] + measured["greedy"]["stopped"] + measured["sampled"]["stopped"] == 8
    assert sft["before"]["p_eos"] == pytest.approx(dpo["after"]["p_eos"], rel=1e-5)


def test_an_sft_stage_teaches_the_model_to_end_its_turn(finished):
    eos = document(finished.stages[1].folder / "eos.json")
    assert eos["after"]["log_p_eos"] > eos["before"]["log_p_eos"] + 0.1


def test_the_adapter_loads_with_peft_and_its_tokenizer_renders_chatml(home, finished):
    folder = finished.stages[1].folder / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert ids == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    own = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(own[name], tensor) for name, tensor in saved.items())


def test_the_second_stage_goes_on_from_the_adapter_of_the_first(finished):
    first, second = (load_file(stage.folder / "adapter" / "adapter_model.safetensors") for stage in finished.stages)
    start = load_file(sorted((finished.stages[1].folder / "checkpoints").glob("*"))[0] / "weights.safetensors")
    moved = max((second[name] - first[name]).abs().max().item() for name in first)
    assert 0 < moved < 0.1, "four steps of 1e-2 move each weight a little from where the first stage left it"
    assert len(start) == len(first)


def killed_after(home: Path, output: Path, checkpoint: Path, *changes: str) -> None:
    """Trains in a process of its own and kills it once a checkpoint is there."""
    program = "import sys; sys.argv = sys.argv[1:]\nfrom prefmix.recipe import load_recipe\nfrom prefmix.train.run import train\n"
    program += "train(load_recipe(sys.argv[0], sys.argv[2:]), store=sys.argv[1])"
    settings = [f"train.output={json.dumps(str(output))}", *changes]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(home / "recipe.toml"), str(home / "store"), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not checkpoint.is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(("stage", "step"), [("dpo", 2), ("eos", 1)])
def test_a_killed_run_goes_on_bit_for_bit(home, finished, tmp_path, stage, step):
    folder = tmp_path / "tiny" / stage
    killed_after(home, tmp_path, folder / "checkpoints" / f"checkpoint-{step}")
    assert not (document(folder / "run.json"))["finished"]
    with pytest.raises(TrainError, match="--resume"):
        run(home, tmp_path)
    resumed = run(home, tmp_path, resume=True)
    assert [each.was_there for each in resumed.stages] == ([False, False] if stage == "dpo" else [True, False])
    for one, other in zip(finished.stages, resumed.stages, strict=True):
        name = "adapter/adapter_model.safetensors"
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
        assert timeless(one.folder / "metrics.jsonl") == timeless(other.folder / "metrics.jsonl")
        assert document(one.folder / "eos.json") == document(other.folder / "eos.json")


def test_resuming_a_finished_run_trains_nothing(home, finished):
    class Silent(Watcher):
        def stage(self, *_):
            raise AssertionError("a stage was run")

    again = run(home, finished.folder.parent, resume=True, watcher=Silent())
    assert all(stage.was_there for stage in again.stages)


@pytest.mark.parametrize("left", [None, "{}", '{"before": {"stop_rate": 1.0}, "after": null}', "[]", '{"aft'])
def test_a_finished_stage_without_its_eos_is_refused_with_the_file_and_the_remedy(home, finished, tmp_path, left):
    shutil.copytree(finished.folder, tmp_path / "tiny")
    file = tmp_path / "tiny" / "dpo" / "eos.json"
    file.unlink() if left is None else file.write_text(left)
    with pytest.raises(TrainError, match=rf"{re.escape(str(file))} .*--force"):
        run(home, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("old", "new", "error", "told"),
    [
        ("r = 4,", "r = 8,", TrainError, "hyperparameters.lora.r: was 4, is 8"),
        ("learning_rate = 1e-2", "learning_rate = 0.5", TrainError, "hyperparameters.learning_rate: was 0.01, is 0.5"),
        ('name = "tiny"', 'name = "tiny"\nseed = 7', MixtureError, "prefmix build"),
    ],
)
def test_a_changed_run_is_not_resumed(home, finished, old, new, error, told):
    with pytest.raises(error, match=told):
        train(changed(home, finished.folder.parent, (old, new)), store=home / "store", resume=True)


def test_settings_that_change_no_weight_may_change_when_a_run_is_resumed(home, finished):
    again = run(home, finished.folder.parent, "train.eos.min_stop_rate=0.9", "train.eos.prompts=3", resume=True)
    assert all(stage.was_there for stage in again.stages)
    assert not again.passed


def test_a_stage_folder_is_not_overwritten_unless_asked(home, finished, tmp_path):
    with pytest.raises(TrainError, match="is there already"):
        run(home, finished.folder.parent)
    with pytest.raises(UsageError, match="exclude"):
        run(home, tmp_path, resume=True, force=True)


def test_a_damaged_mixture_is_refused(home, tmp_path):
    build(home / "recipe.toml", store=tmp_path / "store")
    file = next((tmp_path / "store" / "tiny").glob("*/sft/train-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(MixtureError, match=file.name):
        train(load_recipe(home / "recipe.toml", [f"train.output={tmp_path}"]), store=tmp_path / "store")
    assert not (tmp_path / "tiny").exists()


def test_the_gate_stops_after_the_last_stage(home, tmp_path):
    gate = ['train.eos={prompts=2, max_new_tokens=3, min_stop_rate=0.99, on_fail="stop"}']
    with pytest.raises(GateError, match="min_stop_rate"):
        run(home, tmp_path, *gate)
    assert document(tmp_path / "tiny" / "eos" / "run.json")["finished"]


@pytest.mark.parametrize(("asked", "names"), [(0.0, ["dpo"]), (1.0, ["dpo", "eos"])])
def test_a_repair_stage_runs_only_when_the_gate_fails(home, tmp_path, asked, names):
    edits = [
        ("min_stop_rate = 0.0", f'min_stop_rate = {asked}, on_fail = "repair"'),
        ('subset = "sft"', "if_needed = true"),
    ]
    done = train(changed(home, tmp_path, *edits), store=home / "store")
    assert [stage.run["stage"] for stage in done.stages] == names
    assert list(done.skipped) == ([] if "eos" in names else ["eos"])


def test_all_weights_can_be_trained_and_the_next_stage_goes_on_from_them(home, tmp_path):
    done = train(
        changed(home, tmp_path, ("lora = { r = 4, alpha = 8, dropout = 0.1 }", 'adapter = "none"')),
        store=home / "store",
    )
    for stage in done.stages:
        model = AutoModelForCausalLM.from_pretrained(stage.folder / "adapter")
        assert model.dtype == torch.float32
    first, second = (load_file(stage.folder / "adapter" / "model.safetensors") for stage in done.stages)
    base = load_file(home / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(base[name], first[name])
    assert 0 < (second[name] - first[name]).abs().max() < 0.2


def test_on_a_gpu_without_room_activations_are_computed_again_and_the_steps_stay_the_same(
    home, finished, tmp_path, monkeypatch
):
    order, again = [], []
    load, forward = weights.load_base, LlamaMLP.forward

    def watched(self, hidden):
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            again.append(self)
        return forward(self, hidden)

    monkeypatch.setattr(trainers, "_free_bytes", lambda: order.append("asked") or 1)
    monkeypatch.setattr(weights, "load_base", lambda *arguments: order.append("loaded") or load(*arguments))
    monkeypatch.setattr(LlamaMLP, "forward", watched)
    recipe = changed(home, tmp_path, ("token_budget = 400\n", ""), ("token_budget = 200\n", ""))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = train(recipe, store=home / "store")
    assert order == ["asked", "loaded"] * 2
    assert again
    assert [str(each.message) for each in told if "`gradient_checkpointing`" in str(each.message)] == []
    for stage in done.stages:
        assert (stage.run["token_budget"], stage.run["gradient_checkpointing"]) == (1024, True)
    one, other = (timeless(each.stages[0].folder / "metrics.jsonl") for each in (finished, done))
    assert finished.stages[0].run["gradient_checkpointing"] is False
    for expected, found in zip(one, other, strict=True):
        expected.pop("rewards/accuracies", None)  # a sign, of margins that are 0 but for rounding at the start
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_two_processes_give_the_losses_of_one(home, tmp_path):
    changes = ["train.lora.dropout=0.0"]
    run(home, tmp_path / "one", *changes)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom prefmix.recipe import load_recipe\nfrom prefmix.train.run import train\n"
        "train(load_recipe(sys.argv[1], sys.argv[3:]), store=sys.argv[2])\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    command += ["29517", str(program), str(home / "recipe.toml"), str(home / "store")]
    command += [f"train.output={json.dumps(str(tmp_path / 'two'))}", *changes]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200, capture_output=True)
    for stage in ("dpo", "eos"):
        one, two = (timeless(tmp_path / which / "tiny" / stage / "metrics.jsonl") for which in ("one", "two"))
        assert len(one) == len(two)
        for expected, found in zip(one, two, strict=True):
            expected.pop("rewards/accuracies", None)  # a sign, of margins that are 0 but for rounding at the start
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=2e-5)
        saved = [
            tmp_path / which / "tiny" / stage / "adapter" / "adapter_model.safetensors" for which in ("one", "two")
        ]
        expected, found = map(load_file, saved)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_eos_is_measured_on_held_out_rows_and_refused_without_any(home):
    recipe, mixture = load_recipe(home / "recipe.toml"), open_mixture("tiny", home / "store")
    chat = load_tokenizer("base", "main", home)

    def held_out(*changes):
        return held_out_rows(mixture, chat, load_recipe(home / "recipe.toml", changes).train, Watcher())

    assert held_out().split == "test"
    assert len(held_out()) == recipe.train.eos.prompts
    with pytest.raises(TrainError, match="no row that fits into 8 tokens"):
        held_out("train.stages.0.max_length=8", "train.stages.1.max_length=8")
