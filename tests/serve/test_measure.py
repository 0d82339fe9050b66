"""The measuring, on what can be known otherwise."""

from __future__ import annotations

import pytest
import torch
from sampling_models import SIZE, WordEncoder, tiny_student, tiny_vae
from torch import Tensor

from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.serve.measure import held_viewers, measure_switch, page_latencies


@pytest.mark.parametrize("recache", [False, True])
def test_a_switch_is_measured_at_its_border(recache: bool) -> None:
    pipeline = StreamR1Pipeline(tiny_student(), tiny_vae(), WordEncoder(), size=SIZE, fps=24)
    stream = pipeline.stream("a fat rabbit", 4)
    chunks = [next(stream).frames[0] for _ in range(3)]
    stream.switch("a tree", recache=recache)
    chunks += [next(stream).frames[0] for _ in range(3)]
    change = torch.cat(chunks).diff(dim=0).abs().mean((1, 2, 3))
    borders = len(chunks[0]) + len(chunks[1]), sum(map(len, chunks[:3]))
    usual = change[: borders[1] - 1].median()

    def match(frames: Tensor, prompt: str) -> float:
        """As though the new prompt won in the second chunk, and in that alone."""
        (number,) = (index for index, chunk in enumerate(chunks) if torch.equal(chunk, frames))
        return float((prompt == "a tree") == (number == 4))

    found = measure_switch(
        pipeline, "a fat rabbit", "a tree", match, recache=recache, seed=4, before=3, after=3
    )
    assert found.chunks == 2
    assert (found.new_at_end, found.old_at_end) == (0, 1)
    assert found.usual_jump == pytest.approx(float(change[borders[0] - 1] / usual), rel=0.1)
    assert found.jump == pytest.approx(float(change[borders[1] - 1] / usual), rel=0.1)


def test_viewers_and_the_page_are_measured_at_a_running_server(served: str, chromium: str) -> None:
    figures = list(held_viewers(served, (1, 4), frames=12))
    assert [one["viewers"] for one in figures] == [1, 4]
    assert [one["lost"] for one in figures] == [0, 0]
    found = page_latencies(served, ["a tree in snow"])
    assert found["first_frame"] > 0
    assert found["median"]["total"] >= found["median"]["model"] > 0
    assert "frames a second" in found["page"]
