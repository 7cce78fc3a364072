"""What both trainers do in another way than Trainer: a batch is an optimiser step, laid out in micro-batches of tokens.

Trainer sees one batch a step, which is the step's number. The rows of the step (steps.py) are shared out over the
processes and split by length into micro-batches of at most `token_budget` tokens; each micro-batch's loss is weighted with
its share of the step, so that the step is the mean over its rows (dpo) or its answer tokens (sft), however it was split.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader

from prefmix.errors import TrainError
from prefmix.train.data import IGNORED
from prefmix.train.steps import Steps, best_fit, by_budget, share_of

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # it is a mixin: TRL's trainer comes behind it in the bases of ours

#: A token budget that no step exceeds: losses that compare rows see the whole step in one micro-batch.
WHOLE_STEP = 2**62
#: Adds measurements of the model to an evaluation: names and values.
Measure = Callable[[torch.nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class RowSet:
    """Tokenised rows and what the loop must know of each: int64 [rows] arrays.

    `lengths` is the longest sequence of a row, `whole` the tokens of all its sequences, `packed` those of its row in a pack,
    `answers` those that its likelihood is taken over. `extra` are columns beside the table.
    """

    table: datasets.Dataset
    lengths: np.ndarray
    whole: np.ndarray
    packed: np.ndarray
    answers: np.ndarray
    extra: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows as the trainers' collators want them."""
        columns = self.table[numbers.tolist()]
        columns |= {name: values[numbers].tolist() for name, values in self.extra.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def pairs(table: datasets.Dataset) -> RowSet:
    """Rows with `prompt_ids, chosen_ids, rejected_ids`."""
    prompt, chosen, rejected = (_lengths(table, f"{part}_ids") for part in ("prompt", "chosen", "rejected"))
    longest = prompt + np.maximum(chosen, rejected)
    return RowSet(table, longest, 2 * prompt + chosen + rejected, prompt + chosen + rejected, chosen, {})


def conversations(table: datasets.Dataset) -> RowSet:
    """Rows with `input_ids, labels`."""
    lengths = _lengths(table, "input_ids")
    parts = [
        _answered(labels) for labels in table.data.column("labels").chunks
    ]  # as one, they would be copied to memory
    return RowSet(table, lengths, lengths, lengths, np.concatenate([lengths[:0], *parts]), {})


def _answered(labels: pa.ListArray) -> np.ndarray:
    """int64 [rows]: the labels of each row that are trained on."""
    counted = np.append(0, np.cumsum(labels.flatten().to_numpy() != IGNORED))
    lengths = pc.call_function("list_value_length", [labels]).to_numpy()
    return np.diff(counted[np.append(0, np.cumsum(lengths, dtype=np.int64))])


def longest_row(rows: RowSet, packs: bool, sequences: int, among: Any = ...) -> int:
    """The most tokens that one of the rows (those numbered `among`) takes in a micro-batch."""
    return int(rows.packed[among].max() if packs else rows.lengths[among].max() * sequences)


def _lengths(table: datasets.Dataset, column: str) -> np.ndarray:
    return pc.call_function("list_value_length", [table.data.column(column)]).to_numpy().astype(np.int64)


class StepLoop(Trainer):
    """Goes before TRL's trainer in the bases of ours, which defines `sequences` and `micro_loss`."""

    model: torch.nn.Module
    _metrics: dict[str, dict[str, list[float]]]  # TRL's, by mode and name
    #: Sequences that a row takes in a micro-batch.
    sequences = 1
    #: TRL's metrics that are means over the answer tokens; the others are means over the rows.
    token_metrics = frozenset({"mean_token_accuracy", "entropy"})
    #: Those that cannot be put together from micro-batches, or that loop.py has in its own way.
    left_out_metrics = frozenset({"num_tokens"})

    def __init__(
        self,
        *,
        train_rows: RowSet,
        eval_rows: RowSet | None,
        steps: Steps,
        token_budget: int,
        packs: bool = False,
        may_shrink: bool = False,
        measure: Measure | None = None,
        **settings: Any,
    ) -> None:
        self.rows = {"train": train_rows} | ({"eval": eval_rows} if eval_rows else {})
        self.steps = steps
        self.token_budget = token_budget
        self.packs = packs
        self.may_shrink = may_shrink
        self.measure = measure
        #: Of the whole stage, over all processes and resumed parts.
        self.seen: dict[str, float] = {"rows": 0, "tokens": 0, "processed": 0, "seconds": 0.0}
        self._since: float | None = None  # when the last step ended; evaluations do not count
        tables: dict[str, Any] = {
            "train_dataset": train_rows.table,
            "eval_dataset": eval_rows.table if eval_rows else None,
        }
        super().__init__(**tables, **settings)

    def likelihoods(self, batch: list[dict[str, Any]]) -> torch.Tensor:
        """float32: log-probabilities of the answers of some rows, summed over tokens, in eval mode; packed or padded."""
        raise NotImplementedError

    def packs_agree(self) -> bool:
        """Whether packed rows have the likelihoods that they have padded: the shortest rows with some tokens of answers are
        tried, and may differ by what rounding does to a token's log-probability (in bf16 0.02 on average, SmolLM2 in NF4,
        and 0.09 over six tokens)."""
        rows = self.rows["train"]
        shortest = np.argsort(rows.lengths, kind="stable")[:16]
        enough = int(np.searchsorted(np.cumsum(rows.answers[shortest]), 64)) + 1
        shortest = shortest[: max(2, enough)]
        found, kept = [], self.packs
        for self.packs in (True, False):
            found.append(self.likelihoods(rows.rows(shortest)))
        self.packs = kept
        bound = 1e-3 if self.model.dtype == torch.float32 else 0.1
        return bool((found[0] - found[1]).abs().sum() <= bound * rows.answers[shortest].sum())

    def micro_batches(self, rows: RowSet, numbers: np.ndarray) -> list[np.ndarray]:
        """How some rows are parted: int64 positions into `numbers`."""
        if self.packs:
            return best_fit(rows.packed[numbers], self.token_budget)
        return by_budget(rows.lengths[numbers], self.token_budget, self.sequences)

    def micro_loss(self, model: torch.nn.Module, batch: list[dict[str, Any]], rows: float, tokens: float) -> Any:
        """The loss of a micro-batch, weighted with its share of the step: of the rows, and of the answer tokens."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader:
        steps: Any = range(len(self.steps))  # DataLoader takes any sequence
        return DataLoader(steps, batch_size=1, collate_fn=lambda numbers: numbers[0])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, None]:
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # counted by stage.py, from the tokens

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        numbers = self.steps.rows(inputs)
        if self._since is None:
            self._since = time.perf_counter()
        while True:
            try:
                loss = self._over(model, "train", numbers, self.accelerator.backward)
                _give_back()
                return loss
            except torch.OutOfMemoryError as error:
                model.zero_grad()
                torch.cuda.empty_cache()
                longest = longest_row(self.rows["train"], self.packs, self.sequences, numbers)
                if not self.may_shrink or self.token_budget <= longest or self.accelerator.num_processes > 1:
                    told = _out_of_memory(self.token_budget, longest, bool(self.args.gradient_checkpointing))
                    raise TrainError(told) from error
                self.token_budget = max(longest, self.token_budget // 2)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and metrics over the held-out rows, and what `measure` adds, as `eval_<name>`."""
        was_training = self.model.training
        self.model.eval()
        totals: dict[str, float] = defaultdict(float)
        held_out = self.rows["eval"]
        with torch.no_grad():
            for start in range(0, len(held_out), self.steps.batch_size):
                numbers = np.arange(start, min(start + self.steps.batch_size, len(held_out)))
                share = len(numbers) / len(held_out)
                loss = self._over(self.model, "eval", numbers, None)
                means = {name: values.pop() for name, values in self._metrics["eval"].items()}
                means["loss"] = self.accelerator.reduce(loss, "mean").item()
                for name, value in means.items():
                    totals[name] += share * value
        self._metrics["eval"].clear()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in totals.items()}
        if self.measure:
            measured = self.measure(self.accelerator.unwrap_model(self.model), self.state.global_step)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(was_training)
        self._since = None
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training step: speed of the step just done, over all processes
            now = time.perf_counter()
            rows, tokens = self._step_size
            assert self._since is not None, "training_step has set it"
            seconds = now - self._since
            logs |= {"rows_per_s": rows / seconds, "tokens_per_s": tokens / seconds}
            self.seen["seconds"] += seconds
            self._since = now
        super().log(logs, start_time)

    def _over(
        self, model: torch.nn.Module, mode: str, numbers: np.ndarray, backward: Callable[[Any], None] | None
    ) -> torch.Tensor:
        """The loss of a step over this process's rows, times the number of processes (their mean is the step's loss);
        the step's metrics go to `_metrics`."""
        rows, world = self.rows[mode], self.accelerator.num_processes
        mine = numbers[share_of(rows.lengths[numbers], self.accelerator.process_index, world)]
        idle = len(mine) == 0  # fewer rows than processes: one row at no weight, so that all take part
        mine = numbers[:1] if idle else mine
        all_answers = max(1, int(rows.answers[numbers].sum()))
        micros = self.micro_batches(rows, mine)
        total = torch.zeros((), device=self.accelerator.device)
        tally: dict[str, float] = defaultdict(float)
        for place, micro in enumerate(micros, start=1):
            chosen = mine[micro]
            share = 0.0 if idle else len(chosen) * world / len(numbers)
            token_share = 0.0 if idle else int(rows.answers[chosen].sum()) * world / all_answers
            waits = backward is not None and world > 1 and place < len(micros)
            with self.accelerator.no_sync(model) if waits else nullcontext(), self._own_metrics(mode) as metrics:
                loss = self.micro_loss(model, rows.rows(chosen), share, token_share)
                if backward is not None:
                    if not torch.isfinite(loss):
                        raise TrainError(self._not_finite(loss, chosen))
                    backward(loss)
            total += loss.detach()
            for name, values in metrics.items():
                tally[name] += (token_share if name in self.token_metrics else share) * values[-1]
        self._record(mode, tally)
        if mode == "train":
            self._count(numbers)
        return total

    @contextmanager
    def _own_metrics(self, mode: str) -> Generator[Mapping[str, list[float]]]:
        """TRL's metrics of one micro-batch, of this process alone: it gathers them inside the loss, which would wait for
        processes that have another number of micro-batches."""
        kept, self._metrics[mode] = self._metrics[mode], defaultdict(list)
        accelerator: Any = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda value: value
        try:
            yield self._metrics[mode]
        finally:
            del accelerator.gather, accelerator.gather_for_metrics
            self._metrics[mode] = kept

    def _count(self, numbers: np.ndarray) -> None:
        """Adds a step to what was seen: `tokens` of all its sequences, `processed` of what went through the model."""
        rows = self.rows["train"]
        tokens = int(rows.whole[numbers].sum())
        self._step_size = len(numbers), tokens
        self.seen["rows"] += len(numbers)
        self.seen["tokens"] += tokens
        self.seen["processed"] += int(rows.packed[numbers].sum()) if self.packs else tokens

    def _record(self, mode: str, tally: Mapping[str, float]) -> None:
        names = sorted(tally.keys() - self.left_out_metrics)
        means = torch.tensor([tally[name] for name in names], dtype=torch.float64, device="cpu")
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means.float().to(self.accelerator.device), "mean").cpu()
        for name, value in zip(names, means.tolist(), strict=True):
            self._metrics[mode][name].append(value)

    def _not_finite(self, loss: torch.Tensor, rows: np.ndarray) -> str:
        ids: Sequence[str] = self.rows["train"].table[rows.tolist()]["id"]
        return (
            f"The loss is {loss.item()} in step {self.state.global_step + 1}, in a micro-batch of these rows: "
            f"{', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}. Read them with `prefmix show`; a lower "
            f"learning_rate or a longer warmup is the usual cure."
        )


def _give_back() -> None:
    """Returns free memory of glibc's heap to the system: blocks of one micro-batch do not fit the holes of another, and a CPU
    run would grow with every step."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _out_of_memory(budget: int, longest: int, checkpoints: bool) -> str:
    if budget >= WHOLE_STEP:
        told, remedy = "a whole step in one micro-batch, which its loss compares", "lower batch_size"
    else:
        told, smaller = f"{budget} tokens a micro-batch", max(longest, budget // 2)
        remedy = f"lower token_budget to {smaller}" if smaller < budget else "lower max_length"
    return f"Out of memory with {told}: {remedy}{'' if checkpoints else ', or set gradient_checkpointing = true'}."
