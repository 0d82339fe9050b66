"""Makes this folder's small models importable under pytest's importlib mode, and the folder they fill."""

import sys
from pathlib import Path

import pytest

for _folder in ("gpu", "sampling"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _folder))


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of Wan's layout; not to be written to."""
    from sampling_models import save_tiny_wan

    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder)
    return folder
