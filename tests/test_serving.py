"""What prefmix writes, behind servers that others wrote: llama.cpp on a GGUF, `transformers serve` on the weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from served import converter_cache, free_port, llama_cpp, post, quiet_environment, sentencepiece_tokenizer
from small_models import micro_llama, smollm2_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prefmix.model.gguf.exporting import export, find_weights
from prefmix.train.tokenizer import CHAT_TEMPLATE

pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
openai = pytest.importorskip("openai", reason="the client is not here: pip install openai")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

QUESTION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]
TEXTS = [
    "Hello there, my friend!",
    "  two  spaces,\ta tab\nand\n\nlines  ",
    "naïve café — “quotes” … 日本語, Ελληνικά, 🙂🙃",
    "def f(x):\n    return x ** 2  # 1234567890",
    "internationalization of antidisestablishmentarianism",
    "",
]


@pytest.fixture
def cache(tmp_path_factory, monkeypatch) -> None:
    for name, value in converter_cache(tmp_path_factory.getbasetemp() / "converter").items():
        monkeypatch.setenv(name, value)


def byte_level_tokenizer(out: Path) -> Path:
    """SmolLM2's. What transformers reads from the GGUF lacks that digits stand alone, which its vocabulary was made with."""
    path = smollm2_tokenizer(out) / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    if content["pre_tokenizer"]["type"] != "Sequence":
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return out


@pytest.fixture(params=[sentencepiece_tokenizer, byte_level_tokenizer], ids=["sentencepiece", "byte-level"])
def exported(request, cache, tmp_path) -> tuple[Path, Path]:
    """A micro model with a ChatML vocabulary of one kind or the other, and its GGUF in f16."""
    folder = micro_llama(tmp_path / "micro", tokenizer=request.param(tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder, export(find_weights(str(folder)), "f16", tmp_path / "micro.gguf").path


def test_llama_cpp_reads_a_conversation_as_training_did_and_is_the_same_model(exported, tmp_path):
    folder, gguf = exported
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    lines = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split("\n\n")
    with llama_cpp(gguf, tmp_path / "log") as url:
        for text in [*TEXTS, *lines]:
            turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
            turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert post(f"{url}/apply-template", {"messages": turns})["prompt"] == rendered
            asked = {"content": rendered, "add_special": True, "parse_special": True}
            ids = post(f"{url}/tokenize", asked)["tokens"]
            assert ids == tokenizer.encode(rendered, add_special_tokens=False), text
        settings = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 10}
        told = post(f"{url}/v1/chat/completions", {"messages": QUESTION, **settings})
    likeliest = told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert {each["id"] for each in likeliest[:5]} <= set(expected.topk(10).indices.tolist())
    for each in likeliest:
        assert each["logprob"] == pytest.approx(expected[each["id"]].item(), abs=0.01)


@pytest.mark.slow
def test_llama_cpp_on_an_export_answers_and_stops(smollm2_base, cache, tmp_path):
    exported = export(find_weights(str(smollm2_base)), "q8_0", tmp_path / "smollm2-q8_0.gguf")
    with (
        llama_cpp(exported.path, tmp_path / "log") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        answer = client.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=60, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" in answer.choices[0].message.content
    assert "<|im_end|>" not in answer.choices[0].message.content
    assert answer.usage.completion_tokens < 60


@pytest.mark.slow
def test_transformers_serve_on_a_folder_answers_and_stops(smollm2_base, tmp_path):
    pytest.importorskip("fastapi", reason='transformers serve is not here: pip install "transformers[serving]"')
    (tmp_path / "hub").mkdir()  # it lists the models of the cache, which has to be there
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", code, "serve", str(smollm2_base), "--host", "127.0.0.1", "--port", str(port)]
    environment = quiet_environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    with (
        (tmp_path / "log").open("w") as log,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        try:
            while server.poll() is None:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(0.2)
            assert server.poll() is None, (tmp_path / "log").read_text()
            answer = client.chat.completions.create(
                model=str(smollm2_base), messages=QUESTION, max_tokens=60, temperature=0
            )
        finally:
            server.terminate()
            server.wait(timeout=60)
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" in answer.choices[0].message.content
