"""Norm and rotary beside the reference and what a model does without the op, tiny and larger

    pytest benchmarks/test_attention_rotary.py --benchmark-only

Every case is checked before it is timed: our result must agree with the rival's.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stream_r1_kernels import RotaryGrid, qk_norm_rotary
from stream_r1_kernels.rotary.reference import norm_rotary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_and_time(
    benchmark: Callable, ours: Callable, rival: Callable, timed: Callable, dtype: torch.dtype
) -> None:
    tolerance = 32 * torch.finfo(dtype).eps
    mine, theirs = ours(), rival()
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (mine, theirs)), strict=True):
        scale = b.float().abs().max().item()
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(scale, 1.0))
    benchmark(timed)


@pytest.mark.parametrize("implementation", ["ours", "reference", "separate"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["B1-T84-H4-D64", "B8-T84-H4-D64", "B1-T4680-H12-D128"])
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_qk_norm_rotary(benchmark: Callable, size: str, dtype: str, train: bool, implementation: str) -> None:
    """`separate` is what a model does without the op: torch's rms_norm, then complex multiplication."""
    benchmark.group = f"qk_norm_rotary {'forward + backward' if train else 'forward'} {size} {dtype}"  # type: ignore[attr-defined]
    batch, tokens, heads, head = (int(part[1:]) for part in size.split("-"))
    rows, columns = (4, 7) if tokens == 84 else (30, 52)
    cos, sin = RotaryGrid(head).phases(0, 3, rows, columns)
    fused = torch.randn(batch, tokens, 3 * heads * head).to(DTYPES[dtype])
    q, k = (x.requires_grad_(train) for x in fused.split(heads * head, -1)[:2])
    weights = [torch.ones(heads * head, dtype=DTYPES[dtype], requires_grad=train) for _ in "qk"]

    def separate(x: Tensor, weight: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(x, (heads * head,), weight, 1e-6).float()
        pairs = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2).to(x.dtype)

    def finish(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not train:
            return out
        return *out, *torch.autograd.grad(out, [q, k, *weights], [torch.ones_like(x) for x in out])

    timed = {
        "ours": lambda: finish(qk_norm_rotary(q, k, *weights, cos, sin, num_heads=heads)),
        "reference": lambda: finish(
            tuple(norm_rotary(x, w, cos, sin, heads, 1e-6) for x, w in zip((q, k), weights, strict=True))
        ),
        "separate": lambda: finish(tuple(separate(x, w) for x, w in zip((q, k), weights, strict=True))),
    }
    check_and_time(benchmark, timed["ours"], timed["reference"], timed[implementation], DTYPES[dtype])
