"""What a test may do to the process, and leaves as it was."""

import gc
import os
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers have the cores; a test that needs more threads asks
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For a test that sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(restored_threads: None) -> None:
    """For tensors so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture
def quiet_collector() -> Iterator[None]:
    """What other tests left does not count, and does not delay the collection of garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
