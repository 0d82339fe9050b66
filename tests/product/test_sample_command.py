"""`stream-r1 sample`: mp4 files of the asked length, the same for the same seed, resuming from a video."""

import pytest
import torch
from command_line import run
from PIL import Image

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.weight_names import to_original_names
from stream_r1.sampling.video import read_video


def test_two_prompts_twice(world, tmp_path, capsys):
    sizes = ("--models", world, "--size", "32x48", "--seconds", 0.8)
    for name in ("a", "b"):
        assert (
            run("sample", "a rabbit", "an apple", *sizes, "--out", tmp_path / name / "it.mp4", "--sheet") == 0
        )
    told = capsys.readouterr().out
    assert "frames a second" in told
    videos = {}
    for name in ("a", "b"):
        for index in range(2):
            video, fps = read_video(tmp_path / name / f"it-{index}.mp4")
            assert fps == 24
            assert video.shape == (9 + 12, 3, 32, 48)  # two chunks: the first has 1 + 2 * 4 frames
            videos[name, index] = video
        assert (tmp_path / name / "it.png").is_file()
    assert torch.equal(videos["a", 0], videos["b", 0])
    assert not torch.equal(videos["a", 0], videos["a", 1])

    start = tmp_path / "a" / "it-0.mp4"
    assert run("sample", "a rabbit", *sizes, "--out", tmp_path / "on.mp4", "--start", start) == 0
    assert read_video(tmp_path / "on.mp4")[0].shape == (24, 3, 32, 48)


def test_a_checkpoint_from_a_picture_in_half_precision(world, tmp_path, capsys):
    student = CausalWanTransformer.from_pretrained(world / "student")
    torch.save({"generator": to_original_names(student.state_dict())}, tmp_path / "student.pt")
    Image.new("RGB", (48, 32), (90, 140, 60)).save(tmp_path / "meadow.png")
    what = ("--model", world, "--checkpoint", tmp_path / "student.pt", "--network", "generator")
    how = ("--dtype", "bfloat16", "--vae-dtype", "bfloat16", "--device", "cpu", "--vae-device", "cpu")
    start = ("--size", "32x48", "--seconds", 0.5, "--start", tmp_path / "meadow.png")
    assert run("sample", "--prompt", "a rabbit", *what, *how, *start, "--out", tmp_path / "it.mp4") == 0
    assert "continues from a picture, still for 9 frames" in capsys.readouterr().out
    assert read_video(tmp_path / "it.mp4")[0].shape == (12, 3, 32, 48)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--size", "32"), "--size: expected height x width"),
        (("--size", "30x48"), "multiples of (16, 16)"),
        (("--out", "it.avi"), "ends in .mp4"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (
            ("--checkpoint", "{world}/vae"),
            "_class_name CausalWanTransformer or WanTransformer3DModel, got Auto",
        ),
        (("--seconds", "inf"), "--seconds"),
        (("--seed", str(2**64)), "--seed"),
        (("--preset", "reward"), "reward-forcing"),
        (("--decoder", "tiny"), "taehv:PATH"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--dtype", "half"), "--dtype: expected auto, float32, bfloat16, float16, got 'half'"),
        (("--device", "gpu"), "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("--vae-device", "cuda:99"), "--vae-device: expected a device of the"),
    ],
)
def test_refuses(world, capsys, arguments, told):
    arguments = [argument.format(world=world) for argument in arguments]
    assert run("sample", "a rabbit", "--models", world, *arguments) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "Traceback" not in shown


def test_wants_a_prompt(world, capsys):
    assert run("sample", "--models", world) == 2
    assert "prompts: expected at least one" in capsys.readouterr().err
