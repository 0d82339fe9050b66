"""Where a watched run's numbers and pictures go: the run's folder, TensorBoard's event files, wandb.

Every writer raises what goes wrong; the `Watcher` turns it into a warning.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stream_r1.disk.whole import write_text, written
from stream_r1.maps import png
from stream_r1.messages import first_line
from stream_r1.watch.settings import WandbSettings

Picture = NDArray[np.uint8]
"""[H, W, 3 or 4]."""

METRICS = "metrics.csv"
SAMPLES = "samples"
EVENTS = "tensorboard"
_EVENT_FILE = "events.out.tfevents."
_GIF_WIDTH = 320  # pixels, at most: event files grow by every sample


class Writer(Protocol):
    """Takes what there is to see, a step at a time; steps rise."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def pictures(self, step: int, pictures: dict[str, Picture]) -> None:
        """By name, as "maps/weights"."""
        ...

    def video(self, step: int, name: str, frames: Tensor, fps: float) -> None:
        """frames: uint8 [T, 3, H, W] in host memory."""
        ...

    def close(self) -> None: ...


class FolderWriter:
    """metrics.csv, a row a step, and samples/step-<step>/ with an mp4 a video and a PNG a picture.

    What can't be written, as on a full disk, is kept and written with the next row.

    Args:
        folder: the run's; is there.
        done: steps that the run has done. Rows and pictures of later ones are removed; with 0, all are. A
            metrics.csv that can't be read is kept under another name.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self.folder = folder
        self._path = folder / METRICS
        self._columns: list[str] = ["step"]
        self._waiting: list[dict[str, float]] = []
        self.told: list[str] = []
        """What was wrong with the files of an earlier part of the run, a sentence each."""
        for old in (folder / SAMPLES).glob("step-*"):
            number = old.name.removeprefix("step-")
            if not done or (number.isdecimal() and int(number) > done):
                shutil.rmtree(old, ignore_errors=True)
        try:
            if self._path.exists() and not self._path.is_file():
                raise ValueError("expected a file")
            self.begun = [row for row in read_metrics(self._path) if row["step"] <= done] if done else []
            """Rows of the steps that are done."""
        except (ValueError, KeyError, csv.Error, OSError) as error:
            self.begun = []
            self.told.append(
                f"{set_aside(self._path)}: {first_line(error)}: kept under this name, started again"
            )
        self._rewrite(self.begun)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._waiting.append({"step": step, **values})
        if any(key not in self._columns for row in self._waiting for key in row):
            self._rewrite(list(read_metrics(self._path)) + self._waiting)
        else:
            _append(self._path, _rows(self._columns, self._waiting))
        self._waiting = []

    def pictures(self, step: int, pictures: dict[str, Picture]) -> None:
        for name, picture in pictures.items():
            with written(self._place(step, name, ".png")) as place:
                place.write_bytes(png(picture))

    def video(self, step: int, name: str, frames: Tensor, fps: float) -> None:
        from stream_r1.sampling.video import VideoWriter

        with written(self._place(step, name, ".mp4")) as place, VideoWriter(place, fps) as writer:
            writer.write(frames)

    def close(self) -> None:
        if self._waiting:
            _append(self._path, _rows(self._columns, self._waiting))

    def _place(self, step: int, name: str, suffix: str) -> Path:
        return self.folder / SAMPLES / f"step-{step:08d}" / (name.replace("/", "-") + suffix)

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        """The whole file, with a column for everything; a new name comes once or twice in a run."""
        columns = list(dict.fromkeys([*self._columns, *(key for row in rows for key in row)]))
        with written(self._path) as place:
            place.write_bytes(_line(columns) + _rows(columns, rows))
        self._columns = columns


def set_aside(path: Path) -> Path:
    """Gives a file that can't be read a name that nobody has."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    return path.rename(aside)


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a metrics.csv, each with the numbers that its step has; none if there is no file.

    A last row that is not whole, as a killed process leaves, is left out.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        yield {key: _number(value) for key, value in row.items() if value}


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def _line(cells: Iterable[object]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue().encode()


def _rows(columns: list[str], rows: list[dict[str, float]]) -> bytes:
    return b"".join(_line(row.get(column, "") for column in columns) for row in rows)


def _append(path: Path, data: bytes) -> None:
    """All of it or, with an OSError, nothing."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


class TensorBoardWriter:
    """An event file in a folder, behind those of earlier parts of the run.

    Readers take a run's files in the order of their names, and drop what they read of steps that a later file
    begins with, as with `purge_step` of `SummaryWriter`. That one names files by the second, and within one
    by a number of any length, and its thread dies on a full disk: here a later file has a later name whatever
    the clock says, and an event is whole on the disk when a call returns, or not there at all.

    Args:
        folder: is made.
        done: steps that the run has done; 0 removes the event files of a run before.
        texts: shown beside a new run's numbers, by name.
    """

    def __init__(self, folder: Path, done: int = 0, texts: dict[str, str] | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard.summary import text as text_summary

        folder.mkdir(parents=True, exist_ok=True)
        number = int(time.time())
        for file in folder.glob(_EVENT_FILE + "*"):
            if not done:
                file.unlink()
                continue
            second = file.name.removeprefix(_EVENT_FILE).partition(".")[0]
            number = max(number, int(second) + 1) if second.isdecimal() else number
        self._path = folder / f"{_EVENT_FILE}{number:010d}.stream-r1"
        _append(self._path, _record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        if done:
            begin = SessionLog(status=SessionLog.START)
            _append(self._path, _record(Event(wall_time=time.time(), step=done + 1, session_log=begin)))
        for name, text in (texts or {}).items() if not done else ():
            self._add(0, text_summary(name, text).value)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def pictures(self, step: int, pictures: dict[str, Picture]) -> None:
        self._add(step, [_image(name, p.shape[:2], png(p), p.shape[2]) for name, p in pictures.items()])

    def video(self, step: int, name: str, frames: Tensor, fps: float) -> None:
        self._add(step, [_image(name, frames.shape[2:], gif(frames, fps), 3)])

    def close(self) -> None:
        """Nothing waits."""

    def _add(self, step: int, values: Iterable[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        _append(self._path, _record(event))


def _image(name: str, size: Sequence[int], encoded: bytes, channels: int) -> Any:
    """A picture as an event's value; an animated one plays."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=size[0], width=size[1], colorspace=channels, encoded_image_string=encoded)
    return Summary.Value(tag=name, image=image)


def _record(event: Any) -> bytes:
    """An event as it is in a file: its length, that one's checksum, the event, its checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    out = io.BytesIO()
    RecordWriter(out).write(event.SerializeToString())
    return out.getvalue()


def gif(frames: Tensor, fps: float) -> bytes:
    """uint8 [T, 3, H, W] as an endless animated picture; wide ones in half, a third, ... of their size."""
    stride = -(-frames.shape[3] // _GIF_WIDTH)
    pictures = [
        Image.fromarray(frame).reduce(stride) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()
    ]
    out = io.BytesIO()
    pictures[0].save(
        out, format="GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0
    )
    return out.getvalue()


class WandbWriter:
    """A run on Weights & Biases.

    A resumed run continues the same run, which drops the steps that it has already.

    Args:
        folder: the run's; keeps wandb's files and the run's id.
        done: steps that the run has done.
        config: the recipe.
    """

    def __init__(self, settings: WandbSettings, folder: Path, done: int, config: dict[str, Any]) -> None:
        import wandb

        # Its service is a process of its own, which a busy machine starts slowly; wandb gives it 30 seconds.
        os.environ.setdefault("WANDB__SERVICE_WAIT", "300")
        self._wandb = wandb
        kept = folder / "wandb-id.txt"
        known = kept.read_text(encoding="utf-8").strip() if done and kept.is_file() else None
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            mode=settings.mode,
            dir=str(folder),
            id=known,
            resume="allow" if known and settings.mode == "online" else None,
            config=config,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        write_text(kept, self._run.id + "\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def pictures(self, step: int, pictures: dict[str, Picture]) -> None:
        self._run.log({name: self._wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def video(self, step: int, name: str, frames: Tensor, fps: float) -> None:
        self._run.log({name: self._wandb.Video(io.BytesIO(gif(frames, fps)), format="gif")}, step=step)

    def close(self) -> None:
        self._run.finish()
