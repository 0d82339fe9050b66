"""Every op on every device and backend of this machine against plain torch in float64.

`make gpu-check` runs this on a GPU. Without one it runs on the CPU, so that the cases themselves are known to
be right.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases import CASES, OpCase
from torch import Tensor
from torch.nn import functional

from stream_r1.models.blocks import GELUProjection
from stream_r1_kernels import backends, dispatch

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def combinations() -> list[tuple[OpCase, str, str, torch.dtype]]:
    """All that a backend of this machine does not refuse."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    found = []
    for case in CASES:
        for device in DEVICES:
            for dtype in DTYPES:
                call = dispatch.Call(
                    *(case.op, device, dtype, case.head_dim, capability if device == "cuda" else None),
                    needs_grad=case.differentiable > 0,
                    pieces=case.pieces,
                )
                for backend in ("cpu", "cuda", "triton", "sdpa"):
                    if dispatch.refusal(backend, call, backends.build()) is None:
                        found.append((case, backend, device, dtype))
    return found


def run(case: OpCase, tensors: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Outputs and gradients, in float64 on the CPU; the incoming gradients are the same each time."""
    tensors = [x.detach().clone().requires_grad_(i < case.differentiable) for i, x in enumerate(tensors)]
    out = case.call(*tensors, backend=backend)
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outs]
    grads = torch.autograd.grad(outs, tensors[: case.differentiable], incoming) if case.differentiable else ()
    return [x.detach().double().cpu() for x in (*outs, *grads)]


@pytest.mark.parametrize(
    ("case", "backend", "device", "dtype"),
    [
        pytest.param(*each, id=f"{each[0].op}-{each[0].name}-{each[1]}-{each[2]}-{each[3]}"[:120])
        for each in combinations()
    ],
)
def test_as_plain_torch_in_float64(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    """Off by no more than twice what plain torch is in the same dtype, and a few roundings."""
    given = case.tensors(dtype)
    exact = run(case, [x.double() for x in given], "reference")
    plain = run(case, given, "reference")
    ours = run(case, [x.to(device) for x in given], backend)
    unit = torch.finfo(dtype).eps
    for got, same_dtype, expected in zip(ours, plain, exact, strict=True):
        assert got.shape == expected.shape
        if not expected.numel():
            continue
        allowed = 2 * (same_dtype - expected).abs().max() + 8 * unit * expected.abs().max().clamp(min=1e-3)
        assert (got - expected).abs().max() <= allowed
    if backend != "sdpa":  # the sums of our kernels have an order; on GPUs torch's gradients have none
        again = run(case, [x.to(device) for x in given], backend)
        assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


def test_every_op_and_backend_is_among_them() -> None:
    seen = {(case.op, backend) for case, backend, *_ in combinations()}
    have = backends.build()
    for backend, ops in have.ops.items():
        if backend in have.missing or (backend != "cpu" and "cuda" not in DEVICES):
            continue
        # The first is tested with the cache, those in FP8 in test_fp8_on_devices.py.
        forward = {op for op in ops if op in dispatch.OPS} - {"renew_sink_", *dispatch.FP8_OPS}
        assert forward <= {op for op, name in seen if name == backend}


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_in_the_matmul_is_the_tanh_approximation(device: str) -> None:
    """It differs from the exact one by up to 5e-4."""
    torch.manual_seed(0)
    up, x = GELUProjection(64, 256).to(device), 3 * torch.randn(2, 5, 64, device=device)
    with torch.no_grad():
        hidden = up.proj.double()(x.double())
        exact = functional.gelu(hidden, approximate="tanh")
        assert (exact - functional.gelu(hidden)).abs().max() > 1e-4
        ours = up.float()(x)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
