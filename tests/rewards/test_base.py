"""The reward protocol: checks, normalisation, gradients of every axis, loading by folder."""

import json

import pytest
import torch

from stream_r1.rewards import Reward, load_reward
from stream_r1.rewards.base import ScoreNormalizer, check_video


class TestCheckVideo:
    @pytest.mark.parametrize(
        ("video", "prompts", "error", "part"),
        [
            (torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8), ["a", "b"], TypeError, "floating"),
            (torch.zeros(4, 3, 8, 8), ["a"] * 4, ValueError, r"\[B, T, 3, H, W\]"),
            (torch.zeros(2, 4, 4, 8, 8), ["a", "b"], ValueError, r"\[2, 4, 4, 8, 8\]"),
            (torch.zeros(2, 0, 3, 8, 8), ["a", "b"], ValueError, "one frame"),
            (torch.zeros(2, 4, 3, 8, 8), ["a"], ValueError, "expected 2"),
            (torch.zeros(2, 4, 3, 8, 8), "ab", TypeError, "list of strings"),
        ],
    )
    def test_refuses(self, video, prompts, error, part):
        with pytest.raises(error, match=part) as caught:
            check_video(video, prompts, name="MyReward.score")
        assert "MyReward.score" in str(caught.value)

    def test_takes_an_empty_batch(self):
        check_video(torch.zeros(0, 4, 3, 8, 8), [], name="score")


def test_normalizer_is_per_axis():
    normalizer = ScoreNormalizer([1.0, -2.0], [2.0, 0.5])
    assert torch.equal(normalizer(torch.tensor([[3.0, -1.5]])), torch.tensor([[1.0, 1.0]]))
    with pytest.raises(ValueError, match="positive"):
        ScoreNormalizer([0.0], [0.0])


def test_protocol_needs_no_registration():
    class Mine:
        axes = ("brightness",)

        def score(self, video, prompts):
            return video.mean((1, 2, 3, 4))[:, None]

    assert isinstance(Mine(), Reward)


class TestLoadReward:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load_reward(tmp_path / "nothing")

    def test_unknown_type(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"type": "oracle"}))
        with pytest.raises(ValueError, match="'oracle'"):
            load_reward(tmp_path)

    def test_videoalign_folder_is_known_by_its_own_config(self, tmp_path):
        (tmp_path / "model_config.json").write_text("{}")
        (tmp_path / "instruction.txt").write_text("{text_prompt} <|VQ_reward|> <|MQ_reward|> <|TA_reward|>")
        with pytest.raises(ValueError, match=r"expected model_config\.use_special_tokens, found none"):
            load_reward(tmp_path)
