"""The tiny world's autoencoder: a small residual `AutoencoderKLWan`, trained on random crops of the film.

Instead of sampling from a posterior, a little noise of fixed size is added to the mean: the decoder learns to
bear the small errors that a few-step generator makes, and the latents stay near unit size by a weak penalty.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify
from pydantic import Field
from torch import Tensor

from stream_r1.config import Settings
from stream_r1.data.film import Shot, load_film, load_shots
from stream_r1.models.causal_convolution import PastFrames
from stream_r1.models.vae_codec import decode_piece, encode_piece
from stream_r1.tiny_world.loop import Loop, LoopSettings

log = logging.getLogger(__name__)


class VaeSettings(Settings):
    """The autoencoder and its training.

    out: folder that the averaged model is written to.
    work: folder that keeps the state of the training.
    start: a folder to go on from; None: new weights.
    base_dim: width of the outermost layers.
    latent_channels: channels of a latent.
    blocks: residual blocks a stage.
    crop: frames, rows and columns of what it learns from.
    batch: crops a step; whole pictures are a quarter as many, at least 2.
    full_share: last share of the steps, on whole pictures.
    noise: deviation of what is added to the latents before they are decoded.
    penalty: weight of the latents' mean square in the loss.
    decoder_only: keep the encoder, and so every latent made with it, as it is.
    training: how long and how fast.
    """

    out: str
    work: str
    start: str | None = None
    base_dim: int = 32
    latent_channels: int = 48
    blocks: int = 1
    crop: tuple[int, int, int] = (9, 32, 56)
    batch: int = Field(default=4, ge=2)
    full_share: float = Field(default=0.1, ge=0, le=1)
    noise: float = Field(default=0.1, ge=0)
    penalty: float = Field(default=1e-3, ge=0)
    decoder_only: bool = False
    training: LoopSettings


def new_autoencoder(settings: VaeSettings) -> AutoencoderKLWan:
    """An untrained model: 8 x 8 x 4 pixels to one latent of ``latent_channels``."""
    channels = settings.latent_channels
    model = AutoencoderKLWan(
        base_dim=settings.base_dim,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=settings.blocks,
        attn_scales=[],
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )
    with torch.no_grad():
        model.quant_conv.weight[channels:].zero_()
        model.quant_conv.bias[channels:].fill_(2 * math.log(settings.noise or 1e-4))
        for name, module in model.named_modules():
            if name.endswith("conv2"):
                module.weight.mul_(0.1)  # near the identity at first: the shortcuts carry the picture
    return model


def train_vae(settings: VaeSettings, cache: Path | None = None) -> None:
    """Train, or go on training, and write the averaged model to ``settings.out`` with ``metrics.json``."""
    torch.manual_seed(settings.training.seed)
    frames = torch.from_numpy(load_film(cache).copy())
    shots = [shot for shot in load_shots() if shot.frames >= 17]
    train = [shot for shot in shots if not shot.held_out and shot.frames >= settings.crop[0]]
    if settings.start is None:
        model = new_autoencoder(settings)
    else:
        model = AutoencoderKLWan.from_pretrained(settings.start, torch_dtype=torch.float32)
    model.train()
    if settings.decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    loop = Loop(model, settings.training, Path(settings.work) / "vae.pt", _is_matrix)
    weights = torch.tensor([float(min(shot.frames - settings.crop[0] + 1, 240)) for shot in train])
    codec = _Codec(model)

    def loss() -> tuple[Tensor, dict[str, float]]:
        whole = loop.step >= settings.training.steps * (1 - settings.full_share)
        x = _batch(frames, train, weights, settings, loop.generator, whole=whole)
        z = codec.encode(x)
        noise = torch.randn(z.shape, generator=loop.generator) * settings.noise
        error = codec.decode(z + noise) - x
        square = error.square().mean()
        value = (error.square() + 1e-4).sqrt().mean() + 2 * square + settings.penalty * z.square().mean()
        return value, {"PSNR": -10 * math.log10(square.item() / 4)}

    for _ in loop.run(loss):
        pass
    loop.swap()
    model.eval()
    if not settings.decoder_only:
        _normalise(model, codec, frames, train)
    metrics = {"psnr_held_out": held_out_psnr(model, frames, shots), "steps": loop.step}
    out = Path(settings.out)
    model.half().save_pretrained(out)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    log.info("%s: %s", out, metrics)


class _Codec:
    """Whole clips [B, 3, T, H, W] in [-1, 1] through a model in training; latents [B, C, F, h, w], not
    normalised.
    """

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean."""
        patches = patchify(x, self.model.config["patch_size"])
        moments = self.model.quant_conv(encode_piece(self.model.encoder, patches, PastFrames(), first=True))
        return moments[:, : self.model.config["z_dim"]]

    def decode(self, z: Tensor) -> Tensor:
        """Pixels, not clamped."""
        y = decode_piece(self.model.decoder, self.model.post_quant_conv(z), PastFrames(), first=True)
        return unpatchify(y, self.model.config["patch_size"])


def _is_matrix(name: str, p: Tensor) -> bool:
    """What Muon trains: the kernels inside; the outermost and those around the latents are AdamW's."""
    outer = ("conv_in", "conv_out", "quant")
    return p.ndim >= 4 and p.shape[0] >= 12 and not any(part in name for part in outer)


def _batch(
    frames: Tensor,
    shots: list[Shot],
    weights: Tensor,
    settings: VaeSettings,
    generator: torch.Generator,
    whole: bool,
) -> Tensor:
    """Random crops [B, 3, T, H, W] in [-1, 1], mirrored half of the time; whole pictures, a quarter as many,
    at the end.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    length, rows, columns = settings.crop
    out = []
    count = max(2, settings.batch // 4) if whole else settings.batch
    for index in torch.multinomial(weights, count, replacement=True, generator=generator).tolist():
        start = shots[index].start + below(shots[index].frames - length + 1)
        clip = frames[start : start + length]
        if not whole:
            top, left = below(clip.shape[1] - rows + 1), below(clip.shape[2] - columns + 1)
            clip = clip[:, top : top + rows, left : left + columns]
        out.append(clip.flip(2) if below(2) else clip)
    return _to_pixels(torch.stack(out))


def _to_pixels(clips: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] -> [B, 3, T, H, W] in [-1, 1]."""
    return clips.movedim(-1, 1).float() / 127.5 - 1


@torch.no_grad()
def _normalise(model: AutoencoderKLWan, codec: _Codec, frames: Tensor, shots: list[Shot]) -> None:
    """Record each channel's mean and deviation over the training shots in the configuration."""
    middles = [shot.start + (shot.frames - 17) // 2 for shot in shots]
    z = torch.cat([codec.encode(_to_pixels(frames[start : start + 17][None])) for start in middles])
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def held_out_psnr(model: AutoencoderKLWan, frames: Tensor, shots: list[Shot]) -> float:
    """Mean PSNR in dB over the middle 17 frames of each held-out shot, whole pictures.

    More than the networks' causal memory: a decoder that has only seen the beginnings of videos fails later.
    """
    codec, figures = _Codec(model), []
    for shot in (shot for shot in shots if shot.held_out):
        start = shot.start + (shot.frames - 17) // 2
        x = _to_pixels(frames[start : start + 17][None])
        error = (codec.decode(codec.encode(x)).clamp(-1, 1) - x) / 2
        figures.append(-10 * math.log10(error.square().mean().item()))
    return sum(figures) / len(figures)
