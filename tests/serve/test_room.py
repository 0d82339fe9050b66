"""A stream without a network: what happens before somebody watches, and what becomes of changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sampling_models import SIZE, WordEncoder, tiny_student, tiny_vae

from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.serve.engine import Engine, encode
from stream_r1.serve.protocol import Frame
from stream_r1.serve.room import Change, Room
from stream_r1.serve.viewer import Viewer


def test_changes_before_the_first_chunk_make_one_start(tmp_path: Path) -> None:
    engine = Engine(StreamR1Pipeline(tiny_student(), tiny_vae(), WordEncoder(), size=SIZE, fps=24))
    take = engine.begin("a tree", 7)
    expected = encode(engine.decode(take, engine.make(take)))
    upload = tmp_path / "upload"
    upload.write_bytes(b"is given up for the restart that comes after it")

    async def first_frames() -> list[Frame]:
        room = Room(engine, tmp_path, "a fat rabbit", 5)
        room.change(Change("snow", restart=True, seed=6, upload=upload))
        room.change(Change("snow", restart=True, seed=7))
        room.change(Change("a tree"))  # another text for a stream that has not begun: not another seed
        await asyncio.sleep(0.1)
        assert room.chunks == 0  # nobody watches
        frames: list[Frame] = []

        async def send(data: str | bytes) -> None:
            if isinstance(data, bytes):
                frames.append(Frame.unpack(data))
                viewer.seen(frames[-1].number)

        viewer = Viewer(send, 12)
        sender = asyncio.create_task(viewer.run())
        room.join(viewer)
        while len(frames) < 9:
            await asyncio.sleep(0.01)
        room.leave(viewer)
        sender.cancel()
        await room.close()
        return frames

    frames = asyncio.run(first_frames())
    assert [frame.picture for frame in frames[:9]] == [picture.jpeg for picture in expected]
    assert not upload.exists()
    engine.close()
