"""`prefmix check` and `prefmix schema`: what a recipe asks for, and what it may say."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.options import override_option
from prefmix.cli.plans import plan_json, print_plan
from prefmix.cli.progress import run_beside
from prefmix.cli.screen import command_line, emit_json, err, say, say_next
from prefmix.errors import PrefmixError, Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from prefmix.benchmarks import Benchmark
    from prefmix.recipe import Decontaminate, Recipe
    from prefmix.sources import Source
    from prefmix.tokens import LoadedTokenizer


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

    if recipe is not None:
        named: dict[str, Any] = {name: source.format for name, source in recipe.sources.items()}
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
        plan = run_beside(lambda: plan_json(*_checked(recipe, overrides)))
    except RecipeError as error:
        if not as_json:
            raise
        problems = [{"key": p.key, "line": p.line, "message": p.message, "hint": p.hint} for p in error.problems]
        emit_json({"ok": False, "recipe": recipe, "problems": problems})
        raise click.exceptions.Exit(error.exit_code) from None
    if as_json:
        emit_json({"ok": True, "recipe": recipe, "problems": [], **plan})
        return
    print_plan(recipe, plan)
    build = command_line("build", recipe, overrides=overrides)
    say_next([(f"{build} --limit 100", "a first look at some rows"), (build, "all of it")])


def _checked(
    path: str, overrides: Sequence[str]
) -> tuple[Recipe, dict[str, Source], list[Benchmark], LoadedTokenizer | None]:
    """The recipe with its inputs found, or a RecipeError with everything that keeps it from being built.

    Its exit code is 1 where only inputs are at fault: files that are not there, a Hub out of reach.
    """
    recipe = read_recipe(path, overrides)
    from prefmix import benchmarks, sources, tokens
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
    measured: list[Benchmark] = []
    for key, asked in _benchmarks(recipe):
        try:
            measured += benchmarks.resolve(asked, recipe.root)
        except PrefmixError as error:
            problems.append(Problem(key, str(error).removeprefix(f"{key}: ")))
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
    return recipe, found, measured, tokenizer


def _benchmarks(recipe: Recipe) -> Iterator[tuple[str, Decontaminate]]:
    """Each benchmark of a recipe alone, with its key."""
    asked = recipe.decontaminate
    for name in asked.suites:
        yield "decontaminate.suites", asked.model_copy(update={"suites": [name], "against": {}})
    for name, table in asked.against.items():
        yield f"decontaminate.against.{name}", asked.model_copy(update={"suites": [], "against": {name: table}})


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


@click.command("schema")
@click.option("--out", "path", type=click.Path(dir_okay=False), metavar="FILE", help="Write it to a file.")
def schema_command(path: str | None) -> None:
    """Print the JSON Schema of recipes, for editors.

    An editor with a TOML extension that knows schemas (Taplo, Even Better TOML) completes and checks a recipe that
    begins with the line "#:schema FILE".
    """
    from prefmix.recipe import json_schema

    if path is None:
        emit_json(json_schema())
        return
    try:
        text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
        Path(path).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None
    say(f"wrote {path}", on=err())
