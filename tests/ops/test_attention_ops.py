"""The attention ops against a token-by-token formulation in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_r1_kernels import ChunkMask, Past, cached_chunk_attention, chunk_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "sdpa", "reference")
quick = settings(max_examples=25, deadline=None, derandomize=True)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sees: Callable[[int], list[int]]
) -> tuple[Tensor, Tensor]:
    """One query at a time in float64; sees(query) lists the keys. Differentiable."""
    rows, sums = [], []
    for i in range(q.shape[1]):
        keys = sees(i)
        scores = (q[:, i, None] * k[:, keys]).sum(-1) * scale  # [B, n, H]
        rows.append((scores.softmax(1)[..., None] * v[:, keys]).sum(1))
        sums.append(scores.logsumexp(1))
    return torch.stack(rows, 1), torch.stack(sums, -1)


def frames_seen(mask: ChunkMask, frame: int, frames: int) -> list[int]:
    """The rule of the mask, one frame at a time; frames count on from the clean half into the noisy one."""
    first = mask.first_chunk_frames or mask.frames_per_chunk

    def chunk(f: int) -> int:
        return 0 if f < first else 1 + (f - first) // mask.frames_per_chunk

    noisy, own = frame >= frames, frame % frames
    end = max(f for f in range(frames) if chunk(f) == chunk(own)) + 1
    window = mask.window_frames or frames
    seen = [f for f in range(end) if f >= end - window or f < mask.sink_frames]
    if not noisy:
        return seen
    return [f for f in seen if chunk(f) < chunk(own)] + [
        frames + f for f in range(frames) if chunk(f) == chunk(own)
    ]


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype, cancelled: float = 0.0) -> None:
    """`cancelled`: size of the terms that a sum in float32 may cancel."""
    unit = torch.finfo(dtype).eps
    largest = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    atol = 6 * unit * largest + 2 * torch.finfo(torch.float32).eps * cancelled
    torch.testing.assert_close(ours.double(), exact, rtol=2 * unit, atol=atol)


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] as a slice of a fused projection of three."""
    b, t, h, d = shape
    return torch.randn(b, t, 3, h, d).to(dtype)[:, :, 1]


masks = st.builds(
    lambda tokens, chunk, extra, sink, first, teacher: ChunkMask(
        tokens,
        chunk,
        None if extra is None else max(chunk, first or 0) + extra,
        sink,
        first,
        teacher,
    ),
    st.integers(1, 7),
    st.integers(1, 3),
    st.none() | st.integers(0, 2),
    st.integers(0, 2),
    st.none() | st.integers(1, 2),
    st.booleans(),
)


@quick
@given(mask=masks, frames=st.integers(1, 7))
def test_mask_follows_its_rule(mask: ChunkMask, frames: int) -> None:
    per = mask.tokens_per_frame
    visible = mask.visible(frames * per * (2 if mask.teacher_forcing else 1))
    for query, seen in enumerate(visible):
        expected = [f * per + j for f in sorted(frames_seen(mask, query // per, frames)) for j in range(per)]
        assert seen.nonzero().flatten().tolist() == expected


@quick
@given(
    mask=masks,
    frames=st.integers(1, 6),
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    width=st.sampled_from([2, 5, 16, 33]),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
)
def test_chunk_attention_forward_and_backward(
    mask: ChunkMask, frames: int, batch: int, heads: int, width: int, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    tokens = frames * mask.tokens_per_frame * (2 if mask.teacher_forcing else 1)
    q, k, v = (strided((batch, tokens, heads, width), dtype).requires_grad_() for _ in range(3))
    grad = strided((batch, tokens, heads, width), dtype)
    out = chunk_attention(q, k, v, mask, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), grad)

    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    per = mask.tokens_per_frame

    def sees(i: int) -> list[int]:
        return [f * per + j for f in frames_seen(mask, i // per, frames) for j in range(per)]

    exact, _ = exact_attention(*exact_inputs, width**-0.5, sees)
    assert out.dtype == dtype
    assert_close(out, exact, dtype)
    for ours, theirs in zip(grads, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True):
        assert_close(ours, theirs, dtype)


@quick
@given(
    sizes=st.tuples(
        st.integers(0, 2), st.integers(0, 150), st.integers(1, 3), st.sampled_from([1, 7, 16, 40, 64])
    ),
    fresh=st.integers(0, 60),
    past=st.none() | st.integers(0, 230),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
)
def test_cached_chunk_attention_forward_and_backward(
    sizes: tuple[int, int, int, int], fresh: int, past: int | None, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    batch, _, heads, width = sizes
    fresh += 1
    q = strided(sizes, dtype).requires_grad_()
    k, v = (strided((batch, fresh, heads, width), dtype).requires_grad_() for _ in range(2))
    before = (
        None
        if past is None
        else Past(*(strided((batch, past, heads, width), dtype) for _ in range(2)), False)
    )
    out, lse = cached_chunk_attention(q, k, v, before, scale=0.3, return_lse=True, backend=backend)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))

    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = exact_inputs[1:]
    if before is not None:
        keys, values = torch.cat([before.k.double(), keys], 1), torch.cat([before.v.double(), values], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", exact_inputs[0], keys) * 0.3
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    exact_grads = torch.autograd.grad(
        (exact, scores.logsumexp(-1)), exact_inputs, (grad_out.double(), grad_lse.double())
    )
    assert_close(out, exact, dtype)
    assert_close(lse, scores.logsumexp(-1), torch.float32)
    # grad_out v^T and its mean cancel, exactly where there is one key; then they are multiplied by q or k
    parts = torch.einsum("bqhd,bkhd->bhqk", grad_out.double().abs(), values.detach().abs())
    cancelled = 0.3 * 4 * parts.max().item() if parts.numel() else 0.0
    for ours, theirs in zip(grads, exact_grads, strict=True):
        assert_close(ours, theirs, dtype, cancelled)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dense_pass_over_the_buffer_equals_past_and_fresh(dtype: torch.dtype) -> None:
    buffer = torch.randn(2, 2, 300, 4, 64).to(dtype)
    q = torch.randn(2, 84, 4, 64).to(dtype)
    k, v = buffer[:, :, :252]
    slot = slice(168, 252)
    whole = cached_chunk_attention(q, None, None, Past(k, v, True), return_lse=True)
    parts = cached_chunk_attention(
        q, k[:, slot], v[:, slot], Past(k[:, :168], v[:, :168], False), return_lse=True
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_large_scores_do_not_overflow_and_no_key_gives_zeros() -> None:
    q = torch.full((1, 3, 1, 8), 60.0)
    k = torch.cat([q, -q], 1)
    v = torch.arange(6.0)[None, :, None, None].expand(1, 6, 1, 8)
    torch.testing.assert_close(cached_chunk_attention(q, k, v, None), torch.ones(1, 3, 1, 8))
    nothing = torch.zeros(1, 0, 1, 8)
    q.requires_grad_()
    for backend in BACKENDS:
        out, lse = cached_chunk_attention(q, nothing, nothing, None, return_lse=True, backend=backend)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 40, 2, 16) for _ in range(3))  # q > 0: the scores of an infinite key are inf
    k[0, 7, 1, 3] = bad
    for out in (
        cached_chunk_attention(q, k, v, None, backend=backend),
        chunk_attention(q, k, v, ChunkMask(8, 5), backend=backend),
    ):
        assert out[:, :, 1].isnan().all()
        assert not out[:, :, 0].isnan().any()


def test_gradients_that_would_be_lost_are_refused() -> None:
    q, k, v = (torch.randn(1, 4, 1, 8) for _ in range(3))
    with pytest.raises(ValueError, match="holds_fresh: expected False"):
        cached_chunk_attention(q.clone().requires_grad_(), None, None, Past(k, v, True))
    with pytest.raises(ValueError, match="past: expected tensors without requires_grad"):
        cached_chunk_attention(q, k, v, Past(k.clone().requires_grad_(), v, False))
    with torch.no_grad():
        cached_chunk_attention(q.clone().requires_grad_(), None, None, Past(k, v, True))
    op = torch.ops.stream_r1.cached_chunk_attention
    with pytest.raises(ValueError, match="the past gets no"):
        op(q, k, v, k.clone().requires_grad_(), v, 1.0)
    with pytest.raises(ValueError, match="where q requires grad"):
        op(q.clone().requires_grad_(), None, None, k, v, 1.0)


def test_arguments_are_checked() -> None:
    q = torch.randn(2, 6, 2, 8)
    with pytest.raises(
        ValueError, match=r"chunk_attention: k: expected \[2, T, 2, 8\] as q, got \(2, 6, 2, 4\)"
    ):
        chunk_attention(q, q[..., :4], q, ChunkMask(1, 2))
    with pytest.raises(TypeError, match=r"v: expected torch.float32 as q, got torch.float16"):
        chunk_attention(q, q, q.half(), ChunkMask(1, 2))
    with pytest.raises(ValueError, match="whole frames, a multiple of 4 tokens, got 6"):
        chunk_attention(q, q, q, ChunkMask(4, 2))
    with pytest.raises(ValueError, match="backend: expected one of auto, cpu, cuda"):
        chunk_attention(q, q, q, ChunkMask(1, 2), backend="gpu")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' (can't be used|needs cuda tensors)"):
        chunk_attention(q, q, q, ChunkMask(1, 2), backend="cuda")
    with pytest.raises(TypeError, match="backend 'cpu' expects dtype"):
        chunk_attention(*(q.double(),) * 3, ChunkMask(1, 2), backend="cpu")
    with pytest.raises(ValueError, match="both or neither, got k alone"):
        cached_chunk_attention(q, q, None, None)
    with pytest.raises(ValueError, match=r"past.v: expected 6 tokens as past.k, got 5"):
        cached_chunk_attention(q, q, q, Past(q, q[:, :5], False))
    with pytest.raises(ValueError, match="window_frames: expected at least a chunk"):
        ChunkMask(1, 3, window_frames=2)


def opcheck_inputs() -> list[tuple[str, tuple]]:
    def fresh(tokens: int, grad: bool) -> Tensor:
        return torch.randn(2, tokens, 2, 8, requires_grad=grad)

    return [
        (
            "cached_chunk_attention",
            (fresh(6, True), fresh(6, True), fresh(6, True), fresh(9, False), fresh(9, False), 0.5),
        ),
        ("cached_chunk_attention", (fresh(6, True), fresh(6, True), fresh(6, True), None, None, 0.5)),
        ("cached_chunk_attention", (fresh(6, False), None, None, fresh(9, False), fresh(9, False), 0.5)),
        *(
            ("chunk_attention", (fresh(12, True), fresh(12, True), fresh(12, True), mask.table(12), 0.5))
            for mask in (ChunkMask(1, 2, 4, 1, 1, True), ChunkMask(2, 2))
        ),
    ]


@pytest.mark.parametrize("case", range(5))
def test_opcheck(case: int) -> None:
    name, arguments = opcheck_inputs()[case]
    torch.library.opcheck(getattr(torch.ops.stream_r1, name).default, arguments)


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_any_scale(scale: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 16) for _ in range(3))
    exact = exact_attention(q.double(), k.double(), v.double(), scale, lambda _: list(range(30)))
    for backend in BACKENDS:
        ours = cached_chunk_attention(q, k, v, None, scale=scale, return_lse=True, backend=backend)
        for a, b in zip(ours, exact, strict=True):
            assert_close(a, b, torch.float32)


def test_sdpa_compiles_in_one_graph() -> None:
    def step(q: Tensor, past: Tensor) -> Tensor:
        seen = cached_chunk_attention(q, q, q, Past(past, past, False), backend="sdpa")
        return chunk_attention(seen, q, q, ChunkMask(3, 2, teacher_forcing=True), backend="sdpa")

    q, past = torch.randn(1, 24, 2, 8), torch.randn(1, 7, 2, 8)
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(q, past), step(q, past))


def test_compiles_in_one_graph_and_once_along_a_stream() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cached_chunk_attention(q * 2, None, None, Past(k, v, True))

    buffer = torch.randn(2, 1, 100, 2, 16)
    q = torch.randn(1, 5, 2, 16)
    for length in (10, 15, 40, 100):
        with torch._dynamo.config.patch(error_on_recompile=length > 10):
            out = step(q, buffer[0][:, :length], buffer[1][:, :length])
        plain = cached_chunk_attention(q * 2, buffer[0][:, :length], buffer[1][:, :length], None)
        torch.testing.assert_close(out, plain)


def test_compiled_training_step_has_the_same_gradients() -> None:
    mask = ChunkMask(3, 2, teacher_forcing=True)

    def step(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
        out = chunk_attention(q, k, v, mask).square().sum()
        return out + cached_chunk_attention(q, k, v, Past(past, past, False)).square().sum()

    q, k, v = (torch.randn(1, 24, 2, 8, requires_grad=True) for _ in range(3))
    past = torch.randn(1, 7, 2, 8)
    plain = torch.autograd.grad(step(q, k, v, past), (q, k, v))
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(q, k, v, past), (q, k, v)), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("restored_threads")
def test_same_result_whatever_the_number_of_threads() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, 3, 32, requires_grad=True) for _ in range(3))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        out = cached_chunk_attention(q, k, v, None)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
