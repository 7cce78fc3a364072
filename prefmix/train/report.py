"""What a stage's folder shows its reader: the model card (README.md) with its curves. It needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from prefmix.model_card import CURVES
from prefmix.stages import read_lines, read_record, stage_card
from prefmix.train.curves import curves

CARD = "README.md"


def write_report(stage: Path) -> None:
    """Writes README.md and curves.svg into a stage folder, from what the stage left there.

    Raises TrainError when a part of the folder's record is missing or cannot be read.
    """
    texts = {CARD: stage_card(stage)}
    texts[CURVES] = curves(read_lines(stage / "metrics.jsonl"), read_record(stage / "eos.json"))
    for name, text in texts.items():
        (stage / f".{name}").write_text(text, encoding="utf-8", newline="\n")
    for name in texts:
        os.replace(stage / f".{name}", stage / name)
