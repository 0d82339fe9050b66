"""Pictures as a viewer shows them: upright, in sRGB, over white; still, or moving as videos do."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from stream_r1.sampling.footage import MAX_PIXELS, Footage, Shown, at_rate, check_area
from stream_r1.sampling.video_file import over_white

# No format that runs other programs (EPS) or of which Pillow reads no pixels (MPEG).
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA")
_MOVING = ("PNG", "WEBP", "GIF", "AVIF")
_SHORTEST = 20  # milliseconds of a frame; browsers show shorter ones for 100
_SRGB_GAMMA = 0.45455
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_HDR = {16: "PQ", 18: "HLG"}
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # that a colour profile is for


def picture_kind(path: str | Path) -> str | None:
    """ "still" or "moving"; None: the file holds no picture. By its content, not by its name.

    Raises FileNotFoundError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with _opened(path, None) as picture:
            moves = picture.format in _MOVING and getattr(picture, "n_frames", 1) > 1
            return "moving" if moves else "still"
    except UnidentifiedImageError:
        return None


def read_image(
    path: str | Path, *, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture as a viewer shows it: [3, H, W] float32 in [0, 1].

    Orientation (EXIF), palettes, bit depth, colour profile and PNG's gamma are honoured; what is transparent
    shows white.

    Args:
        path: PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF, JPEG 2000, PPM or TGA.
        size: the only height and width that are taken, None: any. Another is refused before it is decoded.
        max_pixels: larger ones are refused likewise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture, a damaged one, one that moves or has several pages, another size, or
            colours that can't be shown as they are meant (high dynamic range, samples without a known range).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_image: no such file: {path}")
    try:
        with _opened(path, max_pixels) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # whose others are previews and second views
                what = "frames, which read_video reads" if picture.format in _MOVING else "pages"
                raise ValueError(f"{path}: expected one picture, got {frames} {what}")
            if size is not None:
                check_size(_size(picture), size, str(path))
            pixels = _as_shown(picture, str(path))
    except UnidentifiedImageError as error:
        known = ", ".join(_FORMATS)
        raise ValueError(f"read_image: {path} cannot be read: not a picture of {known}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_moving(
    path: str | Path,
    fps: float | None = None,
    *,
    first: int | None = None,
    last: int | None = None,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Footage:
    """A moving GIF, PNG, WebP or AVIF, played once: as `VideoFile.read`; fps None: its mean rate.

    Args, Raises: as `read_image` and `VideoFile.read`.
    """
    path = Path(path)
    with _opened(path, max_pixels) as picture:
        height, width = _size(picture)
        if size is not None:
            check_size((height, width), size, str(path))
        times = list(_durations(picture))
        rate = Fraction(fps if fps is not None else len(times) / float(sum(times))).limit_denominator(1001)
        most = max(1, max_pixels // (height * width))
        numbers, total = at_rate(_shown(times), rate, first=first, last=last, most=most, source=str(path))
        pixels = torch.empty(len(numbers), 3, height, width)
        skipped = _default_only(picture)
        for place, number in enumerate(numbers):
            if place and number == numbers[place - 1]:
                pixels[place] = pixels[place - 1]
                continue
            picture.seek(number + skipped)
            pixels[place] = torch.from_numpy(_as_shown(picture, str(path))).permute(2, 0, 1)
    return Footage(pixels.div_(255), float(rate), total)


def check_size(got: tuple[int, int], expected: tuple[int, int], source: str) -> None:
    """Refuses a file of another height and width than a stream's."""
    if got != expected:
        wanted, came = (f"{height}x{width}" for height, width in (expected, got))
        raise ValueError(f"{source}: expected {wanted} pixels (height x width) to start from, got {came}")


@contextmanager
def _opened(path: Path, max_pixels: int | None) -> Iterator[Image.Image]:
    """The picture, its header read; what goes wrong in it is a ValueError with its name."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if max_pixels is not None:
                check_area(picture.height, picture.width, max_pixels, str(path))
            yield picture
    except UnidentifiedImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error} (PIL.Image.MAX_IMAGE_PIXELS)") from error
    except (OSError, SyntaxError, EOFError, ImageCms.PyCMSError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a picture: {reason}") from error


def _size(picture: Image.Image) -> tuple[int, int]:
    """Height and width, upright; of a TIFF Pillow tells those."""
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) and picture.format != "TIFF"
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def _durations(picture: Image.Image) -> Iterator[Fraction]:
    """Seconds of each frame."""
    for number in range(_default_only(picture), getattr(picture, "n_frames", 1)):
        picture.seek(number)
        if picture.format in ("WEBP", "AVIF"):
            picture.load()  # they say it no earlier
        shown = Fraction(picture.info.get("duration") or 0).limit_denominator(1000)
        yield (shown if shown >= _SHORTEST else Fraction(100)) / 1000


def _default_only(picture: Image.Image) -> int:
    """1 for a PNG whose first picture is shown only where nothing moves."""
    return int(bool(picture.info.get("default_image")))


def _shown(times: list[Fraction]) -> Iterator[Shown[int]]:
    begin = Fraction(0)
    for number, seconds in enumerate(times):
        yield Shown(number, begin, begin + seconds)
        begin += seconds


def _as_shown(picture: Image.Image, source: str) -> NDArray[np.uint8]:
    """[H, W, 3], sRGB over white, upright."""
    _refuse_hdr(picture, source)
    profile, gamma = picture.info.get("icc_profile"), picture.info.get("gamma")
    upright = _eight_bits(ImageOps.exif_transpose(picture), source)
    if upright.mode in ("La", "RGBa"):  # premultiplied
        upright = upright.convert(upright.mode.upper())
    if upright.mode in ("P", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    alpha = upright.getchannel("A") if upright.mode in ("LA", "RGBA") else None
    if alpha is not None:
        upright = upright.convert("L" if upright.mode == "LA" else "RGB")
    if profile:
        upright = _in_srgb(upright, profile, source)
    elif gamma and picture.info.get("srgb") is None:
        upright = _without_gamma(upright.convert("RGB"), gamma, picture.info.get("chromaticity"), source)
    if upright.mode not in ("1", "L", "RGB", "CMYK", "YCbCr"):
        raise ValueError(f"{source}: expected grey, RGB or CMYK, got a picture of mode {upright.mode}")
    shown = upright.convert("RGB")
    if alpha is None:
        return np.array(shown)
    shown.putalpha(alpha)
    return over_white(np.asarray(shown))


def _eight_bits(picture: Image.Image, source: str) -> Image.Image:
    """Grey of 16 bits as 8 bits, rounded; Pillow itself cuts it off at 255."""
    if picture.mode not in ("I;16", "I;16B", "I;16L", "I", "F"):
        return picture
    bits = picture.info.get("bits") if picture.format != "TIFF" else _tiff_bits(picture)
    known = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if not known or bits not in (None, 16):
        raise ValueError(
            f"{source}: expected samples of 8 or 16 bits, got mode {picture.mode}"
            + (f" of {bits} bits" if bits else "")
            + ", whose white is not known"
        )
    samples = np.asarray(picture).astype(np.int64)
    if picture.format == "TIFF" and picture.info.get("photometric") == 0:
        samples = 65535 - samples
    grey = Image.fromarray(((samples + 128) // 257).clip(0, 255).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return grey


def _tiff_bits(picture: Image.Image) -> int | None:
    tags = getattr(picture, "tag_v2", {})
    picture.info["photometric"] = tags.get(262)
    bits = tags.get(258)
    return bits[0] if isinstance(bits, tuple) else bits


def _in_srgb(picture: Image.Image, profile: bytes, source: str) -> Image.Image:
    """Of the colours of a profile."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = own.profile.xcolor_space.strip()
        mode = _MODES.get(space)
        if mode is None or not (picture.mode == mode or (mode == "RGB" and picture.mode in ("1", "L"))):
            raise ValueError(
                f"{source}: expected a colour profile for its {picture.mode}, got one for {space}"
            )
        made = ImageCms.profileToProfile(
            picture.convert(mode), own, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError) as error:
        raise ValueError(f"{source}: its colour profile cannot be used: {error}") from error
    assert made is not None  # not in place
    return made


def _without_gamma(
    picture: Image.Image, gamma: float, primaries: tuple[float, ...] | None, source: str
) -> Image.Image:
    """PNG's gAMA and cHRM: samples are light to the power of gamma."""
    if primaries is not None and np.abs(np.subtract(primaries, _SRGB_PRIMARIES)).max() > 0.01:
        raise ValueError(
            f"{source}: expected sRGB's primaries or a colour profile, got chromaticities {primaries}"
        )
    if not 0.01 < gamma < 10:
        raise ValueError(f"{source}: expected a gamma near {_SRGB_GAMMA}, got {gamma}")
    if abs(gamma - _SRGB_GAMMA) < 0.02:
        return picture
    table = (255 * (np.arange(256) / 255) ** (_SRGB_GAMMA / gamma)).round().astype(int).tolist()
    return picture.point(table * 3)


def _refuse_hdr(picture: Image.Image, source: str) -> None:
    """PNG's cICP and AVIF's colr, which Pillow does not read."""
    transfer = None
    if picture.format in ("PNG", "AVIF"):
        with open(source, "rb") as file:
            head = file.read(1 << 16)
        if picture.format == "PNG" and (at := head.find(b"cICP", 0, head.find(b"IDAT"))) > 0:
            transfer = head[at + 5]
        elif picture.format == "AVIF" and (at := head.find(b"colrnclx")) > 0:
            transfer = head[at + 11]
    if transfer in _HDR:
        raise ValueError(
            f"{source}: expected colours of standard range, got transfer {_HDR[transfer]} (high dynamic "
            "range); convert it to sRGB first"
        )
