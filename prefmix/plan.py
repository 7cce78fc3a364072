"""What a recipe needs, found: its files, the revisions on the Hub, its benchmarks, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import polars as pl

from prefmix import benchmarks, chatml, files, sources, tokens
from prefmix.benchmarks import Benchmark
from prefmix.errors import UsageError
from prefmix.recipe import Recipe
from prefmix.sources import Source


@dataclass(frozen=True)
class Plan:
    """A recipe with its inputs found: files, revisions, benchmarks, tokenizer. Nothing of the data has been read yet."""

    recipe: Recipe
    sources: Mapping[str, Source]
    benchmarks: Sequence[Benchmark]
    tokenizer: tokens.LoadedTokenizer | None
    fingerprints: Mapping[str, list[tuple[str, str]]]

    @property
    def revisions(self) -> dict[str, str]:
        return revisions(self.recipe, self.sources, self.benchmarks, self.tokenizer)

    @property
    def recipe_digest(self) -> str:
        return self.recipe.digest(self.revisions)

    @property
    def fingerprint(self) -> str:
        """64 hex digits over the content of every input file."""
        contents = {name: sorted(files) for name, files in self.fingerprints.items()}
        return sha256(json.dumps(contents).encode()).hexdigest()


def revisions(
    recipe: Recipe,
    found: Mapping[str, Source],
    measured: Sequence[Benchmark],
    tokenizer: tokens.LoadedTokenizer | None,
) -> dict[str, str]:
    """The commits that the revisions of a recipe mean, as its digest takes them."""
    commits = {name: source.revision for name, source in found.items() if source.revision}
    against = recipe.decontaminate.against
    for benchmark in measured:
        if benchmark.name in against and benchmark.revisions:
            commits[f"against.{benchmark.name}"] = benchmark.revisions[against[benchmark.name].hub or ""]
    return commits | ({"tokenizer": tokenizer.revision} if tokenizer and tokenizer.revision else {})


def plan(recipe: Recipe) -> Plan:
    """Finds every input of a recipe: files, revisions on the Hub, the tokenizer."""
    if refused := unsupported(recipe):
        raise UsageError("\n".join(refused))
    found = {name: sources.resolve(name, source, recipe.root) for name, source in recipe.sources.items()}
    measured = benchmarks.resolve(recipe.decontaminate, recipe.root)
    settings = recipe.format
    tokenizer = (
        tokens.load(settings.tokenizer, settings.tokenizer_revision, recipe.root) if settings.tokenizer else None
    )
    fingerprints = {name: source.fingerprints() for name, source in found.items()}
    fingerprints |= {each.table: each.fingerprints() for each in measured}
    for name, source in found.items():
        if source.excluded:
            fingerprints[f"sources.{name}.exclude"] = [(source.excluded.name, files.fingerprint(source.excluded.path))]
    if tokenizer:
        fingerprints["format.tokenizer"] = [("tokenizer.json", tokenizer.sha256)]
    return Plan(recipe, found, measured, tokenizer, fingerprints)


def unsupported(recipe: Recipe) -> list[str]:
    """What a valid recipe asks for that this version of prefmix cannot do, by name; empty for one that can be built."""
    found = []
    if pl.select(pl.lit(recipe.format.system).str.contains(chatml.SPECIAL_TOKENS)).item():
        found.append("format.system: the default system message holds a special token of a chat template.")
    return found
