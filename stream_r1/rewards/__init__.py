"""Video reward models behind one small protocol: `score(video, prompts) -> [B, axes]`, differentiable."""

from stream_r1.rewards.base import Reward
from stream_r1.rewards.loading import load_reward

__all__ = ["Reward", "load_reward"]
