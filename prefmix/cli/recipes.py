"""Commands about recipes and what they can read: check, schema, sources, init."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.progress import run_beside
from prefmix.cli.screen import emit_json, err, out
from prefmix.errors import PrefmixError, Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from prefmix.recipe import Filter, Recipe
    from prefmix.sources import Source
    from prefmix.starter import Starter
    from prefmix.tokens import LoadedTokenizer

_SHOWN_FILES = 4


def read_recipe(path: str, overrides: Sequence[str]) -> Recipe:
    """`load_recipe`, with the formats that do not exist among the problems. Raises RecipeError."""
    from prefmix.recipe import load_recipe

    problems: tuple[Problem, ...] = ()
    recipe = None
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        problems = error.problems
    problems += tuple(_unknown_formats(path, recipe))
    if recipe is None or problems:
        raise RecipeError(path, problems)
    return recipe


def _unknown_formats(path: str, recipe: Recipe | None) -> Iterable[Problem]:
    """A problem for each source whose format nobody provides; by the text of the recipe where that is all there is."""
    from difflib import get_close_matches
    from importlib.metadata import entry_points

    from prefmix.recipe.toml_lines import key_lines

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        sources, lines = tomllib.loads(text).get("sources"), key_lines(text)
    except (OSError, ValueError):  # told by load_recipe
        return
    if recipe is not None:
        named = {name: source.format for name, source in recipe.sources.items()}
    else:
        tables = sources.items() if isinstance(sources, dict) else ()
        named = {name: table.get("format") for name, table in tables if isinstance(table, dict)}
    wanted = {name: value for name, value in named.items() if isinstance(value, str) and value}
    if not wanted:
        return
    from prefmix.sources import ENTRY_POINTS, FORMATS

    known = [*FORMATS, *(each.name for each in entry_points(group=ENTRY_POINTS) if each.name not in FORMATS)]
    for name, value in wanted.items():
        if value not in known:
            near = get_close_matches(value, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"
            line = lines.get(("sources", name, "format"))
            yield Problem(f"sources.{name}.format", f'no format is called "{value}"', line, hint)


@click.command("check")
@click.argument("recipe", metavar="RECIPE", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe, as in filter.min_margin=1.0. May be given more than once.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the plan, or the problems, as JSON.")
def check_command(recipe: str, overrides: Sequence[str], as_json: bool) -> None:
    """Check a recipe and say what a build would read.

    Every problem is told at once, with its line. A recipe without problems is answered with the plan: the files of each
    source, their format, the rows where files know them without being read, and the rules in force.
    """
    try:
        checked, sources, tokenizer = run_beside(lambda progress: _checked(recipe, overrides), bars=not as_json)
    except RecipeError as error:
        if not as_json:
            raise
        problems = [{"key": p.key, "line": p.line, "message": p.message, "hint": p.hint} for p in error.problems]
        emit_json({"ok": False, "recipe": recipe, "problems": problems})
        raise click.exceptions.Exit(error.exit_code) from None
    plan = _plan(checked, sources, tokenizer)
    if as_json:
        emit_json({"ok": True, "recipe": recipe, "problems": [], **plan})
    else:
        _print_plan(recipe, plan, shlex.join(_command("build", recipe, overrides)))


def _checked(path: str, overrides: Sequence[str]) -> tuple[Recipe, dict[str, Source], LoadedTokenizer | None]:
    """The recipe with its inputs found, or a RecipeError with everything that keeps it from being built.

    Its exit code is 1 where only inputs are at fault: files that are not there, a Hub out of reach.
    """
    recipe = read_recipe(path, overrides)
    from prefmix import sources, tokens
    from prefmix.build import unsupported

    lines = _lines(path)
    problems = []
    for text in unsupported(recipe):
        key, _, message = text.partition(": ")
        problems.append(Problem(key, message, _line(lines, key)))
    asks_too_much = bool(problems)
    found: dict[str, Source] = {}
    for name, source in recipe.sources.items():
        try:
            found[name] = sources.resolve(name, source, recipe.root)
        except PrefmixError as error:
            text = str(error).removeprefix(f"source {name}: ")
            problems.append(Problem(f"sources.{name}", text, _line(lines, f"sources.{name}")))
    settings, tokenizer = recipe.format, None
    if settings.tokenizer:
        try:
            tokenizer = tokens.load(settings.tokenizer, settings.tokenizer_revision, recipe.root)
        except PrefmixError as error:
            problems.append(Problem("format.tokenizer", str(error), _line(lines, "format.tokenizer")))
    if problems:
        error = RecipeError(path, problems)
        error.exit_code = RecipeError.exit_code if asks_too_much else PrefmixError.exit_code
        raise error
    return recipe, found, tokenizer


def _lines(path: str) -> dict[str, int]:
    """The lines of a recipe's keys, by dotted key."""
    from prefmix.recipe.toml_lines import key_lines

    keys = key_lines(Path(path).read_text(encoding="utf-8-sig"))
    return {".".join(map(str, key)): line for key, line in keys.items()}


def _line(lines: Mapping[str, int], key: str) -> int | None:
    """The line of a key, else of the nearest table that has one."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key)


def _plan(recipe: Recipe, found: Mapping[str, Source], tokenizer: LoadedTokenizer | None) -> dict[str, Any]:
    revisions = {name: source.revision for name, source in found.items() if source.revision}
    if tokenizer and tokenizer.revision:
        revisions["tokenizer"] = tokenizer.revision
    entries = {}
    for name, source in found.items():
        spec = source.spec
        files = [{"path": each.name, "bytes": each.path.stat().st_size} for each in source.files]
        origin = {"hub": spec.hub} if spec.hub else {"path": spec.path}
        entries[name] = {
            "format": source.format, "sniffed": source.sniffed, "kind": source.kind, **origin, "revision": source.revision,
            "files": files, "bytes": sum(each["bytes"] for each in files), "rows": source.count_rows(),
            "where": spec.where, "take": spec.take, "repeat": spec.repeat,
        }  # fmt: skip
    counted = tokenizer and {"name": tokenizer.name, "revision": tokenizer.revision, "added": list(tokenizer.added)}
    return {
        "name": recipe.name, "seed": recipe.seed, "recipe_digest": recipe.digest(revisions), "sources": entries,
        "filter": rules_in_force(recipe.filter), "dedupe": recipe.dedupe.model_dump(exclude={"near"}),
        "mix": recipe.mix.model_dump(), "splits": dict(recipe.splits),
        "format": recipe.format.model_dump(include={"template", "layout", "system"}), "tokenizer": counted,
    }  # fmt: skip


def rules_in_force(settings: Filter) -> dict[str, list[str]]:
    """The keys of [filter] by what they do: `drop`, `change`, `report`, `off`. A limit comes with its value."""
    rules: dict[str, list[str]] = {"drop": [], "change": [], "report": [], "off": []}
    for key in type(settings).model_fields:
        value = getattr(settings, key)
        if key == "default":
            continue
        if value in ("drop", "report", "off"):
            rules[value].append(key)
        elif value in ("swap", "strip"):
            rules["change"].append(f"{key} ({value})")
        elif value is None or value == []:
            rules["off"].append(key)
        else:
            shown = value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
            parts = ", ".join(f"{part} {limit:,}" for part, limit in shown.items()) if isinstance(shown, dict) else ""
            words = parts or (", ".join(shown) if isinstance(shown, list) else f"{shown:,}" if type(shown) is int else f"{shown:g}")
            rules["drop"].append(f"{key} ({words})")
    return rules


def _print_plan(path: str, plan: Mapping[str, Any], build: str) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    sources = plan["sources"]
    rows = [entry["rows"] for entry in sources.values()]
    counted = f", {sum(rows):,} rows" if None not in rows else ""
    many = f"{len(sources)} source{'s' * (len(sources) != 1)}{counted}, {size(sum(e['bytes'] for e in sources.values()))}"
    console.print(Text.assemble((plan["name"], "bold"), f"  {path} can be built  ", (many, "dim")), soft_wrap=True)
    console.print()
    table = grid("source", "kind", "format", ">rows", ">size", header=True)
    for name, entry in sources.items():
        count = "" if entry["rows"] is None else f"{entry['rows']:,}"
        how = " (from its columns)" if entry["sniffed"] else ""
        table.add_row(Text(name), entry["kind"], Text.assemble(entry["format"], (how, "dim")), count, size(entry["bytes"]))
    _print_trimmed(table)
    console.print()
    origins = grid("", "*")
    for name, entry in sources.items():
        origins.add_row(Text(name), Text("\n".join(_origin(entry)), "dim"))
    _print_trimmed(origins)
    console.print()
    settings = grid("", "*")
    for heading, text in _settings(plan):
        settings.add_row(Text(heading, "dim" if heading.startswith(" ") else ""), Text(text, "dim" if heading == "  off" else ""))
    _print_trimmed(settings)
    console.print()
    console.print(Text("Next:", "bold"))
    console.print(Text(f"  {build}"), soft_wrap=True)


def _print_trimmed(table: Table) -> None:
    from prefmix.cli.pages import Trimmed

    out().print(Trimmed(table))


def _origin(entry: Mapping[str, Any]) -> list[str]:
    """What is read, line by line: the first files, and the keys that leave rows out."""
    files = entry["files"]
    hub = f"{entry['hub']} at {entry['revision'][:12]}: " if entry.get("hub") else ""
    names = ", ".join(file["path"] for file in files[:_SHOWN_FILES])
    rest = len(files) - _SHOWN_FILES
    lines = [f"{hub}{names}{f' and {rest} more files' if rest > 0 else ''}"]
    lines += [f"where {entry['where']}"] if entry["where"] else []
    if (take := entry["take"]) is not None:
        lines.append(f"take {take:,} rows" if isinstance(take, int) else f"take {take:.1%} of the rows")
    return lines + ([f"repeat {entry['repeat']} times"] if entry["repeat"] > 1 else [])


def _settings(plan: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "filter", ""
    for action, rules in plan["filter"].items():
        if rules:
            yield f"  {action}", ", ".join(rules)
    dedupe = plan["dedupe"]
    exact = {"pair": "rows with equal contents", "prompt": "rows with equal prompts", "off": "off"}[dedupe["exact"]]
    cap = f"; at most {dedupe['prompt_cap']:,} pairs of one prompt" if dedupe["prompt_cap"] else ""
    yield "dedupe", f"{exact}{cap}{'; sft rows that repeat a pair' if dedupe['across'] else ''}"
    yield "mix", "; ".join(_shares(plan["mix"])) or "everything that is kept"
    splits = {name: share for name, share in plan["splits"].items() if share}
    held_out = ", ".join(f"{name} {share:.4g}" for name, share in splits.items())
    yield "splits", f"{held_out}, the rest is train" if splits else "train only"
    format_ = plan["format"]
    system = {"keep": "kept", "drop": "dropped"}.get(format_["system"], "kept, with a default")
    yield "format", f"{format_['template']}, {format_['layout']}, system messages {system}"
    tokenizer = plan["tokenizer"]
    if tokenizer:
        at = f" at {tokenizer['revision'][:12]}" if tokenizer["revision"] else ""
        added = f"; {', '.join(tokenizer['added'])} counted as added" if tokenizer["added"] else ""
        yield "tokens", f"{tokenizer['name']}{at}{added}"
    else:
        yield "tokens", "not counted: no [format] tokenizer"


def _shares(mix: Mapping[str, Any]) -> Iterable[str]:
    for kind in ("preference", "sft"):
        shares, rows = mix[kind], mix[f"{kind}_rows"]
        if shares or rows:
            named = " : ".join(f"{name} {share:g}" for name, share in (shares or {}).items())
            total = f"{rows:,} rows" if rows else ""
            yield f"{kind} {', '.join(part for part in (named, total) if part)}"


def size(count: int) -> str:
    """Bytes as `512 B`, `29.1 kB`, `8.7 MB`."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB"]
    while value >= 999.95 and len(units) > 1:
        value, _ = value / 1000, units.pop(0)
    return f"{value:,.1f} {units[0]}"


def _command(command: str, recipe: str, overrides: Sequence[str]) -> list[str]:
    return ["prefmix", command, recipe, *(word for override in overrides for word in ("--set", override))]


@click.command("schema")
@click.option("--out", "path", type=click.Path(dir_okay=False), metavar="FILE", help="Write it to a file.")
def schema_command(path: str | None) -> None:
    """Print the JSON Schema of recipes, for editors.

    Editors that know TOML schemas check and complete a recipe that begins with the line `#:schema FILE`.
    """
    from prefmix.recipe import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if path is None:
        click.echo(text, nl=False)
    else:
        _write(Path(path), text)
        err().print(f"wrote {path}", soft_wrap=True, markup=False)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None


@click.command("sources")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the formats as JSON.")
def sources_command(name: str | None, as_json: bool) -> None:
    """List the formats that can be read, or show the data card of one.

    NAME is a format, a data set on the Hub such as Intel/orca_dpo_pairs, or a data card.
    """
    from prefmix.starter import data_cards

    formats = _formats()
    if name is None:
        if as_json:
            emit_json(list(formats.values()))
        else:
            _print_formats(formats)
        return
    cards = data_cards()
    chosen = [each for each in cards if name in (each.name, *each.hub)] or [each for each in cards if name in each.formats]
    named = [formats[name]] if name in formats else [formats[each] for card in chosen for each in card.formats if each in formats]
    if not named and not chosen:
        from prefmix.recipe.problems import nearest

        there = list(dict.fromkeys([*formats, *(each.name for each in cards), *(hub for each in cards for hub in each.hub)]))
        near = nearest(name, there)
        hint = f"Did you mean {near}?" if near else f"There are: {', '.join(there)}."
        raise UsageError(f'no format and no data card is called "{name}". {hint}')
    if as_json:
        emit_json({"formats": named, "cards": [{"name": each.name, "hub": list(each.hub), "text": each.text} for each in chosen]})
        return
    for entry in named:
        _print_format(entry)
    for card in chosen:
        _print_card(card.text)


def _formats() -> dict[str, dict[str, Any]]:
    """Every format by name: what it is, the layouts it comes in, its options (all values, the default first)."""
    from prefmix.sources import FORMATS, layouts
    from prefmix.sources.layout import describe

    found = {}
    for name, each in FORMATS.items():
        shapes = [
            {
                "kind": layout.kind,
                "columns": {column: describe(dtype) for column, dtype in layout.columns.items()},
                "optional": {column: describe(dtype) for column, dtype in layout.optional.items()},
            }
            for layout in layouts(each)
        ]
        options = {key: list(value) if isinstance(value, tuple) else value for key, value in each.OPTIONS.items()}
        kinds = sorted({shape["kind"] for shape in shapes})
        found[name] = {"name": name, "description": each.DESCRIPTION, "kinds": kinds, "layouts": shapes, "options": options}
    return found


def _print_formats(formats: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    table = grid("format", "kind", "*columns", header=True)
    for name, entry in formats.items():
        first, others = entry["layouts"][0], len(entry["layouts"]) - 1
        columns = Text(", ".join(first["columns"]))
        if first["optional"]:
            columns.append(f" ({', '.join(first['optional'])})", "dim")
        if others:
            columns.append(f" and {others} other form{'s' * (others > 1)}", "dim")
        table.add_row(Text(name, "bold"), " or ".join(entry["kinds"]), columns)
    _print_trimmed(table)
    console.print()
    console.print(Text("Optional columns are in brackets. A source that names no format gets the one that fits its columns.", "dim"))
    console.print()
    console.print(Text("Next:", "bold"))
    console.print(Text("  prefmix sources orca_dpo_pairs"), soft_wrap=True)


def _print_format(entry: Mapping[str, Any]) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    console.print(Text.assemble((entry["name"], "bold"), "  ", entry["description"]))
    console.print()
    table = grid("kind", "column", "*type", "", header=True)
    for shape in entry["layouts"]:
        kind = shape["kind"]
        for needed, columns in ((True, shape["columns"]), (False, shape["optional"])):
            for column, words in columns.items():
                table.add_row(kind, Text(column), Text(words, "dim"), "" if needed else Text("optional", "dim"))
                kind = ""
        table.add_section()
    _print_trimmed(table)
    for key, values in entry["options"].items():
        shown = " or ".join(f'"{value}"' for value in values) if isinstance(values, list) else repr(values)
        console.print(Text.assemble("option  ", (key, "bold"), f" = {shown}", ("  (the first is the default)", "dim")))
    console.print()


def _print_card(text: str) -> None:
    """A data card: laid out on a terminal, as it is elsewhere."""
    console = out()
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        click.echo(text)


@click.command("init")
@click.argument("data", nargs=-1)
@click.option("--recipe", "shipped", metavar="NAME", help="Copy a recipe that comes with prefmix (quickstart with its data).")
@click.option("--out", "path", type=click.Path(dir_okay=False), metavar="FILE", help="The recipe to write; else <name>.toml here.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def init_command(data: Sequence[str], shipped: str | None, path: str | None, force: bool, quiet: bool) -> None:
    """Write a starter recipe for data files, or copy a shipped recipe.

    DATA are files, folders, glob patterns or data sets on the Hub (owner/name). Their formats are found from their
    columns. Without DATA the data files of the current folder and of data/ in it are taken.
    """
    if shipped is not None:
        if data:
            raise UsageError("either DATA or --recipe, not both.")
        _copy_recipe(shipped, path, force, quiet)
        return
    folder, name = (Path(path).parent, Path(path).stem) if path else (Path(), None)
    starter = run_beside(lambda progress: _starter(data, folder, name), bars=not quiet)
    target = Path(path) if path else folder / f"{starter.name}.toml"
    _refuse_existing([target], force)
    _write(target, starter.text)
    if not quiet:
        _say_starter(target, starter)


def _starter(data: Sequence[str], folder: Path, name: str | None) -> Starter:
    from prefmix.starter import starter_recipe

    return starter_recipe(data, folder, name)


def _say_starter(target: Path, starter: Starter) -> None:
    from rich.text import Text

    from prefmix.cli.pages import grid

    console = out()
    count = len(starter.found)
    console.print(Text.assemble(("wrote ", "dim"), (str(target), "bold"), (f"  {count} source{'s' * (count != 1)}", "dim")), soft_wrap=True)
    table = grid("", "", "", ">", ">", "*")
    for each in starter.found:
        rows = each.source.count_rows()
        origin = each.origin.get("hub") or each.origin["path"]
        where = origin if isinstance(origin, str) else ", ".join(origin)
        cells = ("" if rows is None else f"{rows:,} rows", size(each.bytes), Text(where, "dim"))
        table.add_row(Text(f"  {each.name}"), each.source.format, Text(each.source.kind, "dim"), *cells)
    _print_trimmed(table)
    for left in starter.left_out:
        err().print(Text.assemble(("warning: ", "bold yellow"), f"left out: {left.reason}"), soft_wrap=True)
    for each in (each for each in starter.found if each.beside):
        text = f"left aside, because they are other splits: {', '.join(each.beside)}"
        err().print(Text.assemble(("note: ", "bold"), text), soft_wrap=True)
    _say_next(target)


def _say_next(target: Path) -> None:
    from rich.text import Text

    console = out()
    quoted = shlex.quote(str(target))
    console.print()
    console.print(Text("Next:", "bold"))
    for command in (f"prefmix check {quoted}", f"prefmix build {quoted} --limit 100", f"prefmix build {quoted}"):
        console.print(Text(f"  {command}"), soft_wrap=True)


def _copy_recipe(name: str, path: str | None, force: bool, quiet: bool) -> None:
    """Copies a shipped recipe, with the data that it has beside it, to `path` or the current folder."""
    import shutil

    from prefmix.starter import shipped_files

    target = Path(path) if path else Path(f"{name}.toml")
    copies = {target if place == f"{name}.toml" else target.parent / place: file for place, file in shipped_files(name).items()}
    _refuse_existing(list(copies), force)
    for place, file in copies.items():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        except OSError as error:
            raise UsageError(f"{place} cannot be written: {error.strerror}.") from None
    if not quiet:
        from rich.text import Text

        data = f" and its data, {len(copies) - 1} files in {target.parent / name}/" if len(copies) > 1 else ""
        out().print(Text.assemble(("wrote ", "dim"), (str(target), "bold"), data), soft_wrap=True)
        _say_next(target)


def _refuse_existing(targets: Sequence[Path], force: bool) -> None:
    there = [str(target) for target in targets if target.exists()]
    if there and not force:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(f"{there[0]}{more} is there already. Give --out another name, or --force to overwrite.")
