"""Passes as graphs: that a steady stream is fit for them, and that replays give the plain stream's bits.

A CUDA graph is a list of kernels with the memory that each reads and writes. `Tape` is that for a CPU: the
ops of one run, on the same memory again, with none of the Python around them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling_models import TEXT_DIM, WordEncoder, tiny_student, tiny_vae
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.chunk import Chunk
from stream_r1.sampling.graphs import PassGraphs, Replay
from stream_r1.sampling.sampler import Sampler, Stream
from stream_r1_kernels import backends

PROMPTS = ["a fat rabbit", "a butterfly over the meadow"]
SIZE = (2, 4)
STUDENTS: dict[str, dict[str, Any]] = {
    "moving sink": {},
    "averaged sink": {"sink_ema": 0.9},
    "ring of three": {"window_frames": 12},
    "no sink, short first chunk": {"sink_frames": 0, "first_chunk_frames": 1, "positions": "absolute"},
    "ring of one": {"window_frames": 6, "positions": "absolute"},
    "sizes in frames": {"window_frames": 6, "sink_frames": 2},
}


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        for func, args, kwargs, result in self.ops:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_tape(run: Callable[[], Tensor]) -> Replay:
    with Tape() as tape:
        result = run()

    def replay() -> Tensor:
        tape.play()
        return result

    return replay


def ring_slots(student: CausalWanTransformer) -> int:
    config = student.config
    ring = config["window_frames"] - config["sink_frames"]
    return ring // math.gcd(ring, config["frames_per_chunk"])


def plain(student: CausalWanTransformer, **settings: Any) -> Stream:
    single = {"fuse_cache_update": False}  # as graphs are
    sampler = Sampler(student, text_encoder=WordEncoder(), latent_size=SIZE, **single, **settings)
    return sampler.stream(PROMPTS, seed=3)


def on_tapes(student: CausalWanTransformer, **settings: Any) -> Stream:
    stream = plain(student, **settings)
    loop = stream._loop
    loop.passes = PassGraphs(student, loop.cache, loop.passes.text, capture=on_tape)
    return stream


def take(stream: Stream, chunks: int) -> list[Chunk]:
    return list(itertools.islice(stream, chunks))


def take_and_switch(stream: Stream) -> list[Chunk]:
    made = take(stream, 9)
    stream.switch(["a tree", "snow on the meadow"])
    return made + take(stream, 3)


@pytest.mark.parametrize("context_noise", [0.0, 100.0])
@pytest.mark.parametrize("name", STUDENTS)
def test_replays_give_the_plain_stream(
    name: str, context_noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_student(**STUDENTS[name])
    expected = take_and_switch(plain(student, context_noise=context_noise))
    stream = on_tapes(student, context_noise=context_noise)
    made = take(stream, 9)
    assert isinstance(stream._loop.passes, PassGraphs)
    assert stream._loop.passes.captured == ring_slots(student)

    def no_python(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a pass ran that should have been replayed")

    monkeypatch.setattr(student, "forward_chunk", no_python)
    stream.switch(["a tree", "snow on the meadow"])
    made += take(stream, 3)
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.latents, other.latents), one.index


def test_a_window_recomputed_from_graphs_is_that_of_the_plain_stream() -> None:
    made = []
    for stream in (plain(tiny_student()), on_tapes(tiny_student())):
        take(stream, 9)
        stream.switch(["a tree", "snow on the meadow"], recache=True)
        made.append(torch.cat([chunk.latents for chunk in take(stream, 5)], dim=1))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "fault", ["phases of a chunk of its own", "another chunk's text", "one slot for all"]
)
def test_what_is_not_kept_in_place_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student()
    stream = on_tapes(student)
    graphs = stream._loop.passes
    if fault == "phases of a chunk of its own":
        stream.cache._pinned = None
    elif fault == "another chunk's text":
        monkeypatch.setattr(graphs, "switch", lambda text: setattr(graphs, "text", text))
    else:
        monkeypatch.setattr(type(stream.cache), "slot_start", 0)
    expected, made = (take_and_switch(each) for each in (plain(student), stream))
    assert torch.equal(made[1].latents, expected[1].latents)
    assert not torch.equal(made[-1].latents, expected[-1].latents)


def test_refusals() -> None:
    student, endless = tiny_student(), tiny_student(window_frames=None, sink_frames=0, positions="absolute")
    with pytest.raises(ValueError, match="Sampler: cuda_graph needs the student on a CUDA device, got cpu"):
        Sampler(student, cuda_graph=True)
    text, one = (
        student.encode_text(torch.zeros(2, 6, TEXT_DIM)),
        student.encode_text(torch.zeros(1, 6, TEXT_DIM)),
    )
    cache = student.new_cache(2, *SIZE)
    with pytest.raises(
        ValueError, match="PassGraphs: cuda_graph needs the student on a CUDA device, got cpu"
    ):
        PassGraphs(student, cache, text)
    with pytest.raises(ValueError, match=r"a student with window_frames .*, got window_frames None"):
        PassGraphs(endless, cache, text, capture=on_tape)
    with pytest.raises(ValueError, match="text must be of batch 2, got 1"):
        PassGraphs(student, cache, one, capture=on_tape)
    graphs = PassGraphs(student, cache, text, capture=on_tape)
    x = torch.zeros(2, 3, 4, *SIZE)
    for _ in range(3):
        graphs.velocity(x, 0.0)
        cache.commit()
    with pytest.raises(ValueError, match=r"x must be \[2, 3, 4, 2, 4\] torch.float32, got .* torch.float64"):
        graphs.velocity(x.double(), 0.0)


# --- the host never waits for a number of the device's ---

READS = {  # what makes Python wait for the device, or a shape depend on a tensor's numbers
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_dim,
    torch.ops.aten.bincount,
    torch.ops.aten.lift_fresh,  # of torch.tensor: numbers of Python's, copied to the device
}


class NoReads(TorchDispatchMode):
    """Refuses to read numbers; writes down ops with their tensors' shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket not in READS, f"{func} reads a tensor's numbers"
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "meta" for x in given)
        assert not (on_device and any(x.device.type == "cpu" for x in made)), f"{func} copies to the host"
        if func is torch.ops.aten._to_copy.default and made[0].device.type == "meta":
            copied = given[0].device.type == "cpu"
            assert not copied or given[0].dim() == 5, (
                f"{func} copies {list(given[0].shape)}, not a chunk's noise"
            )
        self.trace.append((func, *((tuple(x.shape), x.stride(), x.dtype) for x in given + made)))
        return result


def steady_chunks(device: str, vae: bool, **settings: Any) -> list[list[tuple[Any, ...]]]:
    """Traces of chunks of a stream whose window is full: twice around the ring."""
    student = tiny_student(**settings).to(device)
    sampler = Sampler(student, tiny_vae().to(device) if vae else None, latent_size=SIZE)
    stream = sampler.stream(torch.zeros(2, 6, TEXT_DIM, device=device))
    take(stream, 6)
    traces = []
    for _ in range(2 * ring_slots(student)):
        with NoReads() as watching:
            next(stream)
        traces.append(watching.trace)
    return traces


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("device", ["meta", "cpu", "cpu by sdpa"])
def test_a_steady_chunk_reads_nothing_and_has_the_shapes_of_the_last_one(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device has nothing to read: a branch on a number or a copy to the host raises there."""
    if device == "cpu by sdpa":  # as "auto" takes it on new GPUs
        monkeypatch.setitem(backends._UNAVAILABLE, "cpu", "left out, to see torch's attention")
    traces = steady_chunks(device.split()[0], vae=name == "moving sink", **STUDENTS[name])
    assert len(traces[0]) > 5 * 2 * 20  # passes, layers, ops
    around = 1
    if name == "sizes in frames":  # frames are moved where a chunk runs over the ring's end
        around = ring_slots(tiny_student(**STUDENTS[name]))
    for trace, later in zip(traces, traces[around:], strict=False):
        assert trace == later


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda _: torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.ones(3).to("meta"),
    ],
)
def test_reads_are_refused(read: Callable[[Tensor], object]) -> None:
    with NoReads(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        read(torch.zeros(3, device="meta"))
