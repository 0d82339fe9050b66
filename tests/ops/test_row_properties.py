"""The row, saliency and loss ops on any size, stride, offset and dtype, against the references in float64.

The error may be twice that of the reference at the same dtype, plus two units in the last place of the
largest value. STREAM_R1_EXAMPLES=2000 draws that many examples in all instead of some hundreds.
"""

import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_r1_kernels import (
    dmd_gradient_,
    dmd_loss,
    gated_add,
    intra_weights,
    modulated_norm,
    qk_norm_rotary,
    region_saliency,
    rms_norm_silu,
)

TESTS = 7
EXAMPLES = math.ceil(int(os.environ.get("STREAM_R1_EXAMPLES", "300")) / TESTS)
examples = settings(max_examples=EXAMPLES, deadline=None)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31 - 1)
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([256, 320, 1536]))
# How a tensor lies in its storage: elements before it, elements between its rows, leading dimensions swapped.
LAYOUTS = st.tuples(st.integers(0, 5000), st.integers(0, 9), st.booleans())


def laid_out(value: Tensor, layout: tuple[int, int, bool], dense_dims: int = 1) -> Tensor:
    """The same values in a larger storage full of NaN; the last `dense_dims` dimensions without gaps."""
    offset, gap, swapped = layout
    lead, row = value.shape[: value.dim() - dense_dims], value.shape[value.dim() - dense_dims :]
    row_length = math.prod(row)
    order = list(range(len(lead)))[:: -1 if swapped else 1]
    strides, step = [0] * len(lead), row_length + gap
    for d in reversed(order):
        strides[d] = step
        step *= max(1, lead[d])
    inner = [math.prod(row[i + 1 :]) for i in range(dense_dims)]
    storage = torch.full((offset + step + 1,), torch.nan).to(value.dtype)
    view = storage.as_strided(value.shape, (*strides, *inner), offset)
    view.copy_(value)
    return view


def results(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], leaves: int, seed: int
):
    """Outputs, and the gradients of the first `leaves` inputs for the same random incoming gradients."""
    inputs = [value.detach().requires_grad_(i < leaves) for i, value in enumerate(inputs)]
    outs = call(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if leaves == 0:
        return outs
    generator = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16() for out in outs]
    grads = torch.autograd.grad(
        outs, inputs[:leaves], [g.to(out.dtype) for g, out in zip(incoming, outs, strict=True)]
    )
    return *(out.detach() for out in outs), *grads


def partial_sum(terms: int) -> float:
    """How far a sum of products of normal numbers wanders on its way."""
    return 8 * math.sqrt(terms)


def check(
    op: Callable, inputs: Sequence[Tensor], leaves: int = 0, seed: int = 0, cancelled: Sequence[float] = ()
) -> None:
    """`cancelled`: of the last results, the size of the float32 terms that may cancel on the way."""
    ours = results(lambda *values: op(*values, backend="cpu"), inputs, leaves, seed)
    plain = results(lambda *values: op(*values, backend="reference"), inputs, leaves, seed)
    exact = results(
        lambda *values: op(*values, backend="reference"), [value.double() for value in inputs], leaves, seed
    )
    terms = [0.0] * (len(exact) - len(cancelled)) + list(cancelled)
    for mine, same, true, term in zip(ours, plain, exact, terms, strict=True):
        assert mine.dtype == same.dtype
        assert mine.shape == true.shape
        if not true.numel():
            continue
        unit = torch.finfo(mine.dtype).eps * true.abs().max()
        smallest = torch.finfo(mine.dtype).smallest_normal * torch.finfo(mine.dtype).eps
        allowed = 2 * (same.double() - true).abs().max() + 2 * unit + smallest + 2**-22 * term
        error = (mine.double() - true).abs().max()
        assert error <= allowed, f"{error} > {allowed}"


@examples
@given(
    batch=st.integers(0, 3),
    frames=st.integers(1, 4),
    tokens=st.integers(0, 70),
    width=WIDTHS,
    dtypes=st.tuples(DTYPES, st.booleans()),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
    seed=SEEDS,
)
@example(1, 2, 8, 51, (torch.float32, False), ((0, 0, False),) * 3, 1e-3, 190428)  # a mean of 400 deviations
def test_modulated_norm(batch, frames, tokens, width, dtypes, layouts, scale, seed):
    torch.manual_seed(seed)
    dtype, wide_modulation = dtypes
    x = (torch.randn(batch, frames * tokens, width) * scale + torch.randn(1)).to(dtype)
    modulation = torch.randn(2, batch, frames, width).to(torch.float32 if wide_modulation else dtype)
    inputs = [laid_out(value, layout) for value, layout in zip((x, *modulation), layouts, strict=True)]
    rstd = (x.double().var(-1, correction=0) + 1e-6).rsqrt() if x.numel() else torch.zeros(1)
    largest = (1 + modulation[1].double().abs()).max().item() * rstd.max().item() if x.numel() else 0.0
    # what the mean takes away from x, once the rest is scaled up
    mean = (x.double().mean(-1).abs() * rstd).max().item() if x.numel() else 0.0
    sums = partial_sum(tokens)
    cancelled = (mean * (1 + modulation[1].abs().max().item() if x.numel() else 0.0), 5 * largest, sums)
    check(modulated_norm, inputs, leaves=3, seed=seed, cancelled=(*cancelled, (1 + mean) * sums))


@examples
@given(
    batch=st.integers(0, 3),
    frames=st.integers(1, 4),
    tokens=st.integers(0, 70),
    width=WIDTHS,
    dtypes=st.tuples(DTYPES, DTYPES, st.booleans()),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=SEEDS,
)
def test_gated_add(batch, frames, tokens, width, dtypes, layouts, seed):
    torch.manual_seed(seed)
    stream, branch, wide_gate = dtypes
    branch = branch if stream == torch.float32 else stream
    x, y = torch.randn(2, batch, frames * tokens, width)
    gate = torch.randn(batch, frames, width).to(torch.float32 if wide_gate else branch)
    values = (x.to(stream), y.to(branch), gate)
    inputs = [laid_out(value, layout) for value, layout in zip(values, layouts, strict=True)]
    check(gated_add, inputs, leaves=3, seed=seed, cancelled=(0, 0, partial_sum(tokens)))


@examples
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 90), st.integers(0, 40), WIDTHS),
    dtypes=st.tuples(DTYPES, DTYPES),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
    joined=st.booleans(),
    seed=SEEDS,
)
def test_rms_norm_silu(sizes, dtypes, layouts, scale, joined, seed):
    torch.manual_seed(seed)
    batch, tokens, leading, width = sizes
    x = (torch.randn(batch, tokens, width) * scale).to(dtypes[0])
    weight, before = torch.randn(width).to(dtypes[1]), torch.randn(batch, leading, width).to(dtypes[0])
    inputs = [laid_out(value, layout) for value, layout in zip((x, weight, before), layouts, strict=True)]
    rstd = (x.double().square().mean(-1) + 1e-6).rsqrt().max().item() if x.numel() else 0.0
    cancelled = (5 * weight.abs().max().item() * rstd, partial_sum(batch * tokens), 0.0)
    leaves = 3 if joined else 2
    check(rms_norm_silu, inputs[:leaves], leaves=leaves, seed=seed, cancelled=cancelled[:leaves])


@examples
@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 90),
    heads=st.integers(1, 5),
    pairs=st.one_of(st.integers(1, 40), st.just(64)),
    dtypes=st.tuples(DTYPES, st.booleans()),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=SEEDS,
)
def test_qk_norm_rotary(batch, tokens, heads, pairs, dtypes, layouts, seed):
    torch.manual_seed(seed)
    dtype, wide_weights = dtypes
    width = 2 * pairs * heads
    q, k = (laid_out(torch.randn(batch, tokens, width).to(dtype), layout) for layout in layouts[:2])
    weights = torch.randn(2, width).to(torch.float32 if wide_weights else dtype).unbind()
    angles = torch.rand(tokens, pairs) * 6.3
    phases = angles.cos(), angles.sin()

    def op(*inputs, backend):
        return qk_norm_rotary(*inputs, num_heads=heads, backend=backend)

    cancelled = [
        5 * weight.abs().max().item() * (value.double().square().mean(-1) + 1e-6).rsqrt().max().item()
        if value.numel()
        else 0.0
        for value, weight in zip((q, k), weights, strict=True)
    ]
    check(
        op,
        [q, k, *weights, *phases],
        leaves=4,
        seed=seed,
        cancelled=(*cancelled, *[partial_sum(batch * tokens)] * 2),
    )
    slot = laid_out(torch.zeros(batch, tokens, heads, 2 * pairs, dtype=dtype), layouts[2])
    with torch.no_grad():
        expected_q, expected_k = op(q, k, *weights, *phases, backend="cpu")
        got_q, got_k = qk_norm_rotary(q, k, *weights, *phases, num_heads=heads, k_out=slot, backend="cpu")
    assert got_k is slot
    assert torch.equal(got_q, expected_q)
    assert torch.equal(slot, expected_k)


@examples
@given(
    lead=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    frames=st.integers(1, 4),
    factor=st.integers(1, 4),
    channels=st.sampled_from([1, 3, 4]),
    cells=st.tuples(*[st.integers(1, 9)] * 2),
    cell=st.tuples(*[st.integers(1, 9)] * 2),
    dtype=DTYPES,
    layout=LAYOUTS,
    seed=SEEDS,
)
def test_region_saliency(lead, frames, factor, channels, cells, cell, dtype, layout, seed):
    torch.manual_seed(seed)
    pictures = (1 + factor * (frames - 1), channels, cells[0] * cell[0], cells[1] * cell[1])
    grads = laid_out(torch.randn(*lead, *pictures).to(dtype), layout)

    def op(value, backend):
        return region_saliency(value, (frames, *cells), backend=backend)

    check(op, [grads])


@examples
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 3), *[st.integers(1, 12)] * 3),
    dtype=DTYPES,
    layout=LAYOUTS,
    temperature=st.floats(0.1, 10),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
    parts=st.tuples(st.booleans(), st.booleans()),
    seed=SEEDS,
)
def test_intra_weights(sizes, dtype, layout, temperature, shares, parts, seed):
    torch.manual_seed(seed)
    saliency = laid_out((torch.rand(sizes) + 0.05).to(dtype), layout)
    scores = torch.randn(sizes[1], sizes[0])
    options = dict(
        zip(
            ("spatial_floor", "temporal_floor", "spatial_strength", "temporal_strength"),
            (0.05 + 0.95 * shares[0], 0.05 + 0.95 * shares[1], *shares[2:]),
            strict=True,
        )
    )

    def op(*inputs, backend):
        return intra_weights(
            *inputs,
            temperature=temperature,
            use_spatial=parts[0],
            use_temporal=parts[1],
            backend=backend,
            **options,
        )

    cancelled = 0.0
    if saliency.numel():
        weight = torch.softmax(-scores.double() / temperature, 1)
        fused = torch.einsum("bm,mbfhw->bfhw", weight, saliency.double())
        profiles = [fused.flatten(2)] if parts[0] else []
        profiles += [fused.mean((2, 3))] if parts[1] else []
        # A profile runs up to 1 over a range that may be a small part of its values.
        amplified = 0.0
        for values in profiles:
            high, low = values.amax(-1), values.amin(-1)
            amplified += torch.where(high > low, high / (high - low), 0.0).max().item()
        largest = op(saliency.double(), scores.double(), backend="reference").max().item()
        cancelled = (sizes[0] + 1) / 2 * amplified * largest
    check(op, [saliency, scores], cancelled=[cancelled])


@examples
@given(
    shape=st.tuples(st.integers(0, 3), *[st.integers(1, 4)] * 2, *[st.integers(1, 40)] * 2),
    dtype=DTYPES,
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS, LAYOUTS),
    magnitude=st.sampled_from([1.0, 1e-4, 1e4, 1e-18, 1e18]),
    used=st.tuples(*[st.booleans()] * 4),
    broadcast=st.tuples(*[st.booleans()] * 5),
    seed=SEEDS,
)
def test_dmd(shape, dtype, layouts, magnitude, used, broadcast, seed):
    torch.manual_seed(seed)
    if dtype == torch.float16:  # whose range is small
        magnitude = min(max(magnitude, 1e-2), 1e3)
    # One in a hundred is of another size: it must neither be lost nor drown the rest.
    values = torch.randn(4, *shape) * magnitude * torch.where(torch.rand(4, *shape) < 0.01, 30.0, 1.0)
    x, fake, cond, uncond = (
        laid_out(value.to(dtype), layout, 2) for value, layout in zip(values, layouts, strict=True)
    )
    part = [size if full else 1 for size, full in zip(shape, broadcast, strict=True)]
    options = {
        "w_intra": torch.rand(part) + 0.1 if used[0] else None,
        "w_inter": torch.rand(shape[0]) + 0.1 if used[1] else None,
        "mask": torch.rand(part) < 0.7 if used[2] else None,
    }
    others = [fake, cond, uncond] if used[3] else [fake, cond]

    def loss(*inputs, backend):
        return dmd_loss(*inputs, **options, backend=backend)

    fake64, cond64, uncond64 = (value.double() for value in (fake, cond, uncond if used[3] else cond))
    real = cond64 + 3.0 * (cond64 - uncond64)
    normaliser = (x.double() - real).abs().mean((1, 2, 3, 4), keepdim=True)
    g = (fake64 - real) / normaliser
    # the terms of g, which may cancel; what g weighs in the loss
    terms = (fake64.abs() + cond64.abs() + 3.0 * (cond64.abs() + uncond64.abs())) / normaliser
    weight = torch.zeros(shape, dtype=torch.float64)
    unit_direction = (x.double(), real + normaliser, real)  # of which g is 1
    dmd_gradient_(weight, *unit_direction, **options, backend="reference")
    reach = (weight * terms).nan_to_num(0.0, 0.0, 0.0)  # an element that is not finite counts as 0
    cancelled = ((reach * g.abs().nan_to_num()).sum().item(), reach.max().item()) if x.numel() else ()
    check(loss, [x, *others], leaves=1, seed=seed, cancelled=cancelled)
    exact = torch.zeros(shape, dtype=torch.float64)
    dmd_gradient_(exact, x.double(), *(value.double() for value in others), **options, backend="reference")
    buffer = torch.zeros(shape)
    dmd_gradient_(buffer, x, *others, **options, backend="cpu")
    torch.testing.assert_close(
        buffer.double(), exact, rtol=1e-5, atol=2e-6 * (exact.abs().max().item() if exact.numel() else 0)
    )


@pytest.mark.parametrize("op", [modulated_norm, gated_add, rms_norm_silu])
def test_strides_past_two_to_the_31(op):
    """Two samples 2^31 elements apart; the memory between them is reserved and never touched."""
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 6, 40), (2**31, 40, 1))
    far.copy_(torch.randn(2, 6, 40))
    modulation = torch.randn(2, 2, 3, 40)
    inputs = {
        modulated_norm: (far, *modulation),
        gated_add: (far, far, modulation[0]),
        rms_norm_silu: (far, modulation[0, 0, 0], far),
    }[op]
    near = [value.clone(memory_format=torch.contiguous_format) for value in inputs]
    assert torch.equal(op(*inputs, backend="cpu"), op(*near, backend="cpu"))
