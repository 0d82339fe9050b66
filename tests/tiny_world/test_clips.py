"""Encoded clips: the right drawing under the right prompt, kept while the encoder is the same."""

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
    x0, text = clips.batch(3, torch.Generator().manual_seed(0))
    rows = torch.randint(50, (3,), generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(x0, clips.latents(rows))
    assert torch.equal(text, clips.text[[clips.scene(row) for row in rows]])
    latents, index = clips.some(2)
    assert torch.equal(latents, clips.latents([0, 1]))
    assert index.tolist() == [clips.scene(0), clips.scene(1)]
    assert len({clips.scene(row) for row in range(50)}) > 30


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
