"""From a run to a repository of models on the Hub.

    main       the last stage, merged into its base    <stage>-v0          an earlier stage, the same way
    adapter    its adapter                             <stage>-v0-adapter  its adapter

A branch has an adapter or whole weights, never both: who loads a revision would not know which is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from prefmix import hub
from prefmix.errors import HubError, ModelError
from prefmix.mixture import MANIFEST
from prefmix.model_card import CURVES, Place
from prefmix.publish.to_hub import HARMLESS, Progress, Sent, look, manifest_at, sent_of
from prefmix.stages import RUN, chain, last_stage, read_record, stage_card

_RECORDS = (RUN, "eos.json", "metrics.jsonl", "recipe.toml", CURVES)
_FOLDER = {"merged": "merged", "adapter": "adapter", "whole": "adapter"}


@dataclass(frozen=True)
class Branch:
    """A branch of a push and what it has of which stage: its `adapter`, its `merged` weights or its `whole` weights.

    `commit` is None where nothing was sent yet; without `is_new_commit` it was there with the same files.
    """

    name: str
    stage: str
    form: str
    commit: str | None
    files: tuple[Sent, ...]
    removed: tuple[str, ...]
    is_new_commit: bool

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class PushedRun:
    """What a push of a run did, or with `dry_run` would do. Of the branches `main` is the last."""

    repo: str
    url: str
    branches: tuple[Branch, ...]
    tag: str | None
    is_new_tag: bool
    dry_run: bool


def push_run(
    run: Path,
    repo: str,
    *,
    adapters_only: bool = False,
    data: str | None = None,
    tag: str | None = None,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    scratch: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PushedRun:
    """Pushes the stages of a run (or those up to the stage `run`) to a repository of models, as one commit a branch.

    The stages have to be merged (`<stage>/merged`); `adapters_only` pushes their adapters in place of that. `data` says
    where the mixture is on the Hub (`user/name@tag`; else where it was pulled from), for the cards. `tag` is made on main
    when all is there. The cards are written below `scratch` until they are sent. It can be run again after any failure: a branch that has its files gets no commit.

    Raises:
        ModelError: no such run; a stage that has not ended, or is not merged as it is now.
        HubError: the repository holds something else, or `data` another mixture; the tag is on another model; somebody
            else pushed meanwhile; no access; out of reach.
    """
    stages = chain(last_stage(run))
    data = _checked(data, stages[-1]) if data else _pulled_from(stages[-1])
    places = [
        (stage, place) for stage in stages for place in _places(stage, repo, data, adapters_only, stage is stages[-1])
    ]
    for stage, place in places:
        _check_weights(stage, place.form)
    there = look(repo, private, "model")
    if there:
        _check_branches(repo, there, [place.revision for _, place in places])
    has_tag = bool(there and tag and _check_tag(repo, tag, there, stages[-1]))
    branches: list[Branch] = []
    with TemporaryDirectory(prefix="prefmix-push-", dir=scratch, ignore_cleanup_errors=True) as cards:
        laid = [(stage, place, _files(stage, place, Path(cards))) for stage, place in places]
        sent = _counted(laid, progress)
        for stage, place, files in laid:
            if not dry_run:
                if there is None:
                    hub.create_repository(repo, private, "model")
                    there = hub.refs(repo, "model")
                if place.revision not in there.branches:
                    hub.create_branch(repo, place.revision, there.branches["main"], "model")
                    there = hub.refs(repo, "model")
            head = there.branches.get(place.revision) if there else None
            old = hub.blobs(repo, head, "model") if head else {}
            removed = tuple(path for path in sorted(old) if path not in files and not HARMLESS.fullmatch(path))
            commit = None
            if not dry_run:
                assert head is not None
                title = message or f"{read_record(stage / RUN)['mixture']['name']}, stage {stage.name}: {place.form}"
                commit = hub.commit(
                    repo,
                    files,
                    parent=head,
                    title=title,
                    branch=place.revision,
                    deleted=removed,
                    sent=sent,
                    repo_type="model",
                )
            listed = sent_of(files, old)
            is_new = commit != head if commit else not all(file.is_there for file in listed if _is_weights(file))
            branches.append(Branch(place.revision, stage.name, place.form, commit, listed, removed, is_new))
    if tag and not has_tag and not dry_run:
        hub.create_tag(repo, tag, str(branches[-1].commit), "model")
    url = hub.page(repo, tag or "main", "model")
    return PushedRun(repo, url, tuple(branches), tag, bool(tag) and not has_tag, dry_run)


def _places(stage: Path, repo: str, data: str | None, adapters_only: bool, is_last: bool) -> list[Place]:
    """The branches that have something of a stage; that with the weights of the last one is the last of all."""
    name = "main" if is_last else f"{stage.name}-v0"
    if not _has_adapter(stage):
        return [Place("whole", repo, name, data)]
    if adapters_only:
        return [Place("adapter", repo, name, data)]
    beside = "adapter" if is_last else f"{name}-adapter"
    return [Place("adapter", repo, beside, data), Place("merged", repo, name, data)]


def unmerged(run: Path) -> list[Path]:
    """The stages of a run, up to the one meant, that have an adapter and no merge of it as it is now."""
    return [stage for stage in chain(last_stage(run)) if _has_adapter(stage) and not _is_merged(stage)]


def _has_adapter(stage: Path) -> bool:
    return (stage / "adapter" / "adapter_config.json").is_file()


def _is_merged(stage: Path) -> bool:
    record = stage / "merged" / "merge.json"
    return record.is_file() and read_record(record)["adapter_sha256"] == read_record(stage / RUN)["adapter_sha256"]


def _check_weights(stage: Path, form: str) -> None:
    if form == "merged" and not _is_merged(stage):
        raise ModelError(f"{stage} is not merged as it is now: run `prefmix merge {stage}`, or push the adapter alone.")
    if not any((stage / _FOLDER[form]).glob("*.safetensors")):
        raise ModelError(f"{stage / _FOLDER[form]} has no weights. Run the stage again with `prefmix train --force`.")


def _files(stage: Path, place: Place, scratch: Path) -> dict[str, Path]:
    """The files of a branch by their path in the repository."""
    weights = stage / _FOLDER[place.form]
    files = {path.name: path for path in sorted(weights.iterdir()) if path.is_file() and not path.name.startswith(".")}
    files |= {name: stage / name for name in _RECORDS if (stage / name).is_file()}
    for folder in ("eval", ".eval_results"):
        files |= {path.relative_to(stage).as_posix(): path for path in sorted((stage / folder).glob("*.*"))}
    card = scratch / f"{place.revision}.md"
    card.write_text(stage_card(stage, place), encoding="utf-8", newline="\n")
    return files | {"README.md": card}


def _is_weights(file: Sent) -> bool:
    return file.path.endswith(".safetensors")


def _counted(laid: list[tuple[Path, Place, dict[str, Path]]], progress: Progress) -> Callable[[str], None]:
    """What `hub.commit` calls for each file, on its way to `progress`."""
    sizes = {name: path.stat().st_size for _, _, files in laid for name, path in files.items()}
    total, done = sum(path.stat().st_size for _, _, files in laid for path in files.values()) // 1000, 0

    def sent(path: str) -> None:
        nonlocal done
        done += sizes[path]
        progress("send", min(done // 1000, total), total)

    return sent


def _checked(data: str, stage: Path) -> str:
    """`data`, whose mixture is the one that the stage was trained on."""
    repo, _, tag = data.removeprefix("hub:").partition("@")
    if not tag:
        raise HubError(f"{data} has no tag: name the version of the mixture, as in {repo}@v1.")
    wanted = read_record(stage / RUN)["mixture"]["digest"]
    digest = (manifest_at(repo, hub.resolve_tag(repo, tag)) or {}).get("digest", "none")
    if digest != wanted:
        raise HubError(f"{data} is another mixture (digest {digest[:12]}) than {stage} was trained on ({wanted[:12]}).")
    return f"{repo}@{tag}"


def _pulled_from(stage: Path) -> str | None:
    origin: Mapping[str, str] | None = read_record(stage / MANIFEST).get("hub")
    return f"{origin['repo']}@{origin['revision']}" if origin else None


def _check_branches(repo: str, there: hub.Refs, names: Sequence[str]) -> None:
    """Raises HubError when a branch that would be written to, or begun from, holds something else."""
    for name in dict.fromkeys(["main", *names]):
        files = hub.blobs(repo, there.branches[name], "model") if name in there.branches else {}
        others = sorted(path for path in files if not HARMLESS.fullmatch(path))
        if others and RUN not in files:
            raise HubError(f"{repo} holds something on its branch {name} that is no run of prefmix "
                           f"({', '.join(others[:3])}): push to a repository of its own.")  # fmt: skip


def _check_tag(repo: str, tag: str, there: hub.Refs, stage: Path) -> bool:
    """Whether the tag is there, on this very model. Raises HubError when it is on another."""
    commit = there.tags.get(tag)
    if commit is None:
        return False
    found: Mapping[str, object] = {}
    if RUN in hub.list_files(repo, commit, "model"):
        found = read_record(hub.download(repo, commit, [RUN], "model")[0])
    if found.get("adapter_sha256") != read_record(stage / RUN)["adapter_sha256"]:
        raise HubError(f"{repo} has a tag {tag} with another model: tags are not moved. Give another --tag.")
    return True
