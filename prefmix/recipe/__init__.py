"""The recipe: what a mixture is made of and how, written in TOML, checked at the door, frozen from there on.

model       the keys, with their limits, defaults and meanings
load        a file and its overrides -> a Recipe, or every problem with its line
checks      keys that exclude or need each other
suites      the benchmarks that have a name
problems    pydantic's errors in words
toml_lines  the lines of keys, `--set a.b=c`
reference   the JSON Schema and the documentation's tables
"""

from prefmix.recipe.load import load_recipe, shipped_recipes
from prefmix.recipe.model import (
    Against,
    Chars,
    Decontaminate,
    Dedupe,
    DpoStage,
    Eos,
    Filter,
    Format,
    Lora,
    Mix,
    Near,
    Recipe,
    SftStage,
    Source,
    Stage,
    Train,
    portable,
)
from prefmix.recipe.reference import json_schema, reference_markdown

__all__ = [
    "Against",
    "Chars",
    "Decontaminate",
    "Dedupe",
    "DpoStage",
    "Eos",
    "Filter",
    "Format",
    "Lora",
    "Mix",
    "Near",
    "Recipe",
    "SftStage",
    "Source",
    "Stage",
    "Train",
    "json_schema",
    "load_recipe",
    "portable",
    "reference_markdown",
    "shipped_recipes",
]
