"""How the compiled ops meet autograd and tracing; and which of their two copies a call takes.

Ops recorded by autograd pass through Python once more, which takes longer than a small op. So every op is
there twice: `torch.ops.stream_r1` is what everybody may call, `torch.ops.stream_r1_unrecorded` the same
kernels without autograd. The public functions take the latter where nothing watches the call, that is traces,
transforms or counts it. Where a gradient is wanted, they enter autograd before they call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad, profiler
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import increment_version

from .schemas import GPU_SCHEMAS, SCHEMAS

# As csrc/common/registration.h says, too: what torch sees, and what nothing watches.
try:
    LIBRARIES = tuple(torch.library.Library(name, "DEF") for name in ("stream_r1", "stream_r1_unrecorded"))
except RuntimeError as error:
    raise ImportError(
        "stream_r1_kernels: expected one import in a process, as torch keeps the ops of the first; got a "
        "second (a module reloaded, or another copy of the package on the path): restart Python"
    ) from error
for _library in LIBRARIES:
    for _schema in (*SCHEMAS, *GPU_SCHEMAS):
        _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

RECORDED: Any = torch.ops.stream_r1
_UNRECORDED: Any = torch.ops.stream_r1_unrecorded
_DIRECT: Any = SimpleNamespace()  # the ops as `RECORDED` has them, with autograd entered from Python
_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


def kernels(*tensors: Tensor | None) -> Any:
    """The ops to call with these tensors: `RECORDED`, or what does the same sooner where nothing watches."""
    if (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return RECORDED
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _DIRECT
    return _UNRECORDED


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates what an op does with fake tensors: shapes and dtypes of its results."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for library in LIBRARIES:
            torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
        return function

    return register


def register_autograd(
    name: str,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
    check: Callable[..., None] | None = None,
) -> None:
    """The gradient of an op.

    Args:
        setup: `(ctx, inputs, result)`, saves what the backward needs.
        backward: `(ctx, *grads)`, one gradient or None an input.
        check: raises for inputs of which one requires grad in vain.
    """
    op, unrecorded = (getattr(ops, name).default for ops in (RECORDED, _UNRECORDED))

    def forward(ctx: Any, *inputs: Any) -> Any:
        result = unrecorded(*inputs)
        setup(ctx, inputs, result)
        return result

    def forward_below(ctx: Any, *inputs: Any) -> Any:
        *given, keyset = inputs
        with _as_outside():
            result = _below_autograd(op, keyset, given)
        setup(ctx, tuple(given), result)
        return result

    def backward_below(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *backward(ctx, *grads), None

    direct = _function(name, forward, backward, torch.autograd.Function)
    recorded = _function(name, forward_below, backward_below, _SingleLevelFunction)

    def enter(*inputs: Any) -> Any:
        if check is not None:
            check(*inputs)
        return direct.apply(*inputs)

    setattr(_DIRECT, name, SimpleNamespace(default=direct.apply if check is None else enter))

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if not _wants_grad(name, inputs):
            return _below_autograd(op, keyset, inputs)
        if check is not None:
            check(*inputs)
        return _record(recorded, *inputs, keyset)

    LIBRARIES[0].impl(name, kernel, "Autograd", with_keyset=True)


def _function(name: str, forward: Callable[..., Any], backward: Callable[..., Any], base: type) -> Any:
    class_name = "".join(word.capitalize() for word in name.split("_"))  # as the results' grad_fn has it
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(class_name, (base,), members)


def _record(function: type[_SingleLevelFunction], *inputs: Any) -> Any:
    """`function.apply` within an autograd kernel, which within torch.func's transforms is one level's own:
    `torch.autograd.Function` would hand the call to all levels, or refuse it."""
    recorded: Any = function
    if torch._C._functorch.maybe_current_level() is None:
        return recorded.apply(*inputs)
    with enable_single_level_autograd_function():
        return recorded.apply(*inputs)


@contextmanager
def _as_outside() -> Iterator[None]:
    """Within a forward, where autograd is off: torch.func's outer levels record what its inner ones do."""
    if torch._C._functorch.maybe_current_level() is None:
        yield
    else:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield


def register_no_derivative(*names: str) -> None:
    """Ops without a derivative. Their results require grad where an input does, and say so in a backward."""
    for name in names:
        setattr(_DIRECT, name, getattr(RECORDED, name))
        LIBRARIES[0].impl(name, _no_derivative(name), "Autograd", with_keyset=True)


def _no_derivative(name: str) -> Callable[..., Any]:
    op = getattr(RECORDED, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if not _wants_grad(name, inputs):
            return _below_autograd(op, keyset, inputs)
        return _record(_NoDerivative, name, lambda: _below_autograd(op, keyset, inputs), *_tensors(inputs))

    return kernel


class _NoDerivative(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Any], *tensors: Tensor) -> Any:
        ctx.name = name
        with _as_outside():
            return run()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        first = ctx.name.removesuffix("_backward")
        which = "derivative" if first == ctx.name else "second derivative"
        raise NotImplementedError(
            f"stream_r1::{first}: its {which} is not implemented; backend='reference' has it"
        )


def register_in_place(name: str, written: Iterable[int], check: Callable[..., None]) -> None:
    """An op that writes to some of its inputs and is a constant for autograd.

    Args:
        written: places of the inputs that it writes to.
        check: raises for inputs of which one requires grad in vain.
    """
    op, places = getattr(RECORDED, name).default, tuple(written)

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if _wants_grad(name, inputs):
            check(*inputs)
        result = _below_autograd(op, keyset, inputs)
        increment_version([inputs[i] for i in places if inputs[i] is not None])
        return result

    setattr(_DIRECT, name, getattr(RECORDED, name))
    LIBRARIES[0].impl(name, kernel, "Autograd", with_keyset=True)


def _below_autograd(op: Any, keyset: torch._C.DispatchKeySet, inputs: Iterable[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _AFTER_AUTOGRAD, *inputs)


def _tensors(inputs: Iterable[Any]) -> Iterator[Tensor]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _wants_grad(name: str, inputs: tuple[Any, ...]) -> bool:
    """Whether autograd has to record the call. A tangent, which would be lost, is refused."""
    if forward_ad._current_level >= 0:
        for x in _tensors(inputs):
            if forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"stream_r1: {name} has no forward-mode derivative (torch.func.jvp); expected tensors "
                    f"without a tangent, or backend='reference', got one of shape {list(x.shape)} with one"
                )
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(inputs))
