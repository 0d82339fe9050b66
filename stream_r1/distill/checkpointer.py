"""A run's checkpoints: when they are written, by one process or all, and which one a run resumes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from stream_r1.disk.origin import changes
from stream_r1.distill.checkpoint_files import (
    list_checkpoints,
    load_checkpoint,
    rename_damaged,
    save_checkpoint,
    step_of,
)
from stream_r1.distill.events import Event, NotSaved, Saved, SetAside
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.run_settings import RunSettings
from stream_r1.distill.run_state import Parts, RunState
from stream_r1.distill.sharded_state import SharedCheckpoints, load_shared_checkpoint
from stream_r1.distill.sharding import sharded_like
from stream_r1.distill.verification import (
    CheckpointError,
    DamagedCheckpointError,
    require_usable,
    require_values,
)
from stream_r1.messages import shown


class Checkpointer:
    """Writes the state of a run into a folder and takes it back.

    Args:
        folder: None keeps none.
        state: of the run.
        identity: what must be the same for a checkpoint to be of this run.
        settings: when to keep what.
        ranks: every one of them makes the same calls.

    `set_aside` are the damaged checkpoints that `resume` went past.
    """

    def __init__(
        self,
        folder: Path | None,
        state: RunState,
        identity: dict[str, Any],
        settings: RunSettings,
        ranks: Ranks,
    ) -> None:
        self.folder, self.state, self.identity, self.ranks = folder, state, identity, ranks
        self.set_aside: list[SetAside] = []
        self._keep = settings.keep_checkpoints
        self._in_background = settings.distributed.async_checkpoints
        self._shared = None
        if ranks.launched and folder is not None:
            self._shared = SharedCheckpoints(folder, self._keep, ranks)

    def save(self) -> Path | None:
        """Writes a checkpoint; None without a folder.

        One with numbers that are not finite, or amid skipped updates, removes no older one.
        """
        if self.folder is None:
            return None
        finite = self.state.all_finite(self.ranks)
        if self._shared is not None:
            return self._shared.save(self.state.step, *self._contents(), spare=not finite)
        keep = self._keep if finite else None
        return save_checkpoint(self.folder, self.state.step, *self._contents(), keep=keep)

    def saving(self, why: Literal["interval", "stopped", "finished"]) -> Iterator[Event]:
        """Writes a checkpoint, at an interval perhaps in the background, and tells of what is written.

        Raises:
            OSError: it can't be written; at an interval of one process that is a `NotSaved`.
        """
        if self._shared is not None:
            yield from self.written(wait=True)
            if why == "interval" and self._in_background:
                self._shared.begin(self.state.step, *self._contents())
                return
        try:
            path = self.save()
        except OSError as error:
            if why != "interval" or self.ranks.launched:
                raise
            yield NotSaved(self.state.step, f"{error.filename or self.folder}: {error.strerror or error}")
            return
        if path is not None:
            yield Saved(self.state.step, path, why)

    def written(self, *, wait: bool) -> Iterator[Event]:
        """Tells of a checkpoint that was written in the background and is complete by now."""
        path = self._shared.finish(wait=wait) if self._shared is not None else None
        if path is not None:
            yield Saved(int(path.name.removeprefix("step-")), path, "interval")

    def resume(self) -> Path | None:
        """Loads the newest checkpoint in the folder that is not damaged; None if there is none. Newer ones
        that are damaged get another name; every rank takes the same.

        Raises:
            DamagedCheckpointError: all of them are damaged; they stay as they are.
            CheckpointError: one of a run with other settings.
        """
        there = list_checkpoints(self.folder) if self.folder is not None else []
        damaged: list[tuple[Path, str]] = []
        self.set_aside = []
        for path in reversed(self.ranks.broadcast(there)):
            try:
                self.load(path)
            except DamagedCheckpointError as error:
                damaged.append((path, str(error)))
                continue
            for other, reason in damaged:
                aside = self.ranks.broadcast(rename_damaged(other) if self.ranks.is_main else other)
                self.set_aside.append(SetAside(self.state.step, aside, reason))
            return path
        if damaged:
            older = f"; so are the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
            raise DamagedCheckpointError(f"{damaged[0][1]}{older}: none is left to resume from")
        return None

    def load(self, path: Path | str) -> None:
        """Takes back a checkpoint, of however many processes; see `resume`."""
        problem: CheckpointError | None = None
        try:
            parts, values = self._read(path)
        except CheckpointError as error:
            problem = error
        # What one rank finds damaged, no rank may take.
        kinds = (None, DamagedCheckpointError, CheckpointError)
        worst = kinds[self.ranks.max(kinds.index(None if problem is None else type(problem)))]
        if worst is not None:
            raise problem if isinstance(problem, worst) else worst(f"{path}: not readable on another rank")
        self.state.restore(parts, values)

    def _read(self, path: Path | str) -> tuple[Parts, dict[str, Any]]:
        """What a checkpoint holds, checked against this run, of which nothing is changed."""
        like = self.state.parameter_of
        if Path(path).is_dir():
            parts, values = load_shared_checkpoint(path, like, self.ranks)
        else:
            parts, values = load_checkpoint(path)
        require_values(values, step_of(path), str(path))
        _refuse_another_run(path, values["identity"], self.identity)
        self.state.check_values(values["own"], str(path))
        require_usable(parts, self.state.expected(), str(path))
        for part, named in parts.items():
            for name, t in named.items():
                named[name] = sharded_like(t, like(f"{part}/{name}", t.shape))
        return parts, values

    def _contents(self) -> tuple[Parts, dict[str, Any]]:
        return self.state.tensors(), self.state.values() | {"identity": self.identity}


def _refuse_another_run(path: Path | str, theirs: dict, ours: dict) -> None:
    for key, a, b in changes(theirs, ours):
        raise CheckpointError(
            f"{path}: made with {key} = {shown(a)}, this run has {shown(b)}: "
            "resume with the same settings, or start again"
        )
