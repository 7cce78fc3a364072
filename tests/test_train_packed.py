"""The packed forward pass gives what each sequence gives alone: log-probabilities, losses and gradients."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.train.packed import (
    PackedModel,
    add_packed_forward,
    block_mask,
    mask,
    pack_conversations,
    pack_pairs,
    refused,
    windows,
    with_block_masks,
)

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=7, head_dim=8),
    "mistral without a window": transformers.MistralConfig(**SHAPE, sliding_window=None, head_dim=8),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen2 with two kinds of layers": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
}
_models: dict[str, torch.nn.Module] = {}


def model_of(name: str, attention: str = "sdpa"):
    key = f"{name}/{attention}"
    if key not in _models:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind = "sdpa" if attention == "flex" else attention
            model = transformers.AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), attn_implementation=kind)
            for parameter in model.parameters():  # far from a uniform distribution, so that mistakes show
                torch.nn.init.normal_(parameter, std=0.25)
        if attention == "flex":
            with_block_masks(model)
        add_packed_forward(model)
        _models[key] = model
    model = _models[key]
    model.zero_grad()
    return model


ids = st.integers(1, VOCABULARY - 1)
pair = st.fixed_dictionaries(
    {
        "prompt_ids": st.lists(ids, min_size=1, max_size=30),
        "chosen_ids": st.lists(ids, min_size=1, max_size=20),
        "rejected_ids": st.lists(ids, min_size=1, max_size=20),
    }
)


def answer_log_probabilities(model, prompt, answer):
    """float32 [answer]: by a plain forward pass over one sequence."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logits[places, torch.tensor(answer)]


def packed_log_probabilities(model, rows):
    return PackedModel(model, pack_pairs(rows), model.config, torch.device("cpu"))().log_probs


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(pair, min_size=1, max_size=6))
def test_a_pack_of_pairs_equals_separate_sequences(name, rows):
    model = model_of(name)
    found = packed_log_probabilities(model, rows)
    assert found.shape[0] == 2 * len(rows)
    for number, row in enumerate(rows):
        for line, part in ((number, "chosen_ids"), (number + len(rows), "rejected_ids")):
            alone = answer_log_probabilities(model, row["prompt_ids"], row[part])
            start = len(row["prompt_ids"]) - 1
            torch.testing.assert_close(found[line, start : start + len(alone)], alone, rtol=1e-4, atol=1e-4)
            outside = torch.cat([found[line, :start], found[line, start + len(alone) :]])
            assert not outside.any()


@settings(max_examples=5, deadline=None)
@given(rows=st.lists(pair, min_size=20, max_size=32))
def test_a_pack_of_many_rows_equals_packs_of_one(rows):
    model = model_of("llama")
    together = packed_log_probabilities(model, rows).sum(dim=1)
    alone = torch.stack([packed_log_probabilities(model, [row]).sum(dim=1) for row in rows], dim=1).flatten()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 with two kinds of layers"])
@settings(max_examples=8, deadline=None)
@given(rows=st.lists(pair, min_size=1, max_size=4))
def test_the_gradients_of_a_pack_are_those_of_separate_sequences(name, rows):
    model = model_of(name)
    weights = torch.linspace(0.5, 1.5, 2 * len(rows))
    (packed_log_probabilities(model, rows).sum(dim=1) * weights).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    sums = [answer_log_probabilities(model, row["prompt_ids"], row["chosen_ids"]).sum() for row in rows]
    sums += [answer_log_probabilities(model, row["prompt_ids"], row["rejected_ids"]).sum() for row in rows]
    (torch.stack(sums) * weights).sum().backward()
    scale = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=20, deadline=None)
@given(row=pair, neighbours=st.lists(pair, max_size=5), place=st.integers(0, 5))
def test_a_row_does_not_depend_on_its_neighbours(row, neighbours, place):
    model = model_of("llama")
    place = min(place, len(neighbours))
    rows = [*neighbours[:place], row, *neighbours[place:]]
    alone = packed_log_probabilities(model, [row]).sum(dim=1)
    together = packed_log_probabilities(model, rows).sum(dim=1)[[place, place + len(rows)]]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_identical_answers_have_the_same_log_probabilities():
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 2], "rejected_ids": [8, 9, 2]}
    chosen, rejected = packed_log_probabilities(model_of("llama"), [row])
    torch.testing.assert_close(chosen, rejected, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.tuples(ids, st.booleans()), min_size=2, max_size=25), min_size=1, max_size=6))
def test_a_pack_of_conversations_equals_separate_sequences(texts):
    model = model_of("mistral")
    rows = [
        {"input_ids": [i for i, _ in text], "labels": [i if trained else -100 for i, trained in text]} for text in texts
    ]
    found = PackedModel(model, pack_conversations(rows), model.config, torch.device("cpu"))()
    alone = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        alone += [logits[place - 1, label] for place, label in enumerate(row["labels"]) if place and label != -100]
    assert len(found.label_mask) == len(alone)
    torch.testing.assert_close(found.log_probs, torch.stack(alone) if alone else torch.empty(0), rtol=1e-4, atol=1e-4)


def test_eager_attention_takes_the_same_pack():
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [3, 4, 2]}] * 2
    eager, sdpa = (packed_log_probabilities(model_of("llama", kind), rows) for kind in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 with two kinds of layers"])
def test_block_masks_give_what_dense_ones_give(name):  # forward only: FlexAttention has no backward pass on CPUs
    rows = [
        {"prompt_ids": list(range(1, 60)), "chosen_ids": [8, 9, 3] * 9, "rejected_ids": [3, 4, 2]},
        {"prompt_ids": [7], "chosen_ids": [11] * 40, "rejected_ids": list(range(5, 50))},
    ]
    with torch.no_grad():
        dense, sparse = (packed_log_probabilities(model_of(name, kind), rows) for kind in ("sdpa", "flex"))
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(pair, min_size=1, max_size=8), window=st.sampled_from([None, 5, 40]))
def test_a_block_mask_sees_what_the_dense_mask_sees(rows, window):
    pack = pack_pairs(rows)
    blocks, dense = block_mask(pack, window), mask(pack, window)[0, 0]
    places = torch.arange(len(pack.rows))
    assert torch.equal(blocks.mask_mod(0, 0, places[:, None], places[None, :]), dense)
    seen = torch.nn.functional.pad(dense, (0, -len(places) % 128, 0, -len(places) % 128)).unflatten(0, (-1, 128))
    seen = seen.unflatten(2, (-1, 128)).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), seen)


def test_a_model_with_block_masks_still_takes_plain_batches():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 3, 4]])
    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    plain, flex = (
        model_of("mistral", kind)(input_ids=ids, attention_mask=padding).logits[padding.bool()]
        for kind in ("sdpa", "flex")
    )
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)


def test_the_mask_of_a_pair_is_this():
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    seen = mask(pack_pairs([row, row]))[0, 0].int()
    one = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    expected = np.kron(np.eye(2, dtype=int), np.array(one))
    assert seen.tolist() == expected.tolist()


def test_a_pair_takes_its_prompt_once():
    pack = pack_pairs([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}])
    assert pack.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 2]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Gemma2Config(**SHAPE, head_dim=8), "final_logit_softcapping"),
        (transformers.CohereConfig(**SHAPE), "logit_scale"),
    ],
)
def test_a_model_that_the_pass_would_get_wrong_is_refused(config, reason):
    config._attn_implementation = "sdpa"
    assert reason in refused(config)


def test_models_of_the_usual_kinds_are_taken():
    for config in CONFIGS.values():
        config._attn_implementation = "sdpa"
        assert refused(config) is None
    assert windows(CONFIGS["mistral"]) == {"": 7}
    assert windows(CONFIGS["qwen2 with two kinds of layers"]) == {"full_attention": None, "sliding_attention": 5}
