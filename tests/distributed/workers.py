"""Processes that train together, as a launcher starts them, and small runs for them."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (once, before processes are forked)
import small_run
import torch
from distill_models import LATENT, tiny_student, tiny_teacher, tiny_vae
from small_run import numbers
from torch import Tensor

from stream_r1.distill.events import Saved
from stream_r1.distill.initialise import InitTrainer
from stream_r1.distill.ode import OdePairs, OdeRegression
from stream_r1.distill.ranks import Ranks, join
from stream_r1.distill.rollout import begin_rollout, self_rollout
from stream_r1.distill.run_settings import DistributedSettings
from stream_r1.distill.settings import DistillSettings, InitSettings
from stream_r1.distill.sharding import full_tensor
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.models.sequence import SampleShare, SequenceParallel
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.sampler import Sampler
from stream_r1.schedule import FlowSchedule


class Processes:
    """Ranks 0 .. size - 1 of a function `work(*arguments)`, each a process with a launcher's environment; of
    size None, one without.
    """

    def __init__(self, size: int | None, work: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.processes, self._ends = [], []
        for rank in range(size or 1):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(rank, size, port, theirs, work, arguments))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._ends.append(ours)

    def results(self, timeout: float = 120) -> list[Any]:
        """What every rank returned, or an exception where it raised or died."""
        out = []
        for process, end in zip(self.processes, self._ends, strict=True):
            try:
                out.append(pickle.loads(end.recv_bytes()) if end.poll(timeout) else TimeoutError("no result"))
            except EOFError:
                process.join(timeout)
                out.append(ChildProcessError(f"died: {process.exitcode}"))
        self.kill()
        return out

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def launch(size: int | None, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What every rank's `work` returned; raises what one raised."""
    results = Processes(size, work, *arguments).results()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _child(
    rank: int, size: int | None, port: int, end: Connection, work: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    if size is not None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    try:
        result = work(*arguments)
    except BaseException as error:
        traceback.print_exc()
        result = error if isinstance(error, Exception) else RuntimeError(repr(error))
    end.send_bytes(pickle.dumps(result))  # tensors by value: the process may be gone when they are read


@contextlib.contextmanager
def joined(settings: Any) -> Iterator[Ranks]:
    with join(settings.distributed) as ranks:
        yield ranks


# A large eps: the updates are smooth in the gradients, so that rounding stays rounding.
SMOOTH = {"lr": 1e-2, "eps": 1e-2}
settings = partial(small_run.settings, small_run.SETTINGS | {"batch": 4, "student": SMOOTH, "critic": SMOOTH})


def distiller(
    ranks: Ranks | None, folder: Path | None, chosen: DistillSettings, **extra: Any
) -> DistillTrainer:
    stream = {"window_frames": 6, "sink_frames": 3, "positions": "window", "sink_ema": 0.9}
    student = tiny_student(num_layers=2, **stream)
    vae = None if chosen.rollout.length is None else tiny_vae()
    return small_run.trainer(chosen, folder, **({"student": student, "vae": vae, "ranks": ranks} | extra))


def starter(ranks: Ranks | None, folder: Path | None, chosen: InitSettings) -> InitTrainer:
    g = torch.Generator().manual_seed(2)
    trajectories, text = torch.randn(5, 3, 6, *LATENT, generator=g), torch.randn(2, 8, 16, generator=g)
    pairs = OdePairs(trajectories, torch.arange(5) % 2, text, torch.tensor([1000.0, 625.0]))
    return InitTrainer(chosen, tiny_student(), OdeRegression(pairs), folder=folder, ranks=ranks)


def everything(trainer: Any) -> dict[str, Tensor]:
    """Every tensor that training changed, whole."""
    out = {}
    for part, named in trainer.state.tensors().items():
        out |= {f"{part}/{name}": full_tensor(t).clone() for name, t in named.items()}
    weights = trainer.state.values()["own"].get("weights")
    if weights is not None:
        out["history"] = torch.tensor(weights["history"], dtype=torch.float64)
    return out


def train(folder: Path | None, chosen: Any, gathered: bool = True) -> tuple[list[dict[str, float]], Any]:
    """A run, resumed if there is something to resume: its numbers, and everything it ends with."""
    make = distiller if isinstance(chosen, DistillSettings) else starter
    with joined(chosen) as ranks:
        trainer = make(ranks, folder, chosen)
        trainer.resume()
        return numbers(trainer), everything(trainer) if gathered else None


def train_alone(folder: Path | None, chosen: Any) -> tuple[list[dict[str, float]], Any]:
    """The same in this process, without a group."""
    make = distiller if isinstance(chosen, DistillSettings) else starter
    trainer = make(None, folder, chosen)
    trainer.resume()
    return numbers(trainer), everything(trainer)


def train_four_heads(chosen: DistillSettings) -> tuple[list[dict[str, float]], Any]:
    """A run of models that four processes can share; without a launcher's environment by this one alone."""
    heads = {"num_attention_heads": 4, "num_layers": 1}
    with joined(chosen) as ranks:
        models = {"student": tiny_student(**heads), "teacher": tiny_teacher(**heads)}
        trainer = distiller(ranks, None, chosen, **models)
        return numbers(trainer), everything(trainer)


def train_and_note(folder: Path, chosen: Any, log: Path) -> None:
    """A run that notes every step and checkpoint on the disk as it happens."""
    with joined(chosen) as ranks:
        trainer = distiller(ranks, folder, chosen)
        trainer.resume()
        with log.open("a") as notes:
            for event in trainer.run():
                if ranks.is_main:
                    notes.write(f"{'saved' if isinstance(event, Saved) else 'step'} {event.step}\n")
                    notes.flush()


# Four heads of 12 and frames of 8 tokens, for two and for four processes.
SHARED = {"num_attention_heads": 4, "window_frames": 7, "sink_frames": 3, "positions": "window"}
SHARED_LATENT = (4, 4, 8)  # channels, rows, columns


def shared_student(size: int | None, **settings: Any) -> CausalWanTransformer:
    """A student whose passes `size` processes share; None: one alone."""
    student = tiny_student(**SHARED | settings)
    if size is not None:
        student.enable_sequence_parallel(SequenceParallel())
    return student


def passes(size: int | None, checkpointing: bool) -> dict[str, Tensor]:
    """Whole clips under three masks and a rollout of chunks: velocities, and gradients meant over ranks."""
    g = torch.Generator().manual_seed(3)
    x, clean, text, t = (
        torch.randn(2, 9, *SHARED_LATENT, generator=g),
        torch.randn(2, 9, *SHARED_LATENT, generator=g),
        torch.randn(2, 8, 16, generator=g),
        1000 * torch.rand(2, 9, generator=g),
    )
    weight, out = torch.randn(x.shape, generator=g), {}
    with join(DistributedSettings()) as ranks:
        for name in ("bidirectional", "causal", "teacher forcing", "rollout"):
            student = shared_student(size).train()
            if checkpointing:
                student.enable_gradient_checkpointing()
            given = x.clone().requires_grad_()
            if name == "rollout":
                loop = begin_rollout(
                    student,
                    student.encode_text(text),
                    (2, *SHARED_LATENT[1:]),
                    max_frames=9,
                    schedule=FlowSchedule(5.0),
                    steps=[1000.0, 600.0],
                    exit_step=1,
                    renoise=torch.sin,
                )
                v = self_rollout(loop, x)
            else:
                mask = {} if name == "bidirectional" else {"mask": "causal"}
                v = student(given, t, text, **mask, clean_x=clean if name == "teacher forcing" else None)
            (v * weight).mean().backward()
            ranks.average_gradients(student.parameters())
            out[name] = v.detach()
            out |= {f"{name}/{key}": p.grad for key, p in student.named_parameters()}
            if name != "rollout":
                out[f"{name}/x"] = given.grad
    return out


def rows_by_sample(samples: int) -> tuple[list[int], Tensor]:
    """How many of the samples each process works on, and what all of them have of it, along dimension 1."""
    with join(DistributedSettings()) as ranks:
        share = SampleShare(samples, SequenceParallel())
        mine = torch.arange(float(samples)).expand(2, -1)[:, share.own]
        part = None if share.idle else mine.log()  # the first is infinite
        counts = ranks.gather(torch.tensor([mine.shape[1]])).tolist()
        return counts, share.gathered(part, mine, 2, samples, dim=1)


def streams(size: int | None, merge: bool, moving: bool) -> dict[str, Tensor]:
    """Seven chunks of two streams that go on from given frames and switch; and the numbers in a cache."""
    more = {"window_frames": 9, "sink_ema": 0.9} if moving else {"first_chunk_frames": 1}
    with join(DistributedSettings()) as ranks, torch.no_grad():
        student = shared_student(size, **more).eval()
        g = torch.Generator().manual_seed(4)
        text = torch.randn(3, 8, 16, generator=g)
        sampler = Sampler(student, steps=(1000, 500), latent_size=SHARED_LATENT[1:], fuse_cache_update=merge)
        first = torch.randn(2, 3 if moving else 1, *SHARED_LATENT, generator=g)
        stream = sampler.stream(text[:2], seed=5, chunks=7, first_frames=first)
        out = {}
        for chunk in stream:
            out[f"chunk {chunk.index}"] = chunk.latents
            if chunk.index == 3:
                stream.switch(text[1:], recache=moving)
        return out | {"cache": torch.tensor(stream.cache.storage.numel() * ranks.size)}
