"""The processes that train together, a rank each, and what they tell one another.

One process by itself is `Ranks()`: every method then gives back what it was given, bit for bit. `join` makes
the processes that a launcher started (torchrun, or anything that sets its variables) into one group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from stream_r1.distill.events import summarise
from stream_r1.distill.run_settings import DistributedSettings

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_CPU = torch.device("cpu")
_BUCKET = 1 << 24  # gradients that are summed in one message, in elements

T = TypeVar("T")


class RankError(RuntimeError):
    """What ended a run of several processes, said by the first of them that failed."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train together.

    rank, size: its place and their number.
    local_size: how many of them are on this machine.
    device: where it computes.
    launched: whether there is a process group; without one there is one process.
    sequence: how many neighbours see the same samples, and share their tokens.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = _CPU
    launched: bool = False
    store: Store | None = None
    sequence: int = 1

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided."""
        return self.size // self.sequence

    @property
    def part(self) -> int:
        """Which of them this rank sees."""
        return self.rank // self.sequence

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that talks and writes."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every rank's `x`, of the same shape everywhere; summed in float64."""
        if not self.launched:
            return x
        total = x.detach().to(self.device, torch.float64)
        dist.all_reduce(total)
        return (total / self.size).to(x)

    def gather(self, x: Tensor) -> Tensor:
        """The `x` [B, ...] of every part of a batch, one after the other: [parts * B, ...]."""
        if not self.launched:
            return x
        out = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out[:: self.sequence])

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.max(int(flag)))

    def max(self, number: int) -> int:
        """The greatest of every rank's numbers."""
        if not self.launched:
            return number
        told = torch.tensor(number, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def totals(self, numbers: list[int]) -> list[int]:
        """The sums of every rank's numbers, one by one, modulo 2^64."""
        if not self.launched:
            return numbers
        told = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(told)
        return told.tolist()

    def summary(self, scalars: dict[str, float]) -> dict[str, float]:
        """Every rank's numbers as one, see `summarise`; the same names on all of them."""
        if not self.launched or not scalars:
            return scalars
        table = self.gather(torch.tensor([list(scalars.values())], dtype=torch.float64, device=self.device))
        return summarise([dict(zip(scalars, row, strict=True)) for row in table.tolist()])

    def broadcast(self, value: T) -> T:
        """The main rank's `value`, small and picklable."""
        if not self.launched:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        self.any(False)

    @contextmanager
    def held_by_main(self, lock: AbstractContextManager[object]) -> Iterator[None]:
        """A context of the main rank that all of them wait for; what refuses it there ends all of them."""
        with ExitStack() as stack:
            refused: Exception | None = None
            if self.is_main:
                try:
                    stack.enter_context(lock)
                except Exception as error:
                    refused = error
            told = self.broadcast(str(refused) if refused is not None else None)
            if told is not None:
                raise refused or RankError(told)
            yield

    def require_same(self, **values: object) -> None:
        """Refuses to continue when ranks differ in what they were told. Raises ValueError on all of them."""
        if not self.launched:
            return
        everybody: list[dict[str, object]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everybody, values)
        for name in values:
            said = [each[name] for each in everybody]
            for rank, other in enumerate(said):
                if other != said[0]:
                    raise ValueError(
                        f"every rank must have the same {name.replace('_', ' ')}: "
                        f"rank 0 has {said[0]}, rank {rank} has {other}"
                    )

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces the gradients of parameters that every rank holds whole by their means.

        Sharded ones are left alone: theirs are averaged in the backward.
        """
        if not self.launched:
            return
        bucket: list[Tensor] = []
        for p in parameters:
            if p.grad is None or isinstance(p.grad, DTensor):
                continue
            if bucket and (
                p.grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + p.grad.numel() > _BUCKET
            ):
                self._average(bucket)
                bucket = []
            bucket.append(p.grad)
        if bucket:
            self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(mean.view_as(g))

    def fails_first(self) -> bool:
        """Whether this rank is the first to report a failure; the others fail in its wake."""
        if self.store is None:
            return True
        try:
            return self.store.add("failed", 1) == 1
        except (RuntimeError, OSError):  # whoever kept the store is gone
            return False


def launched() -> bool:
    """Whether a launcher started this process as one of a group."""
    return all(name in os.environ for name in _LAUNCHED)


@contextmanager
def join(settings: DistributedSettings) -> Iterator[Ranks]:
    """The group that the environment describes, for as long as the context lasts; without one, `Ranks()`.

    An error that leaves the context becomes a RankError on the first rank that fails. Those that fail in its
    wake raise SystemExit, so that one message is told.
    """
    if not launched():
        _check_sequence(settings, 1)
        yield Ranks()
        return
    ranks = _start(settings)
    try:
        yield ranks
    except Exception as error:
        if not ranks.fails_first():
            raise SystemExit(2) from error
        told = str(error).strip() or type(error).__name__
        kind = "" if type(error).__module__.startswith("stream_r1") else f"{type(error).__name__}: "
        raise RankError(f"rank {ranks.rank} of {ranks.size}: {kind}{told}") from error
    dist.destroy_process_group()


def _start(settings: DistributedSettings) -> Ranks:
    cuda = settings.backend == "nccl" or (settings.backend == "auto" and torch.cuda.is_available())
    local = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"distributed.backend: nccl needs a GPU a process, local rank {local} found "
                f"{torch.cuda.device_count()} (fewer processes, or distributed.backend=gloo)"
            )
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if os.environ["MASTER_PORT"] == "0":  # torchrun hands it on as it is, and nobody ever listens there
        if os.environ["RANK"] != "0":
            raise SystemExit(2)
        raise ValueError(
            "MASTER_PORT: expected the port that rank 0 listens at, got 0 (torchrun --standalone finds a "
            "free one; else name it: --master-port 29500)"
        )
    timeout = timedelta(minutes=settings.timeout_minutes)
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    _check_sequence(settings, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",  # checkpoints talk over the CPU
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    run = PrefixStore("run", store)
    return Ranks(rank, size, local_size, device, launched=True, store=run, sequence=settings.sequence)


def _check_sequence(settings: DistributedSettings, size: int) -> None:
    if size % settings.sequence:
        raise ValueError(
            f"distributed.sequence: expected a divisor of the number of processes (torchrun "
            f"--nproc-per-node), {size}, got {settings.sequence}"
        )
