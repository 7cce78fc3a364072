"""Commands that load models: what they say where the packages for that are missing, and the libraries kept quiet."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

from prefmix.cli.progress import busy, run_beside
from prefmix.errors import ModelError

Result = TypeVar("Result")


def with_models(command: str, what: str, work: Callable[[], Result], shown: bool) -> Result:
    """The result of `work()`, which imports torch and transformers: beside, and with a spinner that says `what` if `shown`.

    Raises ModelError where a package is missing, and what the work raises.
    """

    def quietly() -> Result:
        quiet_imports()
        return work()

    return needing("train", command, lambda: busy(what, quietly) if shown else run_beside(quietly))


def needing(extras: str, command: str, work: Callable[[], Result]) -> Result:
    """The result of `work()`, which needs packages of some extras. Raises ModelError where one is missing."""
    try:
        return work()
    except ModuleNotFoundError as error:
        package = (error.name or "prefmix").partition(".")[0]
        if package == "prefmix":
            raise
        install = f'pip install "prefmix[{extras}]"'
        raise ModelError(f"prefmix {command} needs {package}, which is not installed. Install it: {install}") from error


def quiet_imports() -> None:
    """Keeps what libraries log, warn of and draw while they load models off the screen."""
    if os.environ.get("PREFMIX_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
