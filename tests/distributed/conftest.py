"""Lets these tests import their workers and the distillation tests' models; starts processes quickly."""

import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent / "distill"), str(HERE.parent.parent)]
sys.path[:0] = PATHS[:2]

# The models that the command's tests have: a fixture is taken from where it is.
_spec = importlib.util.spec_from_file_location("product_world", HERE.parent / "product" / "conftest.py")
_product = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_product)
world = _product.world


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Processes are forked from a server that has imported everything once and never computed anything."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["workers"])
    with pytest.MonkeyPatch.context() as patch:  # the server's path is not the tests' (before Python 3.13)
        patch.setenv("PYTHONPATH", os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]))
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def small_tensors(one_thread):
    """A few hundred numbers each."""
