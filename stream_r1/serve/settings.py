"""What a live page is served with; as an environment variable where a process manager starts the workers."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stream_r1.commands.sample import ModelChoice, as_size

VARIABLE = "STREAM_R1_SERVE"
PROMPT = "a red ball rolls to the left in a meadow at noon"


@dataclass(frozen=True)
class Settings:
    """Of the application.

    Args:
        models: what streams, as for `stream-r1 sample`.
        size: height x width in pixels, as text; None: as the models say.
        prompt: what a stream shows that is not told.
        token: what viewers have to know; None: nothing, and only this machine's own names are answered.
        origins: pages of these origins may connect too; its own may in any case.
        streams: how many at once; None: as many as were measured at the start.
        viewers: how many at once, of all streams.
        lag: seconds of frames that may be on their way to a viewer, and as many that may wait.
        recordings: folder of what was shown; None: a temporary one.
    """

    models: ModelChoice = field(default_factory=lambda: ModelChoice("assets/tiny"))
    size: str | None = None
    prompt: str = PROMPT
    token: str | None = None
    origins: tuple[str, ...] = ()
    streams: int | None = None
    viewers: int = 64
    lag: float = 0.5
    recordings: Path | None = None

    def folder(self) -> Path:
        """Of the recordings."""
        if self.recordings is None:
            return Path(tempfile.mkdtemp(prefix="stream-r1-"))
        self.recordings.mkdir(parents=True, exist_ok=True)
        return self.recordings

    @property
    def pixels(self) -> tuple[int, int] | None:
        return None if self.size is None else as_size(self.size)

    def to_environment(self) -> None:
        """For workers that this process starts."""
        os.environ[VARIABLE] = json.dumps(asdict(self), default=str)

    @classmethod
    def from_environment(cls) -> Settings:
        """Of the variable STREAM_R1_SERVE, a JSON object of this class's settings; all may be left out.

        Raises:
            ValueError: it is something else.
        """
        try:
            given = json.loads(os.environ.get(VARIABLE, "{}"))
            models = {"folder": "assets/tiny"} | given.pop("models", {})
            for name in ("checkpoint", "adapter", "text_cache"):
                models[name] = models.get(name) and Path(models[name])
            recordings = given.pop("recordings", None)
            origins = tuple(given.pop("origins", ()))
            folder = None if recordings is None else Path(recordings)
            return cls(ModelChoice(**models), origins=origins, recordings=folder, **given)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{VARIABLE}: expected a JSON object of settings, got {error}") from None
