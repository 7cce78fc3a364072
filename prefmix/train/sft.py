"""SFT on tokenised conversations: loss on the assistant's answers and the token that ends them."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from prefmix.train.checkpoints import Checkpoints
from prefmix.train.loop import StepLoop
from prefmix.train.packed import PackedModel, add_packed_forward, pack_conversations
from prefmix.train.weights import plain


class ConversationTrainer(Checkpoints, StepLoop, SFTTrainer):
    """TRL's SFTTrainer on rows `input_ids, labels`."""

    def __init__(self, *, args: SFTConfig, **settings: Any) -> None:
        super().__init__(args=args, **settings)
        self.data_collator = DataCollatorForLanguageModeling(pad_token_id=self._tokenizer.pad_token_id)
        add_packed_forward(plain(self.model))

    def micro_loss(
        self, model: torch.nn.Module, batch: list[dict[str, Any]], rows: float, tokens: float
    ) -> torch.Tensor:
        # TRL takes the mean over the answer tokens of what it is given.
        with self.compute_loss_context_manager():
            inputs = self._prepare_inputs(self.data_collator(batch))
            return tokens * self.compute_loss(self._forward(model, batch), inputs)

    @torch.no_grad()
    def likelihoods(self, batch: list[dict[str, Any]]) -> torch.Tensor:
        self.model.eval()
        inputs = self._prepare_inputs(self.data_collator(batch))
        with self.accelerator.autocast():
            found = self._forward(self.model, batch)(**inputs, use_cache=False, fused_lm_head=True)
        return found.log_probs.float().sum().cpu()[None]

    def _forward(self, model: torch.nn.Module, batch: list[dict[str, Any]]) -> Any:
        """What TRL's loss calls on the padded batch: the model, or its packed forward pass over the same rows."""
        if not self.packs:
            return model
        return PackedModel(model, pack_conversations(batch), plain(self.model).config, self.accelerator.device)
