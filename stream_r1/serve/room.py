"""One stream and those who watch it: made just in time, shown in step, changed at once."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.error import FFmpegError

from stream_r1.sampling.video import VideoWriter
from stream_r1.serve.engine import Engine, Made, Picture, Take, encode
from stream_r1.serve.pace import Pace
from stream_r1.serve.protocol import Frame
from stream_r1.serve.viewer import Viewer

LINGER = 60.0  # seconds that a stream waits for somebody to come back
MOST_RECORDED = 1800.0  # seconds of video


@dataclass
class Change:
    """What a viewer asked for; a later one takes the place of one that was not begun."""

    text: str
    recache: bool = False
    restart: bool = False
    seed: int = 0
    upload: Path | None = None
    request: int = 0
    viewer: Viewer | None = None
    asked: float = field(default_factory=time.monotonic)


@dataclass
class _Chunk:
    """Pictures that wait to be shown, and the stages' milliseconds of the first after a change."""

    prompt: int
    pictures: deque[Picture]
    changed: dict[str, Any] | None
    viewer: Viewer | None


@dataclass(frozen=True)
class _Coming:
    """A chunk of which pictures are made."""

    frames: int
    changes: bool  # takes the place of all that waits


class Room:
    """A stream, from the first viewer to `close`. All methods belong to the event loop.

    A chunk is begun a little before it has to be (`Pace.lead`): chunks made before a change are dropped when
    the first one after it is there, and the picture jumps over them. Nothing is made while nobody watches or
    the stream is paused.

    Args:
        engine: makes the chunks.
        folder: for the recording, of what was shown and not of what was dropped.
        prompt, seed: of the start.
        clock: seconds that only grow, as the event loop's timers count them.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        prompt: str,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id, self.key = secrets.token_urlsafe(9), secrets.token_urlsafe(12)
        self.prompt, self.seed, self.paused = prompt, seed, False
        self.viewers: set[Viewer] = set()
        self.recording = folder / f"{self.id}.mp4"
        self.chunks = self.missed = 0  # missed: chunks that were not there when their first frame was due
        self.left_at = time.monotonic()  # when the last viewer went
        self._engine, self._clock = engine, clock
        self._fps = engine.pipeline.fps
        self._pace = Pace(self._fps, engine.frames_per_chunk)
        self._change: Change | None = Change(prompt, restart=True, seed=seed)
        self._take: Take | None = None
        self._prompts = -1  # changes so far, less one
        self._frames = 0
        self._queue: deque[_Chunk] = deque()
        self._decoding: asyncio.Task[None] | None = None
        self._coming: _Coming | None = None
        self._due: float | None = None  # when the next frame is; None: as soon as it is there
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self._writer: VideoWriter | None = None
        self._unwritten: list[Picture] = []
        self._unwritable = False
        self._recording: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._produce()), asyncio.create_task(self._show())]

    # ---- what viewers do

    def join(self, viewer: Viewer) -> None:
        self.viewers.add(viewer)
        self._tell_state()
        self._notify()

    def leave(self, viewer: Viewer) -> None:
        self.viewers.discard(viewer)
        self.left_at = time.monotonic()
        if not self.viewers:
            self._due = None
        self._tell_state()

    def change(self, change: Change) -> None:
        """From the next chunk on; ends a pause."""
        waiting = self._change
        if waiting is not None and change.restart:
            if waiting.upload is not None:
                waiting.upload.unlink(missing_ok=True)
        elif waiting is not None:  # a restart that has not begun still is one
            change.restart, change.seed, change.upload = waiting.restart, waiting.seed, waiting.upload
        self._change = change
        self.prompt, self.paused = change.text, False
        if change.restart:
            self.seed = change.seed
        self._tell_state()
        self._notify()

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self._due = None
        self._tell_state()
        self._notify()

    def state(self) -> dict[str, Any]:
        """What all viewers are told when it changes."""
        named = {"prompt": self.prompt, "seed": self.seed, "paused": self.paused}
        return {"type": "state", **named, "viewers": len(self.viewers)}

    def stats(self, viewer: Viewer) -> dict[str, Any]:
        """What a viewer is told once a second."""
        counts = {"chunks": self.chunks, "missed": self.missed, "dropped": viewer.dropped}
        chunk = round(1000 * self._pace.typical, 1)
        return {"type": "stats", **counts, "chunk_ms": chunk, "waiting": self._waiting}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._decoding is not None:
            await asyncio.gather(self._decoding, return_exceptions=True)
        await self._record(last=True)

    @property
    def failed(self) -> BaseException | None:
        """What ended the stream, if something did."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                return task.exception()
        return None

    # ---- making

    async def _produce(self) -> None:
        while True:
            while (delay := self._delay()) is None or delay > 0:
                await _wait(self._wake, delay)
            begun = self._clock()
            change, self._change = self._change, None
            try:
                made, stages = await self._engine.in_models(self._step, change)
            except (
                ValueError,
                OSError,
            ) as error:  # an upload that is no picture, a prompt that the encoder refuses
                self._refuse(change, error)
                continue
            if change is not None:
                self._prompts += 1
            if self._decoding is not None:
                await self._decoding  # one chunk ahead of the decoder, no more
            take = self._take
            assert take is not None
            self._coming = _Coming(made.pictures, change is not None)
            work = self._decode(take, made, self._prompts, change, stages, begun)
            self._decoding = asyncio.create_task(work)

    def _delay(self) -> float | None:
        """Seconds until the next chunk has to be begun; None: until something happens."""
        if not self.viewers:
            return None
        if self._change is not None:
            return 0.0
        if self.paused or self._take is None:
            return None
        coming, frames, first = self._coming, self._waiting, 0.0
        if coming is not None and coming.changes:  # shown as soon as it is there
            frames = coming.frames
        else:
            frames += 0 if coming is None else coming.frames
            first = 0.0 if self._due is None else max(0.0, self._due - self._clock())
        return max(0.0, first + frames * self._pace.period - self._pace.lead)

    @property
    def _waiting(self) -> int:
        """Frames that wait to be shown."""
        return sum(len(chunk.pictures) for chunk in self._queue)

    def _step(self, change: Change | None) -> tuple[Made, dict[str, float]]:
        """On the models' thread: what was asked for, and the next chunk; milliseconds by stage."""
        start, asked = time.perf_counter(), time.monotonic()
        if change is not None:
            if change.restart or self._take is None:
                given = None
                if change.upload is not None:
                    try:
                        given = self._engine.read(change.upload)
                    finally:
                        change.upload.unlink(missing_ok=True)
                self._take = self._engine.begin(change.text, change.seed, given)
            else:
                self._take.stream.switch(change.text, recache=change.recache)
        assert self._take is not None
        text = time.perf_counter()
        made = self._engine.make(self._take)
        stages = {"text": 1000 * (text - start), "model": 1000 * made.seconds}
        if change is not None:
            stages = {"wait": 1000 * (asked - change.asked)} | stages
        return made, stages

    async def _decode(
        self,
        take: Take,
        made: Made,
        prompt: int,
        change: Change | None,
        stages: dict[str, float],
        begun: float,
    ) -> None:
        modelled = self._clock()

        def work() -> tuple[list[Picture], float, float]:
            start = time.perf_counter()
            pixels = self._engine.decode(take, made)
            decoded = time.perf_counter()
            pictures = encode(pixels)
            return pictures, decoded - start, time.perf_counter() - decoded

        try:
            pictures, decode, jpeg = await self._engine.in_pictures(work)
        finally:
            self._coming = None
            self._notify()
        ended = self._clock()
        longest = max(modelled - begun, ended - modelled) if change is None else None
        self._pace.add(ended - begun, longest)
        self.chunks += 1
        told = None
        if change is not None:
            stages |= {"decode": 1000 * decode, "encode": 1000 * jpeg}
            rounded = {name: round(value, 1) for name, value in stages.items()}
            told = {"type": "changed", "prompt": prompt, "request": change.request, "stages": rounded}
            self._queue.clear()  # of the prompt before
        elif not self._queue and self._due is not None and ended > self._due:
            self.missed += 1
            self._due = None
        self._queue.append(_Chunk(prompt, deque(pictures), told, None if change is None else change.viewer))

    def _refuse(self, change: Change | None, error: Exception) -> None:
        request = 0 if change is None else change.request
        reason = str(error)
        if change is not None and change.upload is not None:
            reason = reason.replace(str(change.upload), "what was uploaded")
        told = {"type": "error", "code": "refused", "message": reason, "request": request}
        viewers = self.viewers if change is None or change.viewer is None else {change.viewer}
        for viewer in viewers:
            viewer.tell(told)
        if self._take is None and self._change is None:  # nothing to go back to
            raise error

    # ---- showing

    async def _show(self) -> None:
        while True:
            if not self._queue or self.paused or not self.viewers:
                await _wait(self._ready, None)
                continue
            now, chunk = self._clock(), self._queue[0]
            if chunk.changed is not None:
                self._announce(chunk)
                self._due = None
            due = (
                now if self._due is None else max(self._due, now - 1 / self._fps)
            )  # no later one is made up for
            if due > now:
                await _wait(self._ready, due - now)
                continue
            self._publish(chunk.prompt, chunk.pictures.popleft(), due)
            self._due = due + self._pace.period
            if not chunk.pictures:
                self._queue.popleft()

    def _announce(self, chunk: _Chunk) -> None:
        for viewer in self.viewers:
            own = viewer is chunk.viewer
            viewer.tell(
                chunk.changed if own and chunk.changed else {"type": "changed", "prompt": chunk.prompt}
            )
        chunk.changed = None

    def _publish(self, prompt: int, picture: Picture, due: float) -> None:
        frame = Frame(prompt, self._frames, int(1000 * due) % 2**32, picture.jpeg)
        packed = frame.pack()
        self._frames += 1
        for viewer in self.viewers:
            viewer.offer(frame, packed)
        self._unwritten.append(picture)
        if len(self._unwritten) >= self._fps:
            self._recording = asyncio.create_task(self._record())

    def _tell_state(self) -> None:
        state = self.state()
        for viewer in self.viewers:
            viewer.tell(state)

    def _notify(self) -> None:
        self._wake.set()
        self._ready.set()

    async def _record(self, last: bool = False) -> None:
        """Write what was shown since the last time, until that fails: the stream continues without."""
        pictures, self._unwritten = self._unwritten, []
        if self._frames > MOST_RECORDED * self._fps:
            pictures = []
        if self._unwritable:
            return
        try:
            await self._engine.in_recorder(self._write, pictures, last)
        except (OSError, FFmpegError) as error:
            if self._unwritable:  # said
                return
            self._unwritable = True
            told = {"type": "error", "code": "recording", "message": f"the recording ended: {error}"}
            for viewer in self.viewers:
                viewer.tell(told | {"request": 0})

    def _write(self, pictures: list[Picture], last: bool) -> None:
        if pictures:
            if self._writer is None:
                self._writer = VideoWriter(self.recording, self._fps)
            video = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
            self._writer.write(video.movedim(-1, 1))
        if last and self._writer is not None:
            self._writer.close()

    async def flush_recording(self) -> Path | None:
        """The recording up to now; None: nothing was shown."""
        await self._record()
        return self.recording if self._writer is not None else None


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    """For something that happens from now on, so long at most."""
    event.clear()
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
