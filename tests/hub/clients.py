"""What the tests of publishing share: mixtures to push, and the real clients as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from hub.loopback import LoopbackHub

from prefmix.build import build
from prefmix.mixture import Mixture


def built(folder: Path, rows: list[dict[str, Any]], name: str = "mix", **tables: str) -> Mixture:
    """A mixture of pairs (question, chosen, rejected ...) in the store `folder/store`, with further tables of the recipe."""
    source = folder / "sources" / f"{name}.jsonl"
    source.parent.mkdir(exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = source.with_suffix(".toml")
    more = "".join(f"[{table}]\n{keys}\n" for table, keys in tables.items())
    recipe.write_text(
        f'name = "{name}"\n[sources.pairs]\npath = "{source.name}"\nformat = "ultrafeedback_binarized"\nlicense = "mit"\n'
        f"{more}",
        "utf-8",
    )
    return build(recipe, store=folder / "store")


def pair(number: int, score: float = 4.0) -> dict[str, Any]:
    """One row of the source, told from the others by its number."""
    return {
        "source": "ours",
        "instruction": f"What is the number after {number}? Say it and why, as in “{number} … {number}”.",
        "chosen_response": f"It is {number + 1}: one more than {number}.",
        "rejected_response": f"It is {number}.",
        "chosen_avg_rating": score,
        "rejected_avg_rating": 1.0,
        "chosen_model": "none",
    }


def python(code: str, hub: LoopbackHub, home: Path, **environment: str) -> str:
    """Runs a program with the clients as they come, in a fresh process with a cache of its own; gives its stdout."""
    done = process([sys.executable, "-c", textwrap.dedent(code)], hub, home, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def process(command: list[str], hub: LoopbackHub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command against the stand-in; `environment` adds to its variables."""
    hf = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": hub.token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    dropped = {"HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_XET_CACHE", "HF_DATASETS_CACHE"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**inherited, **hf, **environment}, timeout=300
    )
