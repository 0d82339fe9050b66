"""Runs ops by themselves, for tools that watch a process: `python -m benchmarks.gpu_check.small_ops`."""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu_check.ops import ops
from benchmarks.gpu_check.sizes import SMALL, WAN

OURS = ("cuda", "triton", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--full", action="store_true", help="the sizes of Wan 2.1 1.3B")
    parser.add_argument("--op", action="append", help="these alone")
    parser.add_argument("--backend", action="append", choices=OURS, help="these alone")
    asked = parser.parse_args()
    ran = 0
    for case in ops(WAN if asked.full else SMALL):
        if asked.op and case.op not in asked.op:
            continue
        inputs = case.inputs(torch.device(asked.device), torch.bfloat16)
        for name, call in case.backends(inputs).items():
            if name in (asked.backend or OURS):
                case.results(call, inputs)
                ran += 1
                print(f"{case.name}: {name}", flush=True)
    if asked.device == "cuda":
        torch.cuda.synchronize()
    if not ran:
        raise SystemExit("none of this package's backends takes any of the calls")


if __name__ == "__main__":
    main()
