"""Our DPO step against stock TRL on the same rows: log-probabilities, loss and gradients of the adapter."""

from __future__ import annotations

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from small_models import byte_tokenizer, micro_llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from prefmix.errors import TrainError
from prefmix.train.dpo import PairTrainer
from prefmix.train.loop import WHOLE_STEP, pairs
from prefmix.train.reference import log_probabilities
from prefmix.train.steps import plan_steps
from prefmix.train.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

START, END = "<|im_start|>", "<|im_end|>"
PLAIN_LOSSES = ["sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
                "discopop", "sft", "sigmoid_norm"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return micro_llama(tmp_path_factory.mktemp("micro"), tokenizer=byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def chat(base):
    return load_tokenizer(str(base), "main", base)


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, turns, strict=False)]


#: Short prompts and long ones, one-word answers, identical answers, several turns, a system message.
CONVERSATIONS = [
    (conversation("Name a colour."), "Blue.", "I would rather not say anything about colours today."),
    (conversation("2 + 2?"), "4", "4"),
    (conversation("Who wrote it?", "A friend.", "And when?"), "In the spring of that year, I believe.", "No idea"),
    (
        [{"role": "system", "content": "Be brief."}, *conversation("Why is the sky blue? " * 12)],
        "Scattering.",
        "It is.",
    ),
    (conversation("x"), "y " * 40, "z"),
    (conversation("List three rivers."), "Rhine\nElbe\nOder", "Rhine, Elbe, Oder and many more besides those."),
]


@pytest.fixture(scope="module")
def rows():
    """TRL's two forms of the same rows: conversations, and ChatML text."""

    def text(prompt):
        turns = [f"{START}{turn['role']}\n{turn['content']}{END}" for turn in prompt]
        return "\n".join(turns) + f"\n{START}assistant\n"

    answers = [
        (prompt, *({"role": "assistant", "content": side} for side in sides)) for prompt, *sides in CONVERSATIONS
    ]
    as_messages = [{"prompt": p, "chosen": [c], "rejected": [r]} for p, c, r in answers]
    as_text = [{"prompt": text(p), "chosen": c + END, "rejected": r + END} for p, c, r in CONVERSATIONS]
    return {"messages": datasets.Dataset.from_list(as_messages), "text": datasets.Dataset.from_list(as_text)}


def arguments(folder, **settings):
    return DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=False,
        per_device_train_batch_size=len(CONVERSATIONS),
        disable_tqdm=True,
        seed=3,
        **settings,
    )


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")


def stock(base, chat, dataset, folder, **settings):
    """TRL's trainer, and its tokenised rows."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return DPOTrainer(
        model,
        args=arguments(folder, **settings),
        train_dataset=dataset,
        processing_class=chat.tokenizer,
        peft_config=lora(),
    )


def ours(base, chat, tokenised, folder, budget, packs, **settings):
    """Our trainer on the rows that TRL tokenised, with reference log-probabilities."""
    table = tokenised.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    table = table.add_column("id", [f"{number:032x}" for number in range(len(table))])
    ids = table["id"]
    trainer = PairTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=arguments(folder, **settings),
        processing_class=chat.tokenizer,
        peft_config=lora(),
        train_rows=pairs(table),
        eval_rows=None,
        steps=plan_steps(ids, seed=1, stage="dpo", batch_size=len(ids), epochs=1),
        token_budget=budget,
        packs=packs,
    )
    extra = log_probabilities(trainer, trainer.rows["train"], folder / "ref.safetensors", lambda done, total: None)
    trainer.rows["train"] = replace(trainer.rows["train"], extra=extra)
    return trainer


def moved(trainer):
    """An adapter that has learnt something: with B at 0 the gradient of A is 0 and every margin too."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return trainer


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}


def stock_step(trainer):
    """TRL's loss on one batch of all rows in their order; its gradients are in the model afterwards."""
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach()


def our_step(trainer):
    trainer.model.train()
    trainer.model.zero_grad()
    return trainer._over(trainer.model, "train", np.arange(len(trainer.rows["train"])), lambda loss: loss.backward())


def assert_same_step(mine, theirs):
    torch.testing.assert_close(our_step(mine), stock_step(theirs), rtol=1e-5, atol=1e-6)
    expected, found = gradients(theirs), gradients(mine)
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize(("packs", "budget"), [(False, 10**6), (False, 700), (True, 10**6), (True, 400)])
def test_a_step_is_stock_trls_however_it_is_split(base, chat, rows, tmp_path, form, packs, budget):
    theirs = moved(stock(base, chat, rows[form], tmp_path))
    mine = moved(ours(base, chat, theirs.train_dataset, tmp_path, budget, packs))
    assert (len(mine.micro_batches(mine.rows["train"], np.arange(6))) > 1) == (budget < 10**6)
    assert_same_step(mine, theirs)


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_every_loss_is_stock_trls_with_the_step_in_several_packs(base, chat, rows, tmp_path, loss):
    settings = {"loss_type": [loss], "label_smoothing": 0.1 if loss == "robust" else 0.0}
    theirs = moved(stock(base, chat, rows["text"], tmp_path, **settings))
    assert_same_step(moved(ours(base, chat, theirs.train_dataset, tmp_path, 400, True, **settings)), theirs)


def test_exo_pair_and_weighted_mixes_are_stock_trls(base, chat, rows, tmp_path):
    settings = {"loss_type": ["exo_pair", "sft", "ipo"], "loss_weights": [1.0, 0.3, 0.1], "label_smoothing": 0.01}
    theirs = moved(stock(base, chat, rows["text"], tmp_path, **settings))
    assert_same_step(moved(ours(base, chat, theirs.train_dataset, tmp_path, 400, True, **settings)), theirs)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_losses_that_compare_rows_are_stock_trls_in_one_micro_batch(base, chat, rows, tmp_path, loss):
    theirs = moved(stock(base, chat, rows["text"], tmp_path, loss_type=[loss]))
    assert_same_step(
        moved(ours(base, chat, theirs.train_dataset, tmp_path, WHOLE_STEP, True, loss_type=[loss])), theirs
    )


def test_log_probabilities_are_those_of_a_plain_forward_pass(base, chat, rows, tmp_path):
    tokenised = stock(base, chat, rows["text"], tmp_path).train_dataset
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for packs in (False, True):
        trainer = ours(base, chat, tokenised, tmp_path / str(packs), 200, packs)
        for side in ("chosen", "rejected"):
            expected = []
            for row in tokenised:
                ids = row["prompt_ids"] + row[f"{side}_ids"]
                with torch.no_grad():
                    scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                places = range(len(row["prompt_ids"]), len(ids))
                expected.append(sum(scores[place - 1, ids[place]].item() for place in places))
            found = trainer.rows["train"].extra[f"ref_{side}_logps"]
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_metrics_are_stock_trls(base, chat, rows, tmp_path):
    theirs = moved(stock(base, chat, rows["text"], tmp_path))
    mine = moved(ours(base, chat, theirs.train_dataset, tmp_path, 400, True))
    stock_step(theirs)
    our_step(mine)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        np.testing.assert_allclose(mine._metrics["train"][name], theirs._metrics["train"][name], rtol=1e-4, atol=1e-6)


def test_stored_reference_log_probabilities_are_read_and_damaged_ones_made_again(base, chat, rows, tmp_path):
    trainer = ours(base, chat, stock(base, chat, rows["text"], tmp_path).train_dataset, tmp_path, 200, True)
    path, row_set = tmp_path / "ref.safetensors", trainer.rows["train"]
    expected = {name: values.copy() for name, values in row_set.extra.items()}
    calls = []
    log_probabilities(trainer, row_set, path, lambda done, total: calls.append(done))
    assert calls == []
    path.write_bytes(path.read_bytes()[:-7])
    again = log_probabilities(trainer, row_set, path, lambda done, total: calls.append(done))
    assert calls
    for name, values in again.items():
        np.testing.assert_array_equal(values, expected[name])


def test_a_loss_that_is_not_a_number_names_the_rows(base, chat, rows, tmp_path):
    trainer = ours(base, chat, stock(base, chat, rows["text"], tmp_path).train_dataset, tmp_path, 10**6, True)
    trainer.rows["train"].extra["ref_chosen_logps"][2] = np.nan
    with pytest.raises(TrainError, match=f"{2:032x}"):
        our_step(trainer)


def test_an_out_of_memory_error_says_what_to_change(base, chat, rows, tmp_path, monkeypatch):
    trainer = ours(base, chat, stock(base, chat, rows["text"], tmp_path).train_dataset, tmp_path, 4096, True)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_over", exhausted)
    with pytest.raises(TrainError, match=r"lower token_budget to 2048, or set gradient_checkpointing = true"):
        trainer.training_step(trainer.model, 0)
    trainer.args.gradient_checkpointing = True
    trainer.token_budget = WHOLE_STEP
    with pytest.raises(TrainError, match=r"a whole step in one micro-batch.*lower batch_size\.$"):
        trainer.training_step(trainer.model, 0)


def test_with_an_automatic_budget_the_step_is_split_finer_until_it_fits(base, chat, rows, tmp_path, monkeypatch):
    trainer = ours(base, chat, stock(base, chat, rows["text"], tmp_path).train_dataset, tmp_path, 4096, True)
    trainer.may_shrink = True
    whole, over = trainer._over, []

    def cramped(*step):
        over.append(trainer.token_budget)
        if trainer.token_budget > 1024:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*step)

    expected = our_step(trainer)
    monkeypatch.setattr(trainer, "_over", cramped)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: loss.backward())
    torch.testing.assert_close(trainer.training_step(trainer.model, 0), expected)
    assert over == [4096, 2048, 1024]


def test_all_losses_of_a_recipe_are_tried_here():
    from typing import get_args

    from prefmix.recipe.model import Loss

    assert {*PLAIN_LOSSES, "exo_pair", "aot", "aot_unpaired"} == set(get_args(Loss))
