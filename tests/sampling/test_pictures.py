"""Pictures as viewers show them: what a file says about itself is honoured, or refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media import (
    COLOURS,
    CORNERS,
    bytes_of,
    chunk,
    clear,
    greys,
    over_white,
    pipeline,
    steps_of,
)
from PIL import Image, ImageCms, ImageOps

from stream_r1.sampling.start import read_start
from stream_r1.sampling.video import read_image, read_video


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(CORNERS).save(path, exif=exif, lossless=True)
    turned = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(bytes_of(read_image(path)), np.asarray(turned))
    size = (turned.height, turned.width)
    assert read_start(path, pipeline(size)).frames.shape[-2:] == size


def _palette(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=4)


def _grey_alpha(picture: Image.Image) -> Image.Image:
    return picture.convert("LA")


def _same(picture: Image.Image) -> Image.Image:
    return picture


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("rgba.png", _same, lambda p: over_white(np.asarray(p))),
        ("rgba.webp", _same, lambda p: over_white(np.asarray(p))),
        ("rgba.tif", _same, lambda p: over_white(np.asarray(p))),
        ("grey-alpha.png", _grey_alpha, lambda p: over_white(np.asarray(p.convert("RGBA")))),
        ("palette.png", _palette, lambda p: np.asarray(p.convert("RGB"))),
        ("palette.gif", _palette, lambda p: np.asarray(p.convert("RGB"))),
        ("cmyk.tif", lambda p: p.convert("RGB").convert("CMYK"), lambda p: np.asarray(p.convert("RGB"))),
        ("bits.png", lambda p: p.convert("1"), lambda p: np.asarray(p.convert("RGB"))),
        ("grey.png", lambda p: p.convert("L"), lambda p: np.asarray(p.convert("RGB"))),
    ],
)
def test_kinds_of_pictures(
    tmp_path: Path,
    name: str,
    make: Callable[[Image.Image], Image.Image],
    expected: Callable[[Image.Image], Any],
) -> None:
    picture = make(Image.fromarray(clear()))
    picture.save(tmp_path / name, lossless=True, exact=True)
    assert np.abs(bytes_of(read_image(tmp_path / name)) - expected(picture)).max() <= 1


def test_hidden_colours_stay_hidden(tmp_path: Path) -> None:
    shown = []
    for hidden in ((0, 0, 0), (255, 0, 0)):
        picture = clear(alpha=0)
        picture[picture[..., 3] == 0, :3] = hidden
        Image.fromarray(picture).save(tmp_path / "a.png")
        shown.append(read_image(tmp_path / "a.png"))
    assert torch.equal(*shown)
    palette = _palette(Image.fromarray(CORNERS))
    levels = [0, 60, 130, 255]
    palette.save(tmp_path / "a.png", transparency=bytes(levels))
    indices = np.asarray(palette)
    picture = np.dstack([CORNERS, np.array(levels, np.uint8)[indices]])
    assert np.abs(bytes_of(read_image(tmp_path / "a.png")) - over_white(picture)).max() <= 1
    Image.fromarray(CORNERS).save(tmp_path / "a.png", transparency=tuple(COLOURS[0].tolist()))
    assert (bytes_of(read_image(tmp_path / "a.png"))[:16, :24] == 255).all()
    assert (bytes_of(read_image(tmp_path / "a.png"))[16:] == CORNERS[16:]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    levels = np.linspace(0, 65535, 32 * 48).round().astype(np.uint16).reshape(32, 48)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    torch.testing.assert_close(
        read, torch.from_numpy(levels / 65535).float().expand(3, -1, -1), atol=0.5 / 255, rtol=0
    )


def test_profiles_and_gamma(tmp_path: Path) -> None:
    picture = Image.fromarray(CORNERS)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "a.png", icc_profile=srgb)
    assert np.abs(bytes_of(read_image(tmp_path / "a.png")) - CORNERS).max() <= 1
    # the same with red and blue primaries exchanged: what is stored as red is blue
    swapped = srgb.replace(b"rXYZ", b"tmpX", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmpX", b"bXYZ", 1)
    picture.save(tmp_path / "a.png", icc_profile=swapped)
    assert np.abs(bytes_of(read_image(tmp_path / "a.png")) - CORNERS[..., ::-1]).max() <= 2
    picture.save(tmp_path / "a.png", icc_profile=b"no profile at all" * 20)
    with pytest.raises(ValueError, match=r"a\.png.*profile"):
        read_image(tmp_path / "a.png")
    picture.save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    for gamma, power in ((1.0, 0.45455), (0.45455, 1.0)):
        (tmp_path / "a.png").write_bytes(
            data[:33] + chunk(b"gAMA", struct.pack(">I", int(1e5 * gamma))) + data[33:]
        )
        expected = 255 * (CORNERS / 255) ** power
        assert np.abs(bytes_of(read_image(tmp_path / "a.png")) - expected).max() <= 1
    (tmp_path / "a.png").write_bytes(data[:33] + chunk(b"cICP", bytes([9, 16, 0, 1])) + data[33:])
    with pytest.raises(ValueError, match=r"a\.png.*PQ"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_moving_pictures_are_videos(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    pictures = [Image.fromarray(picture) for picture in greys(6, 40)]
    times = [100, 200, 50, 50, 500, 100]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, lossless=True)
    starts = np.cumsum([0, *times[:-1]])
    video, fps = read_video(path, fps=20)
    assert fps == 20
    assert steps_of(video, 40) == [int((starts <= 50 * k).sum()) - 1 for k in range(20)]
    start = read_start(path, pipeline())
    assert steps_of(start.frames[0], 40) == [4] * 7 + [5] * 2  # the last tenth of a second is the sixth
    with pytest.raises(ValueError, match="one picture, got 6 frames"):
        read_image(path)
