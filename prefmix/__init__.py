"""prefmix: preference and SFT data sets, curated into versioned, explainable mixtures.

mixture = prefmix.build("recipe.toml")
mixture.scan("preference", "train")     # a Polars LazyFrame
mixture.dataset_dict("preference")      # a datasets.DatasetDict
mixture.drops                           # why rows are not in it
run = prefmix.train("recipe.toml")      # with the extra `train`
"""

from __future__ import annotations

import sys

# Nothing is imported here that Python has not imported itself: until the command line runs, Ctrl-C is a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from prefmix.build import build
    from prefmix.errors import PrefmixError
    from prefmix.mixture import Mixture
    from prefmix.publish import open_mixture
    from prefmix.recipe import Recipe, load_recipe
    from prefmix.train.run import train

    __version__: str
else:
    ModuleType = type(sys)

__all__ = ["Mixture", "PrefmixError", "Recipe", "__version__", "build", "load_recipe", "open_mixture", "train"]

_HOMES = {
    "build": "prefmix.build",
    "PrefmixError": "prefmix.errors",
    "Mixture": "prefmix.mixture",
    "Recipe": "prefmix.recipe",
    "load_recipe": "prefmix.recipe",
    "open_mixture": "prefmix.publish",
    "train": "prefmix.train.run",
}


class _Package(ModuleType):
    """Gives the public names. `prefmix.build` and `prefmix.train` are the functions even after the module prefmix/build.py or
    the package prefmix/train was imported, which Python would bind to the same name; import from these with
    `from prefmix.build import ...`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Imported when first asked for: `prefmix --help` does not wait for Polars.
        if name in _HOMES:
            from importlib import import_module

            return getattr(import_module(_HOMES[name]), name)
        if name == "__version__":
            from importlib.metadata import version

            return version("prefmix")
        raise AttributeError(f"module 'prefmix' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
