"""The plan of a build: what `prefmix check` answers for a recipe without problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefmix.cli.screen import out, say

if TYPE_CHECKING:
    from prefmix.benchmarks import Benchmark
    from prefmix.recipe import Filter, Recipe
    from prefmix.sources import Source
    from prefmix.tokens import LoadedTokenizer

_SHOWN_FILES = 4


def plan_json(
    recipe: Recipe, found: Mapping[str, Source], benchmarks: Sequence[Benchmark], tokenizer: LoadedTokenizer | None
) -> dict[str, Any]:
    """The plan of a build, as `prefmix check --json` prints it."""
    from prefmix.plan import revisions

    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe_digest": recipe.digest(revisions(recipe, found, benchmarks, tokenizer)),
        "sources": {name: _source_plan(source) for name, source in found.items()},
        "filter": rules_in_force(recipe.filter),
        "decontaminate": {
            **recipe.decontaminate.model_dump(include={"ngram", "answers"}),
            "benchmarks": {
                each.name: {
                    "files": [file.name for section in each.sections for file in section.files],
                    "fields": each.fields,
                    "revisions": dict(each.revisions),
                }
                for each in benchmarks
            },
        },
        "dedupe": recipe.dedupe.model_dump(),
        "mix": recipe.mix.model_dump(),
        "splits": dict(recipe.splits),
        "format": recipe.format.model_dump(include={"template", "layout", "system"}),
        "tokenizer": tokenizer
        and {"name": tokenizer.name, "revision": tokenizer.revision, "added": list(tokenizer.added)},
    }


def _source_plan(source: Source) -> dict[str, Any]:
    spec = source.spec
    sizes = {each.name: each.path.stat().st_size for each in source.files}
    return {
        "format": source.format,
        "sniffed": source.sniffed,
        "kind": source.kind,
        **({"hub": spec.hub} if spec.hub else {"path": spec.path}),
        "revision": source.revision,
        "files": [{"path": name, "bytes": size} for name, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "rows": source.count_rows(),
        **spec.model_dump(include={"where", "take", "repeat"}),
    }


def rules_in_force(settings: Filter) -> dict[str, list[str]]:
    """The keys of [filter] by what they do: `drop`, `change`, `report`, `off`. A limit comes with its value."""
    rules: dict[str, list[str]] = {"drop": [], "change": [], "report": [], "off": []}
    values = settings.model_dump(exclude={"default"})
    for key, value in values.items():
        if value is None:
            rules["off"].append(key)
        elif value in ("drop", "report", "off") or value == []:
            rules[value or "off"].append(key)
        elif value in ("swap", "strip"):
            rules["change"].append(f"{key} ({value})")
        elif isinstance(value, dict):
            limits = [f"{part} {limit:,}" for part, limit in value.items() if limit is not None]
            rules["drop"].append(f"{key} ({', '.join(limits)})")
        else:
            rules["drop"].append(f"{key} ({', '.join(value) if isinstance(value, list) else f'{value:,}'})")
    return rules


def print_plan(path: str, plan: Mapping[str, Any]) -> None:
    """The plan as a page."""
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid, size

    sources = plan["sources"]
    rows = [entry["rows"] for entry in sources.values()]
    counts = [f"{len(sources)} source{'s' * (len(sources) != 1)}", f"{sum(rows):,} rows" if None not in rows else ""]
    many = ", ".join(part for part in (*counts, size(sum(entry["bytes"] for entry in sources.values()))) if part)
    say((plan["name"], "bold"), f"  {path} can be built  ", (many, "dim"))
    say()
    table = grid("source", "kind", "format", ">rows", ">size", header=True)
    origins, settings = grid("", "*"), grid("", "*")
    for name, entry in sources.items():
        count = "" if entry["rows"] is None else f"{entry['rows']:,}"
        format_ = Text.assemble(entry["format"], (" (from its columns)" if entry["sniffed"] else "", "dim"))
        table.add_row(Text(name), entry["kind"], format_, count, size(entry["bytes"]))
        origins.add_row(Text(name), Text("\n".join(_origin(entry)), "dim"))
    for heading, text in _settings(plan):
        off = "dim" if heading == "  off" else ""
        settings.add_row(Text(heading, off), Text(text, off))
    for page in (table, "", origins, "", settings):
        out().print(page if isinstance(page, str) else Trimmed(page))


def _origin(entry: Mapping[str, Any]) -> list[str]:
    """What is read, line by line: the first files, and the keys that leave rows out or repeat them."""
    files = entry["files"]
    hub = f"{entry['hub']} at {entry['revision'][:12]}: " if entry.get("hub") else ""
    lines = [f"{hub}{_first_files([file['path'] for file in files])}"]
    lines += [f"where {entry['where']}"] if entry["where"] else []
    if (take := entry["take"]) is not None:
        lines.append(f"take {take:,} rows" if isinstance(take, int) else f"take {take:g} of the rows")
    return lines + ([f"repeat {entry['repeat']} times"] if entry["repeat"] > 1 else [])


def _first_files(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN_FILES
    return ", ".join(names[:_SHOWN_FILES]) + (f" and {rest} more file{'s' * (rest > 1)}" if rest > 0 else "")


def _benchmark(entry: Mapping[str, Any]) -> str:
    """`truthfulqa/truthful_qa at 0123456789ab: question, best_answer`: where a benchmark is, and the fields with text."""
    commits = entry["revisions"]
    if len(commits) == 1:
        ((hub, commit),) = commits.items()
        where = f"{hub} at {commit[:12]}"
    else:
        where = f"{len(commits)} data sets on the Hub" if commits else _first_files(entry["files"])
    return f"{where}: {', '.join(entry['fields'])}"


def _settings(plan: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "filter", ""
    yield from ((f"  {action}", ", ".join(rules)) for action, rules in plan["filter"].items() if rules)
    if measured := plan["decontaminate"]["benchmarks"]:
        where = "prompts and answers" if plan["decontaminate"]["answers"] else "prompts"
        yield "decontaminate", f"{where} that hold text of"
        yield from ((f"  {name}", _benchmark(entry)) for name, entry in measured.items())
    dedupe = plan["dedupe"]
    exact = {"pair": "rows with equal contents", "prompt": "rows with equal prompts", "off": "off"}[dedupe["exact"]]
    cap = f"; at most {dedupe['prompt_cap']:,} pairs of one prompt" if dedupe["prompt_cap"] else ""
    near = dedupe["near"]
    alike = f"; near-duplicates by {near['on']}, Jaccard similarity from {near['threshold']:g}" if near else ""
    yield "dedupe", f"{exact}{cap}{alike}{'; sft rows that repeat a pair' if dedupe['across'] else ''}"
    yield "mix", "; ".join(_shares(plan["mix"])) or "everything that is kept"
    splits = {name: share for name, share in plan["splits"].items() if share}
    held_out = ", ".join(f"{name} {share:g}" for name, share in splits.items())
    yield "splits", f"{held_out}, the rest is train" if splits else "train only"
    format_, tokenizer = plan["format"], plan["tokenizer"]
    system = {"keep": "kept", "drop": "dropped"}.get(format_["system"], "kept, with a default where there is none")
    yield "format", f"{format_['template']}, {format_['layout']}, system messages {system}"
    if tokenizer is None:
        yield "tokens", "not counted: [format] names no tokenizer"
    else:
        at = f" at {tokenizer['revision'][:12]}" if tokenizer["revision"] else ""
        added = f"; {', '.join(tokenizer['added'])} added" if tokenizer["added"] else ""
        yield "tokens", f"{tokenizer['name']}{at}{added}"


def _shares(mix: Mapping[str, Any]) -> Iterable[str]:
    for kind in ("preference", "sft"):
        shares, rows = mix[kind], mix[f"{kind}_rows"]
        parts = [" : ".join(f"{name} {share:g}" for name, share in (shares or {}).items())]
        parts += [f"{rows:,} rows"] if rows else []
        if any(parts):
            yield f"{kind} {', '.join(part for part in parts if part)}"
