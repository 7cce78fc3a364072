from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub.loopback import LoopbackHub
from hypothesis import settings

settings.register_profile("prefmix", deadline=None, max_examples=60)
settings.load_profile("prefmix")

# Started in the background of a shell, the tests would ignore Ctrl-C, and so would every command that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real rows beside the repository (its SOURCES.md says what they are)."""
    if not SHARED.is_dir():
        pytest.skip(f"the real rows are not here: {SHARED.parent.name}/{SHARED.name} is missing beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def smollm2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder that transformers loads; it is converted once for all tests."""
    from small_models import smollm2

    return smollm2(tmp_path_factory.getbasetemp() / "smollm2")


@pytest.fixture
def loopback_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub on a loopback port, with a cache of its own and no token."""
    hub = LoopbackHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three versions of the quickstart: v1 as shipped, v2 with another recipe, v3 with another file.

    The recipes and sources of v1 and v2 lie in `../recipes` of the store, those of v3 in `../edited`. In v3 the source
    ultrafeedback has lost its first row, its second row has another score, and a row was added.
    """
    from prefmix.build import build
    from prefmix.recipe import load_recipe

    root = tmp_path_factory.mktemp("quickstart")
    store, shipped = root / "store", Path(__file__).parents[1] / "recipes"
    for name in ("recipes", "edited"):
        shutil.copytree(shipped / "quickstart", root / name / "quickstart")
        shutil.copy(shipped / "quickstart.toml", root / name)
    changes = ["filter.min_margin=1.0", "filter.on_inverted=swap", "sources.openhermes.take=50", "splits.test=0.3"]
    build(root / "recipes" / "quickstart.toml", store=store)
    build(load_recipe(root / "recipes" / "quickstart.toml", changes), store=store)
    edited = root / "edited" / "quickstart" / "ultrafeedback.jsonl"
    _, second, *others = edited.read_text(encoding="utf-8").splitlines()
    rescored = json.loads(second) | {"chosen_avg_rating": 4.875}
    added = json.loads(second) | {"instruction": "What is a row that was added later?"}
    lines = [json.dumps(rescored), *others, json.dumps(added)]
    edited.write_text("\n".join(lines) + "\n", encoding="utf-8")
    build(root / "edited" / "quickstart.toml", store=store)
    return store


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The stand-in with a token, over LFS, whose clients do not wait between their attempts."""
    monkeypatch.setenv("HF_TOKEN", loopback_hub.token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return loopback_hub
