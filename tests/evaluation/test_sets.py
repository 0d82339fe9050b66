"""One call for all figures: against single ones, orders, and what it refuses."""

import pytest
import torch

from stream_r1.demo.stages import drawings
from stream_r1.drawn_world.measures import MEASURES
from stream_r1.evaluation import Reference, evaluate_videos
from stream_r1.evaluation.sharpness import sharpness
from stream_r1.evaluation.single import video_figures
from stream_r1.files import FileError
from stream_r1.pixels import chroma, luma

PROMPTS = ["a red ball rolls to the left in a meadow at noon", "a blue star bounces by the sea at night"]


class Brightness:
    axes = ("light",)

    def score(self, video, prompts):
        return video.mean((1, 2, 3, 4))[:, None]


def test_figures_are_means_of_single_ones_and_noise_is_worse(tmp_path):
    clean = drawings(PROMPTS * 2, 10)
    generator = torch.Generator().manual_seed(2)
    noisy = [(clip + 0.3 * torch.randn(clip.shape, generator=generator)).clamp(0, 1) for clip in clean]
    Reference.fit(drawings(PROMPTS * 3, 50)).save(tmp_path / "folder" / "statistics.safetensors")
    reference = Reference.load(tmp_path / "folder" / "statistics.safetensors")
    good, bad = (evaluate_videos(videos, PROMPTS * 2, reference, Brightness()) for videos in (clean, noisy))
    single = [video_figures(video, prompt) for video, prompt in zip(clean, PROMPTS * 2, strict=True)]
    for name in single[0]:
        assert good[name].value == pytest.approx(sum(row[name] for row in single) / 4), name
        assert len(good[name].without) == 4
    light = torch.stack(clean).mean().item()
    assert good["judge/light"].value == pytest.approx(light, rel=1e-5)
    assert all(good[name].value > 0.9 for name in MEASURES)
    assert good["kid"].value < bad["kid"].value
    assert good["warp_error"].value < bad["warp_error"].value
    assert bad["steadiness"].value < good["steadiness"].value


def test_what_is_not_of_the_drawn_world_has_no_exact_figures():
    clip = drawings(PROMPTS, 0)[0]
    assert "moves" not in evaluate_videos([clip, clip], ["a fat rabbit", PROMPTS[0]])
    assert "moves" not in evaluate_videos([clip[..., :96], clip[..., :96]], PROMPTS)


def test_luma_and_sharpness_of_known_pictures():
    assert luma(torch.ones(1, 3, 2, 2)).flatten().tolist() == pytest.approx([1.0] * 4)
    coloured = torch.tensor([0.2, 0.7, 0.4]).view(3, 1, 1).expand(2, 3, 4, 5)
    assert luma(coloured).shape == chroma(coloured).shape == (2, 4, 5)
    assert luma(coloured)[0, 0, 0] == pytest.approx(0.299 * 0.2 + 0.587 * 0.7 + 0.114 * 0.4)
    assert chroma(coloured)[1, 3, 4] == pytest.approx(0.5)
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert sharpness(ramp) == pytest.approx(0, abs=1e-3)
    checkers = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 3, 16, 16)
    assert sharpness(checkers) == pytest.approx(4 * 255)


@pytest.mark.parametrize(
    ("bad", "error", "part"),
    [
        ([], ValueError, "at least one"),
        (torch.rand(1, 4, 3, 32, 32), ValueError, "two videos or more, got 1 for 1"),
        (torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(2, 2, 3, 32, 32), ValueError, "T >= 3"),
        (torch.zeros(2, 4, 3, 16, 32), ValueError, "32"),
    ],
)
def test_refuses(bad, error, part):
    with pytest.raises(error, match=part):
        evaluate_videos(bad, ["a"] * len(bad))


def test_statistics_of_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Reference.load(tmp_path / "none.safetensors")
    Reference(torch.zeros(4, 7)).save(tmp_path / "it.safetensors")
    with pytest.raises(FileError, match=r"features: expected \[N, 352\] with N >= 2, got \[4, 7\]"):
        Reference.load(tmp_path / "it.safetensors")
