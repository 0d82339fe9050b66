"""The ops where a user calls them: under torch's transforms, in threads, in workers' processes, in copies."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.autograd import forward_ad
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.utils.data import DataLoader

from stream_r1_kernels import (
    ChunkCache,
    ChunkMask,
    Past,
    RotaryGrid,
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

MASK = ChunkMask(1, 3, window_frames=4, sink_frames=1)
PHASES = RotaryGrid(4).phases(0, 1, 2, 3)
torch.manual_seed(0)
HEADS, TOKENS, FRAMES = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 8), torch.randn(2, 3, 8)
PAST = Past(HEADS + 1, HEADS - 1, False)
LATENTS = torch.randn(4, 2, 3, 4, 5, 6)
WEIGHT = torch.randn(8)

# A call of each op that trains, and what it can be differentiated by.
TRAINED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "chunk_attention": (
        lambda q, k, v: chunk_attention(q, k, v, MASK),
        (HEADS, HEADS.flip(1), HEADS.flip(2)),
    ),
    "cached_chunk_attention": (lambda q, k: cached_chunk_attention(q, k, k, PAST), (HEADS, HEADS.flip(1))),
    "qk_norm_rotary": (
        lambda q, k, w: torch.cat(qk_norm_rotary(q, k, w, w, *PHASES, num_heads=2)),
        (TOKENS, TOKENS.flip(1), WEIGHT),
    ),
    "modulated_norm": (modulated_norm, (TOKENS, FRAMES, FRAMES.flip(1))),
    "gated_add": (gated_add, (TOKENS, TOKENS.flip(1), FRAMES)),
    "rms_norm_silu": (rms_norm_silu, (TOKENS, WEIGHT)),
    "dmd_loss": (lambda x: dmd_loss(x, *LATENTS[1:]), (LATENTS[0],)),
}
CALLS = TRAINED | {
    "rms_norm": (rms_norm, (TOKENS, WEIGHT)),
    "fused_linear": (lambda x, w: fused_linear(x, [w]), (TOKENS, TOKENS[0])),
}


@pytest.mark.parametrize("name", TRAINED)
def test_vmap_is_a_loop(name: str) -> None:
    call, inputs = TRAINED[name]
    stacked = [torch.stack([x, x / 2, x + 1]) for x in inputs]
    looped = torch.stack([call(*(x[i] for x in stacked)) for i in range(3)])
    assert torch.equal(torch.vmap(call)(*stacked), looped)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_rather_than_zero(name: str) -> None:
    call, inputs = CALLS[name]
    for place in range(len(inputs)):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"(?i)forward"):
            call(
                *(
                    forward_ad.make_dual(x, torch.ones_like(x)) if i == place else x
                    for i, x in enumerate(inputs)
                )
            )
    with pytest.raises(NotImplementedError, match=r"(?i)forward"):
        torch.func.jvp(call, inputs, tuple(torch.ones_like(x) for x in inputs))


@pytest.mark.parametrize("name", TRAINED)
def test_functional_gradients_are_autograds(name: str) -> None:
    call, inputs = TRAINED[name]
    places = tuple(range(len(inputs)))

    def loss(*x: Tensor) -> Tensor:
        return call(*x).square().sum()

    def by_autograd(*x: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in x]
        return torch.autograd.grad(loss(*leaves), leaves)

    samples = [inputs, tuple(x / 2 for x in inputs)]
    stacked = [torch.stack(pair) for pair in zip(*samples, strict=True)]
    of_each = torch.vmap(torch.func.grad(loss, places))(*stacked)
    for i, sample in enumerate(samples):
        for a, b, c in zip(
            torch.func.grad(loss, places)(*sample), of_each, by_autograd(*sample), strict=True
        ):
            assert torch.equal(a, c)
            torch.testing.assert_close(b[i], c)
    jacobian = torch.autograd.functional.jacobian(call, inputs)
    for a, b in zip(torch.func.jacrev(call, places)(*inputs), jacobian, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev])
def test_functional_second_derivatives_are_right_or_refused(
    name: str, transform: Callable[..., Callable[..., Tensor]]
) -> None:
    call, inputs = TRAINED[name]

    def loss(x: Tensor) -> Tensor:
        return call(x, *inputs[1:]).square().sum()

    try:
        hessian = transform(torch.func.jacrev(loss))(inputs[0])
    except NotImplementedError as error:
        assert name in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, inputs[0]))


def test_second_derivatives_of_the_rotation_are_refused() -> None:
    q = TOKENS.clone().requires_grad_()
    out = qk_norm_rotary(q, q, WEIGHT, WEIGHT, *PHASES, num_heads=2, backend="cpu")[0]
    (grad,) = torch.autograd.grad(out.pow(3).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grad.sum().backward()


def every_result(seed: int, *, gradients: bool = True) -> list[Tensor]:
    """Of every op, forward and backward, at sizes that are shared by threads."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).bfloat16()

    q, k, v = (randn(1, 210, 4, 64).requires_grad_() for _ in range(3))
    x, branch, w = (randn(2, 210, 256).requires_grad_(), randn(2, 210, 256), randn(256))
    modulation, latents = randn(2, 30, 256), randn(4, 2, 6, 16, 30, 52)
    attended = chunk_attention(q, k, v, ChunkMask(7, 3, window_frames=6, sink_frames=3))
    seen = cached_chunk_attention(q, k, v, Past(k[:, :100].detach(), v[:, :100].detach(), False))
    rotated = qk_norm_rotary(x, branch, w, w, *RotaryGrid(64).phases(0, 30, 1, 7), num_heads=4)
    outs = [attended, seen, *rotated, rms_norm_silu(x, w), dmd_loss(latents[0], *latents[1:])]
    outs += [modulated_norm(x, modulation, modulation), gated_add(x, branch, modulation)]
    with torch.no_grad():
        outs += [fused_linear(x, [branch[0, :100]], gelu=True), rms_norm(x, w)]
    outs += [region_saliency(randn(3, 2, 13, 3, 32, 32), (4, 8, 8))]
    outs += [intra_weights(randn(3, 2, 4, 8, 8).abs(), randn(2, 3))]
    results = [out.detach() for out in outs]
    if gradients:
        loss = sum(out.float().square().sum() for out in outs if out.requires_grad)
        results += torch.autograd.grad(loss, (q, k, v, x))
    return results


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_threads_do_not_mix() -> None:
    expected = [every_result(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        wrong.extend(seed for _ in range(3) if not all_equal(every_result(seed), expected[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Results(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, seed: int) -> list[Tensor]:
        try:
            return every_result(seed)
        except RuntimeError as error:
            if "Autograd-and-Fork" not in str(error):
                raise
            return every_result(
                seed, gradients=False
            )  # CUDA builds of torch have no gradients in forks, of any op


def test_workers_that_are_forked_after_the_ops_have_run() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have
    expected = [every_result(seed) for seed in range(2)]
    torch.set_num_threads(max(2, threads))
    every_result(0)  # the parent has a pool of threads, which a fork loses
    try:
        loader = DataLoader(
            Results(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
        )
        for got, there in zip(loader, expected, strict=True):
            assert all_equal(got, there[: len(got)])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_is_another_stream(copied: Callable[[ChunkCache], ChunkCache]) -> None:
    cache = ChunkCache(
        1, 1, 2, RotaryGrid(8), 2, 3, 3, window_frames=9, sink_frames=3, positions="window", ema=0.9
    )
    for _ in range(4):
        cache.begin_chunk()
        for part in cache[0].slot():
            part.normal_()
        cache.commit()
    cache.begin_chunk()
    cache[0].slot()
    before, other = cache.storage.clone(), copied(cache)
    for stream in (other, cache):
        for part in stream[0].slot():
            part.fill_(7.0)
        if stream is other:
            assert torch.equal(cache.storage, before)
    assert torch.equal(other.storage, cache.storage)
    for stream in (other, cache):
        stream.commit()
        stream.begin_chunk()
    assert torch.equal(other.storage, cache.storage)  # sinks averaged and moved alike


def test_outputs_that_share_elements_are_refused() -> None:
    slot = torch.zeros(1, 6, 2, 4).expand(2, 6, 2, 4)
    with pytest.raises(ValueError, match=r"k_out: expected elements of their own, got an expanded tensor"):
        qk_norm_rotary(TOKENS, TOKENS, WEIGHT, WEIGHT, *PHASES, num_heads=2, k_out=slot)
    buffer = torch.zeros(1, *LATENTS.shape[2:]).expand_as(LATENTS[0])
    with pytest.raises(ValueError, match=r"buffer: expected elements of their own, got an expanded tensor"):
        dmd_gradient_(buffer, *LATENTS)


def test_autograd_notices_keys_that_are_overwritten() -> None:
    slot = torch.zeros(2, 6, 2, 4)
    factor = torch.ones(2, 6, 2, 4, requires_grad=True)
    product = (slot * factor).sum()  # keeps the slot for its backward
    qk_norm_rotary(TOKENS, TOKENS, WEIGHT, WEIGHT, *PHASES, num_heads=2, k_out=slot)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


OPS = torch.ops.stream_r1
BETWEEN = torch.zeros(2, 2, 6)  # [B, H, T]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPS.chunk_attention_backward(
                HEADS[:, :5], HEADS, HEADS, HEADS, HEADS, BETWEEN, ChunkMask(1, 3).table(6), 1.0
            ),
            "grad_out: expected shape",
        ),
        (
            lambda: OPS.cached_chunk_attention_backward(
                HEADS, BETWEEN[:1], HEADS, HEADS, HEADS, None, None, HEADS, BETWEEN, 1.0
            ),
            "grad_lse: expected shape",
        ),
        (
            lambda: OPS.cached_chunk_attention_backward(
                HEADS, None, HEADS, HEADS, HEADS, None, None, HEADS, BETWEEN[..., :1], 1.0
            ),
            r"lse: expected shape \[2, 2, 6\], got \[2, 2, 1\]",
        ),
        (
            lambda: OPS.modulated_norm_backward(TOKENS, TOKENS, FRAMES, BETWEEN[:, 0], BETWEEN[:1, 0]),
            r"rstd: expected shape \[2, 6\], got \[1, 6\]",
        ),
        (
            lambda: OPS.qk_norm_rotary_backward(
                HEADS[..., :4], HEADS[:1, ..., :4], TOKENS, TOKENS, WEIGHT, WEIGHT, *PHASES, 2, 1e-6
            ),
            r"grad_k: expected shape \[2, 6, 2, 4\], got \[1, 6, 2, 4\]",
        ),
        (
            lambda: OPS.dmd_loss_backward(torch.ones(()), LATENTS[0], torch.ones(1)),
            r"factor: expected shape \[2\], got \[1\]",
        ),
    ],
)
def test_backward_ops_refuse_what_would_read_past_an_end(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sharded_tensors_are_refused_by_name(tmp_path: Path) -> None:
    """No op has a sharding strategy; torch says so of DTensors, whichever of the inputs is one. 2.10, which
    looks for a strategy with fake tensors, speaks of these or of a mesh.
    """
    refusal = r"stream_r1.*(DTensor|sharding)|aten.*DTensor|(FakeTensors|device mesh).*stream_r1"
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        for call, inputs in CALLS.values():
            for place, grad in itertools.product(range(len(inputs)), (False, True)):
                sharded = distribute_tensor(inputs[place], mesh, [Shard(0)]).requires_grad_(grad)
                some = [sharded if i == place else x for i, x in enumerate(inputs)]
                every = [distribute_tensor(x, mesh, [Shard(0)]) for x in inputs]
                for mixed in (some, every):
                    with pytest.raises((RuntimeError, ValueError), match=refusal):
                        call(*mixed)
    finally:
        distributed.destroy_process_group()


def test_a_second_import_is_refused_in_a_sentence() -> None:
    """torch keeps the ops of the first; what was imported continues working."""
    code = (
        "import importlib, sys, torch, stream_r1_kernels as first\n"
        "importlib.reload(first)\n"
        "for name in [name for name in sys.modules if name.startswith('stream_r1_kernels')]:\n"
        "    del sys.modules[name]\n"
        "try:\n"
        "    import stream_r1_kernels\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "print(first.gated_add(*torch.ones(3, 1, 1, 2)).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "expected one import in a process" in done.stdout
    assert done.stdout.endswith("[[[2.0, 2.0]]]\n")
