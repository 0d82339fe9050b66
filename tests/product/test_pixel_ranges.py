"""What takes pixels refuses those of another range, by function, parameter and the range that came."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stream_r1.distill.weighting import StreamR1Weights
from stream_r1.drawn_world.measures import measure, spread
from stream_r1.drawn_world.scenes import all_scenes
from stream_r1.evaluation import Reference, evaluate_videos
from stream_r1.evaluation.kid import FrameFeatures
from stream_r1.evaluation.sharpness import sharpness
from stream_r1.evaluation.warp import motion_figures
from stream_r1.models.taehv import TinyVAE
from stream_r1.models.vae import VideoVAE
from stream_r1.pixels import check_range, to_uint8
from stream_r1.rewards import corruptions
from stream_r1.rewards.efficientnet import EfficientNetLite
from stream_r1.rewards.loading import load_reward
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.video import VideoWriter, contact_sheet
from stream_r1.watch.watcher import to_bytes

Takes = Callable[[Tensor], object]


@pytest.fixture(scope="module")
def takers(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Takes]:
    """By what the message names: a call with one video [9, 3, 32, 48]."""
    reward, vae = load_reward(world / "reward"), VideoVAE.from_pretrained(world / "vae")
    pipeline = StreamR1Pipeline.from_pretrained(world, size=(32, 48))
    tiny, lite = TinyVAE(4, (8, 8, 8, 8), 8), EfficientNetLite.from_package("lite0", (2,))
    scene = next(iter(all_scenes()))
    ways = corruptions.VISUAL | corruptions.VISUAL_UNSEEN | corruptions.MOTION | corruptions.MOTION_UNSEEN
    rng = np.random.default_rng(0)
    writer = VideoWriter(tmp_path_factory.mktemp("written") / "a.mp4")
    return {
        "StreamR1Weights: video": lambda video: StreamR1Weights(reward)(video[None], ["a"], (3, 4, 6)),
        "SmallReward.score: video": lambda video: reward.score(video[None], ["a"]),
        "VideoVAE.encode: video": lambda video: vae.encode(video[None]),
        "TinyVAE.encode: video": lambda video: tiny.encode(video[None]),
        "stream: first_frames": lambda video: pipeline.stream("a", chunks=1, first_frames=video[None]),
        "VideoWriter.write: frames": writer.write,
        "contact_sheet: frames": lambda video: contact_sheet([video]),
        "evaluate_videos: videos": lambda video: evaluate_videos([video] * 2, ["a"] * 2),
        "Reference.fit: videos": lambda video: Reference.fit([video] * 2),
        "FrameFeatures: frames": FrameFeatures(),
        "sharpness: frames": sharpness,
        "motion_figures: video": motion_figures,
        "EfficientNetLite: images": lite,
        "to_bytes: video": to_bytes,
        "spread: videos": lambda video: spread([video]),
        "measure: video": lambda video: measure(video, scene),
        **{f"{name}: clip": lambda video, way=way: way(video, 0.5, rng) for name, way in ways.items()},
    }


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0)])
def test_other_ranges_are_refused(takers: dict[str, Takes], low: float, high: float) -> None:
    video = torch.linspace(low, high, 9 * 3 * 32 * 48).view(9, 3, 32, 48)
    for name, take in takers.items():
        with pytest.raises(ValueError, match=f"^{name}: expected values in .0, 1., got {low:g} to {high:g}$"):
            take(video)
        take((video - low) / (high - low) * 1.1 - 0.05)  # a little beyond is what resizing leaves


def test_what_has_no_values_is_not_looked_at() -> None:
    check_range(torch.empty(0, 3), "f: x")
    check_range(torch.full((2,), 7, dtype=torch.uint8), "f: x")
    check_range(torch.empty(2, device="meta"), "f: x")
    with FakeTensorMode():
        check_range(torch.empty(2), "f: x")
    compiled = torch.compile(lambda x: (check_range(x, "f: x"), x + 1)[1], backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert torch.equal(
        torch.func.vmap(lambda x: (check_range(x, "f: x"), x + 1)[1])(torch.zeros(2)), torch.ones(2)
    )


def test_numbers_that_are_none(takers: dict[str, Takes]) -> None:
    """A reward's sample is skipped by its score; what is measured, written or streamed from must be whole."""
    video = torch.rand(9, 3, 32, 48)
    video[3, 0, 5, 5] = np.nan
    check_range(video, "f: x")
    for name in ("VideoWriter.write: frames", "Reference.fit: videos", "stream: first_frames"):
        with pytest.raises(ValueError, match=f"{name}: expected values in .0, 1., got nan"):
            takers[name](video)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_are_the_nearest_and_halves_go_to_the_even_one(dtype: torch.dtype) -> None:
    steps = torch.arange(256, dtype=torch.float64) / 255
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) / 255
    pixels = torch.cat([steps, halves, torch.rand(10000), torch.tensor([-0.3, 1.4])]).to(dtype)
    values = pixels.float().numpy()
    expected = np.rint(np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8)
    made = to_uint8(pixels.requires_grad_())
    assert made.device == pixels.device
    assert np.array_equal(made.numpy(), expected)
    assert torch.equal(to_uint8(made), made)
    assert torch.equal(to_uint8(steps), torch.arange(256, dtype=torch.uint8))
