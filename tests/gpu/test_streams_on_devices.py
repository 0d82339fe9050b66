"""A stream on every device of this machine against a stream of plain torch on the CPU; graphs, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from stream_models import TEXT_DIM, TEXT_LEN, small_decoder, tiny_student
from torch import Tensor

from stream_r1.models.offload import ModelOffload
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.sampling.sampler import Sampler
from stream_r1_kernels import backends

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def latents(student: CausalWanTransformer, chunks: int = 8, **settings: bool) -> Tensor:
    text = torch.randn(2, TEXT_LEN, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    stream = Sampler(student, latent_size=(4, 6), **settings).stream(text, seed=3)
    return torch.cat([chunk.latents for chunk in itertools.islice(stream, chunks)], 1).cpu()


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("device", DEVICES)
def test_a_stream_of_kernels_is_the_stream_of_plain_torch(
    device: str, ema: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = latents(tiny_student(sink_ema=ema).to(device))
    monkeypatch.setitem(backends._UNAVAILABLE, "cpu", "left out")
    monkeypatch.setitem(backends._UNAVAILABLE, "sdpa", "left out")
    plain = latents(tiny_student(sink_ema=ema))
    torch.testing.assert_close(made, plain, atol=1e-4, rtol=1e-4)


if torch.cuda.is_available():

    @pytest.mark.parametrize("ema", [None, 0.9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_graphs_give_the_plain_stream(dtype: torch.dtype, ema: float | None) -> None:
        student = tiny_student(sink_ema=ema, attention_head_dim=64).to("cuda", dtype)
        plain, replayed = (latents(student, cuda_graph=graph) for graph in (False, True))
        assert torch.equal(plain, replayed)

    def test_turns_give_the_plain_stream_and_need_less_memory() -> None:
        def chunks(*, offload: bool) -> tuple[Tensor, int]:
            before = torch.cuda.memory_allocated()
            student, vae = tiny_student(ffn_dim=1 << 16).to("cuda"), small_decoder().to("cuda")
            sampler = Sampler(student, vae, latent_size=(4, 6))
            if offload:
                sampler.offload = ModelOffload("cuda", student, vae)
            text = torch.randn(1, TEXT_LEN, TEXT_DIM, generator=torch.Generator().manual_seed(0))
            frames = [chunk.frames for chunk in sampler.stream(text, seed=3, chunks=3)]
            return torch.cat(frames, 1).cpu(), torch.cuda.memory_allocated() - before

        (plain, more), (turned, less) = (chunks(offload=offload) for offload in (False, True))
        assert torch.equal(plain, turned)
        weights = sum(p.numel() * p.element_size() for p in tiny_student(ffn_dim=1 << 16).parameters())
        assert less < more - weights / 2
