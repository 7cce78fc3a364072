"""What no single key of a recipe can tell: keys that exclude or need each other, names that must exist.

The checks read the raw data, right or wrong in other respects, so that every problem is reported at once: a value of
the wrong type is skipped here because its own key is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prefmix.recipe.problems import Finding, nearest
from prefmix.recipe.suites import holding, suites
from prefmix.recipe.toml_lines import KeyPath

SUBSETS = {"dpo": "preference", "sft": "sft"}
DPO_KEYS = ("beta", "loss", "loss_weights", "label_smoothing")
SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
SPLIT_NAMES_TAKEN = {"train": "it is the rest", "all": "`datasets` reads it as every split"}


def contradictions(recipe: dict[str, Any]) -> Iterator[Finding]:
    """Yields a finding for each contradiction in the data of a recipe."""
    sources = _table(recipe, "sources")
    for name, source in sources.items():
        yield from _one_origin(("sources", name), source)
        if name == "tokenizer" or name.startswith("against."):
            yield Finding(("sources", name), "this name is taken", "it names a revision in a resolved recipe")
    yield from _decontaminate(_table(recipe, "decontaminate"))
    yield from _filter(_table(recipe, "filter"), _table(recipe, "format"))
    yield from _format(_table(recipe, "format"))
    yield from _mix(_table(recipe, "mix"), sources)
    yield from _splits(_table(recipe, "splits"))
    yield from _train(_table(recipe, "train"))


def _table(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}


def _one_origin(path: KeyPath, table: Any) -> Iterator[Finding]:
    if not isinstance(table, dict):
        return
    if "hub" in table and "path" in table:
        yield Finding((*path, "path"), "either `hub` or `path`, not both")
    elif "hub" not in table:
        if "path" not in table and not any(nearest(key, ("hub", "path")) for key in table):
            yield Finding(path, "needs `hub` or `path`")
        for key in ("revision", "config"):
            if key in table and "path" in table:
                yield Finding((*path, key), "has a meaning only with `hub`")


def _decontaminate(table: dict[str, Any]) -> Iterator[Finding]:
    against, names = _table(table, "against"), table.get("suites")
    for name, benchmark in against.items():
        path: KeyPath = ("decontaminate", "against", name)
        yield from _one_origin(path, benchmark)
        if isinstance(benchmark, dict) and {"hub", "config"} <= benchmark.keys() and "split" not in benchmark:
            yield Finding((*path, "config"), "needs `split`")
    names = names if isinstance(names, list) else []
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            continue
        path = ("decontaminate", "suites", index)
        if name not in (known := suites()):
            if close := nearest(name, known):
                hint = f'did you mean "{close}"?'
            else:
                holder = holding(name)
                hint = f'it is part of "{holder}"' if holder else f"suites: {', '.join(known)}"
            yield Finding(path, f'no suite is called "{name}"', hint)
        elif name in names[:index]:
            yield Finding(path, "a suite is named twice")
        elif name in against:
            yield Finding(("decontaminate", "against", name), "this name is taken", "`suites` has it too")


def _filter(rules: dict[str, Any], format_: dict[str, Any]) -> Iterator[Finding]:
    for key in ("max_prompt_tokens", "max_answer_tokens", "max_tokens"):
        if key in rules and "tokenizer" not in format_:
            yield Finding(("filter", key), "needs a tokenizer to count with", 'name one: [format] tokenizer = "..."')
    least, most = (
        {"answer": value} if type(value) is int else value if isinstance(value, dict) else {}
        for value in (rules.get("min_chars"), rules.get("max_chars"))
    )
    for part in ("prompt", "answer", "total"):
        low, high = least.get(part), most.get(part)
        if type(low) is int and type(high) is int and low > high:
            yield Finding(("filter", "min_chars"), f"above `max_chars`: no {part} has {low} to {high} characters")


def _format(format_: dict[str, Any]) -> Iterator[Finding]:
    if "tokenizer_revision" in format_ and "tokenizer" not in format_:
        yield Finding(("format", "tokenizer_revision"), "has a meaning only with `tokenizer`")


def _mix(mix: dict[str, Any], sources: dict[str, Any]) -> Iterator[Finding]:
    for kind in ("preference", "sft"):
        shares = mix.get(kind)
        if not isinstance(shares, dict):
            continue
        for name in shares:
            if sources and name not in sources:
                close = nearest(name, sources)
                hint = f"did you mean `{close}`?" if close else f"sources: {', '.join(sources)}"
                yield Finding(("mix", kind, name), f"no source is called `{name}`", hint)
        if all(share == 0 for share in shares.values()):
            yield Finding(("mix", kind), "needs a share above 0")


def _splits(splits: dict[str, Any]) -> Iterator[Finding]:
    for name in splits:
        if why := SPLIT_NAMES_TAKEN.get(name):
            yield Finding(("splits", name), "this name is taken", why)
    shares = [share for share in splits.values() if type(share) in (int, float) and share >= 0]
    if len(shares) == len(splits) > 1 and max(shares) < 1 <= sum(shares):
        yield Finding(("splits",), f"the shares add up to {sum(shares):g} and leave nothing for train")


def _train(train: dict[str, Any]) -> Iterator[Finding]:
    stages = train.get("stages")
    stages = stages if isinstance(stages, list) else []
    first: dict[str, int] = {}
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict):
            continue
        path: KeyPath = ("train", "stages", index)
        name = stage.get("name")
        if isinstance(name, str) and first.setdefault(name, index) != index:
            yield Finding((*path, "name"), f'an earlier stage is called "{name}" too')
        method, subset = stage.get("method"), stage.get("subset")
        reads = SUBSETS.get(method) if isinstance(method, str) else None
        if reads and subset != reads and subset in SUBSETS.values():
            yield Finding((*path, "subset"), f"{method} reads the {reads} subset")
        if method == "sft":
            yield from (Finding((*path, key), "only dpo stages have it") for key in DPO_KEYS if key in stage)
        elif method == "dpo":
            if "if_needed" in stage:
                yield Finding((*path, "if_needed"), "only sft stages have it")
            yield from _losses(path, stage)
    if train.get("adapter") == "none":
        if train.get("quantization", "nf4") == "nf4":
            yield Finding(("train", "adapter"), "weights in 4 bits cannot be trained", 'set quantization = "none"')
        if "lora" in train:
            yield Finding(("train", "lora"), 'has no meaning with `adapter = "none"`')
    repairs = any(isinstance(stage, dict) and stage.get("if_needed") is True for stage in stages)
    if _table(train, "eos").get("on_fail") == "repair" and not repairs:
        yield Finding(("train", "eos", "on_fail"), "no sft stage is marked `if_needed = true`", 'or: "warn", "stop"')


def _losses(path: KeyPath, stage: dict[str, Any]) -> Iterator[Finding]:
    losses, weights = stage.get("loss", "sigmoid"), stage.get("loss_weights")
    losses = losses if isinstance(losses, list) else [losses]
    if isinstance(weights, list) and len(weights) != len(losses):
        yield Finding((*path, "loss_weights"), f"{len(weights)} weights for {len(losses)} losses")
    if len({str(loss) for loss in losses}) < len(losses):
        yield Finding((*path, "loss"), "a loss is named twice", "give it a larger weight")
    smoothing = stage.get("label_smoothing", 0)
    if type(smoothing) in (int, float) and smoothing > 0 and not set(map(str, losses)) & set(SMOOTHED_LOSSES):
        yield Finding((*path, "label_smoothing"), "the loss does not read it", f"{', '.join(SMOOTHED_LOSSES)} do")
    if "exo_pair" in losses and smoothing == 0:
        yield Finding((*path, "loss"), "exo_pair needs `label_smoothing` above 0", "its paper has 1e-3")
