"""What page and server tell each other, version 1: JSON as text, pictures as binary. See docs/serve.md."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

VERSION = 1
MAX_PROMPT = 500  # characters
MAX_TEXT = 4096  # bytes of a text message
MAX_UPLOAD = 16 << 20  # bytes of a picture or clip
MAX_SEED = 2**53 - 1  # what JavaScript's numbers hold
JPEG = 1

# little endian: version, format, 0, prompt (counts changes), frame (of the stream), milliseconds when due
_HEADER = struct.Struct("<BBHIII")

PromptText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT, strip_whitespace=True)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Number = Annotated[int, Field(ge=0, lt=2**32)]


class ProtocolError(ValueError):
    """What came is no message of the protocol, or not now; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Join(_Message):
    """The first message: a stream of one's own, a known one by its id, or any that runs."""

    type: Literal["join"]
    version: int
    stream: Name = "own"
    key: Name | None = None  # of a stream of one's own, to control it again after a lost connection
    prompt: PromptText | None = None
    seed: Seed = 0


class Prompt(_Message):
    """Another prompt from the next chunk on; `recache`: the window recomputed under it."""

    type: Literal["prompt"]
    text: PromptText
    recache: bool = False
    request: Number = 0  # comes back in `changed`


class Pause(_Message):
    type: Literal["pause"]
    paused: bool


class Restart(_Message):
    """From the first frame on, with another seed and, if said, prompt."""

    type: Literal["restart"]
    seed: Seed
    text: PromptText | None = None
    request: Number = 0


class Upload(_Message):
    """The next message is binary, so many bytes: a picture or clip that the stream starts again from."""

    type: Literal["upload"]
    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD)]
    request: Number = 0


class Seen(_Message):
    """Frames up to this one have arrived: the server sends only so far ahead of it."""

    type: Literal["seen"]
    frame: Number


Message = Join | Prompt | Pause | Restart | Upload | Seen
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def parse(text: str) -> Message:
    """A message of the page; ProtocolError for whatever else."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT:
        raise ProtocolError(
            "malformed", f"expected at most {MAX_TEXT} bytes of text, got {len(text)} letters"
        )
    try:
        message = _MESSAGES.validate_json(text)
    except (ValidationError, ValueError, RecursionError) as error:
        raise ProtocolError("malformed", _reason(error)) from None
    if isinstance(message, Join) and message.version != VERSION:
        raise ProtocolError("version", f"expected protocol version {VERSION}, got {message.version}")
    return message


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "expected a JSON object of the protocol"
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def as_text(message: dict[str, Any]) -> str:
    """A message to the page."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Frame:
    """A picture on its way."""

    prompt: int  # which change it follows, counted from 0
    number: int  # of the frame in the stream, never twice
    due: int  # milliseconds on the server's clock, modulo 2^32
    picture: bytes  # JPEG

    def pack(self) -> bytes:
        """As a binary message: 16 bytes and the JPEG."""
        return _HEADER.pack(VERSION, JPEG, 0, self.prompt, self.number, self.due) + self.picture

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """Of a binary message; ProtocolError for another version or format."""
        if len(data) <= _HEADER.size:
            raise ProtocolError("malformed", f"expected more than {_HEADER.size} bytes, got {len(data)}")
        version, kind, _, prompt, number, due = _HEADER.unpack_from(data)
        if (version, kind) != (VERSION, JPEG):
            expected = f"version {VERSION} and format {JPEG}"
            raise ProtocolError("version", f"expected {expected}, got {version} and {kind}")
        return cls(prompt, number, due, data[_HEADER.size :])
