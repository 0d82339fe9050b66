import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_rewards import FlatReward, PatchReward, SmoothReward

from stream_r1.distill.weighting import AxisBalance, StreamR1Weights
from stream_r1_kernels import dmd_loss

LATENT = (3, 4, 6)
PROMPTS = ["a red rabbit", "a green meadow"]


def video(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 9, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.sampled_from(["spatial", "temporal", "no-balance", "full"]))
@settings(max_examples=20, deadline=None)
def test_intra_weights_have_mean_one_and_are_positive(seed: int, mode: str) -> None:
    w = StreamR1Weights(SmoothReward(), mode)(video(seed=seed), PROMPTS, LATENT)
    assert w.intra.shape == (2, 3, 1, 4, 6)
    assert w.inter.shape == (2,)
    assert w.scores.shape == (2, 3)
    torch.testing.assert_close(w.intra.mean(dim=(1, 2, 3, 4)), torch.ones(2))
    assert (w.intra > 0).all()
    assert (w.inter > 0).all()
    assert not any(part.requires_grad for part in (w.inter, w.intra, w.scores))


def test_floors_hold() -> None:
    # All saliency in one cell: elsewhere the spatial weight is floor / mean, so the ratio to the peak is the
    # floor.
    reward = PatchReward(slice(1, 5), slice(4, 8), slice(8, 12))
    w = StreamR1Weights(reward, "spatial", spatial_floor=0.3)(video(), PROMPTS, LATENT)
    frame = w.intra[:, 1, 0].flatten(1)
    torch.testing.assert_close(frame.min(dim=1).values / frame.max(dim=1).values, torch.full((2,), 0.3))
    w = StreamR1Weights(reward, "temporal", temporal_floor=0.25)(video(), PROMPTS, LATENT)
    profile = w.intra.mean(dim=(2, 3, 4))
    torch.testing.assert_close(profile[:, 0] / profile[:, 1], torch.full((2,), 0.25))
    torch.testing.assert_close(profile[:, 2], profile[:, 0])


@pytest.mark.parametrize(("frame", "row", "column"), [(0, 0, 0), (1, 2, 5), (2, 3, 1)])
def test_a_bright_patch_is_found_where_it_is(frame: int, row: int, column: int) -> None:
    pixel_frames = slice(0, 1) if frame == 0 else slice(4 * frame - 3, 4 * frame + 1)
    reward = PatchReward(pixel_frames, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
    w = StreamR1Weights(reward)(video(), PROMPTS, LATENT)
    assert w.saliency is not None
    assert w.saliency.shape == (3, 2, *LATENT)
    where = torch.zeros(LATENT, dtype=torch.bool)
    where[frame, row, column] = True
    assert (w.saliency[..., where] > 0).all()
    assert (w.saliency[..., ~where] == 0).all()
    peaks = w.intra.flatten(1).argmax(dim=1)
    assert peaks.tolist() == [where.flatten().int().argmax().item()] * 2


def test_uniform_saliency_gives_plain_dmd() -> None:
    w = StreamR1Weights(FlatReward())(video(), PROMPTS, LATENT)
    g = torch.Generator().manual_seed(1)
    x, fake, cond, uncond = torch.randn(4, 2, 3, 5, 4, 6, generator=g)
    x.requires_grad_()
    weighted = dmd_loss(x, fake, cond, uncond, w_inter=w.inter, w_intra=w.intra)
    plain = dmd_loss(x, fake, cond, uncond)
    torch.testing.assert_close(weighted, plain)
    torch.testing.assert_close(torch.autograd.grad(weighted, x), torch.autograd.grad(plain, x))


def test_permuting_the_batch_permutes_the_weights() -> None:
    pixels, prompts = video(4), ["red one", "two", "a red three", "four and more"]
    order = [2, 0, 3, 1]
    weights = StreamR1Weights(SmoothReward(), history=2)
    shuffled = StreamR1Weights(SmoothReward(), history=2)
    for seed in (5, 6, 7):  # the balance has a say from the third update on
        pixels = video(4, seed)
        a = weights(pixels, prompts, LATENT)
        b = shuffled(pixels[order], [prompts[i] for i in order], LATENT)
        torch.testing.assert_close(b.inter, a.inter[order])
        torch.testing.assert_close(b.intra, a.intra[order])
        torch.testing.assert_close(b.scores, a.scores[order])
    assert a.log["balance/penalty"] > 0


def test_batches_split_for_memory_are_the_same() -> None:
    prompts = ["red", "b", "c red", "d", "e"]
    whole = StreamR1Weights(SmoothReward())(video(5), prompts, LATENT)
    split = StreamR1Weights(SmoothReward(), samples_at_once=2)(video(5), prompts, LATENT)
    for a, b in zip(whole[:4], split[:4], strict=True):
        torch.testing.assert_close(a, b)


def test_modes_use_what_they_say() -> None:
    pixels = video()
    scores = SmoothReward().score(pixels, PROMPTS)
    recent, older = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.0, 0.3, 0.0]])
    penalty = (recent - older).std().item()  # over the axes, unbiased
    got = {}
    for mode in ("uniform", "re-dmd", "spatial", "temporal", "no-balance", "full"):
        weights = StreamR1Weights(SmoothReward(), mode, history=2)
        weights.history.observe(older)
        weights.history.observe(recent)
        got[mode] = weights(pixels, PROMPTS, LATENT)
    ones = torch.ones(2)
    torch.testing.assert_close(got["uniform"].inter, ones)
    torch.testing.assert_close(got["re-dmd"].inter, (2 * scores[:, 1]).exp())
    torch.testing.assert_close(got["no-balance"].inter, (2 * scores.mean(1)).exp())
    for mode in ("spatial", "temporal", "full"):
        torch.testing.assert_close(got[mode].inter, (2 * (scores.mean(1) - 0.5 * penalty)).exp())
    for mode in ("uniform", "re-dmd"):
        assert (got[mode].intra == 1).all()
        assert got[mode].saliency is None
    profile, maps = got["temporal"].intra, got["spatial"].intra
    torch.testing.assert_close(profile, profile.mean(dim=(3, 4), keepdim=True).expand_as(profile))
    torch.testing.assert_close(maps.mean(dim=(3, 4)), torch.ones(2, 3, 1))
    torch.testing.assert_close(got["full"].intra, got["no-balance"].intra)
    torch.testing.assert_close(got["full"].intra, profile * maps)
    assert profile.std() > 0.01
    assert maps.std() > 0.01


def test_balance_is_the_spread_of_the_axes_rises() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(70, 4, 3, generator=g, dtype=torch.float64)
    balance = AxisBalance(3, window=50)
    for i, update in enumerate(scores):
        balance.observe(update)
        if i < 49:
            assert balance.penalty() == 0.0
    means = scores.mean(dim=1)[-50:].numpy()
    rises = means[25:].mean(axis=0) - means[:25].mean(axis=0)
    assert balance.penalty() == pytest.approx(rises.std(ddof=1))
    again = AxisBalance(3, window=50)
    again.load_state_dict(balance.state_dict())
    assert again.penalty() == balance.penalty()
    assert len(again) == 50


def test_scores_that_are_not_finite_never_enter_the_history() -> None:
    balance = AxisBalance(2, window=2)
    balance.observe(torch.tensor([[math.nan, 1.0], [2.0, 3.0]]))
    balance.observe(torch.tensor([[math.inf, 1.0]]))
    assert balance.state_dict()["history"] == [[2.0, 3.0]]


def test_the_bound_acts_on_extremes_only_and_is_reported() -> None:
    class Extreme:
        axes = ("VQ",)

        def score(self, video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return torch.tensor([[3.0], [50.0], [-50.0], [0.0]]) + 0 * video.mean()

    prompts = ["a"] * 4
    w = StreamR1Weights(Extreme())(video(4), prompts, LATENT)
    torch.testing.assert_close(w.inter.log(), torch.tensor([6.0, 8.0, -8.0, 0.0]))
    assert w.log["inter/bounded"] == 0.5
    free = StreamR1Weights(Extreme(), log_bound=None)(video(4), prompts, LATENT)
    assert free.inter[1] == torch.tensor(100.0).exp()
    assert free.log["inter/bounded"] == 0.0


def test_an_axis_without_pixels_has_no_saliency() -> None:
    class Deaf:
        axes = ("VQ", "TA")

        def score(self, video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return torch.stack([video[:, :, :, :2].mean(dim=(1, 2, 3, 4)), torch.zeros(len(prompts))], dim=1)

    w = StreamR1Weights(Deaf())(video(), PROMPTS, LATENT)
    assert w.saliency is not None
    assert (w.saliency[1] == 0).all()
    assert (w.saliency[0] > 0).any()


def test_three_lines_in_a_plain_dmd_loop() -> None:
    """A loop of somebody else's: its latents move towards the real score, faster where it matters."""
    real = torch.zeros(2, 3, 1, 4, 6)
    latents = torch.ones(2, 3, 1, 4, 6, requires_grad=True)
    optimizer = torch.optim.SGD([latents], lr=10.0)
    region = PatchReward(slice(1, 5), slice(4, 8), slice(8, 12))
    weights = StreamR1Weights(region)
    for _ in range(5):
        pixels = (
            latents.detach().repeat_interleave(4, 1)[:, 3:].repeat_interleave(4, 3).repeat_interleave(4, 4)
        )
        w = weights(pixels.sigmoid().expand(-1, -1, 3, -1, -1), PROMPTS, LATENT)
        loss = dmd_loss(latents, latents.detach(), real, w_inter=w.inter, w_intra=w.intra)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = (1 - latents.detach()).abs()
    assert (moved > 0).all()
    assert moved[0].argmax() == moved[1].argmax() == 1 * 24 + 1 * 6 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"video": torch.rand(2, 9, 1, 16, 24)}, r"video: expected shape \[B, T, 3, H, W\]"),
        (
            {"video": torch.zeros(2, 9, 3, 16, 24, dtype=torch.uint8)},
            "video: expected a floating-point.*uint8",
        ),
        ({"video": 2 * video() - 1}, r"video: expected values in \[0, 1\], got -0.9\d* to 0.9"),
        ({"video": 255 * video()}, r"video: expected values in \[0, 1\], got"),
        ({"prompts": ["one"]}, "prompts: expected 2, one a video"),
        ({"prompts": "ab"}, "prompts: expected a list of strings, got str"),
        ({"latent_shape": (4, 4, 6)}, "latent_shape"),
        ({"latent_shape": (2, 3, 16, 4, 6)}, r"latent_shape: expected \(F, h, w\), got \(2, 3, 16, 4, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict, message: str) -> None:
    call = {"video": video(), "prompts": PROMPTS, "latent_shape": LATENT} | arguments
    with pytest.raises((TypeError, ValueError), match=message):
        StreamR1Weights(SmoothReward())(**call)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda video: video.mean((1, 2, 3, 4)), r"reward must score \[2, 1\], got \[2\]"),
        (lambda video: [1.0, 2.0], r"reward must score \[2, 1\], got list"),
        (lambda video: torch.zeros(2, 1), "reward must be differentiable in the video"),
    ],
)
def test_rewards_that_score_something_else_are_refused(scores: Callable, message: str) -> None:
    class Own:
        axes = ("own",)

        def score(self, video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return scores(video)

    with pytest.raises(ValueError, match=message):
        StreamR1Weights(Own())(video(), PROMPTS, LATENT)
    with pytest.raises(TypeError, match=r"reward must have axes and score\(video, prompts\), got object"):
        StreamR1Weights(object())  # type: ignore[arg-type]


def test_unknown_modes_and_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="'no-balance', 'full'"):
        StreamR1Weights(SmoothReward(), "everything")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'FLOW'"):
        StreamR1Weights(SmoothReward(), "re-dmd", motion_axis="FLOW")


@pytest.mark.parametrize("mode", ["spatial", "temporal", "full"])
@pytest.mark.parametrize(("strength", "floor"), [(1.0, 0.3), (0.8, 0.3), (0.6, 0.3), (1.0, 0.0)])
def test_what_hits_the_floors_is_counted(mode: str, strength: float, floor: float) -> None:
    """Against the profiles as the paper has them, computed from the saliency in float64."""
    settings = {"spatial_floor": floor, "temporal_floor": floor}
    settings |= {"spatial_strength": strength, "temporal_strength": strength}
    w = StreamR1Weights(SmoothReward(), mode, **settings)(video(), PROMPTS, LATENT)
    assert w.saliency is not None
    share = torch.softmax(-w.scores.double(), dim=1)
    fused = torch.einsum("bm,mbfhw->bfhw", share, w.saliency.double())
    expected = {}
    for part, values, dims in (("spatial", fused, (2, 3)), ("temporal", fused.mean((2, 3)), (1,))):
        low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
        profile = (1 - strength) + strength * (values - low) / (high - low)
        used = mode in (part, "full")
        expected[part] = (profile < floor).double().mean().item() * used
    for part, count in expected.items():
        assert w.log[f"intra/{part}_floored"] == pytest.approx(count), part
    assert w.log["intra/min"] == w.intra.min()
    assert w.log["intra/max"] == w.intra.max()
    assert w.log["intra/std"] == pytest.approx(w.intra.flatten(1).std(1, correction=0).mean().item())


def test_what_hits_the_bounds_is_counted() -> None:
    w = StreamR1Weights(SmoothReward(), "re-dmd", beta=1000.0, log_bound=1.0)(video(), PROMPTS, LATENT)
    assert (w.scores[:, 1] < 0).all()
    assert (w.log["inter/floored"], w.log["inter/capped"], w.log["inter/bounded"]) == (1, 0, 1)
    w = StreamR1Weights(SmoothReward(), beta=1000.0, log_bound=1.0)(video(4), PROMPTS * 2, LATENT)
    assert w.log["inter/floored"] == (w.scores.mean(1) < 0).float().mean()
    assert w.log["inter/std"] == pytest.approx(w.inter.std(correction=0).item())
