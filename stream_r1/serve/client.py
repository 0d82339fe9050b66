"""A live page's stream in Python: frames as they come, prompts as one likes.

with LiveClient("http://127.0.0.1:8600") as live:
    for event in live:
        if isinstance(event, Frame):
            show(event.picture)  # JPEG
        ...
        live.prompt("a fox runs through fresh snow")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from stream_r1.serve.protocol import VERSION, Frame, as_text

_ACKNOWLEDGED = 3  # frames from one `seen` to the next


class LiveClient:
    """A connection to a live page's server (docs/serve.md).

    Args:
        url: of the page; its token, if it has one, as in the link.
        stream: "own", "any" or a stream's id.
        prompt, seed: of a stream of one's own; None: the server's prompt.
        key: to control a stream of one's own again, from an earlier `hello`.

    `hello` is the server's first word: stream, key, size, fps, limits. Iterating gives `Frame`s, and messages
    (`state`, `stats`, `changed`, `error`) as dicts, until the server closes the connection.

    Raises:
        ConnectionError: the server refuses, and why.
        OSError: there is no server.
    """

    def __init__(
        self,
        url: str,
        *,
        stream: str = "own",
        prompt: str | None = None,
        seed: int = 0,
        key: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        query = f"?{parts.query}" if parts.query else ""
        address = f"{scheme}://{parts.netloc}/socket{query}"
        self._open = ExitStack()
        self._socket = self._open.enter_context(
            connect(address, max_size=None, open_timeout=timeout, close_timeout=2, compression=None)
        )
        self._timeout = timeout
        self._arrived = self._acknowledged = -1
        join = {"type": "join", "version": VERSION, "stream": stream, "seed": seed}
        join |= {name: value for name, value in (("prompt", prompt), ("key", key)) if value is not None}
        self.say(join)
        hello = self.receive()
        if not isinstance(hello, dict) or hello.get("type") != "hello":
            self.close()
            raise ConnectionError(f"LiveClient: expected hello, got {hello}")
        self.hello = hello
        self.recording = f"{parts.scheme}://{parts.netloc}/recordings/{quote(hello['stream'])}.mp4{query}"

    def receive(self) -> Frame | dict[str, Any]:
        """The next frame or message; TimeoutError, or ConnectionError where the server is gone."""
        try:
            data = self._socket.recv(self._timeout)
        except ConnectionClosed as error:
            raise ConnectionError(f"LiveClient: the server closed the connection: {error}") from None
        if isinstance(data, str):
            message: dict[str, Any] = json.loads(data)
            return message
        frame = Frame.unpack(data)
        self._arrived = frame.number
        if self._arrived - self._acknowledged >= _ACKNOWLEDGED:
            self._acknowledged = self._arrived
            self.say({"type": "seen", "frame": self._arrived})
        return frame

    def __iter__(self) -> Iterator[Frame | dict[str, Any]]:
        while True:
            try:
                yield self.receive()
            except ConnectionError:
                return

    def say(self, message: dict[str, Any]) -> None:
        """Any message of the protocol."""
        self._socket.send(as_text(message))

    def prompt(self, text: str, *, recache: bool = False, request: int = 0) -> None:
        """Another prompt from the next chunk on."""
        self.say({"type": "prompt", "text": text, "recache": recache, "request": request})

    def pause(self, paused: bool = True) -> None:
        self.say({"type": "pause", "paused": paused})

    def restart(self, seed: int, text: str | None = None, *, request: int = 0) -> None:
        """From the first frame on."""
        more = {} if text is None else {"text": text}
        self.say({"type": "restart", "seed": seed, "request": request} | more)

    def begin_with(self, data: bytes, *, request: int = 0) -> None:
        """Start again from a picture or clip, a file's bytes."""
        self.say({"type": "upload", "bytes": len(data), "request": request})
        self._socket.send(data)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> LiveClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
