"""The fixes that the stack needs, each with a test that fails without it: fp32 adapters, NF4 on CPUs, added tokens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_models import byte_tokenizer, micro_llama
from test_train_run import changed, document, home, timeless  # noqa: F401 (a fixture)

from prefmix.errors import TrainError
from prefmix.model.merge.tensors import MergedTensors, read_adapter
from prefmix.recipe import Lora, load_recipe
from prefmix.train import weights
from prefmix.train.run import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

IN_NF4 = ('quantization = "none"', 'quantization = "nf4"')


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    micro_llama(folder / "base", tokenizer=byte_tokenizer(folder / "bytes"))
    return folder


def quantised(folder):
    return weights.load_base(weights.find_base("base", "main", folder), "nf4", "float32")


def with_adapter(model, seed=0):
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(model, weights.lora_config(Lora(r=4, alpha=8, dropout=0.0), False, True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def gradient_of(model) -> torch.Tensor:
    model.zero_grad()
    model.train()
    ids = torch.arange(3, 60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradients_in_nf4_on_a_cpu_are_the_same_after_a_pass_in_eval_mode(base_folder):
    from bitsandbytes.cextension import lib  # noqa: F401 (says at once whether bitsandbytes works here)
    from bitsandbytes.functional import has_avx512bf16

    model = with_adapter(quantised(base_folder))
    before = gradient_of(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 20)[None])
    assert torch.equal(gradient_of(model), before)
    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks no weights on this CPU (no AVX512-BF16): the cure has nothing to cure")


def test_without_the_cure_they_are_not(base_folder, monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks no weights on this CPU (no AVX512-BF16)")
    monkeypatch.setattr(weights, "cured", lambda model: model)
    model = with_adapter(quantised(base_folder))
    before = gradient_of(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 20)[None])
    cosine = torch.nn.functional.cosine_similarity(gradient_of(model), before, dim=0)
    assert cosine < 0.9, "bitsandbytes is cured: weights.cured can go"


def test_an_adapter_on_a_quantised_base_is_trained_in_fp32_and_small_steps_move_it(home, tmp_path):  # noqa: F811
    small = ("learning_rate = 1e-2", "learning_rate = 5e-6")
    done = train(changed(home, tmp_path, IN_NF4, small, small, ("r = 4", "r = 8")), store=home / "store")
    first, last = (
        load_file(done.stages[0].folder / "checkpoints" / f"checkpoint-{step}" / "weights.safetensors")
        for step in (3, 4)
    )
    for name, tensor in last.items():
        assert tensor.dtype == torch.float32
        moved = (tensor != first[name]).float().mean()
        assert moved > 0.9, f"{name}: {moved:.0%} of its elements moved in a step"


def test_a_run_in_nf4_goes_on_bit_for_bit(home, tmp_path):  # noqa: F811
    recipe = changed(home, tmp_path / "whole", IN_NF4)
    whole = train(recipe, store=home / "store")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    folder = tmp_path / "cut" / "tiny" / "dpo"
    shutil.rmtree(tmp_path / "cut" / "tiny" / "eos")
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    (folder / "run.json").write_text(json.dumps(document(folder / "run.json") | {"finished": None}))
    resumed = train(changed(home, tmp_path / "cut", IN_NF4), store=home / "store", resume=True)
    for one, other in zip(whole.stages, resumed.stages, strict=True):
        assert one.run["adapter_sha256"] == other.run["adapter_sha256"]
        assert timeless(one.folder / "metrics.jsonl") == timeless(other.folder / "metrics.jsonl")


def test_a_base_that_is_none_is_told(home, tmp_path):  # noqa: F811
    recipe = load_recipe(home / "recipe.toml", ['train.base="hollow"', f"train.output={json.dumps(str(tmp_path))}"])
    (home / "hollow").mkdir()
    with pytest.raises(TrainError, match="hollow is not a model that can be read"):
        train(recipe, store=home / "store")


def without_chatml(folder, tied):
    """A base whose tokenizer and embeddings know nothing of ChatML."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    knows = AutoTokenizer.from_pretrained(byte_tokenizer(folder / "bytes"))
    backend = json.loads(knows.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if "im_" not in token["content"]]
    (folder / "plain.json").write_text(json.dumps(backend))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "plain.json"), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    return len(tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_without_chatml_is_given_its_tokens_and_trains_them(home, tmp_path, tied):  # noqa: F811
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    known = without_chatml(tmp_path, tied)
    base = ('base = "base"', f"base = {json.dumps(str(tmp_path / 'base'))}")
    with pytest.raises(TrainError, match="add_tokens = true"):
        train(changed(home, tmp_path / "runs", base), store=home / "store")
    recipe = changed(home, tmp_path / "runs", base, ("[train]\n", "[train]\nadd_tokens = true\n"))
    done = train(recipe, store=home / "store")
    assert done.stages[0].run["tokenizer"]["added"] == ["<|im_end|>", "<|im_start|>"]
    folder = done.stages[1].folder / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")
    whole = {name for name in saved if "lora" not in name}
    assert {name.split(".")[-2] for name in whole} == {"embed_tokens", "lm_head"}
    first = load_file(done.stages[0].folder / "adapter" / "adapter_model.safetensors")
    for name in whole:
        assert saved[name].shape[0] == known + 2
        assert not torch.equal(saved[name][known:], first[name][known:]), "the embeddings of the tokens were trained"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(known + 2)
    model = PeftModel.from_pretrained(model, folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    merged.resize_token_embeddings(known + 2)
    tensors = MergedTensors(tmp_path / "base", merged.config, read_adapter(folder), "none", "float32")
    merged.load_state_dict(dict(tensors), strict=False)
    ids = torch.tensor([[known, 5, 6, known + 1, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
