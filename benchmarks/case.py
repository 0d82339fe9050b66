"""What every benchmark is made of: a case with ours and its baselines, checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Run = Callable[[], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """One op at one size. `bytes` are those it must move, `flops` those it must do; one of them is its limit.

    `build()` makes the inputs and returns the implementations by name; the first is ours, the second is what
    ours is checked against. `tolerance` is relative to the largest expected value.
    """

    op: str
    size: str
    dtype: str
    shape: tuple[int, ...]
    build: Callable[[], dict[str, Run]]
    bytes: int = 0
    flops: int = 0
    tolerance: float = 1e-4
    baselines: tuple[str, ...] = ("eager", "compiled")

    @property
    def name(self) -> str:
        return f"{self.op} {self.size} {self.dtype}"

    def params(self) -> list[object]:
        return [pytest.param(self, name, id=f"{self.name}-{name}") for name in ("ours", *self.baselines)]


def parametrize(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """One test for each implementation of each case, those of a case one after the other."""
    return pytest.mark.parametrize(
        ("case", "implementation"), [param for case in cases for param in case.params()]
    )


def check_and_time(benchmark: Callable, case: Case, implementation: str) -> None:
    """Refuses to time an implementation that disagrees with the case's plain one."""
    torch._dynamo.reset()  # past a few specialisations of one function dynamo runs it eagerly, without a word
    torch.manual_seed(0)
    implementations = case.build()
    run = implementations[implementation]
    plain = next(implementations[name] for name in case.baselines)
    for got, expected in zip(*(_as_tuple(result()) for result in (run, plain)), strict=True):
        largest = expected.double().abs().max().item() if expected.numel() else 0.0
        error = (got.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        assert error <= case.tolerance * largest, (
            f"{case.name}: {implementation} is wrong by {error}: not timed"
        )
    benchmark.group = case.name  # type: ignore[attr-defined]
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        dtype=case.dtype,
        shape=list(case.shape),
        bytes=case.bytes,
        flops=case.flops,
    )
    benchmark(run)


def _as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def with_grads(call: Callable[[], Tensor | tuple[Tensor, ...]], leaves: Sequence[Tensor]) -> Run:
    """Forward and backward of `call`, always with the same incoming gradients; returns outputs and grads."""
    generator = torch.Generator().manual_seed(0)  # so that every implementation gets the same ones
    incoming = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in _as_tuple(call())]

    def run() -> tuple[Tensor, ...]:
        outs = _as_tuple(call())
        return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, incoming)

    return run


def compiled(function: Callable, *arguments: object, **options: object) -> Callable:
    """torch.compile of `function` alone, without what other cases have made it specialise on."""
    return partial(torch.compile(function, dynamic=False), *arguments, **options)
