"""The folder of a run, as `prefmix train` leaves it: its stages, their records, the model card of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefmix.errors import ModelError, TrainError
from prefmix.figures import code, figure, share, table
from prefmix.mixture import MANIFEST
from prefmix.model_card import Place, model_card
from prefmix.scores.card import completed
from prefmix.scores.results import read_results

RUN = "run.json"


def stages_of(folder: Path) -> list[Path]:
    """The stage folders of a run, or the folder itself where it is one; none for another folder."""
    if (folder / RUN).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{RUN}"))


def last_stage(folder: Path) -> Path:
    """The stage of a run that no other goes on from; `folder` is one of a run or of a stage.

    Raises ModelError when there is none, when one has not ended, and when there are several.
    """
    runs = {path: read_record(path / RUN) for path in stages_of(folder)}
    if not runs:
        raise ModelError(f"{folder} is no run: a run has stages with a {RUN}.")
    if waiting := [path for path, run in runs.items() if not run.get("finished")]:
        ended = next((f", or name a stage that has ended ({path})" for path in runs if path not in waiting), "")
        raise ModelError(f"The stage {waiting[0]} has not ended: go on with `prefmix train ... --resume`{ended}.")
    followed = {run.get("after_stage") for run in runs.values()}
    last = [path for path in runs if len(runs) == 1 or path.name not in followed]
    if len(last) != 1:
        raise ModelError(
            f"{folder} has several last stages ({', '.join(path.name for path in last)}): name one's folder."
        )
    return last[0]


def chain(stage: Path) -> list[Path]:
    """The folders of the stages that a stage goes on from, the first one first, and its own."""
    found, run = [stage], read_record(stage / RUN)
    while run.get("after_stage"):
        before = stage.parent / Path(run["after_stage"]).name
        if before in found or not (before / RUN).is_file():
            break
        found.append(before)
        run = read_record(before / RUN)
    return found[::-1]


def stage_card(stage: Path, place: Place | None = None) -> str:
    """The model card of a stage with its scores, for its folder or for another place. Raises TrainError when a part of the
    folder's record is missing or cannot be read; ModelError for scores."""
    run, eos, manifest = (read_record(stage / name) for name in (RUN, "eos.json", MANIFEST))
    stages = chain(stage)
    story = eos_table(stages) if len(stages) > 1 else ""
    card = model_card(run, eos, read_lines(stage / "metrics.jsonl"), manifest, story, place)
    results = list(read_results(stage / "eval").values())
    return completed(card, stage.resolve().parent.name, results) if results else card


def eos_table(stages: Sequence[Path]) -> str:
    """A Markdown table of what each stage did to the EOS, from the eos.json of the folders, in their order."""
    rows = []
    for folder in stages:
        eos = read_record(folder / "eos.json")
        before, after = eos.get("before") or {}, eos.get("after") or {}
        rows.append(
            [
                code(folder.name),
                f"{figure(before.get('p_eos'))} → {figure(after.get('p_eos'))}",
                f"{share(before.get('stop_rate'))} → {share(after.get('stop_rate'))}",
            ]
        )
    return table(["stage", "P(EOS), before → after", "stop rate, before → after"], rows)


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a stage. Raises TrainError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}). Run its stage again with --force.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none when there is no file. Raises TrainError."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise TrainError(f"{path}, line {number}, is not JSON ({error}). Remove the line.") from error
    return found
