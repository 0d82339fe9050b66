"""The student's pass beside the published data flow, on the same weights; the tiny student's chunk

    pytest benchmarks/test_student.py --benchmark-only

Before it is timed, ours must agree with the published flow over a stream that fills the window and rolls it.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.case import DTYPES
from benchmarks.published_flow import PublishedFlow
from stream_r1.estimate.work import count, total_flops
from stream_r1.models.transformer import CausalWanTransformer

WIDTHS = {  # heads, head width, ffn, layers, latent channels, text width, text length, latent rows, columns
    "1.3B-width-2-layers-60x104": (12, 128, 8960, 2, 16, 4096, 512, 60, 104),
    "tiny-8x14": (5, 64, 960, 4, 48, 384, 32, 8, 14),
}
STEPS = (1000.0, 937.5, 833.333, 625.0, 0.0)


def make_student(size: str, positions: str, dtype: torch.dtype) -> CausalWanTransformer:
    heads, width, ffn, layers, channels, text, length, _, _ = WIDTHS[size]
    torch.manual_seed(0)
    student = CausalWanTransformer(
        num_attention_heads=heads,
        attention_head_dim=width,
        ffn_dim=ffn,
        num_layers=layers,
        in_channels=channels,
        out_channels=channels,
        text_dim=text,
        text_len=length,
        window_frames=9,
        sink_frames=3,
        positions=positions,
    )
    return student.to(dtype).eval().requires_grad_(False)


class Ours:
    """Our student over its cache, with the baseline's interface."""

    def __init__(self, student: CausalWanTransformer, text: Tensor, height: int, width: int) -> None:
        self.student = student
        self.context = student.encode_text(text)
        self.cache = student.new_cache(1, height, width)

    def forward_chunk(self, x: Tensor, t: Tensor, text: Tensor, *, last: bool) -> Tensor:
        out = self.student.forward_chunk(x, t, self.context, self.cache)
        if last:
            self.cache.commit()
        return out


def chunk(size: str, dtype: torch.dtype, seed: int) -> Tensor:
    _, _, _, _, channels, _, _, rows, columns = WIDTHS[size]
    noise = torch.randn(1, 3, channels, rows, columns, generator=torch.Generator().manual_seed(seed))
    return noise.to(dtype)


def times(t: float) -> Tensor:
    return torch.full((1, 3), t)


@lru_cache(maxsize=1)
def checked_runs(size: str, dtype: str, positions: str) -> tuple[dict[str, Ours | PublishedFlow], Tensor]:
    """Both with a full window, found to agree, and the prompt; made once for the two of a case."""
    student = make_student(size, positions, DTYPES[dtype])
    *_, text_width, length, rows, columns = WIDTHS[size]
    text = torch.randn(1, length, text_width, generator=torch.Generator().manual_seed(9)).to(DTYPES[dtype])
    runs: dict[str, Ours | PublishedFlow] = {
        "ours": Ours(student, text, rows, columns),
        "published": PublishedFlow(student, rows // 2, columns // 2),
    }
    tolerance = 1e-4 if dtype == "float32" else 6e-2
    chunks = 4 if size.startswith("tiny") else 3
    for index in range(chunks + 1):  # keys and values from the clean passes alone: the window fills
        x, t, last = (
            chunk(size, DTYPES[dtype], index),
            times(0.0 if index < chunks else 625.0),
            index < chunks,
        )
        got, expected = (run.forward_chunk(x, t, text, last=last).float() for run in runs.values())
        assert (got - expected).norm() <= tolerance * expected.norm()
    return runs, text


@pytest.mark.parametrize("implementation", ["ours", "published"])
@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [("1.3B-width-2-layers-60x104", "bfloat16"), ("tiny-8x14", "float32"), ("tiny-8x14", "bfloat16")],
)
def test_pass_over_a_full_window(
    benchmark: Callable, size: str, dtype: str, positions: str, implementation: str
) -> None:
    """One denoising pass of the student, the window full: sink 3, previous 3 and current 3 frames."""
    benchmark.group = f"student pass {size} {positions} {dtype}"  # type: ignore[attr-defined]
    runs, text = checked_runs(size, dtype, positions)
    x = chunk(size, DTYPES[dtype], 100)
    arithmetic = count(lambda: runs["ours"].forward_chunk(x, times(625.0), text, last=False))
    benchmark.extra_info.update(dtype=dtype, shape=list(x.shape), flops=total_flops(arithmetic))  # type: ignore[attr-defined]
    benchmark.pedantic(
        runs[implementation].forward_chunk,
        args=(x, times(625.0), text),
        kwargs={"last": False},
        rounds=5 if size.startswith("1.3B") else 60,
        warmup_rounds=1,
    )
