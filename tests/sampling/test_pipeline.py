"""From folders to streams: both layouts, checkpoints, presets, places and starts."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sampling_models import (
    CHANNELS,
    SIZE,
    WordEncoder,
    plain_autoencoder,
    save_tiny_wan,
    tiny_autoencoder,
    tiny_student,
    tiny_vae,
)

from stream_r1.cli import main
from stream_r1.models.taehv import TinyVAE
from stream_r1.models.weight_names import to_original_names
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.presets import PRESETS
from stream_r1.sampling.sampler import Sampler
from stream_r1.sampling.start import read_start
from stream_r1.sampling.video import VideoWriter, read_video


@pytest.fixture(scope="module")
def plain_wan(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with a configuration as diffusers writes it: nothing about streaming."""
    folder = tmp_path_factory.mktemp("plain") / "wan"
    shutil.copytree(wan, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    ours = ("text_len", "frames_per_chunk", "window_frames", "sink_frames", "positions", "sink_ema")
    for name in (*ours, "first_chunk_frames"):
        del config[name]
    file.write_text(json.dumps(config))
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


@pytest.mark.parametrize(
    ("capabilities", "small", "full"),
    [
        ({"avx2": True}, torch.float32, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16, torch.float32),
    ],
)
def test_only_small_assets_decode_in_bfloat16_and_where_the_cpu_multiplies_it(
    assets: Path, wan: Path, monkeypatch: pytest.MonkeyPatch, capabilities, small, full
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    load = functools.partial(StreamR1Pipeline.from_pretrained, size=SIZE, text_encoder=WordEncoder())
    assert load(wan).vae.dtype == full
    load = functools.partial(StreamR1Pipeline.from_pretrained, assets)
    assert load().vae.dtype == small
    assert load(vae_dtype=torch.float32).vae.dtype == torch.float32
    assert load(vae_device="meta").vae.dtype == torch.float32


@pytest.mark.parametrize("seconds", [0.1, 9 / 16, 1.0])
def test_call_makes_as_many_frames_as_asked(wan: Path, seconds: float) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, size=SIZE, text_encoder=WordEncoder())
    video = pipeline("a", seconds).frames
    frames = torch.cat([chunk.frames for chunk in pipeline.stream("a", chunks=2)], dim=1)
    assert video.shape == (1, round(16 * seconds), 3, *SIZE)
    torch.testing.assert_close(video, frames[:, : video.shape[1]], atol=0, rtol=0)
    onward = pipeline("a", seconds, first_frames=frames[:, :9])
    assert onward.frames.shape == video.shape
    assert onward.timings.chunks == math.ceil(round(16 * seconds) / 12)


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
    assert torch.isfinite(pipeline("a", 1.0).frames).all()


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


def test_output_types_are_the_same_video(wan: Path) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, size=SIZE, text_encoder=WordEncoder())
    tensor = pipeline(["a", "b"], num_frames=10).frames
    array = pipeline(["a", "b"], num_frames=10, output_type="np").frames
    pictures = pipeline(["a", "b"], num_frames=10, output_type="pil").frames
    assert array.shape == (2, 10, *SIZE, 3)
    assert torch.equal(torch.from_numpy(array).movedim(-1, 2), tensor)
    assert [len(video) for video in pictures] == [10, 10]
    shown = torch.from_numpy(np.array(pictures[1][9])).movedim(-1, 0)
    assert (shown / 255 - tensor[1, 9]).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="output_type must be pt, np or pil, got 'latent'"):
        pipeline("a", output_type="latent")


def test_without_a_preset_a_student_streams_as_its_configuration_says_or_as_stream_r1(
    wan: Path, plain_wan: Path, tmp_path: Path
) -> None:
    torch.save(to_original_names(tiny_student().state_dict()), tmp_path / "student.pt")
    load = functools.partial(StreamR1Pipeline.from_pretrained, size=SIZE, text_encoder=WordEncoder())
    names = ("frames_per_chunk", "window_frames", "sink_frames", "positions", "sink_ema", "text_len")
    told = {
        place: tuple(load(*place).student.config[name] for name in names)
        for place in (
            (wan,),
            (wan, tmp_path / "student.pt"),
            (plain_wan,),
            (plain_wan, tmp_path / "student.pt"),
            (wan, None, "self-forcing"),
        )
    }
    assert list(told.values()) == [
        (3, 9, 3, "window", None, 6),
        (3, 9, 3, "window", None, 6),
        (3, 9, 3, "window", 0.999, 512),
        (3, 9, 3, "window", 0.999, 512),
        (3, 21, 0, "absolute", None, 6),
    ]


def test_a_network_of_the_checkpoint_is_chosen(wan: Path, tmp_path: Path) -> None:
    state = to_original_names(tiny_student().state_dict())
    ema = {f"model.{name}": value + 1 for name, value in state.items()}
    torch.save({"generator": state, "generator_ema": ema}, tmp_path / "student.pt")
    for network, shift in ((None, 1), ("generator_ema", 1), ("generator", 0)):
        pipeline = StreamR1Pipeline.from_pretrained(
            wan, tmp_path / "student.pt", network=network, size=SIZE, text_encoder=WordEncoder()
        )
        assert torch.equal(pipeline.student.proj_out.bias, state["head.head.bias"] + shift)


def test_an_adapter_changes_the_student(wan: Path, tmp_path: Path) -> None:
    width = tiny_student().config["num_attention_heads"] * 12
    lead = "base_model.model.blocks.0.self_attn.q.lora_"
    torch.manual_seed(0)
    halves = {f"{lead}A.weight": torch.randn(2, width), f"{lead}B.weight": torch.randn(width, 2)}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2, "r": 2}')
    pipeline = StreamR1Pipeline.from_pretrained(wan, adapter=tmp_path, size=SIZE, text_encoder=WordEncoder())
    change = pipeline.student.blocks[0].attn1.to_q.weight - tiny_student().blocks[0].attn1.to_q.weight
    torch.testing.assert_close(change, halves[f"{lead}B.weight"] @ halves[f"{lead}A.weight"])


def test_the_tiny_decoder_decodes(wan: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = TinyVAE(CHANNELS, (8, 6, 4, 4), 4)
    torch.save(tiny.state_dict(), tmp_path / "taew2_1.pth")
    eight = tmp_path / "eight"  # the tiny decoder's 8 x 8 pixels a latent cell
    save_tiny_wan(eight, autoencoder=plain_autoencoder())
    load = functools.partial(StreamR1Pipeline.from_pretrained, size=SIZE, text_encoder=WordEncoder())
    decoder = f"taehv:{tmp_path / 'taew2_1.pth'}"
    pipeline = load(eight, decoder=decoder)
    chunks = list(pipeline.stream(["a", "b"], chunks=2))
    latents = torch.cat([chunk.latents for chunk in chunks], 1)
    frames = torch.cat([chunk.frames for chunk in chunks], 1)
    torch.testing.assert_close(frames, tiny.decode(latents), atol=1e-6, rtol=0)
    given = torch.rand(1, 9, 3, *SIZE)  # goes through the VAE's encoder: the student is told the same
    onward = next(pipeline.stream("a", chunks=1, first_frames=given))
    assert torch.equal(onward.latents, next(load(eight).stream("a", chunks=1, first_frames=given)).latents)
    with pytest.raises(ValueError, match=r"decoder must be taehv:PATH or None, got 'tiny'"):
        load(eight, decoder="tiny")
    with pytest.raises(FileNotFoundError, match="no such file of the decoder: nowhere"):
        load(eight, decoder="taehv:nowhere")
    save_tiny_wan(tmp_path / "two", autoencoder=plain_autoencoder((False, False, True)))
    with pytest.raises(ValueError, match=r"the vae's pixels and frames a latent \(8, 2\), got \(8, 4\)"):
        load(tmp_path / "two", decoder=decoder)


def test_precision_and_places(wan: Path) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(
        wan, size=SIZE, dtype=torch.bfloat16, vae_dtype=torch.bfloat16
    )
    student = pipeline.student
    assert student.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert student.scale_shift_table.dtype == torch.float32  # as diffusers keeps it
    assert pipeline.vae.dtype == torch.bfloat16
    frames = pipeline("a fat rabbit", 0.5).frames
    assert frames.dtype == torch.float32
    expected = StreamR1Pipeline.from_pretrained(wan, size=SIZE)("a fat rabbit", 0.5).frames
    assert 0 < (frames - expected).abs().mean() < 0.02
    # "meta" stands for another device: what is moved shows, nothing runs
    elsewhere = StreamR1Pipeline.from_pretrained(wan, size=SIZE, vae_device="meta", text_device="meta")
    assert elsewhere.student.device.type == "cpu"
    assert elsewhere.vae.device.type == "meta"
    assert elsewhere.text_encoder.device.type == "meta"


def test_the_text_encoder_is_freed_and_not_needed_for_kept_prompts(wan: Path, tmp_path: Path) -> None:
    load = functools.partial(StreamR1Pipeline.from_pretrained, wan, size=SIZE, text_cache=tmp_path)
    keeping, freeing = load(), load(keep_text_encoder=False)
    expected = keeping("a fat rabbit", 0.5).frames
    assert keeping.text_encoder.loaded
    other = freeing("fat", 0.5).frames
    assert not freeing.text_encoder.loaded
    stream = freeing.stream("fat")
    stream.switch("rabbit")
    assert not freeing.text_encoder.loaded
    again = load()
    assert torch.equal(again("a fat rabbit", 0.5).frames, expected)
    assert torch.equal(again("fat", 0.5).frames, other)
    assert not again.text_encoder.loaded


def test_starting_from_files(wan: Path, tmp_path: Path) -> None:
    pipeline = StreamR1Pipeline.from_pretrained(wan, size=SIZE, text_encoder=WordEncoder())
    pixels = (torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    picture = Image.fromarray((pixels * 255).to(torch.uint8).movedim(0, -1).numpy())
    picture.save(tmp_path / "first.png")
    start = read_start(tmp_path / "first.png", pipeline)
    assert torch.equal(start.frames, pixels.expand(1, 9, -1, -1, -1))
    assert start.meaning == "a picture, still for 9 frames"
    assert torch.isfinite(next(pipeline.stream("a", first_frames=start.frames)).frames).all()
    independent = StreamR1Pipeline.from_pretrained(
        wan, size=SIZE, text_encoder=WordEncoder(), first_chunk_frames=1, sink_frames=1, window_frames=7
    )
    start = read_start(tmp_path / "first.png", independent)
    assert torch.equal(start.frames, pixels[None, None])
    assert start.meaning == "a picture as the first frame"
    assert next(independent.stream("a", first_frames=start.frames)).index == 1

    for name, count, used in (("short", 8, None), ("long", 50, 33), ("exact", 21, 21)):
        with VideoWriter(tmp_path / f"{name}.mp4", 16, crf=0) as writer:
            writer.write(torch.rand(count, 3, *SIZE))
        if used is None:
            with pytest.raises(ValueError, match=r"short\.mp4: expected at least 9 frames .* got 8"):
                read_start(tmp_path / "short.mp4", pipeline)
            continue
        start = read_start(tmp_path / f"{name}.mp4", pipeline)
        assert torch.equal(start.frames[0], read_video(tmp_path / f"{name}.mp4")[0][-used:])
        assert start.meaning == f"the last {used} of {count} frames"

    picture.resize((16, 32)).save(tmp_path / "turned.png")
    with pytest.raises(ValueError, match=r"turned\.png: expected 16x32 pixels .* got 32x16"):
        read_start(tmp_path / "turned.png", pipeline)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read"):
        read_start(tmp_path / "text.png", pipeline)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_start(tmp_path / "absent.png", pipeline)


def test_the_command_streams_a_diffusers_folder(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(to_original_names(tiny_student().state_dict()), tmp_path / "student.pt")
    given = {"--models": wan, "--checkpoint": tmp_path / "student.pt", "--preset": "stream-r1"}
    given |= {"--size": "16x32", "--seconds": 1, "--text-cache": tmp_path / "prompts", "--device": "cpu"}
    for name in ("a.mp4", "b.mp4"):  # the second finds its prompt kept
        options = [str(word) for option in given.items() for word in option]
        with pytest.raises(SystemExit) as end:
            main(["sample", "a fat rabbit", *options, "--out", str(tmp_path / name)])
        assert not end.value.code
    assert "1.3 s of video" in capsys.readouterr().out  # 9 + 12 frames
    assert len(list((tmp_path / "prompts").iterdir())) == 1
    first, second = (read_video(tmp_path / name)[0] for name in ("a.mp4", "b.mp4"))
    assert first.shape == (21, 3, *SIZE)
    assert torch.equal(first, second)
