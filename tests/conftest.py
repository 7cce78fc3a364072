from __future__ import annotations

from pathlib import Path

import pytest
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
