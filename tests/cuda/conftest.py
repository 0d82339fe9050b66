"""Lets this folder's tests import the machine they run kernels on (importlib mode leaves sys.path alone),
and the calls of every op."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
sys.path.insert(0, str(Path(__file__).parent))

from machine import Machine


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """A few thousand numbers each."""


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()


@pytest.fixture(scope="session")
def triton_machine() -> Any:
    from triton_machine import TritonMachine  # most of these tests need no Triton

    return TritonMachine()
