"""Is a merge the model that was trained? The log-probabilities of both, on the same answers, computed in fp32.

The model that was trained (its base in NF4, where it was) is in memory as a whole, as it was in training. The merge is
not: a layer's weights are there while the layer computes. The two are never in memory at the same time.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from prefmix.errors import ModelError
from prefmix.model.find import Found, load_model
from prefmix.model.merge.tensors import on_meta
from prefmix.train.weights import device, load_adapter, plain

#: A mean KL beyond this is not what rounding makes: the merge is another model.
WRONG_KL = 1e-3


@dataclass(frozen=True)
class Rows:
    """Token ids of answers that models are compared on: `prompts[i] + answers[i]`. `source` says where they are from."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    source: str

    @property
    def tokens(self) -> int:
        """The tokens of all answers."""
        return sum(map(len, self.answers))


@dataclass(frozen=True)
class Difference:
    """How far one model is from another on the tokens of answers: the mean KL divergence of their next-token
    distributions, and the largest absolute difference of a log-probability in them (of any token, however unlikely)."""

    kl: float
    largest: float


@dataclass(frozen=True)
class Trained:
    """What the model that was trained makes of rows: `log_probs`, a float32 [answer tokens, vocabulary] for each row, and
    the model's buffers, which are in no file."""

    log_probs: Sequence[torch.Tensor]
    buffers: Mapping[str, torch.Tensor]


def as_trained(found: Found, rows: Rows) -> Trained:
    """The model of a run on rows. It holds the weights that it was trained with, rounded as they were then, and computes
    with them in fp32. Memory: that of the model with its unquantised weights in fp32."""
    from bitsandbytes.nn import Linear4bit

    model, _ = load_model(found)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():  # those in 4 bits are not
            parameter.data = parameter.data.float()
    if found.adapter:
        load_adapter(model, found.adapter)  # once more: embeddings of added tokens were rounded to the base's type
    causal = plain(model)
    log_probs = _log_probs(causal, rows)
    buffers = {name.replace(".original_module", ""): buffer for name, buffer in causal.named_buffers()}
    del model, causal
    gc.collect()
    return Trained(log_probs, buffers)


def difference(
    trained: Trained, weights: Mapping[str, torch.Tensor], config: PretrainedConfig, rows: Rows
) -> Difference:
    """How far the model with these weights is from the one that was trained. Raises ModelError when a weight is missing."""
    kl, largest = 0.0, 0.0
    found = _log_probs(_streamed(config, weights, trained.buffers), rows)
    for expected, got in zip(trained.log_probs, found, strict=True):
        one, other = (each.double().log_softmax(dim=-1) for each in (expected, got))
        apart = one - other
        kl += (one.exp() * apart).sum().item()
        largest = max(largest, apart.abs().max().item())
    return Difference(kl / rows.tokens, largest)


def _streamed(
    config: PretrainedConfig, weights: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]
) -> Any:
    """A model whose modules take their own weights, in fp32, when they begin to compute, and give them back afterwards."""
    model = on_meta(config).eval()
    paths = {module: path for path, module in model.named_modules()}
    for module, path in paths.items():
        for name in module._buffers:
            module._buffers[name] = buffers[f"{path}.{name}"]
    if config.get_text_config().tie_word_embeddings:
        paths[model.get_output_embeddings()] = paths[model.get_input_embeddings()]
    for module, path in paths.items():
        own = dict(module._parameters)
        if any(parameter is not None for parameter in own.values()):
            module.register_forward_pre_hook(partial(_fill, path, weights))
            module.register_forward_hook(partial(_empty, own))
    return model


def _fill(path: str, weights: Mapping[str, torch.Tensor], module: torch.nn.Module, _: Any) -> None:
    for name, empty in module._parameters.items():
        if empty is not None:
            try:
                tensor = weights[f"{path}.{name}"]
            except KeyError as error:
                raise ModelError(f"The base has no {path}.{name}, which its config.json asks for.") from error
            module._parameters[name] = torch.nn.Parameter(tensor.to(device()).float(), requires_grad=False)


def _empty(own: Mapping[str, torch.nn.Parameter | None], module: torch.nn.Module, *_: Any) -> None:
    module._parameters.update(own)


@torch.no_grad()
def _log_probs(model: Any, rows: Rows) -> list[torch.Tensor]:
    """float32 [answer tokens, vocabulary] of each row, on the CPU. The rows go through the model together."""
    texts = [[*prompt, *answer] for prompt, answer in zip(rows.prompts, rows.answers, strict=True)]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device())
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device())
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    ends = [slice(len(text) - len(answer) - 1, len(text) - 1) for text, answer in zip(texts, rows.answers, strict=True)]
    answers = torch.cat([hidden[row, end] for row, end in enumerate(ends)])
    logits = model.get_output_embeddings()(answers).float().cpu()
    return list(logits.log_softmax(dim=-1).split([len(answer) for answer in rows.answers]))
