"""A light causal autoencoder: blocks of pixels projected to a few numbers, with small networks that see the
neighbours.

A latent cell holds a block of 4 frames of 8 x 8 pixels; the first frame of a video is a block of four equal
frames. The encoder is a linear projection and a correction from the cells around. The decoder is the
transposed projection, a network over the grid of cells that also reads the latent frame before, and a
network over pixels two by two that joins neighbouring blocks to each other and to the frame before.
Convolutions run at an eighth and a half of the picture's size: decoding costs milliseconds a latent frame
on one core.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from stream_r1.disk.whole import written
from stream_r1.files import FileError
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.checkpoints import load_weights
from stream_r1.models.sizes import read_sizes
from stream_r1.models.weight_files import read_tensors

_SIDE, _FRAMES = 8, 4
_BLOCK = 3 * _FRAMES * _SIDE * _SIDE
_SIZES = ("channels", "width", "depth", "fine_width")
_FINE = 2  # pixels a side that the last network takes together


class BlockVAE(VideoAutoencoder):
    """8 x 8 pixels of 4 frames to a latent cell of `channels` numbers.

    Args:
        channels: of a latent.
        width: of the networks over cells.
        depth: residual blocks of the decoder over cells; the encoder has one.
        fine_width: of the network over pixels.
    """

    spatial_factor = _SIDE
    temporal_factor = _FRAMES
    mean: Tensor  # [channels, 1, 1] of the projection's results
    std: Tensor

    def __init__(self, channels: int = 24, width: int = 128, depth: int = 3, fine_width: int = 64) -> None:
        super().__init__()
        self.config = dict(zip(_SIZES, (channels, width, depth, fine_width), strict=True))
        self.channels = channels
        self.project = nn.Conv2d(_BLOCK, channels, 1)
        self.unproject = nn.Conv2d(channels, _BLOCK, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(_BLOCK, width, 1), _Residual(width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )
        self.cells = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.decoder = nn.Sequential(*(_Residual(width) for _ in range(depth)), nn.SiLU())
        self.to_block = nn.Conv2d(width, _BLOCK, 1)
        shuffled = (_SIDE // _FINE) ** 2
        inner = 3 * _FINE**2  # numbers of two by two pixels of a frame
        self.to_fine = nn.Conv2d(width, 16 * shuffled, 1)
        self.fine_in = nn.Conv2d((_FRAMES + 1) * inner + 16, fine_width, 3, padding=1)
        self.fine_out = nn.Conv2d(fine_width, _FRAMES * inner, 3, padding=1)
        for layer in (self.encoder[-1], self.to_block, self.fine_out):
            _silence(layer)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> BlockVAE:
        """Load a folder that `save_pretrained` wrote, frozen.

        Raises:
            FileNotFoundError: no such folder, config or weights.
            FileError: another class's folder, or files that can't be read or do not fit.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"BlockVAE.from_pretrained: expected {path}")
        config = read_sizes(path)
        if config.get("_class_name") != cls.__name__:
            raise FileError(f"{path}: expected _class_name {cls.__name__}, got {config.get('_class_name')}")
        sizes = {name: value for name, value in config.items() if not name.startswith("_")}
        if set(sizes) != set(_SIZES):
            raise FileError(f"{path}: expected {', '.join(_SIZES)}, got {', '.join(sizes) or 'nothing'}")
        model = cls(**sizes)
        load_weights(model, read_tensors(folder), source=str(folder))
        return model.eval().requires_grad_(False).to(device, dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and the weights in their dtype."""
        config = {"_class_name": type(self).__name__, **self.config}
        with written(folder) as place:
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
            save_file(tensors, place / "diffusion_pytorch_model.safetensors")

    @property
    def dtype(self) -> torch.dtype:
        return self.project.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.project.weight.device

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents [B, F, C, h, w], float32 or better, of video [B, T, 3, H, W] in [0, 1]."""
        self._check_video(video)
        blocks = as_blocks(video.to(self.device, self.dtype) * 2 - 1)
        z = self.project(blocks.flatten(0, 1)) + self.encoder(blocks.flatten(0, 1))
        z = (z.unflatten(0, blocks.shape[:2]) - self.mean) / self.std
        return z.to(torch.promote_types(self.dtype, torch.float32))

    def _decoder_input(self, latents: Tensor) -> Tensor:
        return (latents.to(self.device, self.dtype) * self.std + self.mean).movedim(2, 1)

    def _decode_functional(self, z: Tensor, first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        z = z.movedim(1, 2)  # [B, F, C, h, w]
        count = z.shape[:2]
        before, seen = tensors or (z[:, 0], None)
        pair = torch.cat([z, torch.cat([before[:, None], z[:, :-1]], 1)], 2).flatten(0, 1)
        features = self.decoder(self.cells(pair))
        blocks = self.unproject(z.flatten(0, 1)) + self.to_block(features)
        pixels = pixel_shuffle(blocks, _SIDE // _FINE)  # [N, 4 * 12, H/2, W/2]: frame, colour, two by two
        last = pixels.unflatten(0, count)[:, :, -3 * _FINE**2 :]
        seen = pixels.unflatten(0, count)[:, 0, : 3 * _FINE**2] if seen is None else seen
        earlier = torch.cat([seen[:, None], last[:, :-1]], 1).flatten(0, 1)
        fine = torch.cat([pixels, earlier, pixel_shuffle(self.to_fine(features), _SIDE // _FINE)], 1)
        pixels = pixels + self.fine_out(silu(self.fine_in(fine)))
        video = pixel_shuffle(pixels, _FINE).unflatten(1, (_FRAMES, 3)).unflatten(0, count).flatten(1, 2)
        if first:  # the first latent frame is one pixel frame, the last of its four
            video = video[:, _FRAMES - 1 :]
        video = video.to(torch.promote_types(video.dtype, torch.float32)) * 0.5 + 0.5
        return (video.clamp(0, 1) if not self.training else video, z[:, -1].clone(), last[:, -1].clone())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _silence(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(silu(self.first(silu(x))))


def _silence(layer: nn.Module) -> None:
    """A layer that adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def as_blocks(video: Tensor) -> Tensor:
    """[B, T, 3, H, W] -> [B, F, 768, h, w], the first frame four times; the numbers as `pixel_shuffle`
    orders them.
    """
    video = torch.cat([video[:, :1].expand(-1, _FRAMES - 1, -1, -1, -1), video], 1)
    groups = video.unflatten(1, (-1, _FRAMES)).flatten(2, 3)
    fine = pixel_unshuffle(groups.flatten(0, 1), _FINE)
    return pixel_unshuffle(fine, _SIDE // _FINE).unflatten(0, groups.shape[:2])
