"""What a prompt leaves open is measured on videos, beside a second formulation."""

import numpy as np
import pytest
import torch

from stream_r1.demo.stages import drawings
from stream_r1.drawn_world import HELD_OUT
from stream_r1.recipe import load, read_prompts
from stream_r1.tiny_world.chance import chance_by_model


def test_drawings_differ_and_a_models_videos_differ_in_their_own_way():
    recipe = load("recipes/tiny/stream-r1.yaml")
    found = chance_by_model(recipe, ["assets/tiny/student"], prompts=2, seeds=2, solver_steps=1)
    assert list(found) == ["drawings", "teacher", "assets/tiny/student"]
    texts = read_prompts(recipe.prompts)[:2]
    apart = []
    for index, text in enumerate(texts):
        a, b = drawings([text] * 2, HELD_OUT + 30_000 + 2 * index)
        apart.append(255 * torch.dist(a[0].double(), b[0].double()).item() / np.sqrt(a[0].numel()))
    assert found["drawings"]["picture"].value == pytest.approx(np.mean(apart), rel=1e-4)
    assert all(figures["picture"].value > 0 for figures in found.values())
