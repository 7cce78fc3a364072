"""What the recipe's model says about itself: a JSON Schema for editors, tables of keys for the documentation."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from prefmix.recipe.model import Recipe
from prefmix.recipe.problems import Schema, alternatives_of, expected, inlined, merged, shown, tables


class _WithoutTitles(GenerateJsonSchema):
    """Pydantic's titles repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> Schema:
    """JSON Schema (draft 2020-12) of a recipe, with descriptions. Contradictions between keys are beyond it."""
    schema = Recipe.model_json_schema(schema_generator=_WithoutTitles)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "prefmix recipe"}


def reference_markdown() -> str:
    """A table of keys for each table of a recipe: key, value, default, meaning."""
    schema = inlined(json_schema())
    sections: dict[str, list[str]] = {}
    for header, alternatives in tables(schema):
        heading = f"### `{header}`" if header else "### Top level"
        sections.setdefault(_section(alternatives), []).append(heading)
    return "\n".join(f"{_heading(headings)}\n\n{body}" for body, headings in sections.items())


def _heading(headings: list[str]) -> str:
    """One heading for tables that are alike."""
    return ", ".join([headings[0], *(heading.removeprefix("### ") for heading in headings[1:])])


def _section(alternatives: list[Schema]) -> str:
    rows = []
    for key, value in merged(alternatives).items():
        holders = [member for member in alternatives if key in member["properties"]]
        if all(any(tables(member, "inner")) for member in alternatives_of(value)):
            continue  # a section of its own
        meaning = value["description"].replace("|", "\\|")
        if len(holders) < len(alternatives):
            meaning = f"({', '.join(member['properties']['method']['const'] for member in holders)}) {meaning}"
        defaults = dict.fromkeys(_default(key, member) for member in holders)
        rows.append(f"| `{key}` | {expected(value).replace('|', chr(92) + '|')} | {' / '.join(defaults)} | {meaning} |")
    texts = [member["description"] for member in alternatives]
    if len(alternatives) > 1:
        texts = [f"`{member['properties']['method']['const']}`: {member['description']}" for member in alternatives]
    return "\n".join(
        ["\n\n".join(texts), "", "| key | value | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    )


def _default(key: str, table: Schema) -> str:
    if key in table.get("required", []):
        return "required"
    default = table["properties"][key].get("default")
    if default is None:
        return ""
    if isinstance(default, dict):
        return f"`{{ {', '.join(f'{key} = {shown(item)}' for key, item in default.items())} }}`" if default else "`{}`"
    return f"`{shown(default)}`"
