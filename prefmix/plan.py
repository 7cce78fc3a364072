"""What a recipe needs, found: its files, the revisions on the Hub, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import polars as pl

from prefmix import chatml, files, sources, tokens
from prefmix.errors import UsageError
from prefmix.recipe import Recipe
from prefmix.sources import Source


@dataclass(frozen=True)
class Plan:
    """A recipe with its inputs found: files, revisions, tokenizer. Nothing of the data has been read yet."""

    recipe: Recipe
    sources: Mapping[str, Source]
    tokenizer: tokens.LoadedTokenizer | None
    fingerprints: Mapping[str, list[tuple[str, str]]]

    @property
    def revisions(self) -> dict[str, str]:
        found = {name: source.revision for name, source in self.sources.items() if source.revision}
        return found | ({"tokenizer": self.tokenizer.revision} if self.tokenizer and self.tokenizer.revision else {})

    @property
    def recipe_digest(self) -> str:
        return self.recipe.digest(self.revisions)

    @property
    def fingerprint(self) -> str:
        """64 hex digits over the content of every input file."""
        contents = {name: sorted(files) for name, files in self.fingerprints.items()}
        return sha256(json.dumps(contents).encode()).hexdigest()


def plan(recipe: Recipe) -> Plan:
    """Finds every input of a recipe: files, revisions on the Hub, the tokenizer."""
    if refused := unsupported(recipe):
        raise UsageError("\n".join(refused))
    found = {name: sources.resolve(name, source, recipe.root) for name, source in recipe.sources.items()}
    settings = recipe.format
    tokenizer = (
        tokens.load(settings.tokenizer, settings.tokenizer_revision, recipe.root) if settings.tokenizer else None
    )
    fingerprints = {name: source.fingerprints() for name, source in found.items()}
    for name, source in recipe.sources.items():
        if source.exclude:
            fingerprints[f"sources.{name}.exclude"] = [
                (source.exclude, files.fingerprint(recipe.root / source.exclude))
            ]
    if tokenizer:
        fingerprints["format.tokenizer"] = [("tokenizer.json", tokenizer.sha256)]
    return Plan(recipe, found, tokenizer, fingerprints)


def unsupported(recipe: Recipe) -> list[str]:
    """What a valid recipe asks for that this version of prefmix cannot do, by name; empty for one that can be built."""
    found = []
    if recipe.dedupe.near is not None:
        found.append("dedupe.near: near-duplicates are not part of this version of prefmix. Remove the key to build.")
    if recipe.decontaminate.suites or recipe.decontaminate.against:
        found.append("decontaminate: decontamination is not part of this version of prefmix. Remove its suites and "
                     "[decontaminate.against] to build.")  # fmt: skip
    if pl.select(pl.lit(recipe.format.system).str.contains(chatml.SPECIAL_TOKENS)).item():
        found.append("format.system: the default system message holds a special token of a chat template.")
    return found
