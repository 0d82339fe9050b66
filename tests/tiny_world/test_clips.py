"""Encoded clips: the right drawing under the right prompt, kept while the encoder is the same."""

from dataclasses import replace

import pytest
import torch

from stream_r1.drawn_world import all_scenes, draw
from stream_r1.models.block_vae import BlockVAE
from stream_r1.tiny_world.clips import Clips


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    BlockVAE(4, width=8, depth=1, fine_width=8).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_rows_are_the_latents_of_their_scenes(folder, tmp_path):
    clips = Clips(folder, 50, tmp_path / "work")
    x0 = clips.latents([7, 3])
    assert x0.shape == (2, 9, 4, 8, 14)
    frames = torch.from_numpy(draw(all_scenes()[clips.scene(7)], [7, 2]).frames).movedim(-1, 1).float() / 255
    expected = BlockVAE.from_pretrained(folder).encode(frames[None])[0]
    assert torch.allclose(x0[0], expected, atol=2e-3)
    assert torch.equal(clips.texts([7, 3]), clips.text[[clips.scene(7), clips.scene(3)]])
    latents, index = clips.some(2)
    assert torch.equal(latents, clips.latents([0, 1]))
    assert index.tolist() == [clips.scene(0), clips.scene(1)]
    assert len({clips.scene(row) for row in range(50)}) > 30


@pytest.mark.parametrize("row", [0, 5, 9])
def test_covered_latents_are_those_of_which_a_frame_shows_the_thing(folder, tmp_path, row):
    clips = Clips(folder, 10, tmp_path / "work")
    scene = all_scenes()[clips.scene(row)]
    red, blue = (
        draw(replace(scene, colour=colour), [row, 2]).frames.astype(int) for colour in ("red", "blue")
    )
    shown = torch.from_numpy(abs(red - blue).max(-1) > 0)  # [T, H, W]: nothing but the thing has the colour
    cells = shown.unflatten(2, (14, 8)).unflatten(1, (8, 8)).float().mean((2, 4))  # [T, h, w]
    share = torch.cat([cells[:1], cells[1:].unflatten(0, (8, 4)).amax(1)])  # [F, h, w]
    found = clips.covered([row])[0, :, 0]
    assert found.shape == share.shape
    assert (found[share > 0.3] > 0.3).all()
    assert (share[found > 0.9] > 0).all()
    assert found[share == 0].mean() < 0.05


def test_what_is_kept_serves_the_same_encoder_and_no_other(folder, tmp_path, monkeypatch):
    made = Clips(folder, 10, tmp_path / "work").latents([1])
    decoder = BlockVAE.from_pretrained(folder)
    torch.nn.init.ones_(decoder.to_block.weight)
    decoder.save_pretrained(folder)  # the same encoder
    with monkeypatch.context() as patch:
        patch.delattr("stream_r1.tiny_world.clips.draw")  # nothing has to be drawn again
        assert torch.equal(Clips(folder, 10, tmp_path / "work").latents([1]), made)
    torch.nn.init.ones_(decoder.project.weight)
    decoder.save_pretrained(folder)
    assert not torch.equal(Clips(folder, 10, tmp_path / "work").latents([1]), made)
