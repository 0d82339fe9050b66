"""The video autoencoder against diffusers' own frame-by-frame encode and decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from stream_r1.models.autoencoders import load_autoencoder
from stream_r1.models.causal_convolution import conv3d
from stream_r1.models.vae import VideoVAE

PLAIN = {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
RESIDUAL = {
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
SPATIAL_ONLY_LEVEL = RESIDUAL | {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True]}
KINDS = {"plain": PLAIN, "residual": RESIDUAL, "residual, one level without time": SPATIAL_ONLY_LEVEL}


def autoencoder(kind: str, seed: int = 0, z_dim: int = 6) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    module = AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        num_res_blocks=1,
        latents_mean=torch.randn(z_dim).tolist(),
        latents_std=(torch.rand(z_dim) + 0.5).tolist(),
        **KINDS[kind],
    ).eval()
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("conv_out.weight"):  # pixels that use most of [-1, 1] without saturating
            parameter.data *= 2
    return module


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def reference_decode(module: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(getattr(module.config, f"latents_{name}")) for name in ("mean", "std"))
    z = latents.movedim(2, -1) * std + mean
    return module.decode(z.movedim(-1, 1)).sample.movedim(2, 1) / 2 + 0.5


def random_latents(vae: VideoVAE, batch: int = 2, frames: int = 6, rows: int = 3, columns: int = 4) -> Tensor:
    return torch.randn(batch, frames, vae.channels, rows, columns, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_decode_is_that_of_diffusers(kind: str, batch: int) -> None:
    module = autoencoder(kind)
    vae = VideoVAE(module)
    latents = random_latents(vae, batch)
    expected = reference_decode(module, latents)
    assert expected.std() > 0.05
    video = vae.decode(latents)
    assert video.shape == (batch, vae.frames(6), 3, 3 * vae.spatial_factor, 4 * vae.spatial_factor)
    assert video.is_contiguous()
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encode_is_that_of_diffusers(kind: str) -> None:
    module = autoencoder(kind)
    vae = VideoVAE(module)
    video = torch.rand(2, 9, 3, 2 * vae.spatial_factor, 3 * vae.spatial_factor)
    mu = module.encode((video * 2 - 1).movedim(1, 2)).latent_dist.mode().movedim(1, -1)
    mean, std = (torch.tensor(getattr(module.config, f"latents_{name}")) for name in ("mean", "std"))
    expected = ((mu - mean) / std).movedim(-1, 2)
    latents = vae.encode(video)
    assert latents.shape == (2, *vae.latent_shape(9, *video.shape[-2:])[:1], vae.channels, 2, 3)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (3, 3), (1, 2, 3), (2, 4), (5, 1)])
def test_stream_is_the_whole(kind: str, chunks: tuple[int, ...]) -> None:
    vae = VideoVAE(autoencoder(kind))
    latents = random_latents(vae)
    decoder = vae.stream_decoder(2)
    pieces = [decoder.decode(chunk) for chunk in latents.split(chunks, dim=1)]
    assert [piece.shape[1] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
    assert decoder.frames_done == 6
    with torch.no_grad():
        expected = reference_decode(vae.autoencoder, latents)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


def test_pieces_of_one_latent_frame_are_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VideoVAE(autoencoder(kind))
    latents = random_latents(vae)
    video = torch.rand(1, 13, 3, vae.spatial_factor, vae.spatial_factor)
    with torch.no_grad():
        whole, encoded = vae.decode(latents), vae.encode(video)
        monkeypatch.setattr("stream_r1.models.autoencoder._PIXELS_PER_PIECE", 1)
        torch.testing.assert_close(vae.decode(latents), whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.encode(video), encoded, atol=1e-5, rtol=0)


def test_stream_memory_is_constant(kind: str) -> None:
    vae = VideoVAE(autoencoder(kind))
    decoder, held = vae.stream_decoder(1), []
    for _ in range(20):
        decoder.decode(random_latents(vae, batch=1, frames=2, rows=1, columns=1))
        held.append(decoder.memory())
        assert all(tensor._base is None for tensor in decoder._tensors)
    assert held[0] == held[-1] > 0


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_gradient(kind: str, batch: int, checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = autoencoder(kind)
    vae = VideoVAE(module)
    latents = random_latents(vae, batch, frames=3, rows=2, columns=2)
    ours, theirs = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    expected = reference_decode(module, theirs)
    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    if checkpoint:
        monkeypatch.setattr("stream_r1.models.autoencoder._PIXELS_PER_PIECE", 1)
    (vae.decode(ours, checkpoint=checkpoint) * cotangent).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * theirs.grad.abs().max().item(), rtol=0)
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_bfloat16_is_close_to_float32(kind: str) -> None:
    vae, half = VideoVAE(autoencoder(kind)), VideoVAE(autoencoder(kind).to(torch.bfloat16))
    latents = random_latents(vae, 1, frames=2, rows=2, columns=2)
    video = half.decode(latents)
    assert video.dtype == torch.float32
    assert (video - vae.decode(latents)).abs().max() < 0.1
    again = half.encode(video)
    assert again.dtype == torch.float32
    assert (again - vae.encode(video)).abs().max() < 0.1 * again.abs().max()


@torch.no_grad()
def test_bfloat16_of_the_small_assets_errs_less_than_eight_bits_a_colour() -> None:
    folder = Path(__file__).parents[2] / "assets" / "tiny" / "vae"
    vae, half = load_autoencoder(folder), load_autoencoder(folder, dtype=torch.bfloat16)
    latents = torch.randn(1, 4, vae.channels, 8, 14, generator=torch.Generator().manual_seed(0))
    video = vae.decode(latents)
    rounded = (video * 255).round() / 255
    assert (half.decode(latents) - video).square().mean() < (rounded - video).square().mean()


@pytest.mark.parametrize("padding", [(0, 1, 1), (0, 0, 0), (1, 1, 1)])
def test_conv3d_matches_torch(padding: tuple[int, int, int]) -> None:
    conv = torch.nn.Conv3d(5, 7, (3, 3, 3)).requires_grad_(False)
    x = torch.randn(1, 5, 4, 6, 5, requires_grad=True)
    y = conv3d(x, conv, padding)
    wide = x.detach().double().requires_grad_()
    expected = torch.nn.functional.conv3d(wide, conv.weight.double(), conv.bias.double(), padding=padding)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, atol=1e-5, rtol=1e-5)


def test_trainable_weights_keep_their_gradient() -> None:
    conv = torch.nn.Conv3d(3, 4, 1)
    conv3d(torch.randn(1, 3, 2, 4, 4), conv, (0, 0, 0)).sum().backward()
    assert conv.weight.grad is not None


def test_round_trip_through_a_folder(kind: str, tmp_path) -> None:
    module = autoencoder(kind)
    module.save_pretrained(tmp_path)
    loaded = VideoVAE.from_pretrained(tmp_path)
    latents = random_latents(loaded)
    torch.testing.assert_close(loaded.decode(latents), VideoVAE(module).decode(latents), atol=0, rtol=0)
    assert loaded.latent_shape(21, 4 * loaded.spatial_factor, loaded.spatial_factor) == (6, 4, 1)
    assert loaded.spatial_factor == (16 if kind.startswith("residual,") else 8)


def test_bad_input_is_refused(tmp_path) -> None:
    vae = VideoVAE(autoencoder("residual"))
    with pytest.raises(ValueError, match=r"frames must be 1 \+ 4 n, got 8"):
        vae.encode(torch.zeros(1, 8, 3, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8, got 16 x 12"):
        vae.encode(torch.zeros(1, 5, 3, 16, 12))
    with pytest.raises(TypeError, match=r"floating point.*uint8"):
        vae.encode(torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[B, T, 3, H, W\]"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match=r"decode: latents must be \[B, F, 6, h, w\]"):
        vae.decode(torch.zeros(1, 6, 3, 2, 2))
    with pytest.raises(TypeError, match="floating point"):
        vae.decode(torch.zeros(1, 3, 6, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        vae.stream_decoder(0)
    decoder = vae.stream_decoder(2)
    decoder.decode(torch.zeros(2, 1, 6, 2, 2))
    with pytest.raises(ValueError, match="batch 2 and 16 x 16 pixels"):
        decoder.decode(torch.zeros(2, 1, 6, 2, 3))
    with pytest.raises(ValueError, match="batch 2"):
        decoder.decode(torch.zeros(1, 1, 6, 2, 2))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        VideoVAE.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="got AutoencoderKL"):
        VideoVAE.from_pretrained(tmp_path)
    module = autoencoder("residual")
    module.register_to_config(latents_mean=[0.0])
    with pytest.raises(ValueError, match="latents_mean must have z_dim = 6 values, got 1"):
        VideoVAE(module)
