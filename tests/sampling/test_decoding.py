"""Decoding beside the next chunk's denoising: what waits for what, on recorded streams; times read late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded_streams import RecordedSide, Recorder, recorded_moments
from sampling_models import SIZE as PIXELS
from sampling_models import WordEncoder, tiny_student, tiny_vae
from torch import Tensor

from stream_r1.clock import Clock, Moment
from stream_r1.pixels import to_uint8
from stream_r1.sampling.chunk import ChunkWork, StreamTimer, StreamTimings
from stream_r1.sampling.decoding import ChunkDecoder
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.sampler import Sampler
from stream_r1.serve.engine import Engine

SIZE = (2, 4)
CHUNKS = 3
MODULES = ("clock", "sampling.stream", "sampling.sampler", "sampling.decoding", "serve.engine")


def sampler() -> Sampler:
    student = tiny_student(num_layers=1)
    return Sampler(student, tiny_vae(), steps=(1000, 500), text_encoder=WordEncoder(), latent_size=SIZE)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    def record(ignored: str = "") -> Recorder:
        recorder = Recorder(ignored)
        for module in MODULES:
            monkeypatch.setattr(f"stream_r1.{module}.Moment", recorded_moments(recorder))
        monkeypatch.setattr(Sampler, "_side_stream", lambda self: RecordedSide(recorder))
        return recorder

    return record


def consume(one: Sampler, *, ahead: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Frames and bytes of a stream from given frames, whose prompt changes in its last chunk."""
    given = torch.randn(1, 3, 4, *SIZE, generator=torch.Generator().manual_seed(0))
    stream = one.stream("a fat rabbit", seed=1, chunks=CHUNKS, first_frames=given)
    frames, pixels = [], []
    for chunk in stream.ahead() if ahead else stream:
        pixels.append(chunk.to_uint8().clone())
        frames.append(chunk.frames * 1)  # read on the current stream
        if stream.index == CHUNKS:  # the given frames are a chunk, too
            stream.switch("a butterfly")
    assert stream.timings.chunks == CHUNKS
    return frames, pixels


def test_every_read_is_ordered_after_its_write(recorded: Any) -> None:
    expected, _ = consume(sampler(), ahead=False)
    recorder, one = recorded(), sampler()
    with recorder:
        frames, pixels = consume(one)
    assert not recorder.races
    assert not recorder.unkept()
    lanes = {lane for lane, _ in recorder.ops}
    assert lanes == {"main", "side", "host"}
    for made, as_bytes, right in zip(frames, pixels, expected, strict=True):
        assert torch.equal(made, right)
        assert torch.equal(as_bytes, to_uint8(right))


@pytest.mark.parametrize("forgotten", ["wait side", "wait main", "synchronize", "uses side", "uses main"])
def test_what_is_forgotten_is_found(forgotten: str, recorded: Any) -> None:
    recorder, one = recorded(forgotten), sampler()
    with recorder:
        for chunk in one.stream("a", chunks=2).ahead():
            chunk.frames.sum()
            chunk.to_uint8()
    assert bool(recorder.unkept()) == forgotten.startswith("uses")
    assert bool(recorder.races) == (not forgotten.startswith("uses"))


@pytest.mark.parametrize("ahead", [True, False])
def test_denoising_does_not_wait_for_the_decoding_of_the_chunk_before(ahead: bool, recorded: Any) -> None:
    recorder, one = recorded(), sampler()
    with recorder:
        stream = one.stream("a", chunks=4)
        decoded, knew = [0, 0], []  # ops of the side stream after each chunk
        for _ in range(4):
            first = len(recorder.ops)
            chunk = next(stream)
            denoising = [known["side"] for lane, known in recorder.ops[first:] if lane == "main"]
            knew.append(max(denoising))
            assert recorder.known["host"]["side"] >= decoded[-1]  # two at most are under way
            decoded.append(recorder.known["side"]["side"])
            if not ahead:
                chunk.to_uint8()
    waited_for = decoded[:-2] if ahead else decoded[1:-1]
    assert knew == waited_for


def test_a_stream_ahead_gives_the_same_chunks(recorded: Any) -> None:
    plain = sampler()
    expected = [chunk.frames for chunk in plain.stream("a", seed=2, chunks=CHUNKS)]
    assert [chunk.index for chunk in plain.stream("a", chunks=2).ahead()] == [0, 1]
    recorded()
    stream = sampler().stream("a", seed=2, chunks=CHUNKS)
    asked, made = [], stream._decoder.decode  # type: ignore[union-attr]
    stream._decoder.decode = lambda *a: (asked.append(stream.index), made(*a))[1]  # type: ignore[union-attr, method-assign]
    for chunk in stream.ahead():
        assert asked[-1] == min(chunk.index + 2, CHUNKS)  # the next one was begun
        assert torch.equal(chunk.frames, expected[chunk.index])
    assert chunk.index == CHUNKS - 1


def test_the_live_page_decodes_in_order(recorded: Any) -> None:
    pipeline = StreamR1Pipeline(
        tiny_student(num_layers=1), tiny_vae(), WordEncoder(), size=PIXELS, fps=24, steps=(1000,)
    )
    given = torch.randn(1, 3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    recorder = recorded()
    with recorder:
        engine = Engine(pipeline)
        take = engine.begin("a", 0, given)
        made = [engine.make(take) for _ in range(2)]
        pixels = [engine.decode(take, each) * 1 for each in made]
    engine.close()
    assert not recorder.races
    assert not recorder.unkept()
    clip = torch.cat([given, *(each.chunk.latents for each in made)], 1)
    right = to_uint8(pipeline.vae.decode(clip)[0, 9:]).movedim(1, -1)
    assert (torch.cat(pixels).int() - right.int()).abs().max() <= 1  # decoded in other pieces


def test_frames_that_are_no_numbers_are_refused() -> None:
    decoder = tiny_vae().stream_decoder(1)
    decoded = ChunkDecoder(decoder, torch.device("cpu")).decode(
        torch.full((1, 3, 4, *SIZE), torch.nan), Moment()
    )
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got nan to nan"):
        decoded.to_uint8()
    with pytest.raises(ValueError, match="expected a stream with a VAE"):
        next(Sampler(tiny_student(), text_encoder=WordEncoder(), latent_size=SIZE).stream("a")).to_uint8()


class At(Moment):
    """A moment at a known time, past once the clock says so."""

    now = 0.0

    def __init__(self, time: float) -> None:
        super().__init__()
        self._time = time

    def query(self) -> bool:
        return At.now >= self._time

    def synchronize(self) -> None:
        At.now = max(At.now, self._time)

    def since(self, earlier: Moment) -> float:
        self.synchronize()
        return super().since(earlier)


def test_times_are_read_late_and_overlapping_work_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks: asked for at 1 and 3; denoised until 3 and 6; decoded 3 to 5 and 6 to 8; idle until 10."""
    monkeypatch.setattr(At, "now", 0.0)
    timer = StreamTimer(StreamTimings(text=1.0, total=1.0), At(1))
    chunks = []
    for begun, made, done in ((1, 3, 5), (3, 6, 8), (10, 12, 13)):
        clock = Clock()
        clock._parts = [("denoise", At(begun), At(made))]
        chunks.append(ChunkWork(At(begun), clock, At(made), (At(made), At(done)), 12))
    timer.add(chunks[0])
    timer.add(chunks[1])
    assert timer.sums().chunks == 0
    assert At.now == 0  # nothing was waited for
    At.now = 5.5
    assert (timer.sums().chunks, timer.sums().total, timer.sums().first_frame) == (1, 5, 5)
    timer.add(chunks[2])
    assert timer.of(chunks[1]).decode == 2
    assert timer.of(chunks[1]).elapsed == 8
    assert At.now == 8
    assert timer.sums(wait=True).chunks == 3
    last = timer.of(chunks[2])
    assert (last.denoise, last.elapsed) == (2, 11)  # of 13: from 8 to 10 nobody asked for a chunk
    assert timer.sums().fps == 36 / 11
