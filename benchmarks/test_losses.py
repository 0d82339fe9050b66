"""Saliency, weights and the weighted loss

    pytest benchmarks/test_losses.py --benchmark-only

Full size is 480p: 21 latent frames, and the pixel gradients of 21 frames by the reward's three axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import published
from benchmarks.case import DTYPES, Case, Run, check_and_time, compiled, parametrize, with_grads
from stream_r1_kernels import dmd_gradient_, dmd_loss, intra_weights, region_saliency

LATENTS = {"tiny": (4, 9, 48, 8, 14), "480p": (1, 21, 16, 60, 104)}
PIXELS = {  # pixel gradients [M, B, T, 3, H, W], latent shape (F, h, w)
    "tiny": ((3, 4, 33, 3, 64, 112), (9, 8, 14)),
    "480p": ((3, 1, 21, 3, 480, 832), (6, 60, 104)),
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def saliency_case(size: str, dtype: str) -> dict[str, Run]:
    shape, latent_shape = PIXELS[size]
    grads = torch.randn(shape).to(DTYPES[dtype])
    reference = partial(region_saliency, backend="reference")
    return {
        "ours": partial(region_saliency, grads, latent_shape),
        "eager": partial(reference, grads, latent_shape),
        "compiled": compiled(reference, grads, latent_shape),
    }


def weights_case(size: str) -> dict[str, Run]:
    batch, frames, _, rows, columns = LATENTS[size]
    saliency, scores = torch.rand(3, batch, frames, rows, columns), torch.randn(batch, 3)
    reference = partial(intra_weights, backend="reference")
    return {
        "ours": partial(intra_weights, saliency, scores),
        "eager": partial(reference, saliency, scores),
        "compiled": compiled(reference, saliency, scores),
    }


def loss_case(size: str, dtype: str, weighted: bool) -> dict[str, Run]:
    """Forward and backward. The published loss knows no weights: a baseline of the plain case only."""
    batch, frames, _, rows, columns = LATENTS[size]
    x, fake, cond, uncond = (torch.randn(LATENTS[size]).to(DTYPES[dtype]) for _ in range(4))
    x.requires_grad_()
    options = {}
    if weighted:
        options = {"w_intra": torch.rand(batch, frames, 1, rows, columns), "w_inter": torch.rand(batch)}
    reference = partial(dmd_loss, backend="reference", **options)
    calls: dict[str, Run] = {
        "ours": partial(dmd_loss, x, fake, cond, uncond, **options),
        "eager": partial(reference, x, fake, cond, uncond),
        "compiled": compiled(reference, x, fake, cond, uncond),
        "published": partial(published.dmd_loss, x, fake, cond, uncond),
    }
    return {name: with_grads(call, [x]) for name, call in calls.items()}


def gradient_case(size: str, dtype: str) -> dict[str, Run]:
    batch, frames, _, rows, columns = LATENTS[size]
    x, fake, cond, uncond = (torch.randn(LATENTS[size]).to(DTYPES[dtype]) for _ in range(4))
    weights = {"w_intra": torch.rand(batch, frames, 1, rows, columns), "w_inter": torch.rand(batch)}
    reference = partial(dmd_gradient_, backend="reference", **weights)
    inputs = x, fake, cond, uncond
    # scale = 0 would be no work: the buffer's sum grows with every round, as in training, and stays finite
    checked, timed = torch.zeros_like(x), torch.zeros_like(x)

    def run(op: Callable) -> Run:
        first = True

        def add() -> torch.Tensor:
            nonlocal first
            if first:  # the call that is compared
                first = False
                return op(checked.clone(), *inputs)
            return op(timed, *inputs)

        return add

    return {
        "ours": run(partial(dmd_gradient_, **weights)),
        "eager": run(reference),
        "compiled": run(compiled(reference)),
    }


def cases() -> Iterator[Case]:
    for size, (pixels, _) in PIXELS.items():
        for dtype in TOLERANCE:
            yield Case(
                op="region_saliency",
                size=size,
                dtype=dtype,
                shape=pixels,
                build=partial(saliency_case, size, dtype),
                bytes=torch.Size(pixels).numel() * DTYPES[dtype].itemsize,
            )
    for size, latents in LATENTS.items():
        batch, frames, _, rows, columns = latents
        cells = batch * frames * rows * columns
        yield Case(
            op="intra_weights",
            size=size,
            dtype="float32",
            shape=(3, batch, frames, rows, columns),
            build=partial(weights_case, size),
            bytes=(3 + 1) * cells * 4,
        )
        numel = torch.Size(latents).numel()
        for dtype in TOLERANCE:
            tensor = numel * DTYPES[dtype].itemsize
            for weighted in (False, True):
                yield Case(
                    op=f"dmd_loss {'weighted' if weighted else 'plain'} forward + backward",
                    size=size,
                    dtype=dtype,
                    shape=latents,
                    build=partial(loss_case, size, dtype, weighted),
                    # forward: four inputs, the gradient's direction; backward: direction to gradient
                    bytes=7 * tensor,
                    tolerance=TOLERANCE[dtype],
                    baselines=("eager", "compiled") if weighted else ("eager", "compiled", "published"),
                )
            yield Case(
                op="dmd_gradient_",
                size=size,
                dtype=dtype,
                shape=latents,
                build=partial(gradient_case, size, dtype),
                # the normaliser comes first: x, cond, uncond; then fake, cond, uncond, the buffer twice
                bytes=8 * tensor,
                tolerance=TOLERANCE[dtype],
            )


@parametrize(list(cases()))
def test_losses(benchmark: Callable, case: Case, implementation: str) -> None:
    check_and_time(benchmark, case, implementation)
