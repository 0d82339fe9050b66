"""Lets this folder's tests import the machine they run kernels on (importlib mode leaves sys.path alone)."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine import Machine


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few thousand numbers: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine()
