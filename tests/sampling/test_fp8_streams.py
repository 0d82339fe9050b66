"""Streams of students in FP8, and with keys and values in FP8, beside whole ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_models import SIZE, TEXT_DIM, WordEncoder, tiny_student
from torch import Tensor

from stream_r1.cli import main
from stream_r1.models.fp8 import Fp8Linear, quantize_student
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.sampler import Sampler
from stream_r1_kernels import Fp8ChunkCache

FP8 = torch.float8_e4m3fn


def latents(student: CausalWanTransformer, chunks: int = 5, **options: Any) -> Tensor:
    torch.manual_seed(1)
    sampler = Sampler(student, steps=(1000, 500), latent_size=(4, 6), **options)
    return torch.cat([c.latents for c in sampler.stream(torch.randn(2, 6, TEXT_DIM), chunks=chunks)], 1)


def off(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("settings", [{}, {"sink_ema": 0.9}, {"window_frames": None, "sink_frames": 0}])
def test_keys_and_values_in_fp8_change_a_stream_a_little(settings: dict[str, Any]) -> None:
    student = tiny_student(**settings)
    whole = latents(student)
    apart = off(latents(student, cache_dtype=FP8), whole)
    assert 1e-5 < apart < 0.05


def test_merged_passes_see_what_single_ones_see() -> None:
    student = tiny_student()
    single = latents(student, cache_dtype=FP8, fuse_cache_update=False)
    merged = latents(student, cache_dtype=FP8, fuse_cache_update=True)
    # rounding to 8 bits makes a step of a last bit in float32 now and then
    assert off(merged, single) < 0.2 * off(single, latents(student))


@pytest.mark.parametrize("recache", [False, True])
def test_a_switch_changes_the_prompt_as_it_does_without(recache: bool) -> None:
    student = tiny_student()

    def after(**options: Any) -> Tensor:
        sampler = Sampler(student, text_encoder=WordEncoder(), latent_size=(4, 6), **options)
        stream = sampler.stream(["a fat rabbit"], seed=5)
        for _ in range(4):
            next(stream)
        stream.switch(["a butterfly over the meadow"], recache=recache)
        return torch.cat([next(stream).latents for _ in range(3)], 1)

    assert 1e-5 < off(after(cache_dtype=FP8), after()) < 0.05


def test_a_student_in_fp8_streams() -> None:
    whole, student = tiny_student(), tiny_student()
    quantize_student(student, "fp8-emulated")
    reference = latents(whole)
    quantised = latents(student)
    assert 1e-4 < off(quantised, reference) < 0.1
    assert 1e-4 < off(latents(student, cache_dtype=FP8), reference) < 0.1
    assert torch.equal(latents(student), quantised)


def test_the_stream_has_the_cache_that_was_asked_for() -> None:
    student = tiny_student().bfloat16()
    stream = Sampler(student, latent_size=(4, 6), cache_dtype=FP8).stream(
        torch.zeros(1, 6, TEXT_DIM), chunks=1
    )
    cache = stream.cache
    assert isinstance(cache, Fp8ChunkCache)
    assert (cache.storage.dtype, cache.dtype) == (FP8, torch.bfloat16)
    next(stream)


def test_a_pipeline_in_fp8_from_whole_weights_and_from_its_own(wan: Path, tmp_path: Path) -> None:
    settings = {"size": SIZE, "quantize": "fp8-emulated", "cache_dtype": FP8}
    pipeline = StreamR1Pipeline.from_pretrained(wan, **settings)
    assert isinstance(pipeline.student.blocks[0].attn1.to_q, Fp8Linear)
    pipeline.student.save_pretrained(tmp_path / "fp8")
    again = StreamR1Pipeline.from_pretrained(wan, tmp_path / "fp8", **settings)
    videos = [pipe("a fat rabbit", num_frames=21).frames for pipe in (pipeline, again)]
    assert torch.equal(*videos)
    assert not torch.equal(
        videos[0], StreamR1Pipeline.from_pretrained(wan, size=SIZE)("a fat rabbit", num_frames=21).frames
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--quantize", "fp8"], "from_pretrained: quantize 'fp8' needs a GPU with FP8 tensor cores"),
        (["--quantize", "int8"], "quantize: expected fp8 or fp8-emulated, got 'int8'"),
        (["--cache-dtype", "int8"], "--cache-dtype: expected auto or fp8, got 'int8'"),
    ],
)
def test_the_command_refuses_in_one_line(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    out = ["--out", str(tmp_path / "it.mp4"), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main(["sample", "a rabbit", "--models", str(wan), *out, *options])
    assert end.value.code == 2
    line = capsys.readouterr().err.strip()
    assert told in line
    assert "\n" not in line
