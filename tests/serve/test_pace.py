"""A stream on a clock that jumps from timer to timer: when chunks are begun, shown and called late."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import selectors
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sampling_models import SIZE, WordEncoder, tiny_student, tiny_vae

from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.serve.engine import Engine
from stream_r1.serve.protocol import Frame
from stream_r1.serve.room import Change, Room
from stream_r1.serve.viewer import Viewer

T = TypeVar("T")
PERIOD = 1 / 24
MOMENT = 1e-4
TEXT = 0.02


class Timers(selectors.SelectSelector):
    """Waits for no timer: the clock is put forward to it, and a little at least, as time passes."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            assert timeout is not None, "nothing will ever happen"
            self.now += max(1e-7, timeout)
        return found


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.timers = Timers()
        super().__init__(self.timers)

    def time(self) -> float:
        return self.timers.now


class TimedEngine(Engine):
    """Real models, which take the seconds that they are told."""

    def __init__(self, model: Iterable[float], decode: Iterable[float], record: float) -> None:
        super().__init__(StreamR1Pipeline(tiny_student(), tiny_vae(), WordEncoder(), size=SIZE, fps=24))
        self._seconds = iter(model), iter(decode)
        self._record = record
        self._turns = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()

    async def _take(self, turn: int, seconds: Callable[[], float], work: Callable[..., T], *args: Any) -> T:
        async with self._turns[turn]:
            await asyncio.sleep(seconds())
            return work(*args)

    async def in_models(self, work: Callable[..., T], *args: Any) -> T:
        text = TEXT if args[0] is not None else 0.0
        return await self._take(0, lambda: text + next(self._seconds[0]), work, *args)

    async def in_pictures(self, work: Callable[..., T], *args: Any) -> T:
        return await self._take(1, lambda: next(self._seconds[1]), work, *args)

    async def in_recorder(self, work: Callable[..., T], *args: Any) -> T:
        return await self._take(2, lambda: self._record, work, *args)


@dataclass
class Watched:
    """A stream, and when its frames came: (prompt, seconds)."""

    room: Room
    viewer: Viewer
    frames: list[tuple[int, float]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)

    def gaps(self) -> list[float]:
        return [after[1] - before[1] for before, after in itertools.pairwise(self.frames)]


def play(
    folder: Path,
    script: Callable[[Watched], Awaitable[None]],
    model: Iterable[float],
    decode: Iterable[float],
    record: float = 0.3,
) -> Watched:
    """What a viewer sees while a script does as people do."""

    async def whole() -> Watched:
        loop = asyncio.get_running_loop()
        engine = TimedEngine(model, decode, record)
        room = Room(engine, folder, "a fat rabbit", 5, loop.time)

        async def send(data: str | bytes) -> None:
            if isinstance(data, bytes):
                frame = Frame.unpack(data)
                watched.frames.append((frame.prompt, loop.time()))
                viewer.seen(frame.number)
            else:
                watched.told.append(json.loads(data))

        viewer = Viewer(send, 12)
        watched = Watched(room, viewer)
        sender = asyncio.create_task(viewer.run())
        room.join(viewer)
        await script(watched)
        assert room.failed is None
        room.leave(viewer)
        sender.cancel()
        await room.close()
        engine.close()
        return watched

    loop = Loop()
    try:
        return loop.run_until_complete(whole())
    finally:
        loop.close()


def steady(low: float, high: float) -> Iterable[float]:
    chance = random.Random(3)
    return (chance.uniform(low, high) for _ in itertools.count())


@pytest.mark.parametrize(("model", "decode"), [(0.03, 0.01), (0.2, 0.15), (0.3, 0.35)])
def test_a_machine_that_is_fast_enough_shows_every_frame_on_time_also_after_changes(
    model: float, decode: float, tmp_path: Path
) -> None:
    asked: list[float] = []

    async def script(watched: Watched) -> None:
        await asyncio.sleep(3)
        for number in range(12):  # at every phase of a chunk
            kept, recomputed = number % 3 == 0, number % 3 == 1
            change = Change(f"snow {number}", recache=recomputed, restart=not kept and not recomputed)
            asked.append(asyncio.get_running_loop().time())
            watched.room.change(change)
            await asyncio.sleep(1.5 + number * 0.0417)

    seen = play(tmp_path, script, steady(0.9 * model, model), steady(0.9 * decode, decode))
    assert seen.room.missed == 0
    first = [next(at for prompt, at in seen.frames if prompt == number) for number in range(13)]
    longest = {at: gap for gap, (_, at) in zip(seen.gaps(), seen.frames[1:], strict=True)}
    changed = set(first)
    assert max(gap for at, gap in longest.items() if at not in changed) <= PERIOD + MOMENT
    assert len(seen.frames) >= 24 * 20
    for at, seen_at in zip(asked, first[1:], strict=True):
        waited = model + max(model, decode)  # for what is being made
        assert seen_at - at <= waited + TEXT + decode + MOMENT


def test_a_change_is_shown_the_moment_it_is_made(tmp_path: Path) -> None:
    async def script(watched: Watched) -> None:
        for number in range(6):
            await asyncio.sleep(1.51)
            while watched.room._coming is not None or watched.room._delay() == 0:
                await asyncio.sleep(0.01)
            asked = asyncio.get_running_loop().time()
            watched.room.change(Change(f"snow {number}"))
            await asyncio.sleep(0.2)
            shown = next(at for prompt, at in watched.frames if prompt == number + 1)
            assert shown - asked == pytest.approx(TEXT + 0.03 + 0.01, abs=MOMENT)

    play(tmp_path, script, itertools.repeat(0.03), itertools.repeat(0.01))


def test_a_pause_and_an_absence_are_not_late(tmp_path: Path) -> None:
    away: list[tuple[float, float]] = []

    async def script(watched: Watched) -> None:
        room, clock = watched.room, asyncio.get_running_loop().time
        for number in range(12):
            await asyncio.sleep(1 + 0.04 * number)
            left = clock()
            if number % 2:
                room.pause(True)
                await asyncio.sleep(2)
                room.pause(False)
            else:
                room.leave(watched.viewer)
                await asyncio.sleep(2)
                room.join(watched.viewer)
            away.append((left, clock()))
        await asyncio.sleep(1)

    seen = play(tmp_path, script, itertools.repeat(0.05), itertools.repeat(0.02))
    assert seen.room.missed == 0
    times = [at for _, at in seen.frames]
    for left, back in away:
        assert not any(left + MOMENT < at < back - MOMENT for at in times)
        assert any(back - MOMENT < at < back + MOMENT for at in times)  # it continues at once
    rest = [
        after - before
        for before, after in itertools.pairwise(times)
        if not any(before <= left <= after for left, _ in away)
    ]
    assert max(rest) <= PERIOD + MOMENT


def test_as_many_chunks_are_late_as_gaps_are_seen(tmp_path: Path) -> None:
    model = [2.0 if number in (7, 20) else 0.03 for number in range(200)]
    seen = play(tmp_path, lambda _: asyncio.sleep(20), model, itertools.repeat(0.01))
    assert sum(gap > PERIOD + MOMENT for gap in seen.gaps()) == 2
    assert seen.room.missed == 2


def test_a_machine_that_gets_slower_is_given_more_time_at_once(tmp_path: Path) -> None:
    model = [*[0.03] * 10, 0.11, 0.2, 0.3, *[0.42] * 9]
    seen = play(tmp_path, lambda _: asyncio.sleep(9), model, itertools.repeat(0.01))
    assert seen.room.missed == 0
    assert max(seen.gaps()) <= PERIOD + MOMENT


def test_a_slow_machine_shows_frames_evenly_and_none_is_late(tmp_path: Path) -> None:
    seen = play(tmp_path, lambda _: asyncio.sleep(40), itertools.repeat(1.0), itertools.repeat(0.5))
    assert seen.room.chunks == pytest.approx(39, abs=1)
    gaps = seen.gaps()[24:]
    assert max(gaps) == pytest.approx(1 / 12, abs=MOMENT)
    assert min(gaps) == pytest.approx(1 / 12, abs=MOMENT)
    assert seen.room.missed <= 1  # the second, before any was measured


def test_little_is_made_ahead_of_what_is_shown(tmp_path: Path) -> None:
    waiting: list[int] = []

    async def script(watched: Watched) -> None:
        for _ in range(400):
            await asyncio.sleep(0.02)
            waiting.append(watched.room.stats(watched.viewer)["waiting"])

    play(tmp_path, script, itertools.repeat(0.03), itertools.repeat(0.01))
    assert max(waiting[50:]) <= 12 + 4  # a chunk, and what a switch may cost besides


def test_a_recording_that_can_not_be_written_is_said_once_and_the_stream_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.write_text("no folder")
    seen = play(folder, lambda _: asyncio.sleep(5), itertools.repeat(0.03), itertools.repeat(0.01))
    assert len(seen.frames) > 24 * 4
    [error] = [message for message in seen.told if message["type"] == "error"]
    assert error["code"] == "recording"
    assert "recordings" in error["message"]
