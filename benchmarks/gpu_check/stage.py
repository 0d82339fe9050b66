"""One stage, in the process that the runner kills if need be: `python -m benchmarks.gpu_check.stage NAME`."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_check import records
from benchmarks.gpu_check.plan import NAMES


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--until", type=float, required=True)
    asked = parser.parse_args()

    def stopped(why: str) -> None:
        records.append(
            asked.out / "results.jsonl", {"stage": asked.name, "kind": "stopped", "why": why[:2000]}
        )

    try:
        import torch

        from benchmarks.gpu_check.context import CannotRunError, Context
    except ImportError as error:
        stopped(f"{type(error).__name__}: {error}")
        return records.CANNOT_RUN
    context = Context(asked.name, torch.device(asked.device), asked.out.resolve(), asked.until)
    try:
        if asked.device == "cuda" and asked.name != "environment" and not torch.cuda.is_available():
            raise CannotRunError(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU")
        importlib.import_module(f"benchmarks.gpu_check.stages.{asked.name}").run(context)
    except (CannotRunError, ModuleNotFoundError) as error:
        stopped(str(error))
        return records.CANNOT_RUN
    except Exception as error:  # of any kind: what a stage died of is what the run is for
        traceback.print_exc()
        stopped(f"{type(error).__name__}: {error}")
        return records.FAILED
    return records.OK


if __name__ == "__main__":
    sys.exit(main())
