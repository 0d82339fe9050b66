"""The AdaLN, saliency, weighting and DMD kernels beside their references, eager and compiled, tiny and full

    pytest benchmarks/test_norm_saliency_dmd.py --benchmark-only

Every case is checked before it is timed: our result must agree with the reference's.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from stream_r1_kernels import (
    dmd_gradient_,
    dmd_loss,
    gated_add,
    intra_weights,
    modulated_norm,
    region_saliency,
)

Op = Callable[..., Tensor]
Run = Callable[[Op], Tensor | tuple[Tensor, ...]]  # calls the implementation it is given on the case's inputs

TOKENS = {  # batch, tokens, frames, width
    "B1-T84-D256": (1, 84, 3, 256),
    "B8-T168-D256": (8, 168, 6, 256),
    "B1-T4680-D1536": (1, 4680, 3, 1536),
}
LATENTS = {"tiny-8x6x48x8x14": (8, 6, 48, 8, 14), "480p-1x21x16x60x104": (1, 21, 16, 60, 104)}
PIXELS = {  # pixel gradients, latent shape
    "tiny-3x8x21x3x64x112": ((3, 8, 21, 3, 64, 112), (6, 8, 14)),
    "480p-3x1x21x3x480x832": ((3, 1, 21, 3, 480, 832), (6, 60, 104)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def grads_of(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def modulated_norm_case(size: str, dtype: str, train: bool) -> Run:
    batch, tokens, frames, width = TOKENS[size]
    x = torch.randn(batch, tokens, width, dtype=DTYPES[dtype], requires_grad=train)
    table = torch.randn(batch, frames, 6, width)
    shift, scale = (table[:, :, i].detach().requires_grad_(train) for i in (0, 1))

    def run(op: Op) -> Tensor | tuple[Tensor, ...]:
        out = op(x, shift, scale)
        return grads_of(out, [x, shift, scale]) if train else out

    return run


def gated_add_case(size: str, dtype: str, train: bool) -> Run:
    batch, tokens, frames, width = TOKENS[size]
    x, y = (torch.randn(batch, tokens, width, dtype=DTYPES[dtype], requires_grad=train) for _ in range(2))
    gate = torch.randn(batch, frames, 6, width)[:, :, 2].requires_grad_(train)

    def run(op: Op) -> Tensor | tuple[Tensor, ...]:
        out = op(x, y, gate)
        return grads_of(out, [x, y, gate]) if train else out

    return run


def region_saliency_case(size: str) -> Run:
    shape, latent_shape = PIXELS[size]
    pixel_grads = torch.randn(shape)
    return lambda op: op(pixel_grads, latent_shape)


def intra_weights_case(size: str) -> Run:
    batch, frames, _, rows, columns = LATENTS[size]
    saliency, scores = torch.rand(3, batch, frames, rows, columns), torch.randn(batch, 3)
    return lambda op: op(saliency, scores)


def dmd_case(size: str, dtype: str, accumulate: bool) -> Run:
    shape = LATENTS[size]
    batch, frames, _, rows, columns = shape
    x, fake, cond, uncond = (torch.randn(shape, dtype=DTYPES[dtype]) for _ in range(4))
    weights = {"w_intra": torch.rand(batch, frames, 1, rows, columns), "w_inter": torch.rand(batch)}
    leaf = x.clone().requires_grad_()

    def run(op: Op) -> Tensor | tuple[Tensor, ...]:
        if accumulate:
            return op(torch.zeros_like(x), x, fake, cond, uncond, **weights)
        return grads_of(op(leaf, fake, cond, uncond, **weights), [leaf])

    return run


CASES: dict[str, tuple[Op, Callable[[], Run]]] = {}
for size in TOKENS:
    for dtype in DTYPES:
        for train in (False, True):
            name = f"{size} {dtype} {'forward+backward' if train else 'forward'}"
            CASES[f"modulated_norm {name}"] = modulated_norm, partial(modulated_norm_case, size, dtype, train)
            CASES[f"gated_add {name}"] = gated_add, partial(gated_add_case, size, dtype, train)
for size in PIXELS:
    CASES[f"region_saliency {size}"] = region_saliency, partial(region_saliency_case, size)
for size in LATENTS:
    CASES[f"intra_weights {size}"] = intra_weights, partial(intra_weights_case, size)
    for dtype in DTYPES:
        CASES[f"dmd_loss {size} {dtype} forward+backward"] = dmd_loss, partial(dmd_case, size, dtype, False)
        CASES[f"dmd_gradient_ {size} {dtype}"] = dmd_gradient_, partial(dmd_case, size, dtype, True)


def check(run: Run, ours: Op, plain: Op, tolerance: float) -> None:
    results = [value if isinstance(value, tuple) else (value,) for value in (run(ours), run(plain))]
    for got, expected in zip(*results, strict=True):
        error = (got.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), f"wrong by {error}: not timed"


@pytest.mark.parametrize("implementation", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_against_reference(benchmark, case: str, implementation: str) -> None:
    torch.manual_seed(0)
    op, build = CASES[case]
    run, ours, plain = build(), partial(op, backend="cpu"), partial(op, backend="reference")
    check(run, ours, plain, 3e-2 if "bfloat16" in case else 2e-4)
    benchmark.group = case
    if implementation == "compiled":
        torch._dynamo.reset()
        plain = torch.compile(plain)
        run(plain)
    benchmark(run, ours if implementation == "ours" else plain)
