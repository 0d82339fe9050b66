"""Statistics kept of the reference videos say what the videos themselves would."""

import pytest
import torch

from stream_r1.evaluation import Reference, evaluate_videos


def test_kept_statistics_measure_as_the_videos_do(tmp_path):
    generator = torch.Generator().manual_seed(0)
    videos = [torch.rand(4, 3, 32, 48, generator=generator) for _ in range(4)]
    reference, prompts = [(video + 0.5) / 2 for video in videos[:3]], ["a", "b", "a"]
    kept = tmp_path / "folder" / "statistics.safetensors"
    Reference.fit(reference, prompts).save(kept)
    by_file = evaluate_videos(videos, Reference.load(kept), ["a", "b", "a", "c"])
    by_videos = evaluate_videos(videos, reference, ["a", "b", "a", "c"], prompts)
    assert by_file.keys() == by_videos.keys()
    for name, value in by_videos.items():
        assert by_file[name] == pytest.approx(value, rel=5e-3, abs=5e-3), name  # features are kept in float16


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="expected 1, one a video, got 2"):
        Reference.fit([torch.rand(4, 3, 32, 32)], ["a", "b"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        Reference.load(tmp_path / "none.safetensors")
