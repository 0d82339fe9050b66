"""The application: a page, a socket, recordings. Any ASGI server runs it, with any number of workers."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse, HTMLResponse
from starlette.websockets import WebSocketDisconnect

from stream_r1.pages import LOOK, application
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.serve import protocol
from stream_r1.serve.engine import Engine, streams_at_once
from stream_r1.serve.protocol import ProtocolError
from stream_r1.serve.room import LINGER, Change, Room
from stream_r1.serve.settings import Settings
from stream_r1.serve.viewer import Allowance, Viewer

_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
_JOIN_SECONDS = 10.0
_MOST_ERRORS = 50  # of one connection, before it is closed


class Hall:
    """The rooms of one process."""

    def __init__(self, engine: Engine, settings: Settings, realtime: float) -> None:
        self.engine, self.settings, self.realtime = engine, settings, realtime
        self.streams = settings.streams or streams_at_once(realtime)
        self.folder = settings.folder()
        self.rooms: dict[str, Room] = {}

    @property
    def viewers(self) -> int:
        return sum(len(room.viewers) for room in self.rooms.values())

    async def enter(self, join: protocol.Join) -> tuple[Room, bool]:
        """The room that is asked for, and whether the viewer controls it; ProtocolError if there is none."""
        if join.stream not in ("own", "any"):
            room = self.rooms.get(join.stream)
            if room is None:
                raise ProtocolError("unknown", f"no stream {join.stream} (here, any more)")
            return room, join.key is not None and secrets.compare_digest(join.key, room.key)
        if join.stream == "any":
            watched = sorted(self.rooms.values(), key=lambda room: -len(room.viewers))
            if watched:
                return watched[0], False
        if len(self.rooms) >= self.streams:
            idle = [room for room in self.rooms.values() if not room.viewers]
            if not idle:
                raise ProtocolError("full", f"all streams are taken, {self.streams}")
            await self.remove(min(idle, key=lambda room: room.left_at))
        room = Room(self.engine, self.folder, join.prompt or self.settings.prompt, join.seed)
        self.rooms[room.id] = room
        return room, True

    async def remove(self, room: Room) -> None:
        if self.rooms.pop(room.id, None) is not None:
            await room.close()
            if self.settings.recordings is None:
                room.recording.unlink(missing_ok=True)

    async def sweep(self) -> None:
        """Once a second: figures to viewers, and what nobody comes back to ends."""
        while True:
            await asyncio.sleep(1)
            for room in list(self.rooms.values()):
                if (error := room.failed) is not None:
                    for viewer in room.viewers:
                        viewer.tell({"type": "error", "code": "failed", "message": str(error), "request": 0})
                    await self.remove(room)
                elif not room.viewers and time.monotonic() - room.left_at > LINGER:
                    await self.remove(room)
                for viewer in room.viewers:
                    viewer.tell(room.stats(viewer))


def create_app(settings: Settings | None = None, pipeline: StreamR1Pipeline | None = None) -> FastAPI:
    """The application; models are loaded, warmed up and measured when it starts.

    Args:
        settings: None: those of the environment, see `Settings.from_environment`.
        pipeline: a loaded one instead of the settings' models.
    """
    settings = settings or Settings.from_environment()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = pipeline
        if loaded is None:
            loaded = await asyncio.to_thread(settings.models.load, settings.pixels, True)
        engine = Engine(loaded)
        hall = app.state.hall = Hall(engine, settings, await engine.in_models(engine.measure))
        sweep = asyncio.create_task(hall.sweep())
        yield
        sweep.cancel()
        for room in list(hall.rooms.values()):
            await hall.remove(room)
        engine.close()

    app = application.create("Stream-R1", settings.token, settings.origins, lifespan=lifespan)
    page = _PAGE.replace("/*LOOK*/", LOOK)

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    def health(request: Request) -> dict[str, Any]:
        hall: Hall = request.app.state.hall
        counts = {"streams": len(hall.rooms), "viewers": hall.viewers}
        most = {"max_streams": hall.streams, "max_viewers": settings.viewers}
        return {"version": protocol.VERSION, **counts, **most, "realtime": round(hall.realtime, 2)}

    @app.get("/recordings/{name}.mp4")
    async def recording(request: Request, name: protocol.Name) -> FileResponse:
        hall: Hall = request.app.state.hall
        room = hall.rooms.get(name)
        path = hall.folder / f"{name}.mp4"  # or of another worker, which writes it once a second
        if room is not None:
            await room.flush_recording()
        if not path.is_file():
            raise HTTPException(404, "expected a stream of which something was shown")
        return FileResponse(path, media_type="video/mp4", filename="stream.mp4")

    @app.websocket("/socket")
    async def socket(socket: WebSocket) -> None:
        hall: Hall = socket.app.state.hall
        refused = application.refusal(socket.headers, socket.query_params, settings.token, settings.origins)
        if refused is not None:
            await socket.close(1008)  # before it is accepted: 403
            return
        await socket.accept()
        await _Connection(hall, socket).serve()

    return app


class _Connection:
    """A viewer's socket, from its first message to its end."""

    def __init__(self, hall: Hall, socket: WebSocket) -> None:
        self._hall, self._socket = hall, socket
        self._errors = 0
        self._upload: protocol.Upload | None = None
        self._viewer = Viewer(self._send, max(2, round(hall.engine.pipeline.fps * hall.settings.lag)))
        self._room: Room
        self._controls = False

    async def _send(self, data: str | bytes) -> None:
        if isinstance(data, str):
            await self._socket.send_text(data)
        else:
            await self._socket.send_bytes(data)

    async def serve(self) -> None:
        try:
            await self._join()
        except ProtocolError as error:
            await self._last_words(error)
            return
        except (WebSocketDisconnect, asyncio.TimeoutError, RuntimeError):
            return
        self._room.join(self._viewer)
        sender = asyncio.create_task(self._viewer.run())
        receiver = asyncio.create_task(self._receive())
        try:
            await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
            if receiver.done() and isinstance(shown_out := receiver.exception(), ProtocolError):
                sender.cancel()
                await asyncio.wait((sender,))
                await self._last_words(shown_out)
        finally:
            self._room.leave(self._viewer)
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)

    async def _last_words(self, error: ProtocolError) -> None:
        told = {"type": "error", "code": error.code, "message": str(error), "request": 0}
        try:
            await asyncio.wait_for(self._socket.send_text(protocol.as_text(told)), 2)
            await asyncio.wait_for(self._socket.close(1008, error.code), 2)
        except (WebSocketDisconnect, asyncio.TimeoutError, RuntimeError):
            return

    async def _join(self) -> None:
        hall = self._hall
        if hall.viewers >= hall.settings.viewers:
            raise ProtocolError("full", f"all places are taken, {hall.settings.viewers}")
        data = await asyncio.wait_for(self._socket.receive(), _JOIN_SECONDS)
        if data["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(data.get("code") or 1005)
        join = protocol.parse(data.get("text") or "")
        if not isinstance(join, protocol.Join):
            raise ProtocolError("malformed", f"expected join as the first message, got {join.type}")
        room, self._controls = await hall.enter(join)
        self._room = room
        pipeline = hall.engine.pipeline
        self._viewer.tell(
            {
                "type": "hello",
                "version": protocol.VERSION,
                "stream": room.id,
                "key": room.key if self._controls else None,
                "size": list(pipeline.size),
                "fps": pipeline.fps,
                "realtime": round(hall.realtime, 2),
                "streams": hall.streams,
                "worker": os.getpid(),
                "limits": {"prompt": protocol.MAX_PROMPT, "upload": protocol.MAX_UPLOAD},
            }
        )

    async def _receive(self) -> None:
        """What the viewer says, until it goes; ProtocolError where it is shown the door."""
        said, seen = Allowance(10, 30), Allowance(200, 400)
        while True:
            data = await self._socket.receive()
            if data["type"] == "websocket.disconnect":
                return
            try:
                text = data.get("text")
                message = None if text is None else protocol.parse(text)
                if isinstance(message, protocol.Seen):
                    if seen.take():
                        self._viewer.seen(message.frame)
                    continue
                if not said.take():
                    raise ProtocolError("rate", "expected at most 10 messages a second")
                if message is None:
                    await self._take_upload(data.get("bytes") or b"")
                else:
                    self._act(message)
            except ProtocolError as error:
                self._errors += 1
                if self._errors > _MOST_ERRORS:
                    raise ProtocolError("errors", f"{_MOST_ERRORS} messages were refused") from None
                told = {"type": "error", "code": error.code, "message": str(error), "request": 0}
                self._viewer.tell(told)

    def _act(self, message: protocol.Message) -> None:
        room = self._room
        if isinstance(message, protocol.Join):
            raise ProtocolError("malformed", "expected join as the first message alone")
        if not self._controls:
            raise ProtocolError("watching", "this stream is another's: it can be watched, not changed")
        if isinstance(message, protocol.Pause):
            room.pause(message.paused)
        elif isinstance(message, protocol.Prompt):
            asked = Change(message.text, message.recache, request=message.request, viewer=self._viewer)
            room.change(asked)
        elif isinstance(message, protocol.Restart):
            text = message.text or room.prompt
            asked = Change(text, restart=True, seed=message.seed, request=message.request)
            asked.viewer = self._viewer
            room.change(asked)
        elif isinstance(message, protocol.Upload):
            self._upload = message

    async def _take_upload(self, data: bytes) -> None:
        upload, self._upload = self._upload, None
        if upload is None or len(data) != upload.bytes:
            expected = "none that was not announced by upload" if upload is None else f"{upload.bytes} bytes"
            raise ProtocolError("upload", f"expected {expected}, got a binary message of {len(data)}")
        room = self._room
        with tempfile.NamedTemporaryFile(dir=self._hall.folder, prefix="upload-", delete=False) as file:
            path = Path(file.name)
            await asyncio.to_thread(file.write, data)
        asked = Change(room.prompt, restart=True, seed=room.seed, upload=path, request=upload.request)
        asked.viewer = self._viewer
        room.change(asked)
