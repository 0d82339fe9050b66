"""Lets this folder's tests import its shared models and rewards (importlib mode leaves sys.path alone)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """A few hundred numbers each."""
