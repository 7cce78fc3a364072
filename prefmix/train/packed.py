"""One packed forward pass in which the prompt of a pair is processed once.

A pair is the row `[prompt | chosen | rejected]`: the positions of the rejected answer go on from the prompt, and it does not
see the chosen one. Many rows lie in one sequence, each of which sees itself alone. The log-probabilities of the answers are
read where they are predicted (the last position of the prompt predicts the first token of both), through TRL's chunked
head, and laid out as TRL's losses expect them. A conversation is a row with one part.

What a position sees is the same as in a forward pass of its own sequence, so the numbers are the same up to rounding; this
is checked on rows of the data before it is relied on (`StepLoop.packs_agree`).

On a GPU the mask is a block mask for FlexAttention, which skips the blocks that nobody sees; on a CPU it is dense.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import repeat_kv
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.kernels import ChunkedLogProbFunction

_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")
#: Columns of the head that TRL's kernel works on at once: its own choice on a GPU, on a CPU a tile that stays in cache.
CPU_CHUNK, GPU_CHUNK = 2048, 32_768
#: Settings of a config that change the logits behind the head: such a model takes the padded path.
_BEHIND_THE_HEAD = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


@dataclass(frozen=True)
class Pack:
    """Rows in one sequence of L tokens, with T answer tokens to read.

    `input_ids, position_ids, rows, parts`: int64 [L]; `rows` numbers the row of a token, `parts` is 0 in its prompt and
    1, 2 in its answers. `read_at` [T] is the position that predicts a target, `targets` [T] its id, `places` [T] where its
    log-probability goes in a flat tensor of `shape`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    parts: torch.Tensor
    read_at: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    shape: tuple[int, ...]


def pack_pairs(pairs: Sequence[Mapping[str, Any]]) -> Pack:
    """Rows `prompt_ids, chosen_ids, rejected_ids`. `shape` is [2 * rows, longest sequence - 1], chosen rows first: token t
    of a sequence has its log-probability in column t - 1."""
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs)
    shape = (2 * len(pairs), longest - 1)
    building = _Building()
    for number, row in enumerate(pairs):
        prompt = row["prompt_ids"]
        start = building.add(prompt, 0, number, 0)
        for part, answer in ((1, row["chosen_ids"]), (2, row["rejected_ids"])):
            behind = building.add(answer, len(prompt), number, part)
            building.read([start + len(prompt) - 1, *range(behind, behind + len(answer) - 1)], answer)
            line = number + (part - 1) * len(pairs)
            building.place(range(line * shape[1] + len(prompt) - 1, line * shape[1] + len(prompt) - 1 + len(answer)))
    return building.pack(shape)


def pack_conversations(conversations: Sequence[Mapping[str, Any]]) -> Pack:
    """Rows `input_ids, labels`. `shape` is [T]: a log-probability for each token that has a label."""
    building = _Building()
    for number, row in enumerate(conversations):
        start = building.add(row["input_ids"], 0, number, 0)
        labelled = [place for place, label in enumerate(row["labels"]) if label != -100 and place > 0]
        building.read([start + place - 1 for place in labelled], [row["labels"][place] for place in labelled])
    total = len(building.targets)
    building.place(range(total))
    return building.pack((total,))


class _Building:
    """The lists of a pack while rows are added."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.rows: list[int] = []
        self.parts: list[int] = []
        self.read_at: list[int] = []
        self.targets: list[int] = []
        self.places: list[int] = []

    def add(self, ids: Sequence[int], position: int, row: int, part: int) -> int:
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.rows += [row] * len(ids)
        self.parts += [part] * len(ids)
        return start

    def read(self, read_at: Sequence[int], targets: Sequence[int]) -> None:
        self.read_at += read_at
        self.targets += targets

    def place(self, places: Sequence[int]) -> None:
        self.places += places

    def pack(self, shape: tuple[int, ...]) -> Pack:
        lists = (self.ids, self.positions, self.rows, self.parts, self.read_at, self.targets, self.places)
        return Pack(*(torch.tensor(values, dtype=torch.int64) for values in lists), shape)


def sees(
    rows: torch.Tensor, parts: torch.Tensor, positions: torch.Tensor, query: Any, key: Any, window: int | None
) -> torch.Tensor:
    """bool: whether the token at `query` sees the one at `key`: of its row, of the prompt or its own answer, not behind it,
    and not further back than the model's sliding window."""
    visible = (rows[query] == rows[key]) & (positions[query] >= positions[key])
    visible = visible & ((parts[key] == 0) | (parts[key] == parts[query]))
    return visible if window is None else visible & (positions[query] - positions[key] < window)


def mask(pack: Pack, window: int | None = None) -> torch.Tensor:
    """bool [1, 1, L, L]: what each token (third axis) sees (fourth axis)."""
    places = torch.arange(len(pack.rows), device=pack.rows.device)
    return sees(pack.rows, pack.parts, pack.position_ids, places[:, None], places[None, :], window)[None, None]


def block_mask(pack: Pack, window: int | None = None) -> BlockMask:
    """The same as `mask`, as FlexAttention takes it: which blocks of 128 by 128 are seen whole, in part or not at all."""
    length, device = len(pack.rows), pack.rows.device

    def seen(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return sees(pack.rows, pack.parts, pack.position_ids, query, key, window)

    return create_block_mask(seen, 1, 1, length, length, device=device, _compile=device.type == "cuda")


def with_block_masks(model: Any) -> None:
    """Lets a model take block masks; with any other mask (or none) its attention stays SDPA."""
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_ATTENTION)


_ATTENTION = "prefmix"


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **rest: Any
) -> Any:
    """Attention as transformers calls it: [batch, heads, L, width] in, [batch, L, heads, width] out."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    heads, groups = query.shape[1], key.shape[1]
    if heads & (heads - 1):  # the kernel's own grouping takes powers of two only
        key, value, groups = repeat_kv(key, heads // groups), repeat_kv(value, heads // groups), heads
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    found = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=groups != heads)
    return found.transpose(1, 2).contiguous(), None


@functools.cache
def _compiled() -> Any:
    """FlexAttention compiled for lengths that change: packs of other lengths do not compile it again."""
    return torch.compile(flex_attention, dynamic=True)


def windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each kind of attention layer of a model: one entry, but for models that mix kinds."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if kinds:
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}
    return {"": window if getattr(text, "use_sliding_window", True) else None}


def refused(config: Any) -> str | None:
    """Why a model cannot take the packed path; None when nothing speaks against it."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"its layers of kind {', '.join(sorted(kinds))} do not take a mask of pairs"
    if behind := [name for name in _BEHIND_THE_HEAD if getattr(text, name, None) is not None]:
        return f"it changes its logits behind the head ({behind[0]})"
    if config._attn_implementation not in ("sdpa", "eager", _ATTENTION):
        return f"its attention is {config._attn_implementation}"
    return None


def add_packed_forward(model: Any) -> None:
    """Gives a causal language model's forward the argument `packed`, a dict of tensors (`arguments`): it then gives the
    statistics of the targets (`_STATISTICS`, [T] each) instead of logits. Wrappers (PEFT, DDP) pass the argument on."""
    if model.device.type == "cuda" and model.config._attn_implementation == "sdpa":
        with_block_masks(model)
    inner = model.forward
    kinds = windows(model.config)

    @functools.wraps(type(model).forward)
    def forward(*args: Any, packed: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return inner(*args, **kwargs)
        masks = {kind: packed[f"mask_{kind}"] for kind in kinds}
        hidden = model.base_model(
            input_ids=packed["input_ids"],
            position_ids=packed["position_ids"],
            attention_mask=masks if len(kinds) > 1 else next(iter(masks.values())),
            use_cache=False,
        ).last_hidden_state[0]
        head = model.get_output_embeddings()
        found = ChunkedLogProbFunction.apply(
            hidden[packed["read_at"]],
            head.weight,
            head.bias,
            packed["targets"],
            1.0,
            CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK,
            None,
            1.0,
            _STATISTICS,
        )
        log_probs, entropy, _, mean_logits, is_top1 = found
        return log_probs, entropy, mean_logits, is_top1

    model.forward = forward


def arguments(pack: Pack, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The argument `packed` for a pack."""
    there = Pack(*(getattr(pack, name).to(device) for name in _TENSORS), pack.shape)
    found = {name: getattr(there, name) for name in ("read_at", "targets")}
    found |= {name: getattr(there, name)[None] for name in ("input_ids", "position_ids")}
    for kind, window in windows(config).items():
        if config._attn_implementation == _ATTENTION:
            found[f"mask_{kind}"] = block_mask(there, window)
        else:
            visible = mask(there, window)
            found[f"mask_{kind}"] = visible if config._attn_implementation == "sdpa" else _additive(visible, dtype)
    return found


_TENSORS = ("input_ids", "position_ids", "rows", "parts", "read_at", "targets", "places")


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


class PackedModel:
    """Stands for a model in TRL's loss: called as the model would be on the padded batch, it runs the pack instead and gives
    what TRL reads from the outputs, `log_probs, entropy, mean_logits, is_top1` in the pack's shape."""

    def __init__(self, model: Any, pack: Pack, config: Any, device: torch.device) -> None:
        self.model, self.pack, self.config, self.device = model, pack, config, device

    def __call__(self, **_: Any) -> SimpleNamespace:
        packed = arguments(self.pack, self.config, self.device, self.config.dtype or torch.float32)
        statistics = dict(zip(_STATISTICS, self.model(packed=packed), strict=True))
        places = self.pack.places.to(self.device)
        laid_out = {
            name: torch.zeros(self.pack.shape, dtype=values.dtype, device=self.device)
            .view(-1)
            .index_copy(0, places, values)
            for name, values in statistics.items()
        }
        laid_out = {name: values.view(self.pack.shape) for name, values in laid_out.items()}
        return SimpleNamespace(**laid_out, label_mask=torch.ones(len(places), dtype=torch.bool, device=self.device))
