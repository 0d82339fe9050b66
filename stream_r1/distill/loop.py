"""The loop around training steps: events, when to checkpoint, Ctrl-C, and what a step computes in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from stream_r1.disk.lock import folder_lock
from stream_r1.distill.checkpointer import Checkpointer
from stream_r1.distill.events import Alarm, Event, StepDone
from stream_r1.distill.lora import add_adapters
from stream_r1.distill.noise import global_streams_kept, seed_global_streams
from stream_r1.distill.optimizer_step import DivergedError, OptimizerStep
from stream_r1.distill.precision import computing_in
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.run_settings import RunSettings
from stream_r1.distill.run_state import Ema, RunState
from stream_r1.distill.settings import LoraSettings
from stream_r1.distill.sharding import Sharding, export_adapter, export_student, weight_sum
from stream_r1.distill.stopping import StopRequest
from stream_r1.models.autoencoder import Decoder
from stream_r1.models.transformer import CausalWanTransformer


class TrainingLoop(ABC):
    """A run that can be watched, stopped and resumed bit for bit.

    A trainer gives `_step`, the `student` and what sample videos are made with, and says in `_begin` what of
    it is state.

    Args:
        settings: how many steps, and when to keep what.
        folder: where checkpoints go and come from; None keeps none.
        ranks: the processes that train together; every one of them runs the same loop. None: this one alone.

    `stopped_by` is the signal that stopped the last `run`, on whichever rank; 0: none did.
    """

    student: CausalWanTransformer
    device: torch.device
    vae: Decoder | None  # of sample videos; None: there are none
    prompts: list[str]
    state: RunState
    checkpoints: Checkpointer

    def __init__(self, settings: RunSettings, folder: Path | str | None, ranks: Ranks | None = None) -> None:
        self._run_settings = settings
        self._folder = Path(folder) if folder is not None else None
        self.ranks = ranks or Ranks()
        self.stopped_by = 0
        self._stop = StopRequest()
        self._has_dropout = False
        self._frozen: dict[str, int] = {}  # weights under adapters, which no checkpoint holds, by model

    def _begin(self, state: RunState, **data: object) -> None:
        """Everything is made: what the run's state is, and what data it must be resumed with."""
        self.state = state
        identity = self._run_settings.maths() | data
        if self._frozen:
            identity["frozen_weights"] = self._frozen
        self.checkpoints = Checkpointer(self._folder, state, identity, self._run_settings, self.ranks)

    def _optimizer_step(self, name: str, optimizer: torch.optim.Optimizer, clip: float) -> OptimizerStep:
        return OptimizerStep(
            name,
            optimizer,
            clip=clip,
            max_skipped=self._run_settings.max_skipped,
            ranks=self.ranks,
            skipped=self.state.skipped,
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    @property
    def ema(self) -> Ema:
        return self.state.ema

    def train_step(self) -> StepDone:
        """One step; leaves `step` one higher.

        What it draws and computes depends on the run alone: not on the caller's autocast, nor on what the
        global streams of randomness gave before, which are afterwards as they were.
        """
        with global_streams_kept(), torch.autocast(self.device.type, enabled=False):
            seed_global_streams(self._run_settings.seed, self.step, self.ranks.part)
            return self._step()

    @abstractmethod
    def _step(self) -> StepDone:
        """What `train_step` does."""

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Latents [B, F, C, h, w] as the exported student would make them, all steps; a seed a sample.

        Trains nothing and draws from no stream of the training. Of models in parts, every rank must ask.
        """
        training = self.student.training
        self.student.eval()
        try:
            with self.ema.applied(), self._precision():
                return self._sample(prompts, seeds)
        finally:
            self.student.train(training)

    @abstractmethod
    def _sample(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """What `sample` gives, of the student as it is to be exported."""

    def _precision(self) -> torch.autocast:
        return computing_in(self._run_settings.precision, self.device)

    def _adapt(self, name: str, model: nn.Module, lora: LoraSettings | None) -> None:
        """Gives a model adapters to train in its place, if the settings say so."""
        if lora is not None:
            self._frozen[name] = weight_sum(model)
            if lora.dropout > 0 and self.ranks.sequence > 1:
                raise ValueError(
                    f"{name}.lora.dropout: expected 0 with distributed.sequence {self.ranks.sequence}, whose "
                    f"ranks would draw other masks than one process does, got {lora.dropout}"
                )
            self._has_dropout = self._has_dropout or lora.dropout > 0
            add_adapters(model, lora, self._run_settings.seed)

    def _seed_dropout(self, seeds: list[int]) -> None:
        """Dropout draws from torch's own generator: here it is made to depend on the samples at hand."""
        if self._has_dropout:
            torch.manual_seed(seeds[0])

    def _shard_models(self, models: list[nn.Module], batch: int, accumulation: int, data: object) -> None:
        """Shards models and work over the ranks, which must have begun alike.

        Raises:
            ValueError: a batch that does not divide, or ranks with other settings, data or weights.
        """
        ranks = self.ranks
        if not ranks.launched:
            return
        if batch % (ranks.parts * accumulation):
            shared = f" / sequence {ranks.sequence}" if ranks.sequence > 1 else ""
            raise ValueError(
                f"batch: expected a multiple of {ranks.size} processes{shared} x accumulation "
                f"{accumulation}, got {batch}"
            )
        ranks.require_same(**self._run_settings.model_dump(mode="json"), data=data)
        ranks.require_same(weights=[weight_sum(model) for model in models])
        sharding = Sharding(self._run_settings.distributed, ranks)
        for model in models:
            sharding.place(model)

    def run(self) -> Iterator[Event]:
        """Trains up to `settings.steps`, yielding an event a step, after those of checkpoints set aside.

        SIGINT (Ctrl-C), SIGTERM, SIGHUP or `stop()`, on any rank, finishes the step under way, keeps a
        checkpoint and ends the iteration, with `stopped` set. A consumer that leaves the loop of a process by
        itself keeps one too; of several, the others know nothing of it.

        An update that is not finite is skipped, and no checkpoint at an interval is written until one of the
        same network is finite again, nor one of weights that are not: it could take the place of a good one.
        Nor does a disk that is full for a while end a run: an interval's checkpoint that can't be written is
        a `NotSaved`.

        A guard's alarm is an `Alarm`, and ends the run where the guard is told to.

        Raises:
            DivergedError: too many updates of a network in a row were skipped; the last checkpoint is from
                before them.
            FolderInUseError: another process has the folder.
            OSError: the last checkpoint can't be written.
        """
        self.stopped_by, due, alarmed = 0, False, False
        guard = self.state.guard
        checkpoints, settings = self.checkpoints, self._run_settings
        damaged, checkpoints.set_aside = checkpoints.set_aside, []
        yield from damaged
        lock = nullcontext() if checkpoints.folder is None else folder_lock(checkpoints.folder)
        with self.ranks.held_by_main(lock), self._stop:
            while self.step < settings.steps and not (guard is not None and guard.stops):
                self.stopped_by = self.ranks.max(self._stop.signal)
                if self.stopped:
                    yield from checkpoints.saving("stopped")
                    return
                try:
                    done = self.train_step()
                except DivergedError:
                    for _ in checkpoints.written(wait=True):
                        pass
                    raise
                try:
                    yield done
                except GeneratorExit:  # the consumer left; between two steps everything is whole
                    if not self.ranks.launched:
                        checkpoints.save()
                    raise
                yield from checkpoints.written(wait=False)
                if guard is not None and guard.alarm is not None and not alarmed:
                    alarmed = True
                    yield Alarm(self.step, guard.alarm, guard.kept_step, guard.stops)
                due = due or self.step % settings.checkpoint_every == 0
                if due and self.step < settings.steps and self.state.all_finite(self.ranks):
                    due = False
                    yield from checkpoints.saving("interval")
            yield from checkpoints.saving("finished")

    @property
    def stopped(self) -> bool:
        """Whether `run` ended before its last step because it was asked to."""
        return self.stopped_by != 0

    def stop(self) -> None:
        """Asks a running `run` to stop after the step under way; from any thread."""
        self._stop.request()

    def resume(self) -> Path | None:
        """Continues from the newest checkpoint in the folder, bit for bit; see `Checkpointer.resume`."""
        return self.checkpoints.resume()

    def save(self) -> Path | None:
        """Writes a checkpoint of everything that the rest of the run depends on; None without a folder."""
        return self.checkpoints.save()

    def export(self, folder: Path | str, *, ema: bool = True) -> None:
        """Writes the student as a diffusers folder, with its averaged weights if `ema` and there are some, or
        those that a guard kept when it ended the run; adapters are merged.
        """
        with self.state.best() if ema else nullcontext():
            export_student(self.student, folder, self.ranks)

    def export_adapter(self, folder: Path | str, *, ema: bool = True) -> None:
        """Writes the student's adapters as peft does; see `export`."""
        with self.state.best() if ema else nullcontext():
            export_adapter(self.student, folder, self.ranks)
