"""The codec's beginning is the best linear projection, and its training leaves what it must."""

import json

import pytest
import torch

from stream_r1.models.block_vae import BlockVAE, as_blocks
from stream_r1.tiny_world.codec import CodecSettings, fit_projection, some_clips, train_codec
from stream_r1.tiny_world.loop import LoopSettings


@pytest.fixture(scope="module")
def clips():
    return some_clips(0, 6)


def test_the_projection_is_onto_the_principal_components(clips):
    model = BlockVAE(8, width=8, depth=1, fine_width=8)
    fit_projection(model, clips)
    with torch.no_grad():
        z = model.encode(clips)
        error = (2 * (model.eval().decode(z) - clips)).square()
    assert z.mean((0, 1, 3, 4)).abs().max() < 2e-3
    assert z.square().mean() == pytest.approx(1, abs=1e-3)
    blocks = torch.cat([as_blocks(2 * clip[None] - 1)[0] for clip in clips]).movedim(1, -1).flatten(0, -2)
    singular = torch.linalg.svdvals((blocks - blocks.mean(0)).double())
    left = (
        singular[8:].square().sum() / blocks.numel()
    )  # what no other linear map of 8 numbers leaves less of
    first = error[:, :1].sum() * 3  # the first frame is in its block four times and is decoded once
    assert ((error.sum() + first) / blocks.numel()).item() == pytest.approx(left.item(), rel=0.05)


def test_training_improves_on_it_and_a_decoders_training_leaves_the_latents(tmp_path, clips):
    sizes = {
        "channels": 6,
        "width": 16,
        "depth": 1,
        "fine_width": 16,
        "fitted_clips": 12,
        "frames": 5,
        "batch": 4,
    }
    training = LoopSettings(steps=25, lr=1e-3, warmup=2, ema=0.5)
    out = tmp_path / "first"
    train_codec(
        CodecSettings(out=str(out), work=str(tmp_path / "work"), training=training, held_out=4, **sizes)
    )
    told = json.loads((out / "metrics.json").read_text())
    assert told["psnr_held_out"] > told["psnr_at_first"] + 0.05
    again = CodecSettings(
        out=str(tmp_path / "second"),
        work=str(tmp_path / "work2"),
        start=str(out),
        decoder_only=True,
        training=training,
        held_out=4,
        **sizes,
    )
    train_codec(again)
    first, second = (BlockVAE.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first.encode(clips), second.encode(clips))
    assert not torch.equal(first.decode(first.encode(clips[:1])), second.decode(second.encode(clips[:1])))
