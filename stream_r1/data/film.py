"""Big Buck Bunny as a data set: fetched from PyPI, checked by hash, cut into captioned shots.

The film is (c) Blender Foundation, CC-BY 3.0. It travels inside the source distribution of moviepy 2.2.1,
which pip downloads with the user's own index settings. Captions and shot bounds are in ``captions.tsv``
beside this file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from stream_r1.disk.whole import written

FPS = 24
FRAMES = 14_315
DISTRIBUTION = "moviepy==2.2.1"
DISTRIBUTION_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
_OUTER = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
_INNER = "moviepy_10_minutes/resources/bbb.mp4"


class FilmError(RuntimeError):
    """The film cannot be had, or what came is not the film."""


@dataclass(frozen=True)
class Shot:
    """One captioned shot: frames ``start`` (inclusive) to ``end`` (exclusive) at 24 fps."""

    index: int
    start: int
    end: int
    held_out: bool
    caption: str

    @property
    def frames(self) -> int:
        return self.end - self.start


def default_cache() -> Path:
    """Where the film is kept: ``$STREAM_R1_CACHE``, else ``~/.cache/stream-r1``."""
    return Path(os.environ.get("STREAM_R1_CACHE", Path.home() / ".cache" / "stream-r1"))


def fetch_film(cache: Path | None = None) -> Path:
    """Path of ``bbb.mp4`` (1280x720, 24 fps, 14,315 frames), downloaded once into ``cache``.

    Raises:
        FilmError: pip could not download the distribution, or its SHA-256 is not the expected one.
    """
    cache = cache or default_cache()
    film = cache / "bbb.mp4"
    if film.exists():
        return film
    with written(film) as part:
        archive = next(iter(cache.glob("moviepy-2.2.1.tar.gz")), None) or _download(part.parent)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != DISTRIBUTION_SHA256:
            raise FilmError(
                f"{archive.name}: expected SHA-256 {DISTRIBUTION_SHA256}, got {digest}; "
                "delete it and try again"
            )
        with tarfile.open(archive) as outer:
            member = outer.extractfile(_OUTER)
            if member is None:
                raise FilmError(f"{archive.name} does not contain {_OUTER}")
            with zipfile.ZipFile(io.BytesIO(member.read())) as inner:
                part.write_bytes(inner.read(_INNER))
    return film


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    run = subprocess.run([*command, "--dest", str(folder), DISTRIBUTION], capture_output=True, text=True)
    found = list(folder.glob("moviepy-*.tar.gz"))
    if run.returncode or not found:
        reason = (run.stderr.strip() or "no file came").splitlines()[-1]
        raise FilmError(
            f"the film could not be fetched (pip download {DISTRIBUTION}: {reason}). "
            "With a copy of moviepy-2.2.1.tar.gz from elsewhere, put it into the cache folder and try again"
        )
    return found[0]


def load_film(cache: Path | None = None, *, height: int = 64, width: int = 112) -> np.ndarray:
    """All frames, uint8 ``[14315, height, width, 3]`` RGB, memory-mapped; decoded once, about a minute."""
    cache = cache or default_cache()
    path = cache / f"frames_{height}x{width}.npy"
    if not path.exists():
        film = fetch_film(cache)
        with written(path) as part:
            _decode(film, part, height, width)
    return np.load(path, mmap_mode="r")


def _decode(film: Path, target: Path, height: int, width: int) -> None:
    import av

    out = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(FRAMES, height, width, 3))
    count = 0
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
            out[count] = small.to_ndarray()
            count += 1
    if count != FRAMES:
        raise FilmError(f"{film}: expected {FRAMES} frames, decoded {count}")
    out.flush()


def load_shots() -> list[Shot]:
    """The captioned shots, in the film's order; none contains a cut."""
    text = resources.files(__package__).joinpath("captions.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return [
        Shot(int(r["shot"]), int(r["start"]), int(r["end"]), r["held_out"] == "1", r["caption"]) for r in rows
    ]


def clip_starts(shot: Shot, length: int, stride: int) -> list[int]:
    """First frames of the clips of ``length`` frames inside a shot, ``stride`` apart."""
    return list(range(shot.start, shot.end - length + 1, stride))


def spread_clip_starts(shot: Shot, length: int, most: int) -> list[int]:
    """At most ``most`` evenly spaced first frames of clips within a shot; none where it is too short."""
    last = shot.end - length
    if last < shot.start:
        return []
    count = min(most, (last - shot.start) // 2 + 1)
    return np.linspace(shot.start, last, count).astype(int).tolist()
