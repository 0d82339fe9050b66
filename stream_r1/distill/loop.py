"""The loop around training steps: events, checkpoints, Ctrl-C, resuming, and updates that are not finite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stream_r1.disk.lock import folder_lock
from stream_r1.distill.events import Event, NotSaved, Saved, SetAside, StepDone
from stream_r1.distill.lora import add_adapters
from stream_r1.distill.noise import global_streams_kept, seed_global_streams
from stream_r1.distill.precision import computing_in
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.settings import LoopSettings, LoraSettings
from stream_r1.distill.sharded_state import SharedCheckpoints, load_shared_checkpoint
from stream_r1.distill.sharding import (
    Sharding,
    divided_like,
    export_adapter,
    export_student,
    local,
    weight_sum,
    whole,
)
from stream_r1.distill.state import (
    Ema,
    StopRequest,
    flatten,
    list_checkpoints,
    load_checkpoint,
    rename_damaged,
    save_checkpoint,
    step_of,
    trained,
)
from stream_r1.distill.verification import (
    CheckpointError,
    DamagedCheckpointError,
    Expected,
    require_usable,
    require_values,
)
from stream_r1.distill.weighting import NOT_FINITE
from stream_r1.messages import shown
from stream_r1.models.autoencoder import Decoder
from stream_r1.models.transformer import CausalWanTransformer

Parts = dict[str, dict[str, Tensor]]


class DivergedError(RuntimeError):
    """Too many updates in a row were not finite; on every rank at once."""


class TrainingLoop(ABC):
    """A run that can be watched, stopped and resumed bit for bit.

    A trainer gives `train_step`, the `student`, the average of its weights, `ema`, and what sample videos are
    made with, and says what of it is state; the loop counts the steps done in `step`.

    Args:
        settings: how many steps, and when to keep what.
        folder: where checkpoints go and come from; None keeps none.
        ranks: the processes that train together; every one of them runs the same loop. None: this one alone.

    `stopped_by` is the signal that stopped the last `run`, on whichever rank; 0: none did. `set_aside` are
    the damaged checkpoints that `resume` went past; `run` tells of them first.
    """

    student: CausalWanTransformer
    ema: Ema
    device: torch.device
    vae: Decoder | None  # of sample videos; None: there are none
    prompts: list[str]

    def __init__(self, settings: LoopSettings, folder: Path | str | None, ranks: Ranks | None = None) -> None:
        self._loop = settings
        self.folder = Path(folder) if folder is not None else None
        self.ranks = ranks or Ranks()
        self._shared = None
        if self.ranks.launched and self.folder is not None:
            self._shared = SharedCheckpoints(self.folder, settings.keep_checkpoints, self.ranks)
        self.step = 0
        self.stopped_by = 0
        self.set_aside: list[SetAside] = []
        self._stop = StopRequest()
        self._skipped: dict[str, int] = {}  # updates in a row, a model
        self._drops = False
        self._frozen: dict[str, int] = {}  # weights under adapters, which no checkpoint holds, by model

    def train_step(self) -> StepDone:
        """One step; leaves `step` one higher.

        What it draws and computes depends on the run alone: not on the caller's autocast, nor on what the
        global streams of randomness gave before, which are afterwards as they were.
        """
        with global_streams_kept(), torch.autocast(self.device.type, enabled=False):
            seed_global_streams(self._loop.seed, self.step, self.ranks.rank)
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
        return computing_in(self._loop.precision, self.device)

    @abstractmethod
    def _parts(self) -> Parts:
        """The tensors that the rest of the run depends on, by part and name."""

    @abstractmethod
    def _values(self) -> dict[str, Any]:
        """The rest that it depends on, as JSON can hold it."""

    @abstractmethod
    def _check_values(self, own: dict[str, Any], source: str) -> None:
        """Raises CheckpointError for anything that `_values` would not give."""

    @abstractmethod
    def _restore(self, parts: Parts, values: dict[str, Any]) -> None:
        """Takes back what `_parts` and `_values` gave."""

    @abstractmethod
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By part, the optimizer whose state it is."""

    @abstractmethod
    def _owners(self) -> dict[str, nn.Module]:
        """By part, the model whose parameters its tensors belong to: they are divided as these are."""

    def _adapt(self, name: str, model: nn.Module, lora: LoraSettings | None) -> None:
        """Gives a model adapters to train in its place, if the settings say so."""
        if lora is not None:
            self._frozen[name] = weight_sum(model)
            self._drops = self._drops or lora.dropout > 0
            add_adapters(model, lora, self._loop.seed)

    def _seed_dropout(self, seeds: list[int]) -> None:
        """Dropout draws from torch's own generator: here it is made to depend on the samples at hand."""
        if self._drops:
            torch.manual_seed(seeds[0])

    def _share(self, models: list[nn.Module], batch: int, accumulation: int, data: object) -> None:
        """Divides models and work among the ranks, which must have begun alike.

        Raises:
            ValueError: a batch that does not divide, or ranks with other settings, data or weights.
        """
        ranks = self.ranks
        if not ranks.launched:
            return
        if batch % (ranks.size * accumulation):
            raise ValueError(
                f"batch: expected a multiple of {ranks.size} processes x accumulation {accumulation}, "
                f"got {batch}"
            )
        ranks.require_same(**self._loop.model_dump(mode="json"), data=data)
        ranks.require_same(weights=[weight_sum(model) for model in models])
        sharding = Sharding(self._loop.distributed, ranks)
        for model in models:
            sharding.place(model)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this run."""
        frozen = {"frozen_weights": self._frozen} if self._frozen else {}
        return self._loop.maths() | frozen

    def run(self) -> Iterator[Event]:
        """Trains up to `settings.steps`, yielding an event a step, after those of `set_aside`.

        SIGINT (Ctrl-C), SIGTERM, SIGHUP or `stop()`, on any rank, finishes the step under way, keeps a
        checkpoint and ends the iteration, with `stopped` set. A consumer that leaves the loop of a process by
        itself keeps one too; of several, the others know nothing of it.

        An update that is not finite is skipped, and no checkpoint at an interval is written until one of the
        same network is finite again, nor one of weights that are not: it could take the place of a good one.
        Nor does a disk that is full for a while end a run: an interval's checkpoint that can't be written is
        a `NotSaved`.

        Raises:
            DivergedError: too many updates of a network in a row were skipped; the last checkpoint is from
                before them.
            FolderInUseError: another process has the folder.
            OSError: the last checkpoint can't be written.
        """
        self.stopped_by, due = 0, False
        told, self.set_aside = self.set_aside, []
        yield from told
        lock = nullcontext() if self.folder is None else folder_lock(self.folder)
        with self.ranks.held_by_first(lock), self._stop:
            while self.step < self._loop.steps:
                self.stopped_by = self.ranks.greatest(self._stop.signal)
                if self.stopped:
                    yield from self._save("stopped")
                    return
                try:
                    done = self.train_step()
                except DivergedError:
                    for _ in self._written(wait=True):
                        pass
                    raise
                try:
                    yield done
                except GeneratorExit:  # the consumer left; between two steps everything is whole
                    if not self.ranks.launched:
                        self.save()
                    raise
                yield from self._written(wait=False)
                due = due or self.step % self._loop.checkpoint_every == 0
                if due and self.step < self._loop.steps and self._sound():
                    due = False
                    yield from self._save("interval")
            yield from self._save("finished")

    @property
    def stopped(self) -> bool:
        """Whether `run` ended before its last step because it was asked to."""
        return self.stopped_by != 0

    def stop(self) -> None:
        """Asks a running `run` to stop after the step under way; from any thread."""
        self._stop.request()

    def save(self) -> Path | None:
        """Writes a checkpoint of everything that the rest of the run depends on; None without a folder.

        One with numbers that are not finite, or amid skipped updates, removes no older one.
        """
        if self.folder is None:
            return None
        sound = self._sound()
        if self._shared is not None:
            return self._shared.save(self.step, *self._state(), spare=not sound)
        keep = self._loop.keep_checkpoints if sound else None
        return save_checkpoint(self.folder, self.step, *self._state(), keep=keep)

    def _sound(self) -> bool:
        """Whether no updates are being skipped and every number of the state is finite, on all ranks."""
        if any(self._skipped.values()):
            return False
        tensors = (local(t) for t in flatten(self._parts()).values())
        return not self.ranks.any(not all(bool(t.isfinite().all()) for t in tensors))

    def _state(self) -> tuple[Parts, dict[str, Any]]:
        values = {
            "step": self.step,
            "skipped": self._skipped,
            "identity": self._identity(),
            "own": self._values(),
        }
        return self._parts(), values

    def resume(self) -> Path | None:
        """Continues from the newest checkpoint in the folder that is not damaged, bit for bit; None if there
        is none. Newer ones that are damaged get another name, see `set_aside`; every rank takes the same.

        Raises:
            DamagedCheckpointError: all of them are damaged; they stay as they are.
            CheckpointError: one of a run with other settings.
        """
        there = list_checkpoints(self.folder) if self.folder is not None else []
        damaged: list[tuple[Path, str]] = []
        self.set_aside = []
        for path in reversed(self.ranks.from_first(there)):
            try:
                self.load(path)
            except DamagedCheckpointError as error:
                damaged.append((path, str(error)))
                continue
            for other, reason in damaged:
                aside = self.ranks.from_first(rename_damaged(other) if self.ranks.first else other)
                self.set_aside.append(SetAside(self.step, aside, reason))
            return path
        if damaged:
            older = f"; so are the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
            raise DamagedCheckpointError(f"{damaged[0][1]}{older}: none is left to resume from")
        return None

    def load(self, path: Path | str) -> None:
        """Continues from a checkpoint, of however many processes; see `resume`."""
        problem: CheckpointError | None = None
        try:
            parts, values = self._read(path)
        except CheckpointError as error:
            problem = error
        # What one rank finds damaged, no rank may take.
        kinds = (None, DamagedCheckpointError, CheckpointError)
        worst = kinds[self.ranks.greatest(kinds.index(None if problem is None else type(problem)))]
        if worst is not None:
            raise problem if isinstance(problem, worst) else worst(f"{path}: not readable on another rank")
        self._restore(parts, values["own"])
        self.step = values["step"]
        self._skipped = values["skipped"]

    def _read(self, path: Path | str) -> tuple[Parts, dict[str, Any]]:
        """What a checkpoint holds, checked against this run, of which nothing is changed."""
        if Path(path).is_dir():
            parts, values = load_shared_checkpoint(path, self._like, self.ranks)
        else:
            parts, values = load_checkpoint(path)
        require_values(values, step_of(path), str(path))
        _refuse_another_run(path, values["identity"], self._identity())
        self._check_values(values["own"], str(path))
        require_usable(parts, self._expected(), str(path))
        for part, named in parts.items():
            for name, t in named.items():
                named[name] = divided_like(t, self._like(f"{part}/{name}", t.shape))
        return parts, values

    def _expected(self) -> Expected:
        """What every checkpoint of this run holds."""
        own = self._parts()
        optimizers = {
            name: [p for group in optimizer.param_groups for p in group["params"]]
            for name, optimizer in self._optimizers().items()
        }
        return Expected(
            models={part: own[part] for part in own.keys() & self._owners().keys() - {"ema", *optimizers}},
            averages={"ema": trained(self.student)},
            optimizers=optimizers,
            generators={"draws": own["draws"]},
        )

    def _like(self, key: str, shape: torch.Size) -> Tensor | None:
        """The parameter that a tensor of a checkpoint belongs to, if it has its shape.

        Keys are <part>/<parameter> or, of optimizers, <part>/<parameter's index>/<what>.
        """
        part, _, name = key.partition("/")
        model = self._owners().get(part)
        if model is None:
            return None
        index = name.partition("/")[0]
        parameter: Tensor | None
        if index.isdigit():
            parameter = list(trained(model).values())[int(index)]
        else:
            parameter = dict(model.named_parameters()).get(name)
        return parameter if parameter is not None and parameter.shape == shape else None

    def export(self, folder: Path | str, *, ema: bool = True) -> None:
        """Writes the student as a diffusers folder, with its averaged weights if `ema` and there are some;
        adapters are merged.
        """
        with self.ema.applied() if ema else nullcontext():
            export_student(self.student, folder, self.ranks)

    def export_adapter(self, folder: Path | str, *, ema: bool = True) -> None:
        """Writes the student's adapters as peft does; see `export`."""
        with self.ema.applied() if ema else nullcontext():
            export_adapter(self.student, folder, self.ranks)

    def _save(self, why: Literal["interval", "stopped", "finished"]) -> Iterator[Event]:
        if self._shared is not None:
            yield from self._written(wait=True)
            if why == "interval" and self._loop.distributed.async_checkpoints:
                self._shared.begin(self.step, *self._state())
                return
        try:
            path = self.save()
        except OSError as error:
            if why != "interval" or self.ranks.launched:
                raise
            yield NotSaved(self.step, f"{error.filename or self.folder}: {error.strerror or error}")
            return
        if path is not None:
            yield Saved(self.step, path, why)

    def _written(self, *, wait: bool) -> Iterator[Event]:
        """Tells of a checkpoint that was written beside the training and is complete by now."""
        path = self._shared.finish(wait=wait) if self._shared is not None else None
        if path is not None:
            yield Saved(int(path.name.removeprefix("step-")), path, "interval")

    def _descend(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        losses: list[Tensor],
        clip: float,
        scalars: dict[str, float],
    ) -> None:
        """Clips and steps once for all micro-batches and ranks; skips it if anything in it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ranks.average_gradients(parameters)
        norm = whole(nn.utils.clip_grad_norm_(parameters, clip))
        loss = self.ranks.mean(torch.stack(losses).mean())
        numbers = torch.stack([loss.float(), norm.float()])
        finite = not self.ranks.any(not torch.isfinite(numbers).all())
        if finite:
            optimizer.step()
            torch.clear_autocast_cache()  # its narrow copies are of the weights before
        optimizer.zero_grad(set_to_none=True)
        scalars[f"{name}/loss"], scalars[f"{name}/grad_norm"] = numbers.tolist()
        scalars[f"{name}/lr"] = optimizer.param_groups[0]["lr"]
        scalars[f"{name}/clipped"] = float(numbers[1] > clip)
        scalars[f"{name}/skipped"] = float(not finite)
        self._skipped[name] = 0 if finite else self._skipped.get(name, 0) + 1
        if self._skipped[name] > self._loop.max_skipped:
            raise DivergedError(self._diverged(name, scalars))

    def _diverged(self, name: str, scalars: dict[str, float]) -> str:
        count = self._skipped[name]
        what = f"{count} updates of the {name} in a row were" if count > 1 else f"an update of the {name} was"
        told = f"loss {scalars[f'{name}/loss']:g}, gradient norm {scalars[f'{name}/grad_norm']:g}"
        advice = "lower its lr and start anew"
        if name == "student" and scalars.get(NOT_FINITE):
            told += f", {scalars[NOT_FINITE]:.0%} of the reward's scores not finite"
            advice = "look at the reward"
        return (
            f"{what} not finite, at step {self.step + 1} ({told}), max_skipped is {self._loop.max_skipped}: "
            f"{advice}; the last checkpoint, if any, is from before"
        )


def _refuse_another_run(path: Path | str, theirs: dict, ours: dict, at: str = "") -> None:
    for key in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _refuse_another_run(path, a, b, f"{at}{key}.")
        elif a != b:
            raise CheckpointError(
                f"{path}: made with {at}{key} = {shown(a)}, this run has {shown(b)}: "
                "resume with the same settings, or start anew"
            )
