"""What is no argument of an op gets an error that names the parameter, what was expected and what came."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stream_r1_kernels import (
    ChunkCache,
    ChunkMask,
    Past,
    RotaryGrid,
    apply_rotary,
    backends,
    cached_chunk_attention,
    chunk_attention,
    dmd_gradient_,
    dmd_loss,
    fused_linear,
    gated_add,
    intra_weights,
    modulated_norm,
    qk_norm_rotary,
    region_saliency,
    rms_norm,
    rms_norm_silu,
)

Q = torch.zeros(1, 6, 2, 8)
X, FRAMES, W = torch.zeros(1, 6, 16), torch.zeros(1, 3, 16), torch.ones(16)
COS, SIN = RotaryGrid(8).phases(0, 1, 2, 3)
P = torch.zeros(1, 2, 3, 4, 5)
MASK = ChunkMask(1, 3)
GRID = RotaryGrid(8)


def rotate(**changed: object) -> object:
    given = {"q": X, "k": X, "q_weight": W, "k_weight": W, "cos": COS, "sin": SIN, "num_heads": 2}
    return qk_norm_rotary(**given | changed)  # type: ignore[arg-type]


def cache(**changed: object) -> object:
    given = {
        "layers": 1,
        "batch": 1,
        "heads": 2,
        "rotary": GRID,
        "rows": 2,
        "columns": 3,
        "frames_per_chunk": 3,
    }
    return ChunkCache(**given | {"window_frames": 9} | changed)  # type: ignore[arg-type]


NO_TENSOR: dict[str, Callable[[], object]] = {
    "chunk_attention: q": lambda: chunk_attention(None, Q, Q, MASK),
    "chunk_attention: k": lambda: chunk_attention(Q, None, Q, MASK),
    "chunk_attention: v": lambda: chunk_attention(Q, Q, None, MASK),
    "cached_chunk_attention: past.k": lambda: cached_chunk_attention(Q, Q, Q, Past(None, Q, False)),
    "cached_chunk_attention: past.v": lambda: cached_chunk_attention(Q, Q, Q, Past(Q, None, False)),
    "qk_norm_rotary: k": lambda: rotate(k=None),
    "qk_norm_rotary: sin": lambda: rotate(sin=None),
    "modulated_norm: x": lambda: modulated_norm(None, FRAMES, FRAMES),
    "modulated_norm: scale": lambda: modulated_norm(X, FRAMES, None),
    "gated_add: y": lambda: gated_add(X, None, FRAMES),
    "gated_add: gate": lambda: gated_add(X, X, None),
    "rms_norm: weight": lambda: rms_norm(X, None),
    "rms_norm_silu: x": lambda: rms_norm_silu(None, W),
    "fused_linear: x": lambda: fused_linear(None, [FRAMES[0]]),
    "fused_linear: biases": lambda: fused_linear(X, [FRAMES[0]], [None]),
    "region_saliency: pixel_grads": lambda: region_saliency(None, (1, 1, 1)),
    "intra_weights: saliency": lambda: intra_weights(None, Q),
    "intra_weights: scores": lambda: intra_weights(P, None),
    "dmd_loss: x": lambda: dmd_loss(None, P, P),
    "dmd_loss: real_cond": lambda: dmd_loss(P, P, None),
    "dmd_gradient_: buffer": lambda: dmd_gradient_(None, P, P, P),
    "apply_rotary: sin": lambda: apply_rotary(Q, COS, None),
}


@pytest.mark.parametrize("where", NO_TENSOR)
def test_no_tensor(where: str) -> None:
    with pytest.raises(TypeError, match=f"^{where}: expected a tensor, got None$"):
        NO_TENSOR[where]()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # numbers that would make every result NaN, or, in dmd_loss, 0
        (lambda: chunk_attention(Q, Q, Q, MASK, scale=math.nan), ValueError, "scale: expected a finite"),
        (lambda: cached_chunk_attention(Q, Q, Q, None, scale=math.inf), ValueError, "scale: .* got inf"),
        (lambda: rotate(eps=-1.0), ValueError, "qk_norm_rotary: eps: expected a number >= 0, got -1.0"),
        (lambda: rotate(eps=math.nan), ValueError, "qk_norm_rotary: eps: expected a number >= 0, got nan"),
        (lambda: modulated_norm(X, FRAMES, FRAMES, eps=math.inf), ValueError, "eps: .* got inf"),
        (lambda: dmd_loss(P, P, P, P, guidance=math.nan), ValueError, "guidance: expected a finite number"),
        (lambda: dmd_gradient_(P, P, P, P, scale=math.inf), ValueError, "scale: expected a finite number"),
        (lambda: RotaryGrid(8, theta=-3), ValueError, "theta: expected a finite number > 0, got -3"),
        # no numbers
        (lambda: chunk_attention(Q, Q, Q, MASK, scale="1"), TypeError, "scale: .*number, got '1'"),
        (lambda: rms_norm(X, W, eps=None), TypeError, "rms_norm: eps: expected a number >= 0, got None"),
        (lambda: dmd_loss(P, P, P, guidance="3"), TypeError, "guidance: expected a finite number, got '3'"),
        (lambda: intra_weights(P, Q[0, :2, 0, :1], temperature="1"), TypeError, "temperature: .*got '1'"),
        # no integers
        (lambda: ChunkMask(1.5, 3), TypeError, "ChunkMask: tokens_per_frame: expected an integer, got 1.5"),
        (lambda: ChunkMask(1, None), TypeError, "frames_per_chunk: expected an integer, got None"),
        (lambda: ChunkMask(1, 3, sink_frames=1.0), TypeError, "sink_frames: expected an integer, got 1.0"),
        (lambda: rotate(num_heads=2.0), TypeError, "num_heads: expected an integer, got 2.0"),
        (lambda: RotaryGrid(8.0), TypeError, "head_dim: expected an integer, got 8.0"),
        (lambda: GRID.phases(0, 1, -2, 2), ValueError, "phases: rows: expected at least 0, got -2"),
        (lambda: cache(rows=2.5), TypeError, "ChunkCache: rows: expected an integer, got 2.5"),
        (lambda: cache(window_frames=9.0), TypeError, "window_frames: expected an integer, got 9.0"),
        (lambda: cache(first_chunk_frames="1"), TypeError, "first_chunk_frames: .*integer, got '1'"),
        (lambda: cache()[0:1], TypeError, r"layer: expected an integer, got slice\(0, 1, None\)"),
        (
            lambda: region_saliency(torch.zeros(1, 5, 3, 8, 8), (2.0, 2, 2)),
            TypeError,
            "latent_shape: expected an integer, got 2.0",
        ),
        # no such thing
        (lambda: region_saliency(P, 2), TypeError, r"latent_shape: expected \(F, h, w\), got 2"),
        (lambda: chunk_attention(Q, Q, Q, None), TypeError, "mask: expected a ChunkMask or .*, got NoneType"),
        (lambda: cached_chunk_attention(Q, Q, Q, (Q, Q)), TypeError, "past: expected a Past or None, got tu"),
        (lambda: fused_linear(X, W), TypeError, "weights: expected a sequence of tensors, got Tensor"),
        (lambda: fused_linear(X, [W], None), TypeError, "biases: expected a sequence of tensors, got None"),
        (lambda: cache(rotary=64), TypeError, "rotary: expected a RotaryGrid, got 64"),
        (lambda: backends.explain("attention", Q), ValueError, "op: expected one of .*, got 'attention'"),
        # dtypes that would be rounded away, or have no arithmetic
        (lambda: cache(dtype=torch.int32), TypeError, "dtype: expected one of torch.float32, .* torch.int32"),
        (lambda: apply_rotary(Q.int(), COS, SIN), TypeError, "x: expected float32, .* got torch.int32"),
        (
            lambda: chunk_attention(*(Q.to(torch.float8_e4m3fn),) * 3, MASK),
            TypeError,
            "q: expected float32, bfloat16, float16 or float64, got torch.float8_e4m3fn",
        ),
        # shapes, some of which would broadcast
        (lambda: chunk_attention(*(Q[..., :0],) * 3, MASK), ValueError, r"q: expected \[B, T, H, D > 0\]"),
        (lambda: apply_rotary(Q, COS[:1], SIN[:1]), ValueError, r"cos: .*\(6, 4\) or \(4,\).*got \(1, 4\)"),
        (lambda: apply_rotary(Q, COS, SIN[0]), ValueError, r"sin: .*the same of both, got \(4,\)"),
        (lambda: apply_rotary(Q[..., :7], COS, SIN), ValueError, "with an even D"),
        # gradients that would be lost
        (lambda: rotate(cos=COS.clone().requires_grad_()), ValueError, r"cos: .* pass cos\.detach\(\)"),
        (
            lambda: rotate(k_out=torch.zeros(1, 6, 2, 8, requires_grad=True)),
            ValueError,
            r"k_out: expected a tensor that does not require grad",
        ),
    ],
)
def test_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_numbers_that_vary_are_checked_in_a_compiled_graph() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def step(q: Tensor, x: Tensor, past: Past, scale: float) -> Tensor:
        mask = ChunkMask(q.shape[1] // 3, 1, window_frames=2)
        seen = chunk_attention(q, q, q, mask, scale=scale) + cached_chunk_attention(
            q, q, q, past, scale=scale
        )
        normed = rms_norm_silu(modulated_norm(x, x, x, eps=scale), W, eps=scale)
        turned = qk_norm_rotary(x, x, W, W, COS, SIN, num_heads=2, eps=scale)[0]
        return seen + turned + fused_linear(normed, [W[None]], gelu=True).unsqueeze(-1)

    torch.manual_seed(0)
    q, x, past = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 16), torch.randn(1, 4, 2, 8)
    for scale in (0.25, 0.5, 0.75):
        with torch.no_grad():
            seen = step(q, x, Past(past, past, False), scale)
            expected = step._torchdynamo_orig_callable(q, x, Past(past, past, False), scale)
        torch.testing.assert_close(seen, expected)
