"""Linear layers with what follows them in a Wan block, beside torch's ops one after the other

    pytest benchmarks/test_linear.py --benchmark-only

Weights come from a set larger than the caches below the last one, as in a model's pass. The sizes are those
of a denoising pass of the tiny world and of a chunk at 480p.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, Run, check_and_time, parametrize
from stream_r1_kernels import fused_linear

SIZES = {"T84-D320": (84, 320, 960), "T4680-D1536": (4680, 1536, 8960)}  # tokens, width, hidden width
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
WEIGHT_BYTES = 2**23


def linear_case(size: str, dtype: str, kind: str) -> dict[str, Run]:
    tokens, width, hidden = SIZES[size]
    depth, widths = {"qkv": (width, [width] * 3), "gelu": (width, [hidden]), "gated": (hidden, [width])}[kind]
    x = torch.randn(1, tokens, depth).to(DTYPES[dtype])
    count = max(1, WEIGHT_BYTES // (sum(widths) * depth * x.element_size()))
    weights = [(torch.randn(n, depth) / depth**0.5).to(x.dtype) for n in widths]
    sets = [[weight.clone() for weight in weights] for _ in range(count)]
    biases = [torch.randn(n).to(x.dtype) for n in widths]
    follows: dict[str, object] = {}
    if kind == "gelu":
        follows["gelu"] = True
    if kind == "gated":
        follows["residual"] = torch.randn(1, tokens, width).to(x.dtype)
        follows["gate"] = torch.randn(1, 3, width)

    def run(backend: str, turn: Callable[[], list[Tensor]]) -> Tensor:
        return fused_linear(x, turn(), biases, **follows, backend=backend)  # type: ignore[arg-type]

    def turns() -> Callable[[], list[Tensor]]:
        return cycle(sets).__next__

    return {"ours": partial(run, "auto", turns()), "eager": partial(run, "reference", turns())}


def flops(size: str, kind: str) -> int:
    tokens, width, hidden = SIZES[size]
    return 2 * tokens * width * (3 * width if kind == "qkv" else hidden)


CASES = [
    Case(
        f"fused_linear {kind}",
        size,
        dtype,
        SIZES[size],
        partial(linear_case, size, dtype, kind),
        flops=flops(size, kind),
        tolerance=TOLERANCE[dtype],
        baselines=("eager",),
    )
    for size in SIZES
    for dtype in ("float32", "bfloat16")
    for kind in ("qkv", "gelu", "gated")
]


@torch.no_grad()
@parametrize(CASES)
def test_linear(benchmark: Callable, case: Case, implementation: str) -> None:
    check_and_time(benchmark, case, implementation)
