"""The small reward: gradients, independence of the batch, any length and size, files, the order of scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stream_r1.rewards import Reward, corruptions, load_reward
from stream_r1.rewards.base import ScoreNormalizer
from stream_r1.rewards.small import SmallHeads, SmallReward
from stream_r1.rewards.small_features import FeatureExtractor, _change_statistics, _directions

TINY = Path(__file__).parents[2] / "assets" / "tiny"
MANY = 3  # draws a corruption, a clip


@pytest.fixture(scope="module", params=["reward", "judge"])
def reward(request):
    return load_reward(TINY / request.param)


def small_clip(frames=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, frames, 3, 64, 112, generator=generator)


class TestScores:
    def test_follows_the_protocol(self, reward):
        assert isinstance(reward, Reward)
        assert reward.axes == ("VQ", "MQ", "TA")

    def test_is_differentiable_and_no_axis_is_blind(self, reward, clean_clips):
        video, prompts = clean_clips
        video = video[:2, :6].clone().requires_grad_()
        scores = reward.score(video, prompts[:2])
        assert scores.shape == (2, 3)
        assert scores.dtype == torch.float32
        for axis in range(3):
            (gradient,) = torch.autograd.grad(scores[:, axis].sum(), video, retain_graph=True)
            assert gradient.isfinite().all()
            assert (gradient.abs().amax((2, 3, 4)) > 0).all(), "every frame matters to every axis"
        assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())

    def test_gradient_predicts_the_change_of_the_score(self, reward, clean_clips):
        """Off the kinks of magnitudes: much of a drawing does not change at all from frame to frame."""
        video, prompts = clean_clips
        video = 0.9 * video[:1, :4] + 0.1 * torch.rand(
            1, 4, 3, 64, 112, generator=torch.Generator().manual_seed(0)
        )
        video.requires_grad_()
        for axis in range(3):
            score = reward.score(video, prompts[:1])[0, axis]
            (gradient,) = torch.autograd.grad(score, video)
            step = 2e-3 * gradient / gradient.norm()
            with torch.no_grad():
                ahead, behind = (reward.score(video + k * step, prompts[:1])[0, axis] for k in (1, -1))
            assert (ahead - behind).item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.1)

    def test_still_video_has_finite_gradients(self, reward):
        video = torch.full((1, 5, 3, 64, 112), 0.5, requires_grad=True)
        reward.score(video, ["grey"]).sum().backward()
        assert video.grad.isfinite().all()

    def test_does_not_depend_on_the_batch(self, reward, clean_clips):
        video, prompts = clean_clips
        video = video[:, :5]
        together = reward.score(video, prompts)
        alone = torch.cat([reward.score(video[i : i + 1], [prompts[i]]) for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-4)
        order = [2, 0, 1]
        assert torch.allclose(
            reward.score(video[order], [prompts[i] for i in order]), together[order], atol=1e-4
        )

    def test_no_gradient_crosses_between_videos(self, reward):
        video = torch.cat([small_clip(seed=1), small_clip(seed=2)]).requires_grad_()
        reward.score(video, ["a", "b"])[0].sum().backward()
        assert video.grad[0].abs().sum() > 0
        assert video.grad[1].abs().sum() == 0

    @pytest.mark.parametrize("shape", [(1, 1, 3, 64, 112), (1, 2, 3, 40, 60), (0, 4, 3, 64, 112)])
    def test_takes_any_length_size_and_an_empty_batch(self, reward, shape):
        scores = reward.score(torch.rand(shape, dtype=torch.bfloat16), ["a meadow"] * shape[0])
        assert scores.shape == (shape[0], 3)
        assert scores.isfinite().all()

    def test_long_video_is_the_mean_of_its_windows(self):
        features, normalizer = FeatureExtractor(), ScoreNormalizer([0] * 3, [1] * 3)
        heads = SmallHeads(features.sizes)
        reward = SmallReward(features, heads, normalizer, max_frames=6, window_frames=3)
        video = small_clip(frames=7)
        windows = torch.cat([reward.score(video[:, start : start + 3], ["x"]) for start in (0, 4)])
        assert torch.allclose(reward.score(video, ["x"]), windows.mean(0, keepdim=True), atol=1e-5)

    def test_refuses_integers(self, reward):
        with pytest.raises(TypeError, match="uint8"):
            reward.score(torch.zeros(1, 4, 3, 64, 112, dtype=torch.uint8), ["a"])


class TestFiles:
    def test_round_trip(self, reward, tmp_path):
        reward.save_pretrained(tmp_path)
        assert (tmp_path / "heads.safetensors").stat().st_size < 2**20
        again = SmallReward.from_pretrained(tmp_path)
        video = small_clip()
        assert torch.equal(again.score(video, ["a rabbit"]), reward.score(video, ["a rabbit"]))

    def test_refuses_another_reward(self, tmp_path):
        (tmp_path / "config.json").write_text('{"type": "small", "axes": ["beauty"]}')
        with pytest.raises(ValueError, match="beauty"):
            SmallReward.from_pretrained(tmp_path)


class TestTrainedOrder:
    """Held-out clips; the full figures are in metrics.json."""

    def test_clean_clips_score_above_the_middle(self, reward, clean_clips):
        with torch.no_grad():
            scores = reward.score(*clean_clips)
        assert ((scores[:, :2] > 0) & (scores[:, :2] < 2.5)).all(), scores

    @pytest.mark.parametrize("name", [*corruptions.VISUAL, *corruptions.MOTION])
    def test_the_worse_the_lower(self, reward, clean_clips, name):
        video, prompts = clean_clips
        video, prompts = video[:2], prompts[:2]
        axis = 0 if name in corruptions.VISUAL else 1
        spoil = {**corruptions.VISUAL, **corruptions.MOTION}[name]

        def mean_score(strength):
            versions = [spoil(c, strength, np.random.default_rng(s)) for s in range(MANY) for c in video]
            return reward.score(torch.stack(versions), prompts * MANY)[:, axis].mean().item()

        with torch.no_grad():
            clean = reward.score(video, prompts)[:, axis].mean().item()
            strong = mean_score(0.8)
            assert clean > strong + 0.5
            assert clean > mean_score(0.3) > strong

    def test_own_caption_above_another(self, reward, clean_clips):
        video, prompts = clean_clips
        with torch.no_grad():
            right, wrong = (reward.score(video, p)[:, 2] for p in (prompts, [*prompts[1:], prompts[0]]))
        assert (right > wrong).all()


class TestFeatures:
    def test_change_statistics_by_hand(self):
        """Two channels of constant pictures: values over time say everything."""
        values = torch.tensor([[0.0, 1, 3, 6], [2.0, 2, 2, 2]])  # [C, T]
        got = _change_statistics(values.T.reshape(1, 4, 2, 1, 1).expand(-1, -1, -1, 3, 5)).view(5, 2)
        for channel, track in enumerate(values.numpy().astype(np.float64)):
            first, second, two = np.diff(track), np.diff(track, 2), track[2:] - track[:-2]
            step, rough, far = (np.log(np.abs(x) + 0.02) for x in (first, second, two))
            around = (step[1:] + step[:-1]) / 2
            expected = [
                step.mean(),
                step.std(),
                (rough - around).mean(),
                (rough - around).std(),
                (far - around).mean(),
            ]
            assert got[:, channel].tolist() == pytest.approx(expected, abs=2e-3)

    def test_order_of_frames_matters_to_motion_only(self):
        extract = FeatureExtractor()
        video = small_clip(frames=5)
        shuffled = video[:, [3, 0, 4, 1, 2]]
        a, b = extract(video), extract(shuffled)
        assert torch.allclose(a.content[:, :-12], b.content[:, :-12], atol=1e-5)  # all but directions
        assert torch.allclose(a.appearance.mean(1), b.appearance.mean(1), atol=1e-5)
        assert not torch.allclose(a.motion, b.motion, atol=1e-2)

    def test_directions_are_those_of_a_moving_picture(self):
        """A smooth field that moves .3 pixels to the right and .2 up a frame, steadily."""
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(28.0), indexing="ij")
        waves = torch.stack([torch.sin((x - 0.3 * t) / 3) + torch.cos((y + 0.2 * t) / 2) for t in range(6)])
        got = _directions(10 * waves[None, :, None].expand(1, 6, 3, 16, 28))[0]
        mean, deviation = got.view(2, 2, 3)
        assert mean[0].tolist() == pytest.approx([0.3] * 3, rel=0.1)
        assert mean[1].tolist() == pytest.approx([-0.2] * 3, rel=0.1)
        assert deviation.max() < 0.02
