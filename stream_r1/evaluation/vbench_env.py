"""``python -m stream_r1.evaluation.vbench_env FOLDER``: an environment for VBench's tool, pinned.

VBench 0.1.5 needs transformers 4.33, which this project's Python can't have beside its own. Its detectron2
is compiled for object class, multiple objects, color and spatial relationship: that takes a CUDA toolkit as
old as torch's (12.1 or before) and some minutes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from stream_r1.cli import run_app

PYTHONS = ("3.9", "3.10")
TORCH = ("torch==2.1.2", "torchvision==0.16.2")
TORCH_INDEX = "https://download.pytorch.org/whl/cu121"
PACKAGES = (
    "vbench==0.1.5",
    "transformers==4.33.2",
    "tokenizers==0.13.3",
    "huggingface_hub==0.20.3",
    "timm==1.0.12",
    "numpy==1.26.4",
    "Pillow==9.5.0",
    "opencv-python==4.9.0.80",
    "pyiqa==0.1.10",
)
BUILD = ("setuptools==69.5.1", "wheel==0.43.0", "cython==3.0.11")  # openai-clip asks for pkg_resources
DETECTRON2 = "git+https://github.com/facebookresearch/detectron2.git@v0.6"


def main(
    folder: Annotated[Path, typer.Argument(help="Where the environment is to be.")],
    python: Annotated[str, typer.Option(help=f"Python of it: {' or '.join(PYTHONS)}.")] = "python3.10",
    torch_index: Annotated[
        str, typer.Option(help="Index of torch's builds; empty: pip's own.")
    ] = TORCH_INDEX,
    detectron2: Annotated[
        str, typer.Option(help="What pip installs as detectron2; empty: nothing.")
    ] = DETECTRON2,
) -> None:
    """Make it, and print the line for a recipe. Resumes where it stopped: pip skips what is there."""
    if shutil.which(python) is None:
        raise typer.BadParameter(f"expected a Python, got {python}: no such command", param_hint="--python")
    try:
        version = _output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    except (OSError, subprocess.CalledProcessError):
        version = f"{python}, which does not run"  # a version manager's stand-in, for example
    if version not in PYTHONS:
        raise typer.BadParameter(f"expected {' or '.join(PYTHONS)}, got {version}", param_hint="--python")
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = folder / "bin" / "python"
    pip = [str(own), "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*pip, *BUILD], check=True)
    index = ["--index-url", torch_index] if torch_index else []
    subprocess.run([*pip, *TORCH, *index], check=True)
    subprocess.run([*pip, "--no-build-isolation", *PACKAGES], check=True)
    if detectron2:
        subprocess.run([*pip, "--no-build-isolation", detectron2], check=True)
    subprocess.run([str(own), "-c", "import vbench"], check=True)
    where = _output([str(own), "-c", "import vbench, os; print(os.path.dirname(vbench.__file__))"])
    typer.echo(f"vbench: {{full_info: {where}, python: {own}}}")


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    run_app(main)
