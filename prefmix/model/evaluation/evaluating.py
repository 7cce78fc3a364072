"""`prefmix eval`: suites of benchmarks asked of a model, task by task, with a record of each.

<folder>/<suite>.json                   the results of a suite (scores.py); <stage>/eval for a run
<folder>/tasks/<task>-<id>.json         a task that has been asked: its metrics, and the values of its items
<folder>/tasks/<task>-<id>.jsonl        one that is being asked: the answers so far (journal.py)

`<id>` is of the model and of how it was asked: an evaluation that is repeated finds what is there, one with other
settings leaves it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefmix.errors import ModelError
from prefmix.model.evaluation import harness
from prefmix.model.evaluation.benchmark_rows import LocalRows, UnlikeTheHubError, local_rows
from prefmix.model.evaluation.decontaminated import TrainingData
from prefmix.model.evaluation.journal import Journal
from prefmix.model.find import Found, load_model, load_tokenizer
from prefmix.scores import results as scores
from prefmix.scores.suites import Suite, expand
from prefmix.train import records, weights

_BATCH_ON_A_GPU = 8


class Watcher:
    """Is told how an evaluation goes on. This one says nothing; the command line draws."""

    def note(self, text: str) -> None:
        """Something that the user should know and that stops nothing."""

    def loading(self) -> None:
        """The model is being loaded."""

    def task(self, name: str, number: int, tasks: int) -> None:
        """A task begins, the `number`-th of so many."""

    def answered(self, done: int, requests: int) -> None:
        """So many of the requests of this task have their answer."""


@dataclass(frozen=True)
class Settings:
    """How a model is asked. `data` is a folder with local benchmark files, None for the Hub; `batch` None is one request at
    once on a CPU and eight on a GPU."""

    data: Path | None = None
    limit: int | None = None
    chat: bool = False
    batch: int | None = None

    @property
    def requests_at_once(self) -> int:
        return self.batch or (1 if weights.device().type == "cpu" else _BATCH_ON_A_GPU)


@dataclass
class _Asked:
    """A model and how it is asked; loaded when the first task needs it."""

    found: Found
    settings: Settings
    watcher: Watcher
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.found)
        if self.settings.chat and not self.tokenizer.chat_template:
            raise ModelError(f"{self.found.name} has no chat template: leave --chat out, or name a model that has one.")

    @cached_property
    def lm(self) -> harness.JournaledLM:
        self.watcher.loading()
        with harness.quiet():
            model, tokenizer = load_model(self.found)
        return harness.JournaledLM(model, tokenizer, self.settings.requests_at_once)

    @cached_property
    def model(self) -> dict[str, Any]:
        """What the model is, whatever it is called."""
        base, adapter = self.found.weights, self.found.adapter
        return {
            "name": self.found.name,
            "weights": f"{base.name}@{base.commit}" if base.commit else records.sha256_of(Path(base.path)),
            "adapter": records.sha256_of(adapter) if adapter else None,
            "tokenizer": sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "quantization": self.found.quantization,
            "dtype": self.found.dtype,
            "device": records.hardware(1)["device"],
        }

    def identity(self, definition: harness.Definition, local: LocalRows | None) -> dict[str, Any]:
        """All that the answers depend on."""
        settings = self.settings
        template = sha256(self.tokenizer.chat_template.encode()).hexdigest() if settings.chat else None
        return {
            "task": definition.name,
            "version": definition.version,
            "harness": harness.harness_version(),
            "model": {key: value for key, value in self.model.items() if key != "name"},
            "files": dict(local.files) if local else None,
            "limit": settings.limit,
            "chat": template,
            "batch": settings.requests_at_once,
        }


def evaluate(
    found: Found,
    suites: Sequence[str],
    folder: Path,
    *,
    settings: Settings = Settings(),
    trained_on: TrainingData,
    watcher: Watcher | None = None,
) -> list[scores.Results]:
    """Asks a model some suites (or single tasks of the harness) and writes the results of each below `folder`.

    What was asked before in the same way is not asked again, and a task that was interrupted goes on.

    Raises:
        UsageError: a suite or task that does not exist.
        ModelError: a model without chat template when one is asked for, one that cannot be loaded; a benchmark file that
            is missing; items that the Hub does not give; memory that does not do.
        SourceError: a benchmark file that cannot be read.
    """
    watcher = watcher or Watcher()
    wanted = expand(suites)
    names = list(dict.fromkeys(task for suite in wanted for task in suite.tasks))
    definitions = harness.definitions(names)
    asked = _Asked(found, settings, watcher)
    local, left_out = _items(names, settings.data)
    done: dict[str, dict[str, Any]] = {}
    waiting = [name for name in names if name not in left_out]
    for note in dict.fromkeys([*left_out.values(), *(rows.note for rows in local.values() if rows.note)]):
        watcher.note(note)
    results = []
    for suite in wanted:
        for name in suite.tasks:
            if name in waiting and name not in done:
                watcher.task(name, len(done) + 1, len(waiting))
                done[name] = _task(asked, definitions[name], local.get(name), folder)
        results.append(_results(asked, suite, done, left_out, trained_on))
        records.write_json(folder / f"{suite.name}.json", results[-1])
    return results


def check(suites: Sequence[str], data: Path | None) -> None:
    """Whether suites can be asked, before something long begins. Raises as `evaluate` does for names and benchmark files."""
    names = [task for suite in expand(suites) for task in suite.tasks]
    harness.definitions(names)
    _items(names, data)


def _items(names: Sequence[str], data: Path | None) -> tuple[dict[str, LocalRows], dict[str, str]]:
    """The local rows of the tasks, read before anything is asked, and why others are left out."""
    local: dict[str, LocalRows] = {}
    left_out: dict[str, str] = {}
    if data is None:
        return local, left_out
    for name in names:
        try:
            local[name] = local_rows(name, data)
        except UnlikeTheHubError as error:
            left_out[name] = str(error)
    if left_out and not local:
        raise ModelError(next(iter(left_out.values())))
    return local, left_out


def _task(asked: _Asked, definition: harness.Definition, local: LocalRows | None, folder: Path) -> dict[str, Any]:
    """A task in results: from its record, or asked now."""
    identity = asked.identity(definition, local)
    text = json.dumps(identity, sort_keys=True)
    stem = f"{definition.name}-{sha256(text.encode()).hexdigest()[:12]}"
    path = folder / "tasks" / f"{stem}.json"
    if path.is_file() and (record := records.read_json(path)) and record.get("asked") == identity:
        return record["score"]
    lm = asked.lm
    with _alone(path), closing(Journal(path.with_suffix(".jsonl"), text, asked.watcher.answered)) as journal:
        lm.remember(journal)
        with harness.loaded(definition, local) as task:
            answered = harness.ask(lm, task, limit=asked.settings.limit, chat=asked.settings.chat)
    score = {
        "version": definition.version,
        "fewshot": definition.fewshot,
        "n": answered.n,
        "of": answered.of,
        "seconds": round(journal.seconds, 3),
        "dataset": definition.dataset,
        "files": identity["files"],
        "counted": scores.label(scores.counted(answered.metrics)),
        "metrics": answered.metrics,
        "record": path.name,
    }
    records.write_json(path, {"asked": identity, "score": score, "items": answered.items})
    journal.path.unlink()
    return score


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """No other process asks this task meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.stem}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ModelError(
            f"Another process evaluates into {path.parent.parent}: wait for it, or give another --out."
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _results(
    asked: _Asked, suite: Suite, done: Mapping[str, Any], left_out: Mapping[str, str], trained_on: TrainingData
) -> dict[str, Any]:
    settings, mixture = asked.settings, trained_on.mixture
    tasks = {name: done[name] for name in suite.tasks if name in done}
    named = mixture and {"name": mixture.name, "version": mixture.version, "digest": mixture.digest}
    return {
        "format": scores.FORMAT,
        "suite": suite.name,
        "title": suite.title,
        "model": asked.model,
        "mixture": (asked.found.run or {}).get("mixture") or named,
        "training_data": trained_on.mark(suite),
        "harness": {"name": "lm-eval", "version": harness.harness_version()},
        "limit": settings.limit,
        "chat": settings.chat,
        "batch": settings.requests_at_once,
        "data": "hub" if settings.data is None else "local",
        "tasks": tasks,
        "left_out": {name: left_out[name] for name in suite.tasks if name in left_out},
        "average": scores.average(tasks, suite.averaged),
        "seconds": round(sum(task["seconds"] for task in tasks.values()), 3),
        "finished": records.now(),
    }
