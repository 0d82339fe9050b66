"""Video reward models behind one small protocol: `score(video, prompts) -> [B, axes]`, differentiable."""

from stream_r1.rewards.base import Reward, load_reward, score_with_gradients

__all__ = ["Reward", "load_reward", "score_with_gradients"]
