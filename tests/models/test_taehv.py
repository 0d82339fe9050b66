"""The tiny autoencoder against its graph written out over a file's tensors, frame by frame, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stream_r1.files import FileError
from stream_r1.models.taehv import TinyVAE

State = dict[str, Tensor]
CHANNELS, WIDTHS, ENCODER = 4, (12, 8, 6, 5), 6


@pytest.fixture(scope="module")
def state() -> State:
    """Random tensors in the layout of `taew2_1.pth`, narrow."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"encoder.0": (ENCODER, 3), "encoder.17": (CHANNELS, ENCODER)}
    for stage, frames in ((2, 2), (7, 2), (12, 1)):
        shapes[f"encoder.{stage}.conv"] = (ENCODER, frames * ENCODER, 1)
        shapes[f"encoder.{stage + 1}"] = (ENCODER, ENCODER, 0)
        shapes |= memory("encoder", range(stage + 2, stage + 5), ENCODER)
    shapes |= {"decoder.1": (WIDTHS[0], CHANNELS), "decoder.22": (3, WIDTHS[3])}
    for stage, frames, width, following in zip((3, 9, 15), (1, 2, 2), WIDTHS, WIDTHS[1:], strict=False):
        shapes |= memory("decoder", range(stage, stage + 3), width)
        shapes[f"decoder.{stage + 4}.conv"] = (frames * width, width, 1)
        shapes[f"decoder.{stage + 5}"] = (following, width, 0)
    state = {}
    for name, (out, inputs, *kind) in shapes.items():
        kernel = 1 if kind == [1] else 3
        state[f"{name}.weight"] = torch.randn(out, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        if not kind:
            state[f"{name}.bias"] = torch.randn(out) / 4
    return state


def memory(network: str, blocks: range, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{network}.{block}.conv.{layer}": (width, 2 * width if layer == 0 else width)
        for block in blocks
        for layer in (0, 2, 4)
    }


@pytest.fixture(scope="module")
def vae(state: State, tmp_path_factory: pytest.TempPathFactory) -> TinyVAE:
    file = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    torch.save(state, file)
    return TinyVAE.from_pretrained(file)


def convolve(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = state[f"{name}.weight"].double(), state.get(f"{name}.bias")
    padding = weight.shape[-1] // 2
    return functional.conv2d(x, weight, None if bias is None else bias.double(), stride, padding)


def remember(state: State, name: str, frames: Iterator[Tensor]) -> Iterator[Tensor]:
    before = None
    for x in frames:
        y = torch.cat([x, torch.zeros_like(x) if before is None else before], 1)
        before = x
        for layer in (0, 2, 4):
            y = convolve(state, f"{name}.conv.{layer}", y if layer == 0 else y.relu())
        yield (x + y).relu()


def decode_by_frame(state: State, latents: Tensor) -> Tensor:
    def grow(name: str, count: int, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        for x in frames:
            yield from convolve(state, f"{name}.conv", x).chunk(count, 1)

    frames = (convolve(state, "decoder.1", 3 * torch.tanh(z.double() / 3)).relu() for z in latents.unbind(1))
    for stage, count in ((3, 1), (9, 2), (15, 2)):
        for block in range(stage, stage + 3):
            frames = remember(state, f"decoder.{block}", frames)
        bigger = (x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in frames)
        grown = grow(f"decoder.{stage + 4}", count, bigger)
        frames = iter([convolve(state, f"decoder.{stage + 5}", x) for x in grown])
    pictures = [convolve(state, "decoder.22", x.relu()) for x in frames]
    return torch.stack(pictures[3:], 1).clamp(0, 1)


def encode_by_frame(state: State, video: Tensor) -> Tensor:
    def pool(name: str, count: int, frames: Iterator[Tensor]) -> Iterator[Tensor]:
        for group in zip(*[frames] * count, strict=True):
            yield convolve(state, f"{name}.conv", torch.cat(group, 1))

    padded = [*video.double().unbind(1), *[video[:, -1].double()] * 3]
    frames = (convolve(state, "encoder.0", x).relu() for x in padded)
    for stage, count in ((2, 2), (7, 2), (12, 1)):
        pooled = pool(f"encoder.{stage}", count, iter(list(frames)))
        frames = iter([convolve(state, f"encoder.{stage + 1}", x, stride=2) for x in pooled])
        for block in range(stage + 2, stage + 5):
            frames = remember(state, f"encoder.{block}", frames)
    return torch.stack([convolve(state, "encoder.17", x) for x in frames], 1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_decoding_is_the_published_graph(vae: TinyVAE, state: State) -> None:
    latents = 2 * random(2, 3, CHANNELS, 4, 6)
    video = vae.decode(latents)
    assert video.shape == (2, 9, 3, 32, 48)
    expected = decode_by_frame(state, latents)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.2  # not clamped away
    torch.testing.assert_close(video.double(), expected, atol=1e-5, rtol=0)


def test_encoding_is_the_published_graph(vae: TinyVAE, state: State) -> None:
    video = random(2, 9, 3, 16, 24).sigmoid()
    latents = vae.encode(video)
    assert latents.shape == (2, 3, CHANNELS, 2, 3)
    torch.testing.assert_close(latents.double(), encode_by_frame(state, video), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [(3, 3, 3), (1, 2, 5, 1)])
def test_a_stream_is_the_whole(
    vae: TinyVAE, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = random(2, 9, CHANNELS, 2, 3)
    whole = vae.decode(latents)
    decoder, frames = vae.stream_decoder(2), []
    for piece in latents.split(chunks, dim=1):
        frames.append(decoder.decode(piece))
        memory = decoder.memory()
    assert [len(piece[0]) for piece in frames] == [4 * chunks[0] - 3, *(4 * chunk for chunk in chunks[1:])]
    torch.testing.assert_close(torch.cat(frames, 1), whole, atol=1e-6, rtol=0)
    assert memory == 2 * 4 * 3 * sum(width * 6 * 4**stage for stage, width in enumerate(WIDTHS[:3]))
    monkeypatch.setattr("stream_r1.models.autoencoder._PIXELS_PER_PIECE", 1)
    torch.testing.assert_close(vae.decode(latents), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(vae.encode(whole), encode_by_frame(vae.state_dict(), whole).float())


def test_gradients_reach_the_latents(vae: TinyVAE) -> None:
    latents = random(1, 2, CHANNELS, 2, 2).requires_grad_()
    grads = [
        torch.autograd.grad(vae.decode(latents, checkpoint=checkpoint).square().sum(), latents)[0]
        for checkpoint in (False, True)
    ]
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(grads[0], grads[1])


def test_half_precision_decodes(vae: TinyVAE, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "taew2_1.pth")
    half = TinyVAE.from_pretrained(tmp_path / "taew2_1.pth", dtype=torch.bfloat16)
    latents = random(1, 2, CHANNELS, 2, 3)
    video = half.decode(latents)
    assert (half.dtype, video.dtype) == (torch.bfloat16, torch.float32)
    assert (video - vae.decode(latents)).abs().max() < 0.1


def test_a_file_that_grows_more_frames_makes_the_last_of_them(
    vae: TinyVAE, state: State, tmp_path: Path
) -> None:
    weight = state["decoder.7.conv.weight"]
    torch.save(state | {"decoder.7.conv.weight": torch.cat([weight + 1, weight])}, tmp_path / "more.pth")
    latents = random(1, 2, CHANNELS, 2, 3)
    assert torch.equal(TinyVAE.from_pretrained(tmp_path / "more.pth").decode(latents), vae.decode(latents))


def test_the_published_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in TinyVAE().state_dict().items()}
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.17.weight"] == (16, 64, 3, 3)
    assert len(shapes) == 2 * (2 * 2 + 3 * 2 + 9 * 6)


def test_other_files_are_refused(state: State, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        TinyVAE.from_pretrained(tmp_path / "absent.pth")
    file = tmp_path / "other.pth"
    torch.save({"layers.0.weight": torch.zeros(1)}, file)
    with pytest.raises(FileError, match=r"layout of taew2_1\.pth with decoder\.1\.weight, found layers\.0"):
        TinyVAE.from_pretrained(file)
    wrong = state | {"decoder.22.weight": torch.zeros(12, WIDTHS[3], 3, 3)}  # patches of 2 x 2 pixels
    del wrong["encoder.4.conv.2.bias"]
    torch.save(wrong, file)
    with pytest.raises(FileError, match=r"1 missing: encoder\.4\.conv\.2\.bias; 1 of another shape: decoder"):
        TinyVAE.from_pretrained(file)
