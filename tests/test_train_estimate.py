"""What `prefmix train --dry-run` says: counts are those of real models and real runs, memory that of real processes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from small_models import micro_llama, smollm2_tokenizer

from prefmix.build import build
from prefmix.errors import TrainError
from prefmix.recipe import DpoStage, Recipe, Train, load_recipe
from prefmix.train import loop
from prefmix.train.estimate import UTILISATION, estimate, training_flops
from prefmix.train.inputs import find_mixture
from prefmix.train.memory import (
    CPU_TOKENS,
    WHOLE_STEP,
    Memory,
    Sizes,
    activation_bytes,
    layer_bytes,
    micro_batch_tokens,
    micro_batches_of,
    most_tokens,
    sizes_of,
    training_memory,
    weight_bytes,
)
from prefmix.train.packed import PackedModel, add_packed_forward, pack_pairs
from prefmix.train.run import train
from prefmix.train.weights import dtype_of, find_base, in_fp32, load_base, lora_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
KINDS = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config}
MISTRAL_7B = transformers.MistralConfig(vocab_size=32002)


def settings_of(**keys) -> Train:
    stages = keys.pop("stages", [{"name": "dpo", "method": "dpo"}])
    return Train.model_validate({"base": "base", "quantization": "none", "stages": stages, **keys})


@functools.cache
def seven_b() -> Sizes:
    return sizes_of(MISTRAL_7B, settings_of(lora={"r": 64}))


# Counts


def test_a_mistral_7b_has_its_parameters_and_its_adapter():
    sizes = sizes_of(MISTRAL_7B, settings_of(lora={"r": 64}))
    assert sizes.parameters == 7_241_748_480
    assert sizes.trainable == sizes.lora == 167_772_160
    assert sizes.matrices == sizes.parameters - 32002 * 4096
    assert sizes.quantised == sizes.parameters - 2 * 32002 * 4096 - 65 * 4096


@pytest.mark.parametrize(
    "lora", [{"r": 8}, {"r": 4, "target": ["q_proj", "v_proj"]}, {"r": 4, "target": ".*down_proj"}]
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [97, 99])
def test_parameters_are_those_of_the_model_with_its_adapter(lora, tied, vocabulary):
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=tied)
    settings = settings_of(lora=lora, add_tokens=True)
    sizes = sizes_of(config, settings, vocabulary)
    model = transformers.LlamaForCausalLM(config)
    if vocabulary > 97:
        model.resize_token_embeddings(vocabulary)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, lora_config(settings.lora, vocabulary > 97, tied))
    assert sizes.trainable == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def test_without_an_adapter_everything_is_trained_in_fp32():
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=2)
    settings = settings_of(adapter="none")
    sizes = sizes_of(config, settings)
    memory = training_memory(sizes, settings, "bfloat16", cpu=False, tokens=1024, answers=512)
    assert sizes.trainable == sizes.parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(sizes.parameters * n for n in (4, 4, 8))
    assert memory.adapter == 0


# Bytes


def kept_by_autograd(model, tokens: int, bf16: bool) -> int:
    """Bytes of all tensors that autograd keeps in a packed forward pass, parameters not counted."""
    model.train()
    in_fp32(model)
    add_packed_forward(model.get_base_model())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    answer = tokens // 3
    row = {"prompt_ids": [5] * (tokens - 2 * answer), "chosen_ids": [6] * answer, "rejected_ids": [7] * answer}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        output = PackedModel(model, pack_pairs([row]), model.get_base_model().config, torch.device("cpu"))()
    assert output.log_probs.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "up_proj"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_keeps_what_autograd_keeps(kind, dropout, target, dtype):
    settings = settings_of(lora={"r": 8, "dropout": dropout, "target": target}, dtype=dtype)
    tokens, width = 600, {"float32": 4, "bfloat16": 2}[dtype]
    configs = [KINDS[kind](**SHAPE, num_hidden_layers=layers) for layers in (2, 3)]
    kept = []
    for config in configs:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        adapted = get_peft_model(model, lora_config(settings.lora, False, False))
        kept.append(kept_by_autograd(adapted, tokens, dtype == "bfloat16"))
    sizes = sizes_of(configs[1], settings)
    layer = layer_bytes(sizes, settings, dtype, cpu=True, repeats_keys=True, dropout=dropout)
    casts = 2 * sizes.lora // 3 if dtype == "bfloat16" else 0
    assert tokens * layer + width * tokens**2 + casts == pytest.approx(kept[1] - kept[0], rel=0.02)
    whole = activation_bytes(sizes, settings, dtype, cpu=True, tokens=tokens, mask_cells=tokens**2, dropout=dropout)
    assert whole == pytest.approx(kept[1], rel=0.15)  # the first layer keeps less: nothing below it is trained


def test_nf4_takes_the_bytes_of_a_model_that_was_loaded_in_nf4(tmp_path):
    wide: dict[str, Any] = SHAPE | {"hidden_size": 768, "intermediate_size": 1536}
    config = transformers.LlamaConfig(**wide, num_hidden_layers=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    settings = settings_of(base="base", quantization="nf4")
    base = find_base(settings.base, "main", tmp_path)
    model = load_base(base, settings.quantization, dtype_of(settings))
    loaded = 0
    for parameter in model.parameters():
        loaded += parameter.untyped_storage().nbytes()
        if state := getattr(parameter, "quant_state", None):
            tensors = (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
            loaded += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert weight_bytes(sizes_of(base.config, settings), settings, dtype_of(settings)) == pytest.approx(
        loaded, rel=0.02
    )


@given(st.integers(1, 30_000), st.integers(1, 30_000))
def test_more_tokens_never_take_less_memory(one, other):
    settings = settings_of()
    sizes = sizes_of(transformers.LlamaConfig(**SHAPE, num_hidden_layers=2), settings)
    few, many = (
        training_memory(sizes, settings, "bfloat16", cpu=False, tokens=tokens, answers=tokens)
        for tokens in sorted((one, other))
    )
    assert few.total <= many.total
    assert few.as_json()["total"] == sum(value for name, value in few.as_json().items() if name != "total")


@given(st.integers(8, 200), st.integers(8, 200), st.sampled_from(["auto", True, False]))
def test_the_micro_batch_grows_with_the_memory_and_fits_it(one, other, checkpointing):
    settings = settings_of(quantization="nf4", gradient_checkpointing=checkpointing)
    found = [most_tokens(seven_b(), settings, gib * 2**30, longest=2000) for gib in sorted((one, other))]
    for gib, (tokens, checkpoints, memory) in zip(sorted((one, other)), found, strict=True):
        assert tokens % 1024 == 0
        assert 2000 <= tokens <= 32_768
        assert checkpointing in ("auto", checkpoints)
        if memory.total > gib * 2**30:  # nothing does: the least is tried
            assert (tokens, checkpoints) == (2048, checkpointing in ("auto", True))
    if found[0][1] == found[1][1]:
        assert found[0][0] <= found[1][0]
    assert found[0][1] >= found[1][1]  # no checkpointing in the larger memory that the smaller one does without


def test_a_row_longer_than_the_largest_micro_batch_has_one_of_its_own():
    tokens, _ = micro_batch_tokens(MISTRAL_7B, settings_of(quantization="nf4"), 10**15, longest=40_000)
    assert tokens == 40_960


@pytest.mark.parametrize(
    ("stage", "asked", "gib", "expected"),
    [
        ({}, "auto", None, (CPU_TOKENS, False)),
        ({"token_budget": 700}, True, None, (700, True)),
        ({}, "auto", 10_000, (32_768, False)),
        ({"token_budget": 4096}, "auto", 139, (4096, False)),
        ({"token_budget": 4096}, "auto", 15, (4096, True)),
        ({"token_budget": 10**6, "batch_size": 2}, "auto", 139, (10**6, False)),
        ({"token_budget": 10**6, "batch_size": 64}, "auto", 139, (10**6, True)),
        ({"token_budget": 4096}, False, 15, (4096, False)),
        ({"loss": "aot", "batch_size": 2}, "auto", 139, (WHOLE_STEP, False)),
        ({"loss": ["aot", "sft"], "token_budget": 512}, "auto", None, (WHOLE_STEP, False)),
    ],
)
def test_micro_batches_are_as_the_recipe_says_or_as_memory_allows(stage, asked, gib, expected):
    settings = settings_of(quantization="nf4", lora={"r": 64}, gradient_checkpointing=asked)
    dpo = DpoStage.model_validate({"name": "dpo", "method": "dpo", **stage})
    free = None if gib is None else gib * 2**30
    assert micro_batches_of(dpo, settings, MISTRAL_7B, free, longest=2048) == expected


def test_a_7b_model_in_nf4_fits_a_24_gb_gpu_with_checkpointing_only():
    settings = settings_of(quantization="nf4", lora={"r": 64})
    tokens, checkpointing, memory = most_tokens(seven_b(), settings, int(23.5 * 2**30), 2048)
    assert checkpointing
    assert tokens >= 4096
    assert memory.weights == pytest.approx(3.84 * 2**30, rel=0.01)
    assert not most_tokens(seven_b(), settings, 139 * 2**30, 2048)[1]


def test_the_reference_run_takes_the_hours_of_its_arithmetic():
    """FACTS: 50 M tokens of a 7.24 B model, forward of the reference and steps, take 45 minutes at 790 TFLOP/s."""
    settings, tokens = settings_of(quantization="nf4", lora={"r": 64}), 50e6
    flops = training_flops(seven_b(), settings, tokens, 0.0) + 2 * seven_b().matrices * tokens
    assert flops / 790e12 / 60 == pytest.approx(46, rel=0.05)
    again = training_flops(seven_b(), settings, tokens, 0.0, checkpointing=True)
    assert again / training_flops(seven_b(), settings, tokens, 0.0) == pytest.approx(3 / 2, rel=0.03)


# Whole runs


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> tuple[Recipe, Path]:
    """A recipe with two stages on the quickstart's rows and a micro-Llama, and the store that its mixture is in."""
    root = tmp_path_factory.mktemp("estimate")
    tokenizer = smollm2_tokenizer(tmp_path_factory.getbasetemp() / "smollm2-tokenizer")
    micro_llama(root / "micro", tokenizer=tokenizer)
    text = (Path(__file__).parents[1] / "recipes" / "quickstart.toml").read_text(encoding="utf-8")
    folder = Path(__file__).parents[1] / "recipes" / "quickstart"
    (root / "recipe.toml").write_text(text.replace('"quickstart/', f'"{folder}/') + STAGES, encoding="utf-8")
    recipe = load_recipe(root / "recipe.toml", [f'train.output="{root / "runs"}"'])
    build(recipe, store=root / "store")
    return recipe, root / "store"


STAGES = """
[train]
base = "micro"
quantization = "none"
lora = { r = 4, dropout = 0.0 }
eos = { prompts = 2, max_new_tokens = 2 }
[[train.stages]]
name = "dpo"
method = "dpo"
rows = 60
epochs = 0.5
batch_size = 8
token_budget = 700
max_length = 320
[[train.stages]]
name = "eos"
method = "sft"
rows = 20
max_steps = 4
batch_size = 8
token_budget = 500
max_length = 256
"""


def test_rows_steps_tokens_and_micro_batches_are_those_of_the_run(micro, monkeypatch):
    recipe, store = micro
    told = estimate(recipe, store=store)
    sizes: dict[str, list[int]] = {}
    over = loop.StepLoop._over

    def watched(self, model, mode, numbers, backward):
        if backward is not None:
            rows = self.rows[mode]
            found = sizes.setdefault(type(self).__name__, [])
            found += [int(rows.packed[numbers[micro]].sum()) for micro in self.micro_batches(rows, numbers)]
        return over(self, model, mode, numbers, backward)

    monkeypatch.setattr(loop.StepLoop, "_over", watched)
    run = train(recipe, store=store)
    for stage, done, micros in zip(told.stages, run.stages, sizes.values(), strict=True):
        keys = ("rows", "left_out", "shortened", "steps", "epochs", "tokens", "token_budget")
        assert {key: getattr(stage, key) for key in keys} == {key: done.run[key] for key in keys}
        assert stage.packs
        assert stage.packed.tokens == stage.packed_tokens == sum(micros)
        assert (stage.packed.micro_batches, stage.packed.largest) == (len(micros), max(micros))
    dpo, eos = told.stages
    assert 0 < dpo.shared < 0.5
    assert eos.shared == 0
    assert dpo.tokens <= dpo.padded.tokens
    assert dpo.padded.padding == pytest.approx(1 - dpo.tokens / dpo.padded.tokens)
    assert told.trainable == run.stages[0].run.get("trainable", told.trainable)


def test_the_estimate_is_json_and_needs_no_weights(micro, tmp_path):
    recipe, store = micro
    before = estimate(recipe, store=store)
    weights = recipe.root / "micro" / "model.safetensors"
    weights.rename(tmp_path / "away")
    try:
        told = estimate(recipe, store=store)
    finally:
        (tmp_path / "away").rename(weights)
    data = told.as_json()
    assert json.loads(json.dumps(data)) == data == before.as_json()
    assert data["peak"] == told.peak == max(stage["peak"] for stage in data["stages"])
    assert data["utilisation"] == UTILISATION
    assert {gpu["gpu"] for gpu in data["stages"][0]["gpus"]} >= {"H100 80 GB", "RTX 4090 24 GB"}
    assert all(gpu["fits"] and 0 < gpu["hours"] < 1 for gpu in data["stages"][0]["gpus"])
    assert set(data["stages"][0]["memory"]) == {*Memory.__dataclass_fields__, "total"}


@pytest.mark.parametrize("budget", [150, 300])
def test_a_larger_budget_makes_fewer_and_larger_micro_batches(micro, budget):
    recipe, store = micro
    one, other = (
        estimate(with_stage(recipe, "dpo", token_budget=tokens), store=store) for tokens in (budget, 2 * budget)
    )
    assert one.stages[0].tokens == other.stages[0].tokens
    assert one.stages[0].packed.micro_batches > other.stages[0].packed.micro_batches
    assert one.stages[0].memory.total < other.stages[0].memory.total


def test_a_stage_without_a_row_is_refused(micro):
    recipe, store = micro
    with pytest.raises(TrainError, match=r"no row left to train on \(.*Raise max_length"):
        estimate(with_stage(recipe, "dpo", max_length=8), store=store)


def with_stage(recipe: Recipe, name: str, **changes) -> Recipe:
    """The recipe with one of its stages alone, changed."""
    assert recipe.train is not None
    stage = next(stage for stage in recipe.train.stages if stage.name == name).model_copy(update=changes)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"stages": [stage]})})


# Memory of real processes

CHILD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from prefmix.train.run import train
done = train(*sys.argv[1:])
print("PEAK", done.stages[0].run["peak_memory_bytes"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "dtype", "stage", "budget", "malloc", "within"),
    [
        ("nf4", "bfloat16", "dpo", 1024, {}, 0.25),
        ("none", "float32", "eos", 1024, {}, 0.25),
        # every block in a mapping of its own: the parts alone, without what glibc's heap keeps
        ("none", "float32", "dpo", 1024, {"MALLOC_MMAP_THRESHOLD_": "65536"}, 0.1),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator's share was measured with glibc")
def test_the_memory_is_that_of_a_real_run(
    micro, smollm2_base, tmp_path, quantization, dtype, stage, budget, malloc, within
):
    recipe, store = micro
    recipe = with_stage(recipe, stage, rows=12, batch_size=12, max_steps=2, max_length=512, token_budget=budget)
    assert recipe.train is not None
    changes = {
        "base": str(smollm2_base),
        "quantization": quantization,
        "dtype": dtype,
        "output": str(tmp_path / "runs"),
        "lora": recipe.train.lora.model_copy(update={"r": 16}),
    }
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    told = estimate(recipe, store=store).stages[0]
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    mixture = find_mixture(recipe, None, store).folder
    command = [sys.executable, "-c", CHILD, str(tmp_path / "recipe.toml"), str(mixture)]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | malloc)
    assert child.returncode == 0, child.stderr
    measured = int(child.stdout.rpartition("PEAK ")[2])
    expected = told.peak - (told.memory.allocator if malloc else 0)
    assert expected == pytest.approx(measured, rel=within)
