"""Passes that several processes share are those of one, up to the order of sums."""

import shutil
from pathlib import Path

import pytest
import small_run
import torch
from PIL import Image
from test_train_command import command
from workers import DistributedSettings, join, launch, passes, rows_by_sample, shared_student, streams

from stream_r1.config import SettingsError
from stream_r1.distill.ranks import Ranks
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.recipe import load
from stream_r1.sampling.video import read_video


def assert_close(results: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for result in results:
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize(("size", "checkpointing"), [(2, True), (4, False)])
def test_velocities_and_gradients(size: int, checkpointing: bool) -> None:
    assert_close(launch(size, passes, size, checkpointing), passes(None, False))


@pytest.mark.parametrize(("size", "merge", "moving"), [(2, True, True), (2, False, False), (4, True, True)])
def test_streams(size: int, merge: bool, moving: bool) -> None:
    """Sinks that move and are averaged, windows of parts of chunks, merged passes; a cache of its heads."""
    assert_close(launch(size, streams, size, merge, moving), streams(None, merge, moving))


@pytest.mark.parametrize(
    ("size", "samples", "counts"),
    [(2, 1, [1, 0]), (2, 3, [2, 1]), (4, 3, [1, 1, 1, 0]), (4, 5, [2, 2, 1, 0])],
)
def test_each_sample_is_worked_on_once(size: int, samples: int, counts: list[int]) -> None:
    expected = torch.arange(float(samples)).log().expand(2, -1)
    for got, whole in launch(size, rows_by_sample, samples):
        assert got == counts
        assert torch.equal(whole, expected)


def _refused(heads: int, width: int) -> str:
    with join(DistributedSettings()):
        try:
            student = shared_student(2, num_attention_heads=heads)
            student(torch.zeros(1, 3, 4, 4, width), torch.zeros(1), torch.zeros(1, 8, 16))
        except ValueError as error:
            return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("heads", "width", "message"),
    [
        (3, 8, "num_attention_heads must be a multiple of the 2 processes of the sequence, got 3"),
        (4, 6, "the tokens of a frame must be a multiple of the 4 processes"),
    ],
)
def test_what_does_not_divide_is_refused(heads: int, width: int, message: str) -> None:
    size = 2 if heads == 3 else 4
    assert all(message in told for told in launch(size, _refused, heads, width))


def _sample(folder: Path, *arguments: str) -> tuple[int, str, str]:
    return command("sample", "a rabbit", "--out", str(folder / "shared.mp4"), *arguments)


def test_the_command_writes_what_one_process_writes(world: Path, tmp_path: Path) -> None:
    """Once, from the first process; decoded pictures to a step of eight bits."""
    shutil.copytree(world, tmp_path / "models", dirs_exist_ok=True)
    config = CausalWanTransformer.load_config(world / "student") | {"num_attention_heads": 2}
    torch.manual_seed(1)
    CausalWanTransformer.from_config(config).save_pretrained(tmp_path / "models" / "student")
    Image.new("RGB", (64, 32), (90, 140, 60)).save(tmp_path / "meadow.png")
    what = ("--models", str(tmp_path / "models"), "--size", "32x64", "--seconds", "0.8")
    what += ("--start", str(tmp_path / "meadow.png"), "--vae-dtype", "float32")
    code, _, error = command("sample", "a rabbit", *what, "--out", str(tmp_path / "alone.mp4"))
    assert (code, error) == (0, "")
    first, second = launch(2, _sample, tmp_path, *what, "--sequence-parallel", "2")
    assert first[0] == second[0] == 0
    assert second[1] == ""
    assert "shared.mp4" in first[1]
    alone, shared = (read_video(tmp_path / f"{name}.mp4")[0].float() for name in ("alone", "shared"))
    assert alone.shape == shared.shape
    assert (alone - shared).abs().max() <= 3 / 255
    assert alone.std() > 0.05


def test_the_command_refuses(world: Path, tmp_path: Path) -> None:
    models = ("--models", str(world), "--size", "32x64")
    (code, _, told), _ = launch(2, _sample, tmp_path, *models)
    assert code == 2
    assert "--sequence-parallel: expected the number of processes that torchrun started" in told
    shared = (*models, "--sequence-parallel", "2")
    assert "2, got 1" in told
    assert "1, got 2" in _sample(tmp_path, *shared)[2]
    assert "--forever: expected --seconds" in _sample(tmp_path, *shared, "--forever")[2]
    told = "".join(result[2] for result in launch(2, _sample, tmp_path, *shared))
    assert told.count("num_attention_heads must be a multiple of the 2 processes of the sequence, got 1") == 1


def test_a_recipe_hears_what_does_not_divide(world: Path) -> None:
    """Before anything is loaded: a frame of 2 x 3 tokens, models of one head."""
    with pytest.raises(SettingsError) as refused:
        load(world / "recipe.yaml", ["distributed={sequence: 4}"])
    assert "distributed.sequence: expected a divisor of the 1 heads of models.teacher, got 4" in str(
        refused.value
    )
    assert "distributed.sequence: expected a divisor of the 6 tokens of a frame" in str(refused.value)


def test_masks_of_dropout_that_would_differ_are_refused() -> None:
    lora = {"lora": {"rank": 2, "dropout": 0.1}}
    chosen = small_run.settings(critic=lora, distributed={"sequence": 2})
    with pytest.raises(ValueError, match=r"critic\.lora\.dropout: expected 0 with distributed\.sequence 2"):
        small_run.trainer(chosen, ranks=Ranks(size=2, sequence=2))
