"""The block autoencoder: causal, streaming as whole, differentiable, and a folder that comes back as it
went.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan

from stream_r1.files import FileError
from stream_r1.models.autoencoders import load_autoencoder
from stream_r1.models.block_vae import BlockVAE, as_blocks
from stream_r1.models.vae import VideoVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = BlockVAE(channels=6, width=16, depth=2, fine_width=12)
    for p in model.parameters():  # zeros at first would hide what the layers do
        torch.nn.init.normal_(p, std=0.08)
    model.mean.normal_()
    model.std.uniform_(0.5, 2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip():
    return torch.rand(2, 17, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def test_shapes(vae, clip):
    z = vae.encode(clip)
    assert z.shape == (2, 5, 6, 3, 4)
    assert vae.latent_shape(17, 24, 32) == (5, 3, 4)
    assert vae.decode(z).shape == clip.shape
    assert vae.encode(clip[:, :1]).shape == (2, 1, 6, 3, 4)


def test_blocks_hold_every_pixel_where_the_first_frame_counts_four_times(clip):
    blocks = as_blocks(clip)
    assert blocks.shape == (2, 5, 768, 3, 4)
    first, later = blocks[:, 0], blocks[:, 2]
    assert torch.equal(later[0, :, 1, 2].sort().values, clip[0, 5:9, :, 8:16, 16:24].flatten().sort().values)
    assert torch.equal(
        first[0, :, 1, 2].sort().values,
        clip[0, 0, :, 8:16, 16:24].expand(4, -1, -1, -1).flatten().sort().values,
    )


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_a_stream_equals_the_whole(vae, pieces):
    z = torch.randn(2, 5, 6, 3, 4, generator=torch.Generator().manual_seed(2))
    stream = vae.stream_decoder(2)
    parts = torch.cat([stream.decode(piece) for piece in z.split(pieces, dim=1)], 1)
    assert torch.allclose(parts, vae.decode(z), atol=1e-6)
    assert stream.memory() > 0


def test_nothing_depends_on_what_comes_later(vae, clip):
    z = vae.encode(clip)
    changed = clip.clone()
    changed[:, 9:] = 0
    assert torch.equal(vae.encode(changed)[:, :3], z[:, :3])
    later = z.clone()
    later[:, 3:] = 0
    before, after = vae.decode(z), vae.decode(later)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_neighbours_and_the_frame_before_are_seen(vae):
    """What removes seams: a pixel depends on the cells around and on the latents before."""
    z = torch.zeros(1, 3, 6, 3, 4, requires_grad=True)
    vae.decode(z)[0, 5:9, :, 8:16, 8:16].sum().backward()
    seen = z.grad.abs().sum(2)[0] > 0
    assert seen[1, 0, 1]
    assert seen[2, 1, 1]
    assert seen[1, 1, 1]


def test_gradients_reach_pixels_and_checkpointing_changes_nothing(vae, clip):
    x = clip.double().requires_grad_()
    vae.double().encode(x).square().sum().backward()
    assert (x.grad.abs().sum((0, 2, 3, 4)) > 0).all()
    z = torch.randn(1, 5, 6, 3, 4, dtype=torch.double, requires_grad=True)
    (plain,) = torch.autograd.grad(vae.decode(z).square().sum(), z)
    (again,) = torch.autograd.grad(vae.decode(z, checkpoint=True).square().sum(), z)
    vae.float()
    assert torch.allclose(plain, again, atol=1e-12)


def test_a_folder_comes_back(vae, clip, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    again = BlockVAE.from_pretrained(tmp_path / "vae")
    assert torch.equal(again.encode(clip), vae.encode(clip))
    assert not any(p.requires_grad for p in again.parameters())
    half = BlockVAE.from_pretrained(tmp_path / "vae", dtype=torch.bfloat16)
    assert half.encode(clip).dtype == torch.float32


def test_folders_that_do_not_fit_are_named(vae, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        BlockVAE.from_pretrained(tmp_path / "none")
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"heads": 2}))
    with pytest.raises(FileError, match=r"fine_width.*heads"):
        BlockVAE.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"channels": 0}))
    with pytest.raises(FileError, match=r"channels.*0"):
        BlockVAE.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"channels": 7}))
    with pytest.raises(FileError, match="project"):
        BlockVAE.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(FileError, match=r"BlockVAE.*AutoencoderKLWan"):
        BlockVAE.from_pretrained(tmp_path / "vae")


def test_videos_and_latents_that_do_not_fit_are_refused(vae):
    with pytest.raises(ValueError, match="frames"):
        vae.encode(torch.rand(1, 6, 3, 24, 32))
    with pytest.raises(ValueError, match=r"latents.*6"):
        vae.decode(torch.rand(1, 5, 4, 3, 4))


def test_a_folder_is_read_by_its_class(vae, clip, tmp_path):
    vae.save_pretrained(tmp_path / "block")
    assert torch.equal(load_autoencoder(tmp_path / "block").encode(clip), vae.encode(clip))
    sizes = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    wan = AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **sizes)
    wan.save_pretrained(tmp_path / "wan")
    assert isinstance(load_autoencoder(tmp_path / "wan"), VideoVAE)
    (tmp_path / "wan/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match=r"AutoencoderKLWan or BlockVAE.*AutoencoderKL\W*$"):
        load_autoencoder(tmp_path / "wan")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_autoencoder(tmp_path / "none")
