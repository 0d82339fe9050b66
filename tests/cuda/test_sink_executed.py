"""renew_sink_, what a streaming cache does once a chunk: run on real tensors, against torch."""

import pytest
import torch
from machine import Machine

from stream_r1_kernels import ChunkCache, RotaryGrid, graphs
from stream_r1_kernels.sink import renew_sink_


@pytest.mark.parametrize("head_dim", [16, 10])  # whole packs, and rows that are not aligned
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("ema", [None, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_torch(
    machine: Machine, dtype: torch.dtype, ema: float | None, first: bool, moves: bool, head_dim: int
) -> None:
    torch.manual_seed(0)
    storage = torch.randn(2, 2, 2, 15, 3, head_dim).to(dtype)
    kept_dtype = dtype if ema is None else torch.float32
    sink_k, sink_v = (torch.randn(2, 2, 4, 3, head_dim).to(kept_dtype) for _ in "kv")
    grid = RotaryGrid(head_dim)
    phases = [*grid.temporal_shift(-7), *(grid.temporal_shift(5) if moves else (None, None))]
    ours, theirs = (
        [storage.clone(), sink_k.clone(), None if ema is None else sink_v.clone()] for _ in range(2)
    )
    machine.run("renew_sink_", *ours, 9, ema, first, *phases)
    renew_sink_(*theirs, 9, ema, first, *phases)
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_a_stream(machine: Machine, monkeypatch: pytest.MonkeyPatch, positions: str) -> None:
    """A cache streams the same with it as with torch."""

    def stream() -> list[torch.Tensor]:
        torch.manual_seed(0)
        held = ChunkCache(
            *(2, 1, 1, RotaryGrid(16), 2, 2, 2),
            **{"window_frames": 6, "sink_frames": 2, "positions": positions, "ema": 0.9},
            dtype=torch.bfloat16,
        )
        seen = []
        for _ in range(6):
            held.begin_chunk()
            for layer in range(2):
                for part in held[layer].slot():
                    part.copy_(torch.randn(part.shape))
                seen.extend(x.clone() for x in held[layer].past(holds_fresh=True)[:2])
            held.commit()
        return seen

    expected = stream()
    calls = []

    def compiled(*args: object) -> None:
        *passed, place = args
        assert place == 0  # a ring of whole chunks: the kernel's case
        calls.append(passed)
        machine.run("renew_sink_", *passed)

    monkeypatch.setattr(graphs, "renew_sink_", compiled)
    for ours, theirs in zip(stream(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 3


def test_a_slot_in_the_sink_is_refused(machine: Machine) -> None:
    storage, sink = torch.randn(1, 2, 1, 8, 1, 4), torch.randn(1, 1, 4, 1, 4)
    phases = RotaryGrid(4).temporal_shift(1)
    for slot in (2, 5):
        with pytest.raises(ValueError, match="slot: expected a slot of 4 tokens past the sink and within 8"):
            machine.run("renew_sink_", storage, sink, sink, slot, 0.9, False, *phases, None, None)
