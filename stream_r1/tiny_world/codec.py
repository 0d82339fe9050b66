"""The tiny world's autoencoder: a `BlockVAE` that starts as a linear projection and learns on the drawn
world.

The projection is onto the blocks' principal components, scaled by the fourth root of their variance:
between raw, where detail drowns in a diffusion's noise, and white, where it drowns what matters. A little
noise of fixed size is added to the latents before they are decoded, so that the decoder bears the small
errors of a few-step generator.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from stream_r1.config import Settings
from stream_r1.disk.whole import written
from stream_r1.drawn_world import HEIGHT, HELD_OUT, WIDTH, Scene, all_scenes, draw_random
from stream_r1.models.block_vae import BlockVAE, as_blocks
from stream_r1.tiny_world.loop import Loop, LoopSettings, origin

log = logging.getLogger(__name__)


class CodecSettings(Settings):
    """The autoencoder and its training.

    out: folder that the averaged model is written to.
    work: folder that keeps the state of the training.
    start: a folder to start from; None: the linear projection.
    channels, width, depth, fine_width: sizes of the network.
    fitted_clips: that the projection is computed from.
    held_out: clips that the PSNR is measured on.
    frames: of a clip that it learns from, 1 + 4 n.
    batch: crops a step; whole pictures are a quarter as many.
    crop: rows and columns, in latent cells, of the windows around the thing that it learns from.
    full_share: last share of the steps, on whole pictures.
    noise: deviation of what is added to the latents before they are decoded.
    penalty: weight of the latents' drift from the projection's in the loss.
    decoder_only: keep the encoder, and so every latent made with it, as it is.
    training: how long and how fast.
    """

    out: str
    work: str
    start: str | None = None
    channels: int = Field(default=32, ge=1)
    width: int = Field(default=128, ge=1)
    depth: int = Field(default=3, ge=1)
    fine_width: int = Field(default=64, ge=1)
    fitted_clips: int = Field(default=300, ge=1)
    held_out: int = Field(default=48, ge=1)
    frames: int = Field(default=17, ge=5)
    batch: int = Field(default=24, ge=4)
    crop: tuple[int, int] = (5, 6)
    full_share: float = Field(default=0.3, ge=0, le=1)
    noise: float = Field(default=0.1, ge=0)
    penalty: float = Field(default=1e-3, ge=0)
    decoder_only: bool = False
    training: LoopSettings


def to_video(frames: Tensor) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., T, 3, H, W] in [0, 1]."""
    return frames.movedim(-1, -3).float() / 255


def some_clips(first: int, count: int) -> Tensor:
    """[count, 33, 3, 64, 112] in [0, 1]: the drawings of so many seeds."""
    scenes = all_scenes()
    return to_video(
        torch.stack([torch.from_numpy(draw_random(scenes, first + i).frames) for i in range(count)])
    )


@torch.no_grad()
def fit_projection(model: BlockVAE, clips: Tensor) -> None:
    """Make the model's projection the principal components of clips [N, T, 3, H, W], its latents of mean 0
    and unit size.
    """
    x = torch.cat([as_blocks(clip[None] * 2 - 1)[0] for clip in clips]).movedim(1, -1).flatten(0, -2)
    mean = x.mean(0)
    variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    axes, variance = axes.flip(1)[:, : model.channels], variance.flip(0)[: model.channels]
    scale = variance**0.25 * variance.sqrt().mean().sqrt()  # the mean square of all latents is 1
    model.project.weight.copy_((axes / scale).T[..., None, None])
    assert model.project.bias is not None
    assert model.unproject.bias is not None
    model.project.bias.copy_(-(mean @ axes) / scale)
    model.unproject.weight.copy_((axes * scale)[..., None, None])
    model.unproject.bias.copy_(mean)


@torch.no_grad()
def held_out_psnr(model: BlockVAE, clips: Tensor) -> float:
    """Mean PSNR in dB over clips [N, T, 3, H, W], each whole."""
    error = [(model.decode(model.encode(clip[None])) - clip).square().mean().item() for clip in clips]
    return sum(-10 * math.log10(e) for e in error) / len(error)


def train_codec(settings: CodecSettings) -> None:
    """Train, or resume training, and write the averaged model to ``settings.out`` with ``metrics.json``."""
    torch.manual_seed(settings.training.seed)
    held_out = some_clips(HELD_OUT, settings.held_out)
    if settings.start is None:
        model = BlockVAE(settings.channels, settings.width, settings.depth, settings.fine_width)
        fit_projection(model, some_clips(0, settings.fitted_clips))
    else:
        model = BlockVAE.from_pretrained(settings.start).requires_grad_(True)
    linear = held_out_psnr(model.eval(), held_out)
    log.info("at first: %.2f dB on held-out clips", linear)
    if settings.decoder_only:
        for part in (model.project, model.encoder):
            part.requires_grad_(False)
    model.train()
    state = Path(settings.work) / "codec.pt"
    loop = Loop(model, settings.training, state, _is_matrix, origin(settings, settings.start))
    scenes = all_scenes()

    def loss() -> tuple[Tensor, dict[str, float]]:
        whole = loop.step >= settings.training.steps * (1 - settings.full_share)
        count, crop = (settings.batch // 4, None) if whole else (settings.batch, settings.crop)
        x = torch.stack([_piece(settings.frames, crop, scenes, loop.generator) for _ in range(count)])
        z = model.encode(x)
        noise = torch.randn(z.shape, generator=loop.generator) * settings.noise
        error = 2 * (model.decode(z + noise) - x)
        square = error.square().mean()
        value = (error.square() + 1e-4).sqrt().mean() + 2 * square + settings.penalty * z.square().mean()
        return value, {"PSNR": -10 * math.log10(square.item() / 4), "size": z.square().mean().sqrt().item()}

    for _ in loop.run(loss):
        pass
    loop.swap()
    model.eval()
    if not settings.decoder_only:
        _normalise(model, some_clips(0, min(200, settings.fitted_clips)))
    metrics = {"psnr_held_out": held_out_psnr(model, held_out), "psnr_at_first": linear, "steps": loop.step}
    out = Path(settings.out)
    model.half().save_pretrained(out)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    log.info("%s: %s", out, metrics)


def plot_against_linear(folder: Path, out: Path) -> dict[int, float]:
    """PSNR of linear projections to several numbers a latent on held-out clips, by number; drawn as SVG
    beside that of the autoencoder in ``folder``.
    """
    from matplotlib.figure import Figure

    fitted, held_out = some_clips(0, 200), some_clips(HELD_OUT, 24)
    linear = {}
    for channels in (8, 16, 24, 32, 48, 64, 96):
        model = BlockVAE(channels, width=8, depth=1, fine_width=8).eval()
        fit_projection(model, fitted)
        linear[channels] = held_out_psnr(model, held_out)
    ours = BlockVAE.from_pretrained(folder)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(list(linear), list(linear.values()), "o-", label="linear projection")
    axes.plot([ours.channels], [held_out_psnr(ours, held_out)], "s", markersize=9, label="tiny/vae")
    axes.set_xlabel("numbers a latent")
    axes.set_ylabel("PSNR on held-out clips, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with written(out) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    return linear


def _is_matrix(name: str, p: Tensor) -> bool:
    """What Muon trains: the convolutions inside; AdamW those around pixels and latents."""
    return p.ndim == 4 and name.startswith(("decoder.", "encoder.1.", "fine_in", "cells"))


def _piece(
    frames: int, crop: tuple[int, int] | None, scenes: list[Scene], generator: torch.Generator
) -> Tensor:
    """[T, 3, H, W] in [0, 1]: a clip, or a window of `crop` cells of it near the thing's middle in some
    frame.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    drawing = draw_random(scenes, below(HELD_OUT), frames)
    video = to_video(torch.from_numpy(drawing.frames))
    if crop is None:
        return video
    rows, columns = 8 * crop[0], 8 * crop[1]
    at, side = below(frames), below(2)
    top = int(drawing.path.y[at]) - below(rows)
    left = int(drawing.path.x[at]) - below(columns)
    top, left = min(max(top, 0), HEIGHT - rows), min(max(left, 0), WIDTH - columns)
    video = video[..., top : top + rows, left : left + columns]
    return video.flip(-1) if side else video


@torch.no_grad()
def _normalise(model: BlockVAE, clips: Tensor) -> None:
    """Each channel's mean to 0, the mean square of all together to 1; channels keep their sizes beside each
    other.
    """
    z = model.encode(clips)
    model.mean.copy_(z.mean((0, 1, 3, 4)).view(-1, 1, 1))
    model.std.fill_((z - model.mean).square().mean().sqrt())
