"""The EOS guard: does the model still end its turn?

Two measurements on held-out rows, the same rows at every stage: the probability of `<|im_end|>` at the end of answers that
are given (a forward pass), and the share of the model's own answers that end on it (generations of bounded length, greedy
and sampled).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from prefmix.recipe import Eos
from prefmix.train.steps import by_budget

_TEMPERATURE = 0.7
TOKENS_A_BATCH = 16_384


@dataclass(frozen=True)
class HeldOut:
    """Tokenised answers that a model is measured on: `prompts[i] + answers[i]`, where an answer ends on `<|im_end|>`."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    split: str

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Stops:
    """How `n` generations ended: on `<|im_end|>`, on another end-of-sequence token of the model, or at the bound."""

    n: int
    stopped: int
    other_eos: int
    cut: int
    mean_tokens: float

    @property
    def rate(self) -> float:
        return self.stopped / self.n if self.n else 0.0


@dataclass(frozen=True)
class Measured:
    """`p_eos` and `log_p_eos` are means over the answers given; `stop_rate` is over the greedy and the sampled
    generations together, and a generation cut at the bound has not stopped."""

    p_eos: float
    log_p_eos: float
    greedy: Stops
    sampled: Stops

    @property
    def stop_rate(self) -> float:
        n = self.greedy.n + self.sampled.n
        return (self.greedy.stopped + self.sampled.stopped) / n if n else 0.0

    def as_json(self) -> dict[str, Any]:
        """The entry of eos.json."""
        modes = {name: asdict(stops) for name, stops in (("greedy", self.greedy), ("sampled", self.sampled))}
        return {
            "p_eos": self.p_eos,
            "log_p_eos": self.log_p_eos,
            "stop_rate": self.stop_rate,
            "cut": self.greedy.cut + self.sampled.cut,
            "n": self.greedy.n + self.sampled.n,
            **modes,
        }

    def as_metrics(self) -> Mapping[str, float]:
        return {"p_eos": self.p_eos, "log_p_eos": self.log_p_eos, "stop_rate": self.stop_rate}


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, settings: Eos, seed: int) -> Measured:
    """Measures a causal language model. The random numbers of the caller are as they were afterwards."""
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        probabilities = log_p_end(model, held_out, tokenizer.eos_token_id, tokenizer.pad_token_id)
        stops = {
            sampled: _generate(model, tokenizer, held_out.prompts, settings.max_new_tokens, sampled, seed)
            for sampled in (False, True)
        }
    model.train(was_training)
    return Measured(probabilities.exp().mean().item(), probabilities.mean().item(), stops[False], stops[True])


@torch.no_grad()
def log_p_end(model: Any, held_out: HeldOut, end: int, pad: int) -> torch.Tensor:
    """float32 [rows]: log p of the token `end` where each answer ends."""
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(held_out.prompts, held_out.answers, strict=True)]
    found = torch.empty(len(texts))
    for batch in _batches(texts):
        ids, mask = _padded([texts[row] for row in batch], pad, model.device, left=False)
        last = mask.sum(dim=1) - 1
        hidden = _hidden(model, ids, mask)[torch.arange(len(batch)), last]
        logits = model.get_output_embeddings()(hidden).float()
        found[torch.as_tensor(batch)] = logits.log_softmax(dim=-1)[:, end].cpu()
    return found


def _hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states [rows, tokens, width]: the logits of every position are not needed."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    bound: int,
    sampled: bool,
    seed: int,
) -> Stops:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    known = model.generation_config.eos_token_id
    ends = {end, *(known if isinstance(known, list) else [] if known is None else [known])} - {pad}
    choice = (
        {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    )
    stopped = other = tokens = 0
    for batch in _batches(prompts, room=bound):
        torch.manual_seed(seed)
        ids, mask = _padded([prompts[row] for row in batch], pad, model.device, left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=bound,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
            use_cache=True,
            **choice,
        )[:, ids.shape[1] :]
        for answer in output.tolist():
            last = next((place for place, token in enumerate(answer) if token in ends), None)
            tokens += len(answer) if last is None else last + 1
            stopped += last is not None and answer[last] == end
            other += last is not None and answer[last] != end
    n = len(prompts)
    return Stops(n, stopped, other, n - stopped - other, tokens / n if n else 0.0)


def _batches(texts: Sequence[Sequence[int]], room: int = 0) -> list[list[int]]:
    import numpy as np

    lengths = np.array([len(text) + room for text in texts], dtype=np.int64)
    return [batch.tolist() for batch in by_budget(lengths, TOKENS_A_BATCH)]


def _padded(
    texts: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [rows, longest] ids and mask."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(0, len(text))
        ids[row, place] = torch.tensor(text, dtype=torch.int64)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
