"""Real pairs through SmolLM2's own weights: packed, padded and stock TRL are one and the same step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
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
def base(smollm2_base, tmp_path_factory) -> Path:
    """The first layers of SmolLM2 with its embeddings, in fp32: real weights, in a few seconds a step."""
    folder = tmp_path_factory.mktemp("first-layers")
    config = AutoConfig.from_pretrained(smollm2_base)
    config.num_hidden_layers = LAYERS
    model = LlamaForCausalLM(config)
    model.load_state_dict(
        AutoModelForCausalLM.from_pretrained(smollm2_base, dtype=torch.float32).state_dict(), strict=False
    )
    model.save_pretrained(folder)
    load_tokenizer(str(smollm2_base), "main", smollm2_base).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(smollm2_base):
    return load_tokenizer(str(smollm2_base), "main", smollm2_base)


@pytest.fixture(scope="module")
def rows(real_data, chat):
    """Real pairs as ChatML text, with prompts from one token to more than 2,000; identical answers, answers of one token
    and a conversation of several turns among them.

    Answers are cut at 200 characters: a margin is a difference of sums of log-probabilities, and fp32 rounds longer ones by
    more than the test allows. (At 500, stock TRL's gradient is 1.4e-5 from that of a plain pass in float64, ours 1.0e-5.)
    """
    import datasets

    read = pl.read_parquet(real_data / "orca_dpo_pairs" / "converted.parquet").filter(
        pl.col("question").str.len_chars() > 0
    )
    longest = read.sort(pl.col("question").str.len_chars(), descending=True).head(1)
    some = read.filter(pl.col("question").str.len_chars() < 700).sample(4, seed=3)
    texts = [
        (row["question"], row["chosen"][:200], row["rejected"][:200]) for row in pl.concat([longest, some]).to_dicts()
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


def test_bf16_rounds_the_packed_step_as_it_rounds_the_padded_one(base, chat, rows, tmp_path):
    """What bf16 rounds depends on how a micro-batch is laid out: the distances of the padded path from fp32, in several
    layouts of the same rows, are the noise."""
    table = stock(base, chat, rows, tmp_path).train_dataset.select(range(1, len(rows)))

    def step(packs, budget, dtype):
        """The log-probabilities of all answers and the gradient, with the rows laid out by a token budget."""
        trainer = moved(ours(base, chat, table, tmp_path / f"{packs}{budget}{dtype}", budget, packs))
        every = trainer.rows["train"]
        found = torch.zeros(2, len(every))
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            our_step(trainer)
            for micro in trainer.micro_batches(every, np.arange(len(every))):
                found[:, micro] = trainer.likelihoods(every.rows(micro)).reshape(2, -1)
        return found, torch.cat([gradient.flatten() for gradient in gradients(trainer).values()])

    exact = step(False, 3000, torch.float32)

    def distances(packs):
        found = [step(packs, budget, torch.bfloat16) for budget in (1, 400, 3000)]
        return [max((one[part] - exact[part]).norm() / exact[part].norm() for one in found) for part in (0, 1)]

    noise, packed = distances(False), distances(True)
    assert 1e-4 < noise[0] < 0.05
    assert 1e-3 < noise[1] < 0.1
    assert packed[0] <= 2 * noise[0]
    assert packed[1] <= 2 * noise[1]
