"""lm-evaluation-harness: its tasks, read from the Hub or from local files, asked of a model that remembers its answers.

Prompts and metrics are the harness's own in both cases: for local files its task definition is taken as it is, and only
the place that its rows come from is another one.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import numpy as np
import torch
import yaml
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.utils import logging as transformers_logging

from prefmix.errors import ModelError, UsageError
from prefmix.model.evaluation.benchmark_rows import LocalRows
from prefmix.model.evaluation.journal import Journal, key_of
from prefmix.recipe.problems import nearest
from prefmix.scores.suites import KNOWN

_TASKS = Path(lm_eval.__file__).parent / "tasks"
#: Where the harness defines the tasks of the suites: the index of all its 14,000 tasks takes eight seconds.
_HOMES = (
    *("agieval", "arc", "gsm8k", "hellaswag", "leaderboard/bbh_mc", "openbookqa", "piqa", "super_glue/boolq"),
    *("truthfulqa", "winogrande"),
)


@dataclass(frozen=True)
class Definition:
    """A task as the harness defines it: its YAML file, and its keys with the functions unresolved."""

    name: str
    path: Path
    keys: Mapping[str, Any]

    @property
    def version(self) -> Any:
        return (self.keys.get("metadata") or {}).get("version")

    @property
    def fewshot(self) -> int:
        return self.keys.get("num_fewshot") or 0

    @property
    def dataset(self) -> dict[str, Any]:
        """Where on the Hub its items are: id, configuration, split."""
        split = self.keys.get("test_split") or self.keys.get("validation_split")
        return {"id": self.keys.get("dataset_path"), "config": self.keys.get("dataset_name"), "split": split}


def harness_version() -> str:
    return version("lm-eval")


def definitions(names: list[str]) -> dict[str, Definition]:
    """The definitions of some tasks. Raises UsageError for one that the harness does not have, with the nearest name."""
    manager = TaskManager(include_path=[str(_TASKS / home) for home in _HOMES], include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = _all_tasks()
    found = {}
    for name in names:
        entry = manager.task_index.get(name)
        if name in manager.all_groups:
            raise UsageError(f"{name} is a group of the harness: name a suite ({', '.join(KNOWN[:6])}) or its tasks.")
        if entry is None or entry.yaml_path is None or name not in manager.all_subtasks:
            near = nearest(name, KNOWN) or nearest(name, manager.all_subtasks)
            hint = f" Did you mean {near}?" if near else ""
            raise UsageError(f"{name} is neither a suite nor a task of lm-evaluation-harness.{hint} Suites: "
                             f"{', '.join(KNOWN[:6])}.")  # fmt: skip
        found[name] = Definition(name, Path(entry.yaml_path), entry.cfg or {})
    return found


@cache
def _all_tasks() -> TaskManager:
    return TaskManager()


@contextmanager
def loaded(definition: Definition, local: LocalRows | None) -> Generator[Task]:
    """The task with its items: local ones, or those of the Hub. Raises ModelError when the Hub does not give them."""
    with TemporaryDirectory(prefix="prefmix-eval-") as scratch, quiet():
        path = definition.path if local is None else _definition_of(definition, local, Path(scratch))
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        try:
            task = manager.load([definition.name])["tasks"][definition.name]
        except (OSError, ValueError) as error:
            if local is not None:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{definition.name}: its items cannot be read from the Hub ({reason}). Go online, or give a "
                             f"folder with local benchmark files (--data).") from error  # fmt: skip
        yield task


def _definition_of(definition: Definition, local: LocalRows, scratch: Path) -> Path:
    """Writes the rows as JSON lines, and a definition that is the harness's but for the place of the rows."""
    places = {}
    for split, rows in local.splits.items():
        places[split] = str(scratch / f"{split}.jsonl")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(places[split]).write_text("".join(lines), encoding="utf-8")
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    asked = {key: definition.keys.get(key) for key in keys}
    changed = {
        "include": str(definition.path),
        "task": definition.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": places, "cache_dir": str(scratch / "cache")},
        **{key: split if split in places else None for key, split in asked.items()},
    }
    home = scratch / "task"
    home.mkdir()
    path = home / f"{definition.name}.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


class JournaledLM(HFLM):
    """The harness's model of transformers, which looks a request up before it computes it, and keeps what it computed batch
    by batch. Answers drawn at random are not looked up."""

    def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
        with quiet():
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self.journal: Journal | None = None

    def remember(self, journal: Journal) -> None:
        self.journal = journal
        self.cache_hook = journal  # ty: ignore[invalid-assignment] (it has the one method that is called)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._kept("loglikelihood", requests, super().loglikelihood)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self._kept("generate_until", requests, super().generate_until)

    def _kept(self, kind: str, requests: list[Any], compute: Callable[..., list[Any]]) -> list[Any]:
        journal = self.journal
        assert journal is not None
        if any(isinstance(part, dict) and part.get("do_sample") for each in requests for part in each.args):
            return compute(requests, disable_tqdm=True)
        keys = [key_of(kind, each.args) for each in requests]
        waiting = [each for each, key in zip(requests, keys, strict=True) if key not in journal.done]
        journal.expect(len(set(keys)))
        if waiting:
            compute(waiting, disable_tqdm=True)
            journal.commit()
        return [journal.done[key] for key in keys]

    def _model_call(self, *args: Any, **keys: Any) -> torch.Tensor:
        if self.journal is not None:
            self.journal.commit()
        return super()._model_call(*args, **keys)

    def _model_generate(self, *args: Any, **keys: Any) -> torch.Tensor:
        if self.journal is not None:
            self.journal.commit()
        return super()._model_generate(*args, **keys)


@dataclass(frozen=True)
class Answered:
    """A task that was asked. `metrics` are `{"name", "filter", "value", "stderr", "higher_is_better"}`, `items` has the id
    of each item and, by metric, its values."""

    metrics: list[dict[str, Any]]
    items: dict[str, Any]
    n: int
    of: int


def ask(lm: JournaledLM, task: Task, *, limit: int | None, chat: bool) -> Answered:
    """Asks a model a task. Seeds and few-shot examples are those of `lm_eval.simple_evaluate`, which would also collect
    what is installed on this machine. Raises ModelError when the memory does not do."""
    name = task.task_name
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    with quiet():
        try:
            found: Any = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {name: task}},
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                log_samples=True,
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{name}: out of memory with {lm.batch_size} requests at once: give a smaller --batch."
            ) from error
    values, better = found["results"][name], found["higher_is_better"][name]
    metrics = [
        {
            "name": metric,
            "filter": None if filtered == "none" else filtered,
            "value": float(value),
            "stderr": _number(values.get(f"{metric}_stderr,{filtered}")),
            "higher_is_better": better.get(metric),
        }
        for metric, comma, filtered in (key.partition(",") for key in values)
        if comma and not metric.endswith("_stderr") and (value := values[f"{metric},{filtered}"]) is not None
    ]
    counts = found["n-samples"][name]
    return Answered(metrics, _items(found["samples"][name]), counts["effective"], counts["original"])


def _items(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """By metric and filter the value of each item. An item is what was asked: the same requests are the same item."""
    items: dict[str, Any] = {}
    for sample in samples:
        asked = json.dumps(sample["arguments"], ensure_ascii=False, default=str)
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            values = items.setdefault(name, {"ids": [], "values": []})
            values["ids"].append(sha256(asked.encode()).hexdigest()[:16])
            values["values"].append(float(sample[metric]))
    return items


def _number(value: Any) -> float | None:
    return None if value is None or isinstance(value, str) else float(value)


@contextmanager
def quiet() -> Generator[None]:
    """Without the bars of the harness and of the libraries below it, and without what they log."""
    logger, bars = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level, loading = logger.level, transformers_logging.is_progress_bar_enabled()
    reading = not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(bars, disable=True)  # ty: ignore[invalid-assignment]
    datasets.disable_progress_bars()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bars
        if reading:
            datasets.enable_progress_bars()
        transformers_logging.set_verbosity(verbosity)
        if loading:
            transformers_logging.enable_progress_bar()
