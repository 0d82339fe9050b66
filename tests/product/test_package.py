"""What `import stream_r1` gives, and how little it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import stream_r1

ROOT = Path(__file__).parents[2]


def test_importing_it_loads_no_library() -> None:
    code = "import sys, stream_r1; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "stream_r1" in loaded
    assert not loaded & {"torch", "numpy", "diffusers", "transformers", "pydantic", "stream_r1_kernels"}


def test_public_names_are_loaded_when_asked_for() -> None:
    from stream_r1.distill.weighting import StreamR1Weights
    from stream_r1.sampling.pipeline import StreamR1Pipeline

    assert stream_r1.StreamR1Pipeline is StreamR1Pipeline
    assert stream_r1.StreamR1Weights is StreamR1Weights
    assert set(stream_r1.__all__) <= set(dir(stream_r1))
    with pytest.raises(AttributeError, match="StreamR1Sampler"):
        stream_r1.StreamR1Sampler  # noqa: B018


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stream_r1.__version__"}
    ops = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]  # can't see that attribute
    assert ops["version"] == stream_r1.__version__
    torch = [line for line in project["project"]["dependencies"] if line.startswith("torch")]
    assert ops["dependencies"] == torch
