"""The trainer of a stage: the model of the stage before (or the base), TRL's arguments, the reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PrinterCallback, TrainingArguments
from trl import DPOConfig, SFTConfig

from prefmix.errors import TrainError
from prefmix.recipe import DpoStage
from prefmix.train import processes, weights
from prefmix.train.dpo import PairTrainer
from prefmix.train.guard import Guard, Writer
from prefmix.train.loop import WHOLE_STEP, RowSet, conversations, longest_row, pairs
from prefmix.train.memory import micro_batches_of, not_packed
from prefmix.train.records import StageRun
from prefmix.train.reference import log_probabilities, reference_key
from prefmix.train.session import AnyStage, Session, StageRows
from prefmix.train.sft import ConversationTrainer

Trainer = PairTrainer | ConversationTrainer
#: transformers 5.23 calls it so and keeps the old name, which TRL reads, equal to it.
_CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def trainer_of(
    session: Session,
    stage: AnyStage,
    before: StageRun | None,
    folder: Path,
    given: StageRows,
) -> tuple[Trainer, Guard]:
    """The model of the stage before (or the base) in a trainer for this one."""
    settings = session.settings
    lora = settings.adapter == "lora"
    rows_of = pairs if isinstance(stage, DpoStage) else conversations
    rows = rows_of(given.table)
    why_not = not_packed(session.base.config, settings)
    budget, checkpointing = _micro_batches(session, stage, rows, packs=why_not is None)
    source = session.base
    if before and not lora:
        source = weights.Base(session.base.name, str(before.folder / "adapter"), None, session.base.config)
    model = weights.load_base(
        source, settings.quantization, weights.dtype_of(settings), len(session.tokenizer.tokenizer)
    )
    processes.wait()  # on some nodes the base was there, others have downloaded it
    peft = weights.lora_config(settings.lora, bool(session.tokenizer.added), is_tied(model)) if lora else None
    packs = settings.packing is not False and _may_pack(session, why_not)
    held_out = given.held_out
    keys = {"train": given.tokens["train"].key, "eval": given.tokens["test"].key if held_out is not None else ""}
    guard = Guard(session, folder)
    shared: dict[str, Any] = {
        "model": model,
        "processing_class": session.tokenizer.tokenizer,
        "steps": given.steps,
        "train_rows": rows,
        "eval_rows": rows_of(held_out) if held_out is not None else None,
        "token_budget": budget,
        "packs": packs,
        "may_shrink": stage.token_budget == "auto" and budget < WHOLE_STEP,
        "measure": guard.during,
        "callbacks": [Writer(session, folder)],
        "peft_config": peft,
    }
    common = {"steps": len(given.steps), "evaluates": held_out is not None, _CHECKPOINTING: checkpointing}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"(peft|trl|transformers)\..*")
        if isinstance(stage, DpoStage):
            own = _dpo(stage, lora)
            trainer: Trainer = PairTrainer(
                args=_arguments(DPOConfig, session, stage, folder, **common, **own), **shared
            )
        else:
            trainer = ConversationTrainer(args=_arguments(SFTConfig, session, stage, folder, **common), **shared)
    trainer.remove_callback(PrinterCallback)
    weights.in_fp32(trainer.model)
    if before and isinstance(trainer.model, PeftModel):
        weights.load_adapter(trainer.model, before.folder / "adapter")
    if packs and not trainer.packs_agree():
        trainer.packs = _may_pack(session, "its packed rows have other likelihoods than its padded ones")
    if isinstance(trainer, PairTrainer):
        _with_reference(session, trainer, before, keys)
    return trainer, guard


def _may_pack(session: Session, why_not: str | None) -> bool:
    """Whether rows are packed: told when they are not, refused when the recipe insists."""
    if why_not and session.settings.packing is True:
        raise TrainError(f"train.packing: {session.base.name} cannot be packed: {why_not}. Leave the key out.")
    if why_not:
        session.watcher.note(f"{session.base.name} takes the padded path: {why_not}.")
    return why_not is None


def _with_reference(session: Session, trainer: PairTrainer, before: StageRun | None, keys: Mapping[str, str]) -> None:
    """Gives the rows their reference log-probabilities; `keys` names the token ids of each split."""
    settings = session.settings
    start = before.run["adapter_sha256"] if before else None
    for split, rows in trainer.rows.items():
        key = reference_key(
            [keys[split], len(rows)],
            session.base.fingerprint,
            [settings.quantization, weights.dtype_of(settings), start],
        )
        extra = log_probabilities(
            trainer,
            rows,
            session.folder / ".reference" / f"{key}.safetensors",
            lambda done, total: session.watcher.work("reference", done, total),
            needed=trainer.steps.order if split == "train" else None,
        )
        trainer.rows[split] = replace(rows, extra=extra)


def is_tied(model: Any) -> bool:
    """Whether the head is the embeddings."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def _micro_batches(session: Session, stage: AnyStage, rows: RowSet, packs: bool) -> tuple[int, bool]:
    """The tokens of a micro-batch, and whether activations are computed again: asked before the weights are loaded."""
    return micro_batches_of(
        stage,
        session.settings,
        session.base.config,
        _free_bytes(),
        longest=longest_row(rows, packs, 2 if isinstance(stage, DpoStage) else 1),
        vocabulary=len(session.tokenizer.tokenizer),
    )


def _free_bytes() -> int | None:
    """What is free on the GPU of the process that has the least; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    return min(gather_object([torch.cuda.mem_get_info()[0]]))


def _dpo(stage: DpoStage, lora: bool) -> dict[str, Any]:
    """DPO's own arguments for TRL. The flag for the reference makes TRL load no second model when there is no adapter."""
    losses = [stage.loss] if isinstance(stage.loss, str) else list(stage.loss)
    return {
        "beta": stage.beta,
        "loss_type": losses,
        "loss_weights": stage.loss_weights or [1.0] * len(losses),
        "label_smoothing": stage.label_smoothing,
        "precompute_ref_log_probs": not lora,
    }


def _arguments(
    kind: type, session: Session, stage: AnyStage, folder: Path, steps: int, evaluates: bool, **own: Any
) -> Any:
    """TRL's arguments of a stage."""
    every = stage.eval_every if evaluates else None
    return kind(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=1,  # Trainer's epoch is the whole stage: see loop.py
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.scheduler,
        warmup_steps=math.ceil(stage.warmup_ratio * steps),
        max_grad_norm=1.0,
        max_length=None,  # what is too long was left out or shortened before: see data.py
        bf16=weights.dtype_of(session.settings) == "bfloat16",
        seed=session.recipe.seed % 2**32,
        use_cpu=weights.device().type == "cpu",
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=stage.checkpoint_every or steps,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        report_to=list(session.report_to) or "none",
        run_name=f"{session.recipe.name}-{stage.name}",
        **own,
    )
