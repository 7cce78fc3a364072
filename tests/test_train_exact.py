"""Real pairs through SmolLM2's own weights: packed, padded and stock TRL are one and the same step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from small_models import smollm2
from test_train_dpo import gradients, moved, our_step, ours, stock
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from prefmix.train.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]
START, END = "<|im_start|>", "<|im_end|>"
LAYERS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def base(whole, tmp_path_factory) -> Path:
    """The first layers of SmolLM2 with its embeddings, in fp32: real weights, in a few seconds a step."""
    folder = tmp_path_factory.mktemp("first-layers")
    config = AutoConfig.from_pretrained(whole)
    config.num_hidden_layers = LAYERS
    model = LlamaForCausalLM(config)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).state_dict(), strict=False)
    model.save_pretrained(folder)
    load_tokenizer(str(whole), "main", whole).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(whole):
    return load_tokenizer(str(whole), "main", whole)


@pytest.fixture(scope="module")
def rows(real_data, chat):
    """Real pairs as ChatML text, with prompts from one token to more than 2,000; identical answers, answers of one token
    and a conversation of several turns among them."""
    import datasets

    read = pl.read_parquet(real_data / "orca_dpo_pairs" / "converted.parquet").filter(
        pl.col("question").str.len_chars() > 0
    )
    longest = read.sort(pl.col("question").str.len_chars(), descending=True).head(1)
    some = read.filter(pl.col("question").str.len_chars() < 700).sample(4, seed=3)
    texts = [
        (row["question"], row["chosen"][:500], row["rejected"][:500]) for row in pl.concat([longest, some]).to_dicts()
    ]
    words = texts[0][0].split(" ")
    while len(chat.tokenizer(" ".join(words))["input_ids"]) < 2000:
        words += words
    while len(chat.tokenizer(" ".join(words))["input_ids"]) > 2100:
        words = words[: int(len(words) * 0.97)]
    texts[0] = (" ".join(words), *texts[0][1:])
    prompt, chosen, _ = texts[1]
    texts += [(prompt, chosen, chosen), (texts[2][0], "Yes", "No")]
    as_chatml = [
        {"prompt": f"{START}user\n{question}{END}\n{START}assistant\n", "chosen": c + END, "rejected": r + END}
        for question, c, r in texts
    ]
    turns = f"{START}user\n{texts[3][0]}{END}\n{START}assistant\n{texts[3][1]}{END}\n{START}user\nWhy?{END}\n{START}assistant\n"
    as_chatml.append({"prompt": turns, "chosen": texts[4][1] + END, "rejected": texts[4][2] + END})
    as_chatml.append(
        {"prompt": START, "chosen": "assistant\nA prompt of one token." + END, "rejected": "assistant\n" + END}
    )
    return datasets.Dataset.from_list(as_chatml)


def stock_step(trainer):
    """Stock TRL over the rows one at a time, as with gradient accumulation: a batch of all would not fit into memory."""
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    for row in trainer.train_dataset:
        batch = trainer._prepare_inputs(trainer.data_collator([row]))
        loss = trainer.compute_loss(trainer.model, batch) / len(trainer.train_dataset)
        loss.backward()
        total += loss.item()
    return total


def test_a_step_on_real_pairs_is_stock_trls_packed_and_padded(base, chat, rows, tmp_path):
    theirs = moved(stock(base, chat, rows, tmp_path))
    prompts = [len(ids) for ids in theirs.train_dataset["prompt_ids"]]
    assert min(prompts) == 1
    assert max(prompts) > 2000
    expected = stock_step(theirs)
    whole = torch.cat([gradient.flatten() for gradient in gradients(theirs).values()])
    for packs in (True, False):
        mine = moved(ours(base, chat, theirs.train_dataset, tmp_path / str(packs), 3000, packs))
        assert our_step(mine).item() == pytest.approx(expected, rel=1e-5)
        found = torch.cat([gradients(mine)[name].flatten() for name in gradients(theirs)])
        assert (found - whole).norm() <= 1e-5 * whole.norm()


def test_log_probabilities_of_each_row_are_the_same_alone_packed_and_padded(base, chat, rows, tmp_path):
    table = stock(base, chat, rows, tmp_path).train_dataset
    packed = ours(base, chat, table, tmp_path / "packed", 3000, True).rows["train"].extra
    padded = ours(base, chat, table, tmp_path / "padded", 3000, False).rows["train"].extra
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for side in ("chosen", "rejected"):
        alone = []
        for row in table:
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = scores.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
            alone.append(picked.sum().item())
        for found in (packed, padded):
            np.testing.assert_allclose(found[f"ref_{side}_logps"], alone, rtol=1e-5)


def test_in_bf16_the_packed_step_differs_from_the_padded_one_as_that_does_from_itself(base, chat, rows, tmp_path):
    """Rounding in bf16 depends on how a micro-batch is laid out: the padded path in other micro-batches is the noise."""
    table = stock(base, chat, rows, tmp_path).train_dataset.select(range(1, len(rows)))

    def step(packs, budget):
        trainer = ours(base, chat, table, tmp_path / f"{packs}{budget}", budget, packs)
        moved(trainer)
        with torch.autocast("cpu", torch.bfloat16):
            loss = our_step(trainer)
        return loss.item(), torch.cat([gradient.flatten() for gradient in gradients(trainer).values()])

    loss, gradient = step(False, 3000)
    noise_loss, noise = step(False, 8000)
    packed_loss, packed = step(True, 3000)
    assert abs(packed_loss - loss) <= 5 * abs(noise_loss - loss) + 1e-3
    assert (packed - gradient).norm() <= 3 * (noise - gradient).norm() + 1e-3 * gradient.norm()
