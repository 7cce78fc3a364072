"""`prefmix check` and `prefmix schema`: what a recipe asks for, and what it may say."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.progress import run_beside
from prefmix.cli.screen import emit_json, err, out
from prefmix.errors import PrefmixError, Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from prefmix.recipe import Filter, Recipe
    from prefmix.sources import Source
    from prefmix.tokens import LoadedTokenizer

_SHOWN_FILES = 4

override_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, as in filter.min_margin=1.0; may be given more than once.",
)


def read_recipe(path: str, overrides: Sequence[str]) -> Recipe:
    """`load_recipe`, with formats that nobody provides among the problems. Raises RecipeError."""
    from prefmix.recipe import load_recipe

    recipe, problems = None, ()
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        problems = error.problems
    problems += tuple(_unknown_formats(path, recipe))
    if recipe is None or problems:
        raise RecipeError(path, problems)
    return recipe


def _unknown_formats(path: str, recipe: Recipe | None) -> Iterator[Problem]:
    """A problem for each source whose format does not exist; of a recipe that is wrong, by what its file says."""
    from importlib.metadata import entry_points

    from prefmix.recipe.problems import nearest

    named: dict[str, Any] = {}
    if recipe is not None:
        named = {name: source.format for name, source in recipe.sources.items()}
    else:
        try:
            sources = tomllib.loads(Path(path).read_text(encoding="utf-8-sig")).get("sources")
        except (OSError, ValueError):  # which load_recipe has told
            return
        tables = sources if isinstance(sources, dict) else {}
        named = {name: table.get("format") for name, table in tables.items() if isinstance(table, dict)}
    if not any(isinstance(name, str) for name in named.values()):
        return
    from prefmix.sources import ENTRY_POINTS, FORMATS

    known = dict.fromkeys([*FORMATS, *(each.name for each in entry_points(group=ENTRY_POINTS))])
    for source, name in named.items():
        if isinstance(name, str) and name and name not in known:
            close = nearest(name, known)
            hint = f"did you mean `{close}`?" if close else f"there are: {', '.join(known)}"
            key = f"sources.{source}.format"
            yield Problem(key, f'no format is called "{name}"', _line(_lines(path), key), hint)


@click.command("check")
@click.argument("recipe", metavar="RECIPE", type=click.Path())
@override_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan, or the problems, as JSON.")
def check_command(recipe: str, overrides: Sequence[str], as_json: bool) -> None:
    """Check a recipe and say what a build would read.

    Every problem is told at once, with its line. A recipe without problems is answered with the plan: the files of each
    source, their format, the rows where files know them without being read, and the rules in force.
    """
    try:
        plan = run_beside(lambda progress: _plan(*_checked(recipe, overrides)), bars=not as_json)
    except RecipeError as error:
        if not as_json:
            raise
        problems = [{"key": p.key, "line": p.line, "message": p.message, "hint": p.hint} for p in error.problems]
        emit_json({"ok": False, "recipe": recipe, "problems": problems})
        raise click.exceptions.Exit(error.exit_code) from None
    if as_json:
        emit_json({"ok": True, "recipe": recipe, "problems": [], **plan})
        return
    from prefmix.cli.pages import next_page

    _print_plan(recipe, plan)
    sets = [word for override in overrides for word in ("--set", override)]
    build = shlex.join(["prefmix", "build", recipe, *sets])
    out().print(
        next_page([(f"{build} --limit 100", "a first look at some rows"), (build, "all of it")]), soft_wrap=True
    )


def _checked(path: str, overrides: Sequence[str]) -> tuple[Recipe, dict[str, Source], LoadedTokenizer | None]:
    """The recipe with its inputs found, or a RecipeError with everything that keeps it from being built.

    Its exit code is 1 where only inputs are at fault: files that are not there, a Hub out of reach.
    """
    recipe = read_recipe(path, overrides)
    from prefmix import sources, tokens
    from prefmix.plan import unsupported

    lines = _lines(path)
    refused = [text.partition(": ") for text in unsupported(recipe)]
    problems = [Problem(key, message) for key, _, message in refused]
    found: dict[str, Source] = {}
    for name, source in recipe.sources.items():
        try:
            found[name] = sources.resolve(name, source, recipe.root)
        except PrefmixError as error:
            problems.append(Problem(f"sources.{name}", str(error).removeprefix(f"source {name}: ")))
    settings, tokenizer = recipe.format, None
    if settings.tokenizer:
        try:
            tokenizer = tokens.load(settings.tokenizer, settings.tokenizer_revision, recipe.root)
        except PrefmixError as error:
            problems.append(Problem("format.tokenizer", str(error)))
    if problems:
        problems = [Problem(each.key, each.message, _line(lines, each.key)) for each in problems]
        error = RecipeError(path, problems)
        error.exit_code = RecipeError.exit_code if refused else PrefmixError.exit_code
        raise error
    return recipe, found, tokenizer


def _lines(path: str) -> dict[str, int]:
    """The lines of a recipe's keys, by dotted key."""
    from prefmix.recipe.toml_lines import key_lines

    keys = key_lines(Path(path).read_text(encoding="utf-8-sig"))
    return {".".join(map(str, key)): line for key, line in keys.items()}


def _line(lines: Mapping[str, int], key: str) -> int | None:
    """The line of a key, else of the nearest table around it that has one."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key)


def _plan(recipe: Recipe, found: Mapping[str, Source], tokenizer: LoadedTokenizer | None) -> dict[str, Any]:
    revisions = {name: source.revision for name, source in found.items() if source.revision}
    if tokenizer and tokenizer.revision:
        revisions["tokenizer"] = tokenizer.revision
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "recipe_digest": recipe.digest(revisions),
        "sources": {name: _source_plan(source) for name, source in found.items()},
        "filter": rules_in_force(recipe.filter),
        "dedupe": recipe.dedupe.model_dump(exclude={"near"}),
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


def _print_plan(path: str, plan: Mapping[str, Any]) -> None:
    from rich.text import Text

    from prefmix.cli.pages import Trimmed, grid, size

    sources = plan["sources"]
    rows = [entry["rows"] for entry in sources.values()]
    counts = [f"{len(sources)} source{'s' * (len(sources) != 1)}", f"{sum(rows):,} rows" if None not in rows else ""]
    many = ", ".join(part for part in (*counts, size(sum(entry["bytes"] for entry in sources.values()))) if part)
    out().print(Text.assemble((plan["name"], "bold"), f"  {path} can be built  ", (many, "dim")), soft_wrap=True)
    out().print()
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
    names = ", ".join(file["path"] for file in files[:_SHOWN_FILES])
    rest = len(files) - _SHOWN_FILES
    lines = [f"{hub}{names}{f' and {rest} more files' if rest > 0 else ''}"]
    lines += [f"where {entry['where']}"] if entry["where"] else []
    if (take := entry["take"]) is not None:
        lines.append(f"take {take:,} rows" if isinstance(take, int) else f"take {take:g} of the rows")
    return lines + ([f"repeat {entry['repeat']} times"] if entry["repeat"] > 1 else [])


def _settings(plan: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "filter", ""
    yield from ((f"  {action}", ", ".join(rules)) for action, rules in plan["filter"].items() if rules)
    dedupe = plan["dedupe"]
    exact = {"pair": "rows with equal contents", "prompt": "rows with equal prompts", "off": "off"}[dedupe["exact"]]
    cap = f"; at most {dedupe['prompt_cap']:,} pairs of one prompt" if dedupe["prompt_cap"] else ""
    yield "dedupe", f"{exact}{cap}{'; sft rows that repeat a pair' if dedupe['across'] else ''}"
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


@click.command("schema")
@click.option("--out", "path", type=click.Path(dir_okay=False), metavar="FILE", help="Write it to a file.")
def schema_command(path: str | None) -> None:
    """Print the JSON Schema of recipes, for editors.

    An editor with a TOML extension that knows schemas (Taplo, Even Better TOML) completes and checks a recipe that
    begins with the line "#:schema FILE".
    """
    from prefmix.recipe import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if path is None:
        click.echo(text, nl=False)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
    err().print(f"wrote {path}", soft_wrap=True, markup=False)
