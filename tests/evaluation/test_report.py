"""One call for all measures: what it returns, orders, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from stream_r1.evaluation import MEASURES, evaluate_videos


def videos(count, seed, frames=4):
    """Soft coloured fields that pan, each with a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    fields = F.interpolate(torch.rand(count, 3, 8, 16, generator=generator), (32, 64), mode="bicubic").clamp(
        0, 1
    )
    fields = (0.7 * fields + 0.3 * torch.rand(count, 3, 1, 1, generator=generator)).clamp(0, 1)
    return torch.stack([fields[..., t : t + 48] for t in range(frames)], 1)


def test_spoilt_videos_are_worse():
    reference, clean = videos(7, seed=0), videos(4, seed=1)
    generator = torch.Generator().manual_seed(2)
    noisy = (clean + 0.2 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    names = [f"scene {i}" for i in range(7)]
    good = evaluate_videos(clean, reference, names[:4], names)
    bad = evaluate_videos(list(noisy), reference)
    assert set(MEASURES) <= set(good)
    assert "prompt_match" not in bad
    for measure in ("kid", "naturalness", "warp_error", "judder"):
        assert good[measure] < bad[measure], measure
    assert good["sharpness"] == pytest.approx(1, abs=0.4)
    assert bad["sharpness"] > 2
    assert all(isinstance(value, float) for value in good.values())


def test_lengths_may_differ_and_a_reference_matches_its_own_prompts():
    reference = videos(4, seed=3)
    mixed = [reference[0], reference[1][:3]]
    result = evaluate_videos(mixed, reference, ["a", "b"], ["a", "b", "c", "d"])
    assert result["prompt_match"] == 1.0


@pytest.mark.parametrize(
    ("bad", "error", "part"),
    [
        ([], ValueError, "at least one"),
        (torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(1, 2, 3, 32, 32), ValueError, "T >= 3"),
        (torch.zeros(1, 4, 3, 16, 32), ValueError, "32"),
    ],
)
def test_refuses(bad, error, part):
    with pytest.raises(error, match=part):
        evaluate_videos(bad, torch.zeros(2, 4, 3, 32, 32))
