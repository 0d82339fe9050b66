"""What a wheel and an sdist hold, and that a wheel runs where there is nothing else of the project."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STREAM = """
import stream_r1, stream_r1_kernels
from pathlib import Path
from stream_r1 import StreamR1Pipeline
from stream_r1.recipe import load

here = Path(stream_r1.__file__).parent
assert load("recipes/tiny/stream-r1.yaml").steps
pipeline = StreamR1Pipeline.from_pretrained("assets/tiny")
chunk = next(iter(pipeline.stream("a red ball bounces in a meadow at noon", seed=0)))
print(here, tuple(chunk.frames.shape), stream_r1_kernels.backends.resolve("auto", "rms_norm", chunk.frames))
"""


def built(kind: str, into: Path) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return into / done.stdout.strip().splitlines()[-1]


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


def test_a_wheel_runs_in_an_empty_folder(wheel, tmp_path):
    """With its own weights and recipes, and the compiled ops."""
    place, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    environment = os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STREAM],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(place / "stream_r1")
    assert "cpu" in done.stdout


def test_a_wheel_holds_the_world_the_recipes_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in tracked("assets", "recipes"):
        assert f"stream_r1/{file}" in names
    for file in tracked("stream_r1", "stream_r1_kernels"):
        assert file in names
    assert not [
        n for n in names if n.startswith(("tests", "ptx_executor", "benchmarks", "assets", "recipes"))
    ]


def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = tracked("assets", "recipes", "csrc", "build_support", "stream_r1", "stream_r1_kernels")
    assert not wanted - names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= names
