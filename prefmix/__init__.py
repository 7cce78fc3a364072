"""prefmix: preference and SFT data sets, curated into versioned, explainable mixtures.

mixture = prefmix.build("recipe.toml")
mixture.scan("preference", "train")     # a Polars LazyFrame
mixture.dataset_dict("preference")      # a datasets.DatasetDict
mixture.drops                           # why rows are not in it
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefmix.build import build
    from prefmix.errors import PrefmixError
    from prefmix.mixture import Mixture
    from prefmix.recipe import Recipe, load_recipe
    from prefmix.store import open_mixture

__version__ = version("prefmix")
__all__ = ["Mixture", "PrefmixError", "Recipe", "__version__", "build", "load_recipe", "open_mixture"]

_HOMES = {
    "build": "prefmix.build",
    "PrefmixError": "prefmix.errors",
    "Mixture": "prefmix.mixture",
    "Recipe": "prefmix.recipe",
    "load_recipe": "prefmix.recipe",
    "open_mixture": "prefmix.store",
}


class _Package(ModuleType):
    """Gives the public names. `prefmix.build` is the function even after the module prefmix/build.py was imported,
    which Python would bind to the same name; import from the module with `from prefmix.build import ...`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Imported when first asked for: `prefmix --help` does not wait for Polars.
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'prefmix' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
