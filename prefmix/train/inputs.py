"""What a run reads: the recipe's `[train]` and the mixture. Nothing here imports torch, so that what is wrong with either
is told before the seconds that its imports take."""

from __future__ import annotations

import tomllib
from pathlib import Path

from prefmix.errors import MixtureError, UsageError
from prefmix.mixture import Mixture
from prefmix.publish import open_mixture
from prefmix.recipe import Recipe, Train
from prefmix.store import Store


def settings_of(recipe: Recipe) -> Train:
    """The recipe's `[train]`. Raises UsageError when it has none."""
    if recipe.train is None:
        raise UsageError(f"{recipe.path or recipe.name} has no [train]: name a base model and at least one stage.")
    return recipe.train


def find_mixture(recipe: Recipe, reference: str | Path | None, store: str | Path | None) -> Mixture:
    """The mixture that is named (one on the Hub is pulled), else the last version that was built from this recipe.

    Raises MixtureError when there is none: it has to be built first; HubError.
    """
    if reference is not None:
        return open_mixture(reference, store)
    shelf = Store(store)
    for label in reversed(shelf.versions(recipe.name)):
        found = shelf.find(recipe.name, label)
        if recipe.digest(revisions_of(found)) == found.manifest["recipe_digest"]:
            return found
    raise MixtureError(
        f"No mixture of the store {shelf.place} was built from {recipe.path or 'this recipe'} as it is now. "
        f"Run `prefmix build` first, or name a mixture with --mixture."
    )


def revisions_of(mixture: Mixture) -> dict[str, str]:
    """The commits that a mixture's recipe was resolved to, as `Recipe.digest` takes them."""
    resolved = tomllib.loads((mixture.folder / "recipe.toml").read_text(encoding="utf-8"))
    against = resolved.get("decontaminate", {}).get("against", {})
    tables = {**resolved["sources"], **{f"against.{name}": table for name, table in against.items()}}
    found = {name: table["revision"] for name, table in tables.items() if "revision" in table}
    tokenizer = resolved.get("format", {}).get("tokenizer_revision")
    return found | ({"tokenizer": tokenizer} if tokenizer else {})
