"""The data files of a data set on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from prefmix import hub
from prefmix.errors import SourceError
from prefmix.files import in_split, is_data_file


class Fetched(NamedTuple):
    """A data set at a commit: its data files (path in the repository, local file) and the licence its card names."""

    commit: str
    files: list[tuple[str, Path]]
    license: str | None


def fetch(repo: str, revision: str, split: str | None, default: str = "train") -> Fetched:
    """Downloads the data files of a split, in sorted path order.

    The split's files are those that the data set's card names (`configs:`), else those with the split's word in their
    path. Without `split` that is `default`; if nothing is called so, the only split, or (without a card) all files.
    A repository with several configurations and no default one needs `split = "<configuration>/<split>"`.

    Raises:
        SourceError: no such split, or no data files. HubError: see hub.py.
    """
    commit = hub.resolve_revision(repo, revision)
    names = hub.list_files(repo, commit)
    card = hub.download(repo, commit, ["README.md"])[0].read_text("utf-8", "replace") if "README.md" in names else ""
    head = _head(card)
    configs = head.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    chosen = choose(repo, names, configs, split, default)
    licence = head.get("license")
    return Fetched(
        commit,
        list(zip(chosen, hub.download(repo, commit, chosen), strict=True)),
        licence if isinstance(licence, str) else None,
    )


def choose(
    repo: str, names: Sequence[str], configs: Sequence[dict[str, Any]], split: str | None, default: str = "train"
) -> list[str]:
    """The names of the data files of a split, sorted."""
    splits = _card_splits(repo, configs, split)
    if not splits:
        data = sorted(name for name in names if is_data_file(name))
        there = ", ".join(data[:5]) or "none at all"
        chosen = [name for name in data if in_split(name, split or default)] or (data if split is None else [])
        if not chosen:
            raise SourceError(
                f'{repo}: no data file of the split "{split or default}": it has {there}: correct `split`'
            )
        return chosen
    wanted = split.rpartition("/")[2] if split else default
    if wanted not in splits and split is None and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise SourceError(f'{repo}: no split "{wanted}": set split = one of {", ".join(sorted(splits))}')
    chosen = sorted(name for name in names if any(_matches(name, pattern) for pattern in splits[wanted]))
    if not chosen:
        raise SourceError(f'{repo}: no file matches {", ".join(splits[wanted])}, the split "{wanted}" by its card')
    return chosen


def _card_splits(repo: str, configs: Sequence[dict[str, Any]], split: str | None) -> dict[str, list[str]]:
    """Patterns of files by split, of the configuration that is meant; empty if the card names no files."""
    by_name = {str(config.get("config_name", "default")): config for config in configs if config.get("data_files")}
    if not by_name:
        return {}
    name = split.rpartition("/")[0] if split else ""
    if not name:
        default = [each for each, config in by_name.items() if config.get("default") is True or each == "default"]
        if len(by_name) > 1 and not default:
            raise SourceError(
                f"{repo}: it has the configurations {', '.join(by_name)}: set split = "
                f'"<configuration>/<split>", for example "{next(iter(by_name))}/train"'
            )
        name = default[0] if default else next(iter(by_name))
    if name not in by_name:
        raise SourceError(f'{repo}: no configuration "{name}": it has {", ".join(by_name)}')
    files = by_name[name]["data_files"]
    if isinstance(files, list) and all(isinstance(each, dict) for each in files):
        return {str(each.get("split", "train")): _listed(each.get("path", [])) for each in files}
    return {"train": _listed(files)}


def _head(card: str) -> dict[str, Any]:
    """The YAML head of a card; empty if it has none that can be read."""
    if not card.startswith("---\n"):
        return {}
    try:
        head = yaml.safe_load(card[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def _listed(paths: Any) -> list[str]:
    return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern of a card; a folder means all data files below it."""
    return fnmatchcase(name, pattern.replace("**/", "*")) or (
        is_data_file(name) and name.startswith(pattern.rstrip("/") + "/")
    )
