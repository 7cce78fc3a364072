from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.loopback import LoopbackHub
from hypothesis import settings

settings.register_profile("prefmix", deadline=None, max_examples=60)
settings.load_profile("prefmix")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real rows beside the repository (its SOURCES.md says what they are)."""
    if not SHARED.is_dir():
        pytest.skip(f"the real rows are not here: {SHARED.parent.name}/{SHARED.name} is missing beside the repository")
    return SHARED


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
