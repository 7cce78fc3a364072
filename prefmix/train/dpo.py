"""DPO: TRL's losses on tokenised pairs, with reference log-probabilities that were computed once."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefmix.train.checkpoints import Checkpoints
from prefmix.train.loop import StepLoop
from prefmix.train.packed import PackedModel, add_packed_forward, pack_pairs
from prefmix.train.weights import plain


class PairTrainer(Checkpoints, StepLoop, DPOTrainer):
    """TRL's DPOTrainer on rows `prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps`."""

    sequences = 2
    left_out_metrics = frozenset({"num_tokens", "entropy", "logits/chosen", "logits/rejected"})

    def __init__(self, *, args: DPOConfig, **settings: Any) -> None:
        super().__init__(args=args, **settings)
        self.precompute_ref_logps = True  # the rows carry them
        self._step_weights = list(self.loss_weights)
        self.data_collator = DataCollatorForPreference(pad_token_id=self._tokenizer.pad_token_id)
        add_packed_forward(plain(self.model))

    def micro_loss(
        self, model: torch.nn.Module, batch: list[dict[str, Any]], rows: float, tokens: float
    ) -> torch.Tensor:
        # TRL takes the mean over the rows of what it is given, and over the chosen tokens in its sft loss.
        shares = (tokens if name == "sft" else rows for name in self.loss_types)
        self.loss_weights = [weight * share for weight, share in zip(self._step_weights, shares, strict=True)]
        with self.compute_loss_context_manager():
            return self.compute_loss(self._forward(model, batch), self._prepare_inputs(self.data_collator(batch)))

    @torch.no_grad()
    def log_probabilities(self, batch: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [rows] each: log p(chosen | prompt) and log p(rejected | prompt), summed over the answer's tokens,
        under the model as it stands, in eval mode."""
        was_training = self.model.training
        self.model.eval()
        inputs = self._prepare_inputs(self.data_collator(batch))
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with self.accelerator.autocast():
            output = self._forward(self.model, batch)(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
        self.model.train(was_training)
        chosen, rejected = output.log_probs.float().sum(dim=1).cpu().chunk(2)
        return chosen, rejected

    def likelihoods(self, batch: list[dict[str, Any]]) -> torch.Tensor:
        return torch.cat(self.log_probabilities(batch))

    def _forward(self, model: torch.nn.Module, batch: list[dict[str, Any]]) -> Any:
        """What TRL's loss calls on the padded batch: the model, or its packed forward pass over the same rows."""
        if not self.packs:
            return model
        return PackedModel(model, pack_pairs(batch), plain(self.model).config, self.accelerator.device)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # tokenised already

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        return dataset  # see reference.py
