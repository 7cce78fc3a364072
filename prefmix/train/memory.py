"""What training holds in memory, by part, and what a micro-batch may be so that it fits: from a model's config alone.

The activations are what autograd keeps of one micro-batch, counted operation by operation for decoders of Llama's make
(Mistral, Qwen) under PEFT's LoRA; bytes are those of fp32 on a CPU and of bf16 autocast on a GPU.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from peft import get_peft_model

from prefmix.recipe import DpoStage, SftStage, Train
from prefmix.train import eos, packed
from prefmix.train.loop import WHOLE_STEP
from prefmix.train.weights import lora_config

#: Bits a parameter takes in NF4 with double quantisation: 4, 8 for the scale of each 64, 32 for that of 256 scales.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
#: Resident bytes of a CPU process beside the weights, measured on Linux: Python with torch, transformers, trl, peft,
#: bitsandbytes and polars imported (580 MB), the tokenizer and the rows of a small mixture (60 MB), what the first forward
#: pass reads in (50 MB).
CPU_PROCESS = 690_000_000
#: Bytes of a GPU that CUDA's context and the libraries' kernels and workspaces take before the first tensor.
GPU_PROCESS = 900_000_000
#: Free memory that an allocator keeps, as a share of the activations. In glibc's heap the blocks of one micro-batch do not
#: fit the holes that another one of other lengths left between the gradients; 0.8 to 1.5 measured with SmolLM2 (fp32, NF4;
#: glibc 2.36), and none with MALLOC_MMAP_THRESHOLD_=65536, which costs a quarter of the speed. On a GPU it is assumed.
CPU_HOLES, GPU_HOLES = 1.1, 0.05
#: Tokens per micro-batch on a CPU, where longer packs cost more attention than they save.
CPU_TOKENS = 1024
MOST_TOKENS = 32_768
#: Losses that compare the rows of a step with each other, so that it is never split.
COMPARING = frozenset({"aot", "aot_unpaired"})
_HEAD_ROWS = 4096
#: fp32 tiles that TRL's head has at once beside the one it multiplies into, in its backward pass in torch operations (the
#: logits twice, log p, p, the gradient, two terms of it, and a bool); its Triton kernel needs none.
_CPU_TILES = 7.25
#: Projections that read one normed input, by the last part of their name.
_READS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention") | dict.fromkeys(("gate_proj", "up_proj"), "mlp")


@dataclass(frozen=True)
class Sizes:
    """Numbers that follow from a base's config and the recipe's adapter.

    `parameters` are the base's, `matrices` those that a token is multiplied with (all but the embeddings, with the head),
    `quantised` those that NF4 takes, `trainable` those with a gradient, `lora` those of its two factors. The widths are
    sums over the layers, in numbers a token: `residual` of the inputs of the norms, `normed` of what the adapter reads
    from them, `queries` and `keys` of the attention, `gated` of an MLP's width, `read` of the inputs of all adapted
    matrices, `own` of those that are kept for the adapter alone, `ranks` of the adapter's inner widths.
    """

    parameters: int
    matrices: int
    quantised: int
    trainable: int
    lora: int
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    queries: int
    keys: int
    gated: int
    read: int
    own: int
    ranks: int


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the peak of training. `allocator` is free and kept by the allocator, `process` is the rest of the
    process: the libraries on a CPU, CUDA's context on a GPU."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    allocator: int
    process: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def sizes_of(config: Any, settings: Train, vocabulary: int | None = None) -> Sizes:
    """Counts the parameters of the model and its adapter on the meta device, where weights have no bytes.

    `vocabulary` is the length of a tokenizer that may have more tokens than the base.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    added = vocabulary is not None and vocabulary > text.vocab_size
    if added:
        text.vocab_size = vocabulary
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what it calls deprecated
        model = transformers.AutoModelForCausalLM.from_config(config)
        parameters, embeddings = _count(model.parameters()), model.get_input_embeddings().weight.numel()
        head = model.get_output_embeddings()
        linear = {name: module for name, module in model.named_modules()
                  if isinstance(module, torch.nn.Linear) and module is not head}  # fmt: skip
        quantised = sum(module.weight.numel() for module in linear.values())
        tied = bool(text.tie_word_embeddings)
        widths = {name: module.in_features for name, module in linear.items()}
        if settings.adapter == "lora":
            # the plain loader: the base is not in 4 bits here, and the adapter is the same
            adapted = get_peft_model(model, lora_config(settings.lora, added and settings.add_tokens, tied))
            targets = {name.removeprefix("base_model.model.") for name, module in adapted.named_modules()
                       if hasattr(module, "lora_A")}  # fmt: skip
            trainable = _count(parameter for parameter in adapted.parameters() if parameter.requires_grad)
            lora = _count(parameter for name, parameter in adapted.named_parameters() if "lora_" in name)
        else:
            targets, trainable, lora = set(linear), parameters, 0
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        parameters=parameters,
        matrices=parameters if tied else parameters - embeddings,
        quantised=quantised,
        trainable=trainable,
        lora=lora,
        layers=layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        heads=heads,
        queries=head_width * heads,
        keys=head_width * (getattr(text, "num_key_value_heads", None) or heads),
        gated=text.intermediate_size,
        read=sum(widths.get(name, 0) for name in targets),
        own=_kept_alone(widths, targets),
        ranks=settings.lora.r * len(targets) if settings.adapter == "lora" else 0,
    )


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _kept_alone(widths: Mapping[str, int], targets: set[str]) -> int:
    """Numbers a token that are kept because an adapted matrix reads them: once where several read the same, and not
    where the attention keeps its output anyway."""
    kept: dict[str, int] = {}
    for name in targets & widths.keys():
        parent, _, last = name.rpartition(".")
        if last != "o_proj":
            kept[f"{parent}/{_READS.get(last, last)}"] = widths[name]
    return sum(kept.values())


def weight_bytes(sizes: Sizes, settings: Train, dtype: str) -> int:
    """The base: NF4 (NF4_BITS a parameter) on linear layers other than the head where it is asked for; the rest, and the
    whole base where all is trained (fp32), at 2 or 4 bytes a parameter."""
    width = 4 if settings.adapter == "none" else _width(dtype)
    quantised = sizes.quantised if settings.quantization == "nf4" else 0
    return int(quantised * NF4_BITS / 8) + (sizes.parameters - quantised) * width


def layer_bytes(
    sizes: Sizes, settings: Train, dtype: str, *, cpu: bool, repeats_keys: bool, dropout: float = 0.0
) -> int:
    """Bytes that autograd keeps for a token in one layer.

    Two norms keep their input in fp32; the attention keeps its queries, keys, values and output (keys and values at the
    width of the queries where the heads are repeated for a mask) and a normaliser a head in fp32; the MLP keeps the gate,
    its activation and the other factor. The adapter keeps what its matrices read: the input itself, once for all that
    share it, or a copy for each where PEFT casts it for the fp32 adapter (in bf16, but for 4-bit weights on a GPU) or it
    is dropped out (with the mask: fp32 noise on a CPU, a byte a number on a GPU).
    """
    width = _width(dtype)
    keys = sizes.queries if repeats_keys else sizes.keys
    kept = (2 * sizes.queries + 2 * keys + 3 * sizes.gated) * width + 4 * (2 * sizes.hidden + 2 + sizes.heads)
    lora = settings.adapter == "lora"
    copied = lora and (bool(dropout) or (width == 2 and (cpu or settings.quantization == "none")))
    inputs = (sizes.read if copied else sizes.own) * width
    noise = sizes.read * (4 if cpu else 1) if lora and dropout else 0
    return kept + (inputs + noise + sizes.ranks * width) // sizes.layers


def activation_bytes(
    sizes: Sizes,
    settings: Train,
    dtype: str,
    *,
    cpu: bool,
    tokens: int,
    mask_cells: int = 0,
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> int:
    """What is kept of one micro-batch of `tokens` tokens until its backward pass.

    `mask_cells` is the number of cells of a dense mask (SDPA: L x L of a pack, rows x L x L of a padded batch), which
    SDPA turns into numbers and keeps for every layer, beside the bool one; 0 where the mask is a block mask. With
    checkpointing a layer keeps its input, and one layer at a time all of it.
    """
    width = _width(dtype)
    layer = mask_cells * width
    layer += tokens * layer_bytes(sizes, settings, dtype, cpu=cpu, repeats_keys=mask_cells > 0, dropout=dropout)
    around = tokens * sizes.hidden * width * 2 + mask_cells
    if checkpointing:
        return layer + around + sizes.layers * tokens * sizes.hidden * width
    casts = sizes.lora * 2 if width == 2 else 0  # autocast's bf16 copies of fp32 weights
    if width == 2 and settings.adapter == "none":
        casts = sizes.matrices * 2
    return sizes.layers * layer + around + casts


def head_bytes(sizes: Sizes, dtype: str, answers: int, *, cpu: bool) -> int:
    """The head's buffers for so many answer tokens: the hidden states that it reads, their gradient in fp32, and tiles of
    [at most 4,096 tokens, a chunk of the vocabulary], of which torch operations need several at once."""
    width = _width(dtype)
    chunk = packed.CPU_CHUNK if cpu else packed.GPU_CHUNK
    tile = chunk * (width + (4 * _CPU_TILES if cpu else 0))
    return answers * sizes.hidden * (width + 4) + int(min(answers, _HEAD_ROWS) * tile)


def training_memory(
    sizes: Sizes,
    settings: Train,
    dtype: str,
    *,
    cpu: bool,
    tokens: int,
    answers: int,
    mask_cells: int = 0,
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> Memory:
    """The parts at the peak: the start of the backward pass of a micro-batch, when an optimiser step lies behind it.

    Trainable weights, their gradients and AdamW's two moments are fp32. `answers` is the number of tokens that the head
    reads.
    """
    full = settings.adapter == "none"
    activations = activation_bytes(
        sizes,
        settings,
        dtype,
        cpu=cpu,
        tokens=tokens,
        mask_cells=mask_cells,
        checkpointing=checkpointing,
        dropout=dropout,
    )
    return Memory(
        weights=weight_bytes(sizes, settings, dtype),
        adapter=0 if full else 4 * sizes.trainable,
        gradients=4 * sizes.trainable,
        optimizer=8 * sizes.trainable,
        activations=activations,
        head=head_bytes(sizes, dtype, answers, cpu=cpu),
        allocator=int((CPU_HOLES if cpu else GPU_HOLES) * activations),
        process=CPU_PROCESS if cpu else GPU_PROCESS,
    )


def loading_bytes(sizes: Sizes, settings: Train, dtype: str, stored: int, *, cpu: bool) -> int:
    """The most while the weights are loaded: the weights as they will be, beside the mapped file on a CPU, where its pages
    are resident as they are read. `stored` is the bytes of a parameter in the file."""
    process = CPU_PROCESS if cpu else GPU_PROCESS
    return process + weight_bytes(sizes, settings, dtype) + (sizes.parameters * stored if cpu else 0)


def measuring_bytes(sizes: Sizes, settings: Train, dtype: str, longest: int, *, cpu: bool) -> int:
    """The most while the EOS is measured (eos.py): the model with its optimiser, and for a batch of prompts either the keys
    and values of their answers, with the copy of a layer that grows, or one layer's values in a forward pass."""
    width = _width(dtype)
    tokens = min(eos.TOKENS_A_BATCH, settings.eos.prompts * (longest + settings.eos.max_new_tokens))
    keys = 2 * sizes.keys * (sizes.layers + 1) * width
    forward = (4 * sizes.gated + 3 * sizes.hidden) * width
    trained = sizes.trainable * (8 if settings.adapter == "none" else 12)
    process = CPU_PROCESS if cpu else GPU_PROCESS
    return process + weight_bytes(sizes, settings, dtype) + trained + tokens * max(keys, forward)


def micro_batch_tokens(
    config: Any, settings: Train, free_bytes: int, *, longest: int = 0, vocabulary: int | None = None
) -> tuple[int, bool]:
    """The tokens of a micro-batch on a GPU with so many bytes before the weights are loaded, and whether to checkpoint.

    The most that fit, in steps of 1,024 up to 32,768, and at least the longest row. Checkpointing as the recipe says;
    "auto" takes it when less than 4,096 tokens, or not the longest row, fit without. Raises nothing: where even the
    longest row does not fit with checkpointing, it is tried all the same.
    """
    return most_tokens(sizes_of(config, settings, vocabulary), settings, free_bytes, longest)[:2]


def most_tokens(sizes: Sizes, settings: Train, free_bytes: int, longest: int = 0) -> tuple[int, bool, Memory]:
    """`micro_batch_tokens`, and the memory that this takes."""
    choices = {True: (True,), False: (False,)}.get(settings.gradient_checkpointing, (False, True))
    least = max(1024, -(-longest // 1024) * 1024)
    for checkpointing in choices:
        enough = least if checkpointing or len(choices) == 1 else max(least, 4096)
        for tokens in range(max(MOST_TOKENS, least), 0, -1024):
            if tokens < enough:
                break
            memory = _gpu_memory(sizes, settings, tokens, checkpointing)
            if memory.total <= free_bytes:
                return tokens, checkpointing, memory
    return least, choices[-1], _gpu_memory(sizes, settings, least, choices[-1])


def micro_batches_of(
    stage: DpoStage | SftStage,
    settings: Train,
    config: Any,
    free_bytes: int | None,
    *,
    longest: int,
    vocabulary: int | None = None,
) -> tuple[int, bool]:
    """The tokens of a stage's micro-batches and whether to checkpoint: as the recipe says, and where it says "auto" what
    fits into so many bytes of a GPU before the weights are loaded (`micro_batch_tokens`; None is a CPU).

    `longest` is the most tokens that one row takes. A loss of COMPARING has its whole step in one micro-batch.
    """
    tokens = stage.token_budget
    if isinstance(stage, DpoStage) and COMPARING & {*([stage.loss] if isinstance(stage.loss, str) else stage.loss)}:
        tokens = WHOLE_STEP
    asked = settings.gradient_checkpointing
    if free_bytes is None:
        return CPU_TOKENS if tokens == "auto" else tokens, asked is True
    if tokens == "auto":
        return micro_batch_tokens(config, settings, free_bytes, longest=longest, vocabulary=vocabulary)
    if asked != "auto":
        return tokens, asked
    most = max(longest, min(tokens, stage.batch_size * longest))
    return tokens, _gpu_memory(sizes_of(config, settings, vocabulary), settings, most, False).total > free_bytes


def not_packed(config: Any, settings: Train) -> str | None:
    """Why a base's rows are padded instead of packed; None when they are packed. Reads no weights."""
    if settings.packing is False:
        return "the recipe says so (packing = false)"
    with torch.device("meta"):
        return packed.refused(transformers.AutoModelForCausalLM.from_config(config).config)


def _gpu_memory(sizes: Sizes, settings: Train, tokens: int, checkpointing: bool) -> Memory:
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    dropout = settings.lora.dropout if any(stage.method == "sft" for stage in settings.stages) else 0.0
    return training_memory(sizes, settings, dtype, cpu=False, tokens=tokens, answers=tokens,
                           checkpointing=checkpointing, dropout=dropout)  # fmt: skip


def _width(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]
