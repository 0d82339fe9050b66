"""Which backend a call takes, as a function of the call and the build alone."""

from typing import Any

import pytest
import torch

from stream_r1_kernels import dispatch

CUDA = frozenset(dispatch.OPS)
EVERYTHING = dispatch.Build(
    {"cpu": CUDA, "cuda": CUDA, "triton": frozenset(dispatch.ATTENTION_OPS)}, ["80", "90a"]
)
HALF, FULL, DOUBLE = torch.bfloat16, torch.float32, torch.float64
A100, RTX4090, H100, B200 = (8, 0), (8, 9), (9, 0), (10, 0)


def gpu(op: str, capability: tuple[int, int] | None, dtype: torch.dtype = HALF, **rest) -> dispatch.Call:
    head_dim = rest.pop("head_dim", 128)
    is_attention = op in dispatch.ATTENTION_OPS
    return dispatch.Call(op, "cuda", dtype, head_dim if is_attention else None, capability, **rest)


CACHED, CHUNKED = dispatch.ATTENTION_OPS


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        # sampling: keys in one piece
        (gpu(CACHED, A100), "cuda"),
        (gpu(CACHED, RTX4090), "cuda"),
        (gpu(CACHED, H100), "sdpa"),
        (gpu(CACHED, B200), "sdpa"),
        (gpu(CACHED, None), "cuda"),  # a fake tensor's GPU
        # in two pieces, or not contiguous, SDPA would have to copy
        (gpu(CACHED, A100, pieces=2), "cuda"),
        (gpu(CACHED, H100, pieces=2), "triton"),
        (gpu(CACHED, H100, dense=False), "triton"),
        (gpu(CHUNKED, A100), "cuda"),
        (gpu(CHUNKED, H100), "triton"),
        # training
        (gpu(CACHED, A100, needs_grad=True, pieces=2), "triton"),
        (gpu(CACHED, H100, needs_grad=True), "triton"),
        (gpu(CHUNKED, H100, needs_grad=True), "triton"),
        # what no kernel of ours takes
        (gpu(CACHED, A100, FULL), "sdpa"),
        (gpu(CHUNKED, H100, FULL, needs_grad=True), "sdpa"),
        (gpu(CACHED, A100, head_dim=256), "sdpa"),
        (gpu(CACHED, A100, DOUBLE), "reference"),
        (gpu(CHUNKED, (7, 5), torch.float16), "sdpa"),
        # the other ops
        (gpu("dmd_loss", A100, FULL), "cuda"),
        (gpu("gated_add", H100, needs_grad=True), "cuda"),
        (gpu("gated_add", B200), "reference"),  # not among the compiled architectures
        (gpu("gated_add", A100, DOUBLE), "reference"),
        # no GPU
        (dispatch.Call(CACHED, "cpu", FULL, 64), "cpu"),
        (dispatch.Call(CACHED, "cpu", HALF, 512, needs_grad=True), "cpu"),
        (dispatch.Call(CACHED, "cpu", DOUBLE, 64), "reference"),
        (dispatch.Call(CACHED, "meta", FULL, 64), "reference"),
        (dispatch.Call("gated_add", "cpu", FULL), "cpu"),
        (dispatch.Call("gated_add", "mps", FULL), "reference"),
    ],
)
def test_what_auto_takes(call: dispatch.Call, expected: str) -> None:
    assert dispatch.choose(call, EVERYTHING).backend == expected


@pytest.mark.parametrize("op", dispatch.ATTENTION_OPS)
def test_without_triton_training_takes_torch_whose_backward_is_a_kernel(op: str) -> None:
    without = dispatch.Build(EVERYTHING.ops, ["80"], {"triton": "not installed"})
    for capability in (A100, H100, B200):
        choice = dispatch.choose(gpu(op, capability, needs_grad=True), without)
        assert str(choice).splitlines() == [
            "sdpa: its backward is a kernel, ours on GPUs are Triton's alone",
            "  not triton: can't be used: not installed",
        ]


def test_hopper_trains_on_cudnn_from_the_version_on_that_leads() -> None:
    def taken(cudnn: int | None, **rest: Any) -> str:
        build = dispatch.Build(EVERYTHING.ops, EVERYTHING.archs, {}, cudnn)
        return dispatch.choose(gpu(rest.pop("op", CACHED), rest.pop("on", H100), **rest), build).backend

    assert taken(91501, needs_grad=True) == taken(91900, needs_grad=True) == "sdpa"
    assert taken(91500, needs_grad=True) == taken(None, needs_grad=True) == "triton"
    # what is masked, in two pieces, or on another GPU is not its
    for rest in ({"op": CHUNKED}, {"pieces": 2}, {"dense": False}, {"on": A100}, {"on": B200}):
        assert taken(91501, needs_grad=True, **rest) == "triton"


def test_a_machine_without_the_extension_attends_with_torch() -> None:
    bare = dispatch.Build({}, (), {"cpu": "not built", "cuda": "not built", "triton": "not installed"})
    assert dispatch.choose(dispatch.Call(CACHED, "cpu", FULL, 64), bare).backend == "sdpa"
    assert dispatch.choose(dispatch.Call("gated_add", "cpu", FULL), bare).backend == "reference"


def test_the_prediction_is_called_one() -> None:
    assert "a prediction, not a measurement" in dispatch.choose(gpu(CACHED, H100), EVERYTHING).why


@pytest.mark.parametrize("capability", [A100, RTX4090, H100, B200, (7, 5), None])
@pytest.mark.parametrize("dtype", [HALF, FULL, DOUBLE])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_auto_takes_nothing_that_would_refuse(op: str, dtype: torch.dtype, capability: tuple | None) -> None:
    for needs_grad in (False, True):
        for pieces in (1, 2):
            for width in (64, 256):
                call = gpu(op, capability, dtype, needs_grad=needs_grad, pieces=pieces, head_dim=width)
                choice = dispatch.choose(call, EVERYTHING)
                assert dispatch.refusal(choice.backend, call, EVERYTHING) is None
                for backend in choice.refused:
                    assert dispatch.refusal(backend, call, EVERYTHING) is not None


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *(((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 1), True), ((13, 0), True)),
        *(((7, 5), False), ((10, 3), False), ((11, 0), False)),
    ],
)
def test_which_gpus_the_default_architectures_cover(capability: tuple[int, int], runs: bool) -> None:
    assert dispatch.covers(["80", "90a", "100a", "120"], capability) == runs
