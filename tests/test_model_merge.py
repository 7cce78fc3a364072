"""Merging: the merged model is the one that was trained, on disk it is whole or not there, and what cannot be is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import byte_tokenizer
from test_train_run import document, home  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefmix.chatml import ANSWER_HEADER
from prefmix.cli.main import run
from prefmix.errors import MixtureError, ModelError
from prefmix.model.find import find_model
from prefmix.model.merge import merging, stored
from prefmix.model.merge import tensors as merged
from prefmix.model.merge.agreement import Rows, as_trained, difference
from prefmix.model.merge.merging import merge
from prefmix.model.merge.rows import rows_of
from prefmix.model.merge.stored import Stored
from prefmix.model.merge.tensors import MergedTensors, on_meta, quantised_names, read_adapter, through_nf4
from prefmix.recipe import Lora
from prefmix.train import weights
from prefmix.train.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = Rows([list(range(3, 30)), list(range(40, 90))], [list(range(60, 75)), list(range(7, 40))], "rows of this test")
CHATS = [[{"role": "user", "content": "Hi"}]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_base(folder: Path, *, tied: bool = True, chatml: bool = True, seed: int = 0) -> Path:
    """A Llama of two layers with random weights that are large enough to have opinions, and a tokenizer of bytes."""
    byte_tokenizer(folder)
    if not chatml:
        knows = AutoTokenizer.from_pretrained(folder)
        backend = json.loads(knows.backend_tokenizer.to_str())
        backend["added_tokens"] = [token for token in backend["added_tokens"] if "im_" not in token["content"]]
        (folder / "plain.json").write_text(json.dumps(backend))
        plain = PreTrainedTokenizerFast(tokenizer_file=str(folder / "plain.json"), eos_token="<|endoftext|>")
        plain.save_pretrained(folder)
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, initializer_range=0.2, **SHAPE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_stage(folder: Path, base: Path, quantization="nf4", dtype="bfloat16", *, added=False, tied=True, size=0.05):
    """A finished stage with a random adapter; `size` is that of the elements of B."""
    found = weights.find_base(str(base), "main", Path())
    tokenizer = load_tokenizer(str(base), "main", Path(), add_tokens=added).tokenizer
    model = weights.load_base(found, quantization, dtype, len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(model, weights.lora_config(Lora(r=4, alpha=8, dropout=0.0), added, tied))
        weights.in_fp32(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.data += size * torch.randn_like(parameter)
    weights.save_adapter(model, folder / "adapter", found)
    tokenizer.save_pretrained(folder / "adapter")
    trained = {"quantization": quantization, "dtype": dtype, "subset": "sft"}
    mixture = {"name": "tiny", "version": "v1", "digest": "0" * 64}
    record = {"stage": folder.name, "finished": "now", "after_stage": None, "hyperparameters": trained}
    (folder / "run.json").write_text(json.dumps({**record, "mixture": mixture}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base) -> Path:
    """A stage in NF4 and bf16."""
    return write_stage(tmp_path_factory.mktemp("run") / "dpo", base)


@pytest.fixture
def stage(trained, tmp_path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(trained, tmp_path / "run" / "dpo"))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "bfloat16"), ("none", "float32")])
def test_the_merged_model_is_the_one_that_was_trained(tmp_path, tied, added, quantization, dtype):
    base = write_base(tmp_path / "base", tied=tied, chatml=not added)
    known = document(base / "config.json")["vocab_size"]
    stage = write_stage(tmp_path / "run" / "dpo", base, quantization, dtype, added=added, tied=tied)
    done = merge(find_model(stage), rows=ROWS)
    assert done.folder == stage / "merged"
    assert done.check.fp32.kl < 1e-8
    assert 0 < done.check.bf16.kl < 5e-3
    assert done.check.fp32.largest < 1e-3
    model, told = AutoModelForCausalLM.from_pretrained(done.folder, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(told.values())
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == known + 2 * added
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    ids = tokenizer.apply_chat_template(CHATS, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(ids["input_ids"][0]) == f"<|im_start|>user\nHi<|im_end|>\n{ANSWER_HEADER}"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != model.generation_config.eos_token_id
    output = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert output.shape[1] > ids["input_ids"].shape[1]


def test_a_plain_merge_agrees_with_peft(tmp_path, base):
    stage = write_stage(tmp_path / "run" / "dpo", base, "none", "float32")
    done = merge(find_model(stage))
    assert done.check is None
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), stage / "adapter"
    )
    expected = expected.merge_and_unload().to(torch.bfloat16).state_dict()
    saved = load_file(done.folder / "model.safetensors")
    assert saved.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=0)


def test_the_original_base_is_another_model_than_the_one_that_was_trained(trained, base):
    found = find_model(trained)
    expected = as_trained(found, ROWS)

    def apart(quantization):
        tensors = MergedTensors(base, found.weights.config, read_adapter(found.adapter), quantization, found.dtype)
        return difference(expected, tensors, found.weights.config, ROWS).kl

    assert apart("nf4") < 1e-8
    assert apart("none") > 1e-4


def test_changes_below_a_step_of_bf16_are_kept_on_average(tmp_path, base):
    stage = write_stage(tmp_path / "run" / "dpo", base, size=2e-4)
    saved = load_file(merge(find_model(stage)).folder / "model.safetensors")
    weight, adapter = load_file(base / "model.safetensors"), read_adapter(stage / "adapter")
    kept = wanted = 0.0
    for name, (a, b) in adapter.pairs.items():
        change = adapter.scale * adapter.tensors[b] @ adapter.tensors[a]
        original = through_nf4(weight[name].float())
        assert change.abs().mean() < (original - original.bfloat16()).abs().mean() / 2
        kept += ((saved[name] - original) * change).sum().item()
        wanted += change.square().sum().item()
    assert 0.75 < kept / wanted < 1.25, "weights that come back from 4 bits as bf16 round to themselves"


def test_a_large_model_is_written_in_shards(stage):
    whole = merge(find_model(stage), stage / "whole")
    most = 60_000
    done = merge(find_model(stage), stage / "sharded", rows=ROWS, shard_bytes=most)
    files = sorted(path.name for path in done.folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{done.shards:05d}.safetensors" for number in range(1, done.shards + 1)]
    assert done.shards > 3
    index = document(done.folder / "model.safetensors.index.json")
    parts = {file: load_file(done.folder / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in parts.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in parts.values()]
    assert max(sizes) <= most
    assert index["metadata"]["total_size"] == sum(sizes)
    expected = load_file(whole.folder / "model.safetensors")
    found = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(AutoModelForCausalLM.from_pretrained(done.folder, output_loading_info=True)[1].values())


def test_a_merge_without_a_check_loads_no_model(stage, monkeypatch):
    monkeypatch.setattr(weights, "load_base", lambda *_: pytest.fail("a model was loaded"))
    assert merge(find_model(stage)).check is None


def test_other_stop_tokens_of_the_base_are_kept_but_for_its_padding_and_for_text(stage, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = {
        "_from_model_config": True,
        "eos_token_id": [7, tokenizer.bos_token_id, tokenizer.pad_token_id],
        "temperature": 0.6,
    }
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    done = merge(find_model(stage, str(tmp_path / "base")))
    found = document(done.folder / "generation_config.json")
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    assert found["eos_token_id"] == document(done.folder / "config.json")["eos_token_id"] == ends
    assert found["temperature"] == 0.6
    assert AutoModelForCausalLM.from_pretrained(done.folder).generation_config.eos_token_id == found["eos_token_id"]


def test_settings_of_the_base_keep_their_names(stage, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = document(base / "config.json")
    old = {**config, "rope_theta": 5000.0, "torch_dtype": "float16", "_name_or_path": "/somewhere"}
    for key in ("dtype", "rope_parameters"):
        old.pop(key)
    (tmp_path / "base" / "config.json").write_text(json.dumps(old))
    found = document(merge(find_model(stage, str(tmp_path / "base"))).folder / "config.json")
    assert found["rope_theta"] == 5000.0
    assert found["dtype"] == "bfloat16"
    assert not found.keys() & {"torch_dtype", "_name_or_path", "rope_parameters", "quantization_config"}


def test_the_record_says_what_was_merged_and_what_was_found(stage, base):
    done = merge(find_model(stage), rows=ROWS)
    record = document(done.folder / "merge.json")
    assert record["base"] == {"name": str(base), "revision": None}
    assert (record["quantization"], record["dtype"]) == ("nf4", "bfloat16")
    assert record["check"]["fp32"] == {"kl": done.check.fp32.kl, "largest": done.check.fp32.largest}
    assert record["check"]["tokens"] == ROWS.tokens
    assert sum(record["files"].values()) == done.bytes
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in done.folder.iterdir())


def test_the_same_adapter_is_not_merged_twice(stage):
    first = merge(find_model(stage))
    before = (first.folder / "model.safetensors").stat()
    again = merge(find_model(stage), force=True)
    assert not again.is_new
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    checked = merge(find_model(stage), rows=ROWS)
    assert not checked.is_new
    assert checked.check.fp32.kl < 1e-8
    assert merge(find_model(stage), rows=ROWS) == checked
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert left_in(stage) == {"adapter", "run.json", "merged"}


@pytest.mark.parametrize("what", ["another adapter", "a shard is damaged", "a record that is none"])
def test_what_is_not_this_merge_is_replaced_only_with_force(stage, what):
    done = merge(find_model(stage))
    before = (done.folder / "model.safetensors").read_bytes()
    if what == "another adapter":
        file = stage / "adapter" / "adapter_model.safetensors"
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    elif what == "a shard is damaged":
        (done.folder / "model.safetensors").write_bytes(before[:1000])
    else:
        (done.folder / "merge.json").write_text("[1")
    with pytest.raises(ModelError, match="--force"):
        merge(find_model(stage))
    replaced = merge(find_model(stage), force=True)
    assert replaced.is_new
    assert ((done.folder / "model.safetensors").read_bytes() == before) is (what != "another adapter")
    assert left_in(stage) == {"adapter", "run.json", "merged"}


def test_a_folder_that_is_no_merge_is_never_replaced(stage, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match=r"is no merge.*--out"):
        merge(find_model(stage), tmp_path / "mine", force=True)
    assert left_in(tmp_path / "mine") == {"thesis.txt"}
    (tmp_path / "empty").mkdir()
    assert merge(find_model(stage), tmp_path / "empty").is_new


def test_a_wrong_merge_is_not_written(stage, monkeypatch):
    monkeypatch.setattr(merged, "through_nf4", lambda weight: weight)
    with pytest.raises(ModelError, match=r"is not the model that was trained: the mean KL on rows of this test is"):
        merge(find_model(stage), rows=ROWS)
    assert left_in(stage) == {"adapter", "run.json"}


def renamed(stage: Path, base: Path) -> str:
    file = stage / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    return r"another base: .* has no model\.layers\.7"


def resized(stage: Path, base: Path) -> str:
    file = stage / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.repeat(2, 2) for name, tensor in load_file(file).items()}, file)
    return r"another base: .* has another model\.layers\.0"


def of_bin_files(stage: Path, base: Path) -> str:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return r"no safetensors to merge into: its weights are pytorch_model\.bin.*save_pretrained"


def quantised_before(stage: Path, base: Path) -> str:
    config = document(base / "config.json") | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(config))
    return r"quantised already \(gptq\): give the original weights with --base"


def with_setting(key: str, value: object):
    def change(stage: Path, base: Path) -> str:
        file = stage / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(document(file) | {key: value}))
        return "only plain LoRA adapters can be merged"

    return change


def with_the_head_alone(stage: Path, base: Path) -> str:
    file = stage / "adapter" / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (4, 64)), ("B", (259, 4)))}  # fmt: skip
    save_file(load_file(file) | head, file)
    return r"changes lm_head\.weight alone"


def without_embeddings_for_its_tokens(stage: Path, base: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(stage / "adapter")
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(stage / "adapter")
    return "has 260 tokens, and the model embeddings for 259"


@pytest.mark.parametrize(
    "wrong",
    [
        renamed,
        resized,
        of_bin_files,
        quantised_before,
        with_setting("use_dora", True),
        with_setting("rank_pattern", {"q_proj": 2}),
        with_setting("init_lora_weights", "pissa"),
        with_setting("peft_type", "IA3"),
        with_the_head_alone,
        without_embeddings_for_its_tokens,
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(stage, base, tmp_path, wrong):
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    told = wrong(stage, copy)
    with pytest.raises(ModelError, match=told):
        merge(find_model(stage, str(copy)))
    assert left_in(stage) == {"adapter", "run.json"}


def test_whole_weights_are_not_merged(base):
    with pytest.raises(ModelError, match="no adapter to merge: its weights are whole already"):
        merge(find_model(base))


def test_a_disk_without_room_is_told_before_anything_is_written(stage, monkeypatch):
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ModelError, match=r"takes 0\.0 GB, and the disk .* left: make room"):
        merge(find_model(stage))
    assert left_in(stage) == {"adapter", "run.json"}


def test_a_disk_that_fills_up_leaves_nothing(stage, monkeypatch):
    save = stored.save_file

    def filling(tensors, path, metadata):
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(stored, "save_file", filling)
    with pytest.raises(ModelError, match=r"No space left on device.*nothing of it is left.*--out"):
        merge(find_model(stage), shard_bytes=60_000)
    assert left_in(stage) == {"adapter", "run.json"}


#: Merges, and stops in the middle of it until it is killed or interrupted.
SLOW = """
import sys, time
from pathlib import Path
from prefmix.model.merge import stored
save = stored.save_file
def slow(tensors, path, metadata):
    save(tensors, path, metadata)
    time.sleep(600)
stored.save_file = slow
from prefmix.__main__ import main
sys.argv = ["prefmix", "merge", sys.argv[1], "--no-check"]
main()
"""


def stopped(stage: Path, how: signal.Signals) -> subprocess.CompletedProcess:
    """A merge that is sent a signal when a part of it is written."""
    command = [sys.executable, "-W", "ignore", "-c", SLOW, str(stage)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not list(stage.glob(".merged.part/*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    out, error = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def test_ctrl_c_leaves_nothing(stage):
    done = stopped(stage, signal.SIGINT)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted: nothing was written"
    assert left_in(stage) == {"adapter", "run.json"}


def test_what_a_killed_merge_leaves_is_hidden_and_goes_with_the_next_one(stage):
    stopped(stage, signal.SIGKILL)
    assert {name for name in left_in(stage) if not name.startswith(".")} == {"adapter", "run.json"}
    assert merge(find_model(stage)).is_new
    assert left_in(stage) == {"adapter", "run.json", "merged"}


def test_two_processes_do_not_write_the_same_merge(stage):
    from prefmix.model.merge.place import alone

    with alone(stage / "merged"), pytest.raises(ModelError, match="Another process is merging"):
        merge(find_model(stage))


def test_the_base_comes_from_the_hub(stage, base, loopback_hub, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert "model.safetensors.index.json" in files
    files["consolidated.safetensors"] = b"the same weights with other names"
    found = find_model(stage)

    def on_hub(name: str, files: dict[str, bytes]):
        commit = loopback_hub.commit(name, files, repo_type="model")
        return replace(found, weights=weights.Base(name, name, commit, found.weights.config))

    done = merge(on_hub("me/base", files))
    expected = load_file(merge(found, tmp_path / "expected").folder / "model.safetensors")
    saved = load_file(done.folder / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    old = {"config.json": files["config.json"], "pytorch_model.bin": b""}
    with pytest.raises(
        ModelError, match=r"me/bin has no safetensors to merge into: its weights are pytorch_model\.bin"
    ):
        merge(on_hub("me/bin", old), tmp_path / "other")


def test_the_names_that_are_quantised_are_those_that_transformers_quantises(base):
    from bitsandbytes.nn import Linear4bit

    found = weights.find_base(str(base), "main", Path())
    model = weights.load_base(found, "nf4", "float32")
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert quantised_names(on_meta(found.config)) == expected


def test_weights_are_read_when_they_are_asked_for(base):
    tensors = Stored([base / "model.safetensors"])
    expected = load_file(base / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == tensors.shapes
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    (base / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ModelError, match=r"broken\.safetensors cannot be read"):
        Stored([base / "broken.safetensors"])


def test_rows_are_those_of_the_mixture_that_was_trained_on(home, base):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    manifest = document(next((home / "store" / "tiny").glob("*/mixture.json")))
    trained_on = {"mixture": {"name": "tiny", "version": "v9", "digest": manifest["digest"]}}
    for subset in ("sft", "preference"):
        rows = rows_of({**trained_on, "hyperparameters": {"subset": subset}}, tokenizer, None, str(home / "store"))
        last = pl.scan_ipc(home / "store" / "tiny" / manifest["build"] / subset / "test-*.arrow").collect().tail(8)
        texts = last["text"] if subset == "sft" else last["prompt"] + last["chosen"]
        whole = [
            tokenizer.decode([*prompt, *answer]) for prompt, answer in zip(rows.prompts, rows.answers, strict=True)
        ]
        assert whole == texts.to_list()
        assert all(tokenizer.decode(prompt).endswith(ANSWER_HEADER) for prompt in rows.prompts)
        assert rows.source == f"{len(last)} rows of tiny@v1 ({subset}, test)"


def test_without_that_mixture_rows_are_our_own_or_those_of_another_one_that_is_named(home, base, tmp_path):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = {"mixture": {"name": "tiny", "version": "v1", "digest": "0" * 64}, "hyperparameters": {"subset": "sft"}}
    for store in (home / "store", tmp_path):
        rows = rows_of(run, tokenizer, None, str(store))
        assert rows.source == "4 conversations of prefmix's own"
        assert 0 < rows.tokens <= 4 * 64
    assert rows_of(None, tokenizer, None, str(home / "store")).source == "4 conversations of prefmix's own"
    assert rows_of(None, tokenizer, "tiny@v1", str(home / "store")).source.endswith(
        "rows of tiny@v1 (preference, test)"
    )
    with pytest.raises(MixtureError, match="no mixture other"):
        rows_of(run, tokenizer, "other", str(home / "store"))


def test_the_command_reports_what_it_did(stage, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFMIX_STORE", str(tmp_path))
    assert run(["merge", str(stage)]) == 0
    out, error = capfd.readouterr()
    assert error == ""
    first, *_ = lines = out.splitlines()
    assert first.startswith(f"{stage / 'merged'}  ")
    assert "in one file, bf16; merged in" in first
    assert "4 conversations of prefmix's own" in out
    assert [line.split()[:2] for line in lines if line.startswith(("merged, in", "as saved"))] == [
        ["merged,", "in"],
        ["as", "saved,"],
    ]
    assert f"  prefmix eval {stage} reference" in out
    assert run(["merge", str(stage), "-q"]) == 0
    assert capfd.readouterr().out == f"{stage / 'merged'}\n"
    assert run(["merge", str(stage), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["folder"] == str(stage / "merged")
    assert found["is_new"] is False
    assert found["check"]["fp32"]["kl"] < 1e-8
    assert run(["merge", str(stage)]) == 0
    assert "is there already" in capfd.readouterr().out


def test_the_command_tells_what_is_wrong_in_a_line(stage, base, capfd):
    assert run(["merge", str(base)]) == 1
    assert "whole already" in capfd.readouterr().err
    (stage / "merged").mkdir()
    (stage / "merged" / "mine.txt").touch()
    assert run(["merge", str(stage), "--no-check"]) == 1
    assert capfd.readouterr().err.startswith(f"error: {stage / 'merged'} is there, and is no merge")


@pytest.mark.slow
def test_smollm2_merged_on_real_rows(smollm2_base, real_data, tmp_path):
    stage = write_stage(tmp_path / "run" / "dpo", smollm2_base, size=2e-3)
    tokenizer = AutoTokenizer.from_pretrained(stage / "adapter")
    pairs = pl.read_parquet(real_data / "orca_dpo_pairs" / "converted.parquet").head(6)
    prompts, answers = [], []
    for question, chosen in pairs.select("question", "chosen").iter_rows():
        prompts.append(tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n{ANSWER_HEADER}")["input_ids"][-200:])
        answers.append(tokenizer(f"{chosen}<|im_end|>")["input_ids"][:64])
    done = merge(find_model(stage), rows=Rows(prompts, answers, "real rows"))
    assert done.check.fp32.kl < 1e-6
    assert done.check.bf16.kl < 1e-3
    assert done.check.fp32.largest < 1e-2
