"""From folders to streams: both layouts, checkpoints, presets, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from sampling_models import WordEncoder, save_tiny_wan, tiny_autoencoder, tiny_student, tiny_vae

from stream_r1.models.checkpoints import to_original_names
from stream_r1.sampling.pipeline import PRESETS, StreamR1Pipeline
from stream_r1.sampling.sampler import Sampler

SIZE = (16, 32)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder)
    return folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    tiny_student(text_dim=384, text_len=16).save_pretrained(folder / "student")
    tiny_autoencoder().save_pretrained(folder / "vae")
    return folder


def test_a_diffusers_folder_streams(wan: Path) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, size=SIZE)
    assert (pipeline.size, pipeline.fps) == (SIZE, 16)
    chunks = list(itertools.islice(pipeline.stream("a fat rabbit", seed=3), 3))
    by_hand = Sampler(tiny_student(), tiny_vae(), latent_size=(2, 4)).stream(
        pipeline.text_encoder.encode(["a fat rabbit"]), seed=3, chunks=3
    )
    for ours, expected in zip(chunks, by_hand, strict=True):
        torch.testing.assert_close(ours.frames, expected.frames, atol=1e-5, rtol=0)


def test_the_small_assets_stream(assets: Path) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(assets)
    assert (pipeline.size, pipeline.fps) == ((64, 112), 24)
    assert next(pipeline.stream(["a rabbit", "a bird"])).frames.shape == (2, 9, 3, 64, 112)


@pytest.mark.parametrize("seconds", [0.1, 9 / 16, 1.0])
def test_call_makes_as_many_frames_as_asked(wan: Path, seconds: float) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, size=SIZE, text_encoder=WordEncoder())
    video = pipeline("a", seconds)
    frames = torch.cat([chunk.frames for chunk in pipeline.stream("a", chunks=2)], dim=1)
    assert video.shape == (1, round(16 * seconds), 3, *SIZE)
    torch.testing.assert_close(video, frames[:, : video.shape[1]], atol=0, rtol=0)
    onward = pipeline("a", seconds, first_frames=frames[:, :9])
    assert onward.shape == video.shape


def test_a_checkpoint_in_original_names(wan: Path, tmp_path: Path) -> None:
    student = tiny_student()
    for parameter in student.parameters():
        parameter.data.mul_(1.1)
    names = {f"model.{name}": value for name, value in to_original_names(student.state_dict()).items()}
    torch.save({"generator_ema": names}, tmp_path / "student.pt")
    pipeline = StreamR1Pipeline.from_pretrained(
        wan, tmp_path / "student.pt", "stream-r1", size=SIZE, text_encoder=WordEncoder(), text_len=6
    )
    config = pipeline.student.config
    assert (config.window_frames, config.sink_frames, config.positions, config.sink_ema) == (
        9,
        3,
        "window",
        0.999,
    )
    assert config.attention_head_dim == 12
    for name, value in student.state_dict().items():
        assert torch.equal(pipeline.student.state_dict()[name], value), name
    assert torch.isfinite(pipeline("a", 1.0)).all()


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_stream(wan: Path, preset: str) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, preset=preset, size=SIZE, text_encoder=WordEncoder())
    chunks = list(itertools.islice(pipeline.stream("a"), 4))
    assert chunks[-1].frames.shape == (1, 12, 3, *SIZE)
    narrower = StreamR1Pipeline.from_pretrained(
        wan,
        preset=preset,
        size=SIZE,
        text_encoder=WordEncoder(),
        window_frames=6,
        sink_frames=0,
        sink_ema=None,
    )
    assert narrower.student.config.window_frames == 6


def test_bad_folders_are_refused(wan: Path, tmp_path: Path) -> None:
    load = StreamR1Pipeline.from_pretrained
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"lacks vae/config\.json, transformer/config\.json, text_encoder"
    ):
        load(tmp_path)
    with pytest.raises(
        ValueError, match="preset must be one of stream-r1, reward-forcing, self-forcing, got 'x'"
    ):
        load(wan, preset="x")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(wan, tmp_path / "student.pt")
    with pytest.raises(ValueError, match=r"size must be positive multiples of \(16, 16\), got \(24, 32\)"):
        load(wan, size=(24, 32), text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="fps must be positive"):
        load(wan, size=SIZE, fps=-1, text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="no such setting: windows"):
        load(wan, size=SIZE, text_encoder=WordEncoder(), windows=3)
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(NotImplementedError, match=r"transformer_2/: a second expert transformer"):
        load(tmp_path)
    pipeline = load(wan, size=SIZE, text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="seconds must be at least"):
        pipeline("a", 0)
