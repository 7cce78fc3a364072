"""From a TOML file and its overrides to a Recipe, or to everything that is wrong with them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prefmix.errors import Problem, RecipeError
from prefmix.recipe.checks import contradictions
from prefmix.recipe.model import Recipe
from prefmix.recipe.problems import Finding, dotted, explain, nearest
from prefmix.recipe.toml_lines import KeyPath, key_lines, parse_override, set_value


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a TOML file; each override is `a.b=c`, its value TOML or else text.

    Raises RecipeError with everything that is wrong, each problem with its key and line (an override's problem names
    the override).
    """
    path = Path(path)
    text = _text(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(str(path), [_syntax_problem(str(error), text)]) from None
    lines = key_lines(text)
    set_by, problems = _override(data, overrides)
    findings: dict[KeyPath, Finding] = {}
    for finding in contradictions(data):
        findings.setdefault(finding.path, finding)
    if data.pop("path", None) is not None:
        findings[("path",)] = Finding(("path",), "unknown key", "a source has it: [sources.<name>]")
    folder = path.parent.resolve()
    root = data.get("root", ".")
    if isinstance(root, str):
        root = (folder / root).resolve()
    recipe = None
    try:
        recipe = Recipe.model_validate({**data, "root": root, "path": folder / path.name})
    except ValidationError as error:
        for finding in explain(error, Recipe.model_json_schema(), data):
            findings.setdefault(finding.path, finding)
    problems += [_problem(finding, lines, set_by) for finding in findings.values()]
    if recipe is None or problems:
        raise RecipeError(str(path), problems)
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with prefmix, by name: in the wheel, or in a checkout of the repository."""
    package = Path(__file__).parents[1]
    folders = (package / "data" / "recipes", package.parent / "recipes")
    return {path.stem: path for folder in folders[::-1] for path in sorted(folder.glob("*.toml"))}


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        shipped = shipped_recipes()
        hint = None
        if close := nearest(path.name, (file.name for file in path.parent.glob("*.toml")), cutoff=0.75):
            hint = f"did you mean {path.parent / close}?"
        elif close := nearest(path.stem, shipped, cutoff=0.75):
            hint = f"prefmix comes with {shipped[close]}"
        raise _unreadable(path, "no such file", hint) from None
    except IsADirectoryError:
        inside = ", ".join(sorted(file.name for file in path.glob("*.toml")))
        raise _unreadable(path, "a folder, not a recipe", f"it has {inside}" if inside else None) from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, "not UTF-8", "save it as UTF-8", data.count(b"\n", 0, error.start) + 1) from None


def _unreadable(path: Path, message: str, hint: str | None = None, line: int | None = None) -> RecipeError:
    return RecipeError(str(path), [Problem("", message, line, hint)])


def _syntax_problem(message: str, text: str) -> Problem:
    """tomllib's message, its line, and a hint for the most frequent mistake."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", message, re.DOTALL)
    what, line = (match[1], int(match[2] or text.rstrip().count("\n") + 1)) if match else (message, None)
    written = text.split("\n")[line - 1] if line else ""
    bare = re.fullmatch(r"\s*[\w.-]+\s*=\s*([A-Za-z][\w./-]*)\s*(?:#.*)?", written)
    return Problem("", what, line, f'text needs quotes: "{bare[1]}"' if bare else None)


def _override(data: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[KeyPath, str], list[Problem]]:
    """Writes the overrides into `data`; gives which override set which key, and the problems on the way."""
    set_by: dict[KeyPath, str] = {}
    problems = []
    for text in overrides:
        try:
            path, value = parse_override(text)
            set_by[set_value(data, path, value)] = text
        except ValueError as error:
            problems.append(Problem("", f"--set {text}: {error}"))
    return set_by, problems


def _problem(finding: Finding, lines: Mapping[KeyPath, int], set_by: Mapping[KeyPath, str]) -> Problem:
    """Adds where it comes from: the override that set the key or made its table, else the line of key or table."""
    path, key = finding.path, dotted(finding.path)
    table = next((path[:end] for end in range(1, len(path) + 1) if path[:end] not in lines), None)
    for at, text in reversed(list(set_by.items())):
        within = path[: len(at)] == at
        if within or (table and at[: len(table)] == table):
            hint = finding.hint or (_meant(table, lines) if table and not within else None)
            return Problem(key, f"--set {text}: {finding.message}", None, hint)
    while path and path not in lines:
        path = path[:-1]
    return Problem(key, finding.message, lines.get(path), finding.hint)


def _meant(table: KeyPath, lines: Mapping[KeyPath, int]) -> str | None:
    """For a table that only an override has, the table of the file that was probably meant."""
    beside = [str(other[-1]) for other in lines if other[:-1] == table[:-1]]
    close = nearest(str(table[-1]), beside)
    return f"did you mean {dotted((*table[:-1], close))}?" if close else None
