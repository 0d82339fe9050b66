"""Long rollouts: the end of the whole video, in the memory of a short one, learnt from where it should be."""

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from distill_models import LATENT, StretchDecoder, tiny_student, tiny_teacher, tiny_vae
from small_run import numbers
from torch import Tensor

from stream_r1.chunk_loop import ChunkLoop
from stream_r1.distill.dmd import DistributionMatching
from stream_r1.distill.long_rollout import RolloutClip, long_rollout
from stream_r1.distill.rollout import begin_rollout, self_rollout
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule

SCHEDULE = FlowSchedule(5.0)
STEPS = SCHEDULE.denoising_steps([1000, 500])
STREAM = {"window_frames": 9, "sink_frames": 3, "positions": "window", "sink_ema": 0.9}
SINGLE = {"window_frames": 7, "sink_frames": 1, "first_chunk_frames": 1}


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(student: CausalWanTransformer, max_frames: int, renoise: Any = None) -> ChunkLoop:
    counter = itertools.count(1000)
    text = student.encode_text(seeded(1, 2, 8, 16))
    again = renoise or (lambda x: seeded(next(counter), *x.shape))
    return begin_rollout(
        student,
        text,
        (2, 4, 6),
        max_frames=max_frames,
        schedule=SCHEDULE,
        steps=STEPS,
        exit_step=1,
        renoise=again,
    )


def drawn() -> Callable[[int], Tensor]:
    """Noise of single frames, so that it does not depend on how many are asked for at once."""
    frame = itertools.count()
    return lambda frames: torch.stack([seeded(next(frame), 2, *LATENT) for _ in range(frames)], dim=1)


@pytest.mark.parametrize(("stream", "frames", "length"), [(STREAM, 9, 21), (SINGLE, 7, 16)], ids=["3", "1"])
def test_it_is_the_end_of_the_whole_video(stream: dict, frames: int, length: int) -> None:
    student, vae, first = tiny_student(**stream), tiny_vae(), stream.get("first_chunk_frames", 3)
    got = long_rollout(start(student, length), drawn(), length=length, frames=frames, codec=vae, grad=True)
    whole = self_rollout(start(student, length), drawn()(length))
    assert got.x.shape == (2, frames, *LATENT)
    torch.testing.assert_close(got.x[:, 1:], whole[:, length - frames + 1 :])
    with torch.no_grad():
        picture = vae.decode(whole)[:, 4 * (length - frames)]  # the last of latent frame length - frames
        torch.testing.assert_close(got.x[:, :1], vae.encode(picture[:, None]), rtol=1e-4, atol=1e-4)

    assert got.loss_mask is not None
    assert got.loss_mask.flatten().tolist() == [False] * first + [True] * (frames - first)
    weight = seeded(9, *got.x.shape) * got.loss_mask
    (weight * got.x).sum().backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    (weight[:, first:] * whole[:, first - frames :]).sum().backward()
    torch.testing.assert_close(gradients, [p.grad for p in student.parameters()])


@pytest.mark.usefixtures("quiet_collector")
def test_memory_does_not_grow_with_length() -> None:
    """Bytes of tensors that are alive whenever noise is drawn, and those that the graph keeps."""
    student, vae = tiny_student(**STREAM), tiny_vae()
    student.enable_gradient_checkpointing()

    def alive() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    figures = []
    for length in (9, 15, 33):  # the first fills what is kept from call to call
        peak, saved = 0, []

        def renoise(x: Tensor) -> Tensor:
            nonlocal peak
            peak = max(peak, alive())
            return torch.zeros_like(x)

        def pack(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.nbytes)
            return t

        before = alive()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            clip = long_rollout(
                start(student, length, renoise),
                lambda frames: torch.zeros(2, frames, *LATENT),
                length=length,
                frames=6,
                codec=vae,
                grad=True,
            )
        figures.append((peak - before, sum(saved)))
        del clip
    assert figures[1] == figures[2]
    assert min(figures[1]) > 0


def test_the_loss_looks_at_what_learns() -> None:
    """A masked loss is that of the clip whose beginning is cut away, but for the normaliser."""
    teacher = tiny_teacher().eval()
    matching = DistributionMatching(teacher, tiny_teacher(5), seeded(1, 1, 8, 16), schedule=SCHEDULE)
    x, loss_mask = seeded(2, 2, 6, *LATENT).requires_grad_(), torch.arange(6).view(1, -1, 1, 1, 1) >= 3
    t, eps, text = torch.tensor([300.0, 600.0]), seeded(3, 2, 6, *LATENT), seeded(4, 2, 8, 16)
    (whole,) = torch.autograd.grad(matching.loss(x, text, t, eps), x)
    (part,) = torch.autograd.grad(matching.loss(x, text, t, eps, None, loss_mask), x)
    assert not part[:, :3].any()
    torch.testing.assert_close(part[:, 3:], 2 * whole[:, 3:])  # a mean over half as many


def trainer(
    folder: Path | None = None, *, vae: Any = None, stream: Any = STREAM, **changes: Any
) -> DistillTrainer:
    chosen = small_run.settings(**({"critic_updates": 1} | changes))
    student = tiny_student(num_layers=1, **stream)
    return small_run.trainer(chosen, folder, student=student, vae=vae or tiny_vae())


def test_no_longer_than_what_is_learnt_from_is_a_plain_run() -> None:
    plain, same = trainer(steps=2), trainer(steps=2, rollout={"length": 6})
    assert numbers(plain) == numbers(same)
    assert numbers(plain) != numbers(trainer(steps=2, rollout={"length": 9}))
    for name, value in plain.student.state_dict().items():
        assert torch.equal(value, same.student.state_dict()[name])


def test_drawn_lengths_and_a_resumed_run(tmp_path: Path) -> None:
    chosen = {"rollout": {"length": [6, 15]}, "accumulation": 2}
    unbroken = trainer(**chosen)
    seen: list[tuple[int, bool]] = []
    roll_out = unbroken._rollout

    def watch(text: Tensor, noise: Any, draw: Any, *, grad: bool) -> RolloutClip:
        clip = roll_out(text, noise, draw, grad=grad)
        seen.append((draw.length, clip.loss_mask is None))
        return clip

    unbroken._rollout = watch  # type: ignore[method-assign]
    expected = numbers(unbroken)
    assert len({length for length, _ in seen}) > 2
    assert all(length in (6, 9, 12, 15) and plain is (length == 6) for length, plain in seen)
    assert seen[::2] == seen[1::2]  # micro-batches of an update share its length
    assert [line["student/length"] for line in expected] == [float(length) for length, _ in seen[::4]]
    before = numbers(trainer(tmp_path, steps=2, **chosen))
    after = trainer(tmp_path, **chosen)
    after.resume()
    assert before + numbers(after) == expected
    for name, value in unbroken.student.state_dict().items():
        assert torch.equal(value, after.student.state_dict()[name])


def test_what_cannot_be_rolled_out_is_refused() -> None:
    for length in (5, 10, [6, 10], [12, 9], [3, 9]):
        with pytest.raises(ValueError, match=r"rollout\.length: expected 6 \+ a multiple of 3"):
            trainer(rollout={"length": length})
    with pytest.raises(ValueError, match="needs a student with a window"):
        trainer(rollout={"length": 9}, stream={})
    with pytest.raises(ValueError, match="needs a vae that is a VideoAutoencoder, got StretchDecoder"):
        trainer(rollout={"length": 9}, vae=StretchDecoder())
    student, vae = tiny_student(**STREAM), tiny_vae()
    with pytest.raises(ValueError, match=r"long_rollout: expected frames .* got frames 6 and length 10"):
        long_rollout(start(student, 10), drawn(), length=10, frames=6, codec=vae, grad=True)
    with pytest.raises(
        ValueError, match="begun with max_frames of at least its length, 12, got one that never"
    ):
        long_rollout(start(student, 9), drawn(), length=12, frames=6, codec=vae, grad=True)
    with pytest.raises(ValueError, match="a student with window_frames"):
        long_rollout(start(tiny_student(), 6), drawn(), length=9, frames=6, codec=vae, grad=True)
