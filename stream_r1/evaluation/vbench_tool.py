"""Runs VBench's own tool, in its own environment, a dimension at a time."""

from __future__ import annotations

import subprocess
from pathlib import Path

from stream_r1.evaluation import vbench_run
from stream_r1.evaluation.plan import Evaluation
from stream_r1.evaluation.vbench import RESULTS, full_info
from stream_r1.recipe import locate

LOG = "log.txt"


class ToolFailedError(RuntimeError):
    """VBench's tool ended with an error; the message is its last line."""


def missing_dimensions(evaluation: Evaluation, model: str) -> list[str]:
    """Those of the recipe without a file of results."""
    assert evaluation.settings.vbench is not None
    folder = evaluation.vbench_results(model)
    return [d for d in evaluation.settings.vbench.dimensions if not (folder / f"{d}{RESULTS}").is_file()]


def run_dimension(evaluation: Evaluation, model: str, dimension: str) -> None:
    """Have one dimension of a model's videos scored; `DIMENSION_eval_results.json` is what it leaves.

    Raises:
        ToolFailedError: it left none.
    """
    settings, folder = evaluation.settings.vbench, evaluation.vbench_results(model)
    assert settings is not None
    assert settings.python is not None
    folder.mkdir(parents=True, exist_ok=True)
    first = evaluation.file(model, evaluation.videos[0])
    command = [
        str(locate(settings.python)),
        vbench_run.__file__,
        str(first.parent.resolve()),
        str(full_info(locate(settings.full_info)).resolve()),
        str(folder.resolve()),
        dimension,
        settings.device,
    ]
    with open(folder / LOG, "ab") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, cwd=folder, check=False)
    if ended.returncode or not (folder / f"{dimension}{RESULTS}").is_file():
        raise ToolFailedError(f"vbench: {dimension} of {model}: {_last_line(folder / LOG)} ({folder / LOG})")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
