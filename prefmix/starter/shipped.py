"""What comes with prefmix beside its code: the files of recipes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from prefmix import recipe
from prefmix.errors import UsageError


def shipped_files(name: str) -> dict[str, Path]:
    """The files of a shipped recipe by the place they go to: `<name>.toml`, and what is in the folder `<name>/`.

    Raises UsageError with the names that there are.
    """
    shipped = recipe.shipped_recipes()
    if name not in shipped:
        near = get_close_matches(name, shipped, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f'no recipe "{name}" comes with prefmix. {hint}There are: {", ".join(sorted(shipped))}.')
    home = shipped[name].parent
    beside = sorted(path for path in (home / name).rglob("*") if path.is_file())
    return {path.relative_to(home).as_posix(): path for path in (shipped[name], *beside)}
