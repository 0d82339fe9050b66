"""``python -m build_support.pictures FOLDER``: the README's pictures, from a finished demo's folder.

Writes docs/pictures/demo.webp, the student before and after beside the teacher and a drawing, and
docs/pictures/saliency.png, where the reward looks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from stream_r1 import maps
from stream_r1.cli import run_app
from stream_r1.demo.record import Record
from stream_r1.demo.report import LABELS
from stream_r1.disk.whole import written
from stream_r1.sampling.video import read_video

OUT = Path("docs/pictures")
_SCALE, _GAP, _LINE = 2, 6, 20  # pixels


def demo_picture(record: Record, folder: Path, prompts: int) -> list[Image.Image]:
    """Frames of a moving picture: a row a prompt, a column a kind of video, each of its name above."""
    columns = [name for name in LABELS if record.clips.get(name)]
    rows = [
        [next(clip for clip in record.clips[name] if clip.prompt == prompt) for name in columns]
        for prompt in record.prompts[:prompts]
    ]
    videos = [
        [read_video(folder / clip.video)[0].mul(255).round().byte().movedim(1, -1).numpy() for clip in row]
        for row in rows
    ]
    count = min(len(video) for row in videos for video in row)
    height, width = (_SCALE * side for side in record.size)
    size = (len(columns) * (width + _GAP) - _GAP, _LINE + len(rows) * (height + _LINE + _GAP))
    font = ImageFont.load_default(size=13)
    frames = []
    for t in range(count):
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        for column, name in enumerate(columns):
            label = LABELS[name].format(steps=record.teacher_steps)
            draw.text((column * (width + _GAP), 2), label, fill="black", font=font)
        for row, (prompt, line) in enumerate(zip(record.prompts, videos, strict=False)):
            top = _LINE + row * (height + _LINE + _GAP)
            for column, video in enumerate(line):
                shown = Image.fromarray(video[t]).resize((width, height), Image.Resampling.BICUBIC)
                picture.paste(shown, (column * (width + _GAP), top))
            draw.text((0, top + height + 1), f"“{prompt}”", fill="#555", font=font)
        frames.append(picture)
    return frames


def saliency_picture(record: Record, folder: Path) -> Image.Image:
    """The frames of one video, each axis' saliency on them, and the weights that come of it."""
    assert record.maps is not None
    with np.load(folder / record.maps) as data:
        frames, saliency, weights = data["frames"], data["saliency"], data["weights"]
    strips = [maps.frame_strip(frames, scale=1)]
    strips += [maps.heat_strip(frames, maps.unit_range(values), scale=1) for values in saliency]
    strips.append(maps.heat_strip(frames, maps.unit_range(weights), scale=1, cmap="viridis"))
    names = ["frames", *(f"saliency {axis}" for axis in record.axes), "weights"]
    rows = [Image.fromarray(strip).convert("RGBA") for strip in strips]
    picture = Image.new("RGB", (90 + rows[0].width, len(rows) * (rows[0].height + _GAP) - _GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for row, (strip, name) in enumerate(zip(rows, names, strict=True)):
        top = row * (strip.height + _GAP)
        picture.paste(strip, (90, top), strip)
        draw.text((0, top + strip.height // 2 - 8), name, fill="#555", font=font)
    return picture


def main(folder: Path, prompts: int = 3, out: Path = OUT) -> None:
    """Write the pictures."""
    record = Record.load(folder)
    if record is None or not record.finished:
        raise typer.BadParameter(f"expected the folder of a finished demo, got {folder}")
    first, *others = demo_picture(record, folder, prompts)
    with written(out / "demo.webp") as place:
        first.save(
            place,
            save_all=True,
            append_images=others,
            duration=1000 // record.fps,
            loop=0,
            quality=70,
            method=6,
        )
    with written(out / "saliency.png") as place:
        saliency_picture(record, folder).save(place, optimize=True)
    for name in ("demo.webp", "saliency.png"):
        typer.echo(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_app(main)
