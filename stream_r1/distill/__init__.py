"""Distillation: self-rollout, distribution matching, reward weights, and the trainers that use them."""
