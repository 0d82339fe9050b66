"""The rewards' training: corruptions are what they say, seeds share nothing, and the folder can be read."""

import json

import pytest
import torch

from stream_r1.drawn_world import all_scenes
from stream_r1.rewards import load_reward
from stream_r1.tiny_world.reward import RewardTrainingSettings, _beside_wrong, _ranking, train_reward


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two trainings of a moment each, with one seed and with another."""
    root = tmp_path_factory.mktemp("rewards")
    few = {"clips": 6, "plain_clips": 4, "held_out": 2, "frames": 9, "steps": 30, "batch": 6}
    for seed in (0, 1):
        train_reward(RewardTrainingSettings(out=str(root / str(seed)), seed=seed, **few))
    return root


def test_what_is_written_is_a_reward_with_its_figures(folders):
    reward = load_reward(folders / "0")
    scores = reward.score(torch.rand(1, 9, 3, 64, 112), [all_scenes()[0].prompt])
    assert scores.shape == (1, 3)
    metrics = json.loads((folders / "0" / "metrics.json").read_text())
    assert {"VQ_seen_clean_above_strong", "MQ_unseen_clean_above_weak", "TA_right_above_wrong_motion"} <= set(
        metrics["pair_accuracy"]
    )
    assert metrics["corruptions"]["blur"]["axis"] == "VQ"
    assert metrics["corruptions"]["rewind"] == metrics["corruptions"]["rewind"] | {
        "axis": "MQ",
        "seen": False,
    }


def test_two_seeds_are_two_rewards(folders):
    states = [load_reward(folders / str(seed)).heads.state_dict() for seed in (0, 1)]
    assert not torch.equal(states[0]["visual.1.weight"], states[1]["visual.1.weight"])
    assert not torch.equal(states[0]["appearance_scale.mean"], states[1]["appearance_scale.mean"])  # clips


def test_a_wrong_word_is_one_word():
    """Scores that count the words a prompt shares: one wrong word is exactly one less."""
    scenes = all_scenes()
    alignment = torch.tensor(
        [
            [
                float(sum(a == b for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))
                for two in scenes
            ]
            for one in scenes[:5]
        ]
    )
    for word, others in (("colour", 3), ("shape", 2), ("motion", 4), ("place", 3)):
        apart = _beside_wrong(alignment, torch.arange(5), word)
        assert apart.tolist() == [1.0] * (5 * others)


def test_what_did_not_change_is_not_ranked():
    clean, weak, strong = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0]), torch.tensor([-2.0, 5.0])
    ranked = _ranking(clean, weak, strong, torch.tensor([True, False]))
    assert ranked.item() < _ranking(clean, weak, strong, torch.tensor([True, True])).item()
    assert _ranking(clean, weak, strong, torch.tensor([False, False])).item() == 0
