import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_r1_kernels import intra_weights, region_saliency

BACKENDS = ["cpu", "reference"]


def saliency_cell_by_cell(grads: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """[B, T, C, H, W] in float64, each latent cell cut out by hand."""
    batch, pixel_frames, _, height, width = grads.shape
    factor = 0 if frames == 1 else (pixel_frames - 1) // (frames - 1)
    cell_height, cell_width = height // rows, width // columns
    out = torch.empty(batch, frames, rows, columns, dtype=torch.float64)
    for b, f, i, j in itertools.product(range(batch), range(frames), range(rows), range(columns)):
        times = [0] if f == 0 else list(range(factor * (f - 1) + 1, factor * f + 1))
        vertical = slice(i * cell_height, (i + 1) * cell_height)
        cell = grads[b, times, :, vertical, j * cell_width : (j + 1) * cell_width].double()
        out[b, f, i, j] = cell.square().sum(1).sqrt().mean()
    return out


def weights_by_hand(saliency: Tensor, scores: Tensor, **options) -> Tensor:
    """[M, B, F, h, w] in float64, sample by sample and frame by frame."""
    o = {
        "temperature": 1.0,
        "spatial_floor": 0.15,
        "temporal_floor": 0.2,
        "spatial_strength": 1.0,
        "temporal_strength": 1.0,
        "use_spatial": True,
        "use_temporal": True,
    } | options
    saliency, scores = saliency.double(), scores.double()

    def scaled(values: Tensor, strength: float, floor: float) -> Tensor:
        if values.max() - values.min() <= 1e-6 * values.max():
            return torch.ones_like(values)
        p = (values - values.min()) / (values.max() - values.min())
        p = ((1 - strength) + strength * p).clamp(min=floor)
        return p / p.mean()

    samples = []
    for b in range(saliency.shape[1]):
        share = (-scores[b] / o["temperature"]).exp()
        fused = sum(share[m] / share.sum() * saliency[m, b] for m in range(saliency.shape[0]))
        profile = torch.stack([frame.mean() for frame in fused])
        tau = scaled(profile, o["temporal_strength"], o["temporal_floor"])
        frames = []
        for f, frame in enumerate(fused):
            sigma = scaled(frame, o["spatial_strength"], o["spatial_floor"])
            frames.append(
                (tau[f] if o["use_temporal"] else 1.0)
                * (sigma if o["use_spatial"] else torch.ones_like(sigma))
            )
        sample = torch.stack(frames)
        samples.append(sample / sample.mean())
    return torch.stack(samples).unsqueeze(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "latent_shape"),
    [
        ((2, 9, 3, 16, 24), (3, 2, 3)),
        ((1, 1, 3, 8, 8), (1, 1, 1)),
        ((2, 5, 3, 6, 35), (5, 3, 5)),
        ((1, 7, 3, 4, 9), (3, 4, 9)),
        ((1, 3, 4, 8, 8), (2, 2, 2)),
        ((0, 5, 3, 8, 8), (2, 2, 2)),
    ],
)
def test_region_saliency_is_the_mean_of_each_cell(shape, latent_shape, dtype, backend):
    torch.manual_seed(0)
    grads = torch.randn(shape).to(dtype)
    got = region_saliency(grads, latent_shape, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), saliency_cell_by_cell(grads, *latent_shape), rtol=2e-6, atol=0)


def test_region_saliency_of_many_axes_and_strided_gradients():
    torch.manual_seed(0)
    channels_first = torch.randn(2, 2, 3, 5, 16, 32)[..., ::2]  # [M, B, 3, T, H, W]
    grads = channels_first.transpose(2, 3)
    got = region_saliency(grads, (2, 4, 4), backend="cpu")
    assert got.shape == (2, 2, 2, 4, 4)
    for axis in range(2):
        truth = saliency_cell_by_cell(grads[axis], 2, 4, 4)
        torch.testing.assert_close(got[axis].double(), truth, rtol=2e-6, atol=0)
    rows_dense = torch.randn(2, 2, 3, 5, 16, 16).transpose(2, 3)
    assert torch.equal(
        region_saliency(rows_dense, (2, 4, 4), backend="cpu"),
        region_saliency(rows_dense.contiguous(), (2, 4, 4), backend="cpu"),
    )


@pytest.mark.parametrize("pixel_frame", range(9))
def test_a_bright_patch_lands_in_its_cell_and_frame(pixel_frame):
    grads = torch.zeros(1, 9, 3, 32, 48)
    grads[0, pixel_frame, :, 8:16, 40:48] = 1
    saliency = region_saliency(grads, (3, 4, 6))
    latent_frame = 0 if pixel_frame == 0 else (pixel_frame + 3) // 4
    assert saliency.nonzero().tolist() == [[0, latent_frame, 1, 5]]
    weights = intra_weights(saliency.unsqueeze(0), torch.zeros(1, 1))
    assert weights.flatten().argmax() == saliency.flatten().argmax()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_spatial": False},
        {"use_temporal": False},
        {"use_spatial": False, "use_temporal": False},
        {"temperature": 0.3, "spatial_floor": 0.0, "temporal_floor": 0.0},
        {"spatial_strength": 0.5, "temporal_strength": 0.7},
        {"spatial_strength": 0.0, "temporal_strength": 1.0},
        {"spatial_floor": 1.0, "temporal_floor": 0.6},
    ],
)
def test_intra_weights_against_float64(options, dtype, backend):
    torch.manual_seed(0)
    saliency, scores = torch.rand(3, 2, 5, 4, 7).to(dtype), torch.randn(2, 3)
    got = intra_weights(saliency, scores, **options, backend=backend)
    assert got.dtype == torch.float32
    # Min-max over frame means that lie close together costs digits in float32.
    torch.testing.assert_close(
        got.double(), weights_by_hand(saliency, scores, **options), rtol=1e-5, atol=3e-5
    )


@settings(max_examples=50, deadline=None)
@given(
    axes=st.integers(1, 4),
    frames=st.integers(1, 6),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    magnitude=st.floats(-20, 6),
    constant_frame=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 1000),
)
def test_the_mean_is_one_and_the_floors_hold(
    axes, frames, rows, columns, magnitude, constant_frame, backend, seed
):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(axes, 3, frames, rows, columns, generator=generator) * 10**magnitude
    if constant_frame:
        saliency[:, :, 0] = saliency[:, :, :1, :1, :1].squeeze(2)
    scores = torch.randn(3, axes, generator=generator) * 3
    weights = intra_weights(saliency, scores, backend=backend)
    torch.testing.assert_close(weights.double().mean((1, 2, 3, 4)), torch.ones(3).double(), rtol=0, atol=5e-7)
    maps = weights / weights.mean((3, 4), keepdim=True)
    assert (maps >= 0.15 * maps.amax((3, 4), keepdim=True) * (1 - 1e-5)).all()
    profile = weights.mean((2, 3, 4))
    assert (profile >= 0.2 * profile.amax(1, keepdim=True) * (1 - 1e-5)).all()
    if constant_frame:
        torch.testing.assert_close(maps[:, 0], torch.ones_like(maps[:, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_properties_of_the_fusion(backend):
    torch.manual_seed(0)
    saliency, scores = torch.rand(3, 4, 3, 4, 5), torch.randn(4, 3)
    weights = intra_weights(saliency, scores, backend=backend)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(intra_weights(saliency[:, order], scores[order], backend=backend), weights[order])
    # The scale of the saliency, a common offset of the scores and the order of the axes have no effect.
    for same in (
        intra_weights(saliency * 1e-9, scores, backend=backend),
        intra_weights(saliency, scores + 5, backend=backend),
        intra_weights(saliency.flip(0), scores.flip(1), backend=backend),
    ):
        torch.testing.assert_close(same, weights, rtol=1e-5, atol=1e-6)
    # An axis far weaker than the others decides alone.
    weak = torch.tensor([[-200.0, 0.0, 0.0]]).expand(4, 3)
    alone = intra_weights(saliency[:1], weak[:, :1], backend=backend)
    torch.testing.assert_close(intra_weights(saliency, weak, backend=backend), alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_saliency_gives_ones_in_spite_of_rounding(backend):
    ones = torch.ones(2, 4, 1, 9, 11)
    for saliency in (torch.zeros(3, 2, 4, 9, 11), torch.full((3, 2, 4, 9, 11), 0.1)):
        weights = intra_weights(saliency, torch.randn(2, 3), backend=backend)
        torch.testing.assert_close(weights, ones, rtol=1e-6, atol=0)
    # The same cells in another order in each frame: the frame means differ by rounding alone.
    cells = torch.rand(99)
    shuffled = torch.stack([cells[torch.randperm(99)] for _ in range(4)]).view(1, 1, 4, 9, 11)
    weights = intra_weights(shuffled, torch.zeros(1, 1), use_spatial=False, backend=backend)
    torch.testing.assert_close(weights, ones[:1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_is_nan_and_the_others_are_not(bad, backend):
    torch.manual_seed(0)
    saliency, scores = torch.rand(2, 3, 3, 4, 4), torch.randn(3, 2)
    good = intra_weights(saliency, scores, backend=backend)
    saliency[1, 1, 0, 2, 2] = bad
    weights = intra_weights(saliency, scores, backend=backend)
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], good[[0, 2]])


def test_empty_batch():
    assert intra_weights(torch.rand(3, 0, 2, 4, 4), torch.rand(0, 3), backend="cpu").shape == (0, 2, 1, 4, 4)


def test_opcheck_and_compile():
    torch.manual_seed(0)
    grads, scores = torch.randn(2, 2, 5, 3, 8, 8), torch.randn(2, 2)
    torch.library.opcheck(torch.ops.stream_r1.region_saliency, (grads, 2, 4, 4))
    saliency = region_saliency(grads, (2, 4, 4))
    settings_ = (1.0, 0.15, 0.2, 1.0, 1.0, True, True)
    torch.library.opcheck(torch.ops.stream_r1.intra_weights, (saliency, scores, *settings_))

    def both(grads, scores):
        return intra_weights(region_saliency(grads, (2, 4, 4), backend="cpu"), scores, backend="cpu")

    compiled = torch.compile(both, fullgraph=True)
    assert torch.equal(compiled(grads, scores), both(grads, scores))


GRADS, SALIENCY, SCORES = torch.zeros(1, 9, 3, 16, 16), torch.ones(3, 2, 3, 2, 2), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: region_saliency(GRADS[0], (3, 2, 2)), ValueError, "pixel_grads: expected shape"),
        (lambda: region_saliency(GRADS.int(), (3, 2, 2)), TypeError, "pixel_grads: expected float32"),
        (lambda: region_saliency(GRADS, (4, 2, 2)), ValueError, r"T = 1 \+ k \(F - 1\).*F = 4.*got T = 9"),
        (lambda: region_saliency(GRADS, (1, 2, 2)), ValueError, "F = 1 latent frames .* got T = 9"),
        (lambda: region_saliency(GRADS[:, :1], (3, 2, 2)), ValueError, "got T = 1"),
        (lambda: region_saliency(GRADS, (3, 3, 2)), ValueError, "picture of 16 x 16, got 3 x 2"),
        (lambda: region_saliency(GRADS, (3, 2)), ValueError, "latent_shape: expected"),
        (
            lambda: region_saliency(GRADS.clone().requires_grad_(), (3, 2, 2)),
            ValueError,
            r"pixel_grads\.detach\(\)",
        ),
        (lambda: intra_weights(SALIENCY[0], SCORES), ValueError, "saliency: expected shape"),
        (
            lambda: intra_weights(SALIENCY, SCORES.T),
            ValueError,
            r"scores: expected shape \[B, M\] = \[2, 3\]",
        ),
        (lambda: intra_weights(SALIENCY.long(), SCORES), TypeError, "saliency: expected float32"),
        (lambda: intra_weights(SALIENCY, SCORES, temperature=0), ValueError, "temperature: .* > 0, got 0"),
        (
            lambda: intra_weights(SALIENCY, SCORES, spatial_floor=1.5),
            ValueError,
            r"spatial_floor: .*\[0, 1\], got 1.5",
        ),
        (
            lambda: intra_weights(SALIENCY, SCORES, temporal_strength=-1),
            ValueError,
            "temporal_strength: .*got -1",
        ),
        (lambda: intra_weights(SALIENCY, SCORES.clone().requires_grad_()), ValueError, r"scores\.detach\(\)"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
