"""Counts what code does: the ops that it calls, their flops and the bytes that they move.

`count` runs a function on fake tensors: nothing is computed, and a model of any size takes as long as its
Python. What is counted is the very code that would run, op by op; an op of this project is one op, as its
kernel is one.

    with fake_tensors():
        student = cast(CausalWanTransformer(**config), torch.bfloat16)
        cache = student.new_cache(1, 60, 104)
        work = count(lambda: student.forward_chunk(x, t, text, cache))
    total_flops(work)

`FakeTensorMode` and `TorchDispatchMode` are what torch's documentation names for this; torch has no public
module that exports them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Module = TypeVar("Module", bound=nn.Module)
Engine = Literal["matmul", "attention", "convolution", "elementwise", "link"]
# of the fields of `Work`, in their order, without the calls
_Calls = Counter[tuple[str, Engine, torch.dtype, int, int, tuple[int, int] | None]]

FP8_PRODUCT = "aten._scaled_mm_v2"  # torch's table of flops leaves it out
SHALLOW = (1, 2)  # layers of networks that are run; what the second adds every further one adds


@dataclass(frozen=True)
class Work:
    """Equal calls of an op.

    `flops` and `bytes` are of one call. `bytes` are the inputs read once and the outputs written once: what
    cannot be avoided unless ops are fused or a cache holds their inputs. On the engine "link" they are those
    that come from other GPUs. `matrix` are the rows and columns of a matmul's result, None where it is none.
    """

    op: str  # "aten.addmm", "stream_r1.gated_add"
    engine: Engine
    dtype: torch.dtype  # of the result
    flops: int
    bytes: int
    matrix: tuple[int, int] | None = None
    calls: int = 1

    def times(self, calls: int) -> Work:
        return replace(self, calls=self.calls * calls)


def total_flops(work: Sequence[Work]) -> int:
    return sum(w.flops * w.calls for w in work)


def total_bytes(work: Sequence[Work]) -> int:
    return sum(w.bytes * w.calls for w in work)


def exchanged_bytes(work: Iterable[Work]) -> int:
    """That come from other GPUs; as many go there."""
    return sum(w.bytes * w.calls for w in work if w.engine == "link")


def repeat(work: Sequence[Work], times: int) -> list[Work]:
    return [w.times(times) for w in work]


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Within it tensors have shapes and no memory: a model of 14 billion weights is made in a second."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def cast(model: Module, dtype: torch.dtype) -> Module:
    """A model of fake tensors in another dtype, in place. Parts that diffusers keeps in float32 stay so."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, part in model.named_modules():
        for own, parameter in part._parameters.items():
            if parameter is not None and not any(word in f"{name}.{own}".split(".") for word in kept):
                part._parameters[own] = nn.Parameter(parameter.to(dtype), parameter.requires_grad)
        for own, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[own] = buffer.to(dtype)
    return model


def count(run: Callable[[], object]) -> list[Work]:
    """What `run` does, most expensive first in flops and then bytes. Call it within `fake_tensors()`."""
    counting = Counting()
    with Watching(counting):
        run()
    return counting.work()


def grown_work(onto: Iterable[Work], a: Iterable[Work], b: Iterable[Work], times: int) -> list[Work]:
    """Work and so many times what b has more than a, in the order of `count`.

    What b does with one more layer is either more calls, or calls that are larger: of an op for all layers.
    """
    calls, before, after = (Counter({replace(w, calls=1): w.calls for w in work}) for work in (onto, a, b))
    gone, new = before - after, after - before
    for x, n in gone.items():
        y = next((y for y in new if (y.op, y.dtype, new[y]) == (x.op, x.dtype, n)), None)
        if y is None:
            calls[x] -= times * n
            continue
        del new[y]
        larger = replace(
            x, flops=x.flops + times * (y.flops - x.flops), bytes=x.bytes + times * (y.bytes - x.bytes)
        )
        calls[x] -= n
        calls[larger] += n
    for y, n in new.items():
        calls[y] += times * n
    return _ordered(w.times(n) for w, n in calls.items() if n > 0)


def _ordered(work: Iterable[Work]) -> list[Work]:
    return sorted(work, key=lambda w: (w.flops * w.calls, w.bytes * w.calls), reverse=True)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an op's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors_in(item)]
    return []


@cache
def name_of(func: Any) -> str:
    """Of an op without its overload: "aten.add"."""
    return str(func.overloadpacket)


class OpWatcher(Protocol):
    """Sees every op that runs; `replay` repeats what it recorded between `begin` and `end`."""

    def on_op(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None: ...

    def begin(self) -> Any:
        """What `end` is to be given, for what is seen from here on."""
        ...

    def end(self, begun: Any) -> Any:
        """What was seen since, for `replay`."""
        ...

    def replay(self, taken: Any) -> None: ...


def _call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


class Watching(TorchDispatchMode):
    """Shows ops to watchers while it is active: one mode for all, as each costs as much as an op.

    Args:
        call: runs an op.
    """

    _active: ClassVar[list[Watching]] = []

    def __init__(self, *watchers: OpWatcher, call: Callable[..., Any] = _call) -> None:
        super().__init__()
        self.watchers = list(watchers)
        self._call = call

    @classmethod
    def around(cls) -> list[OpWatcher]:
        """The watchers that see what runs here, those outside first."""
        return [watcher for watching in cls._active for watcher in watching.watchers]

    def __enter__(self) -> Watching:
        self._active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._active.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._call(func, args, kwargs)
        for watcher in self.watchers:
            watcher.on_op(func, args, kwargs, result)
        return result


class Counting:
    """Counts ops."""

    def __init__(self) -> None:
        self._seen: _Calls = Counter()

    def work(self) -> list[Work]:
        return self.as_work(self._seen)

    @staticmethod
    def as_work(calls: _Calls) -> list[Work]:
        return _ordered(Work(*call, calls=n) for call, n in calls.items())

    def begin(self) -> _Calls:
        return self._seen.copy()

    def end(self, begun: _Calls) -> _Calls:
        return self._seen - begun

    def replay(self, taken: _Calls) -> None:
        self._seen.update(taken)

    def on_op(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        moved = _bytes(func, args, kwargs, result)
        if moved:
            dtype = next(x.dtype for value in (result, args, *kwargs.values()) for x in tensors_in(value))
            engine, flops = _arithmetic(func, args, kwargs, result)
            matrix = tuple(result.shape) if engine == "matmul" and result.dim() == 2 else None
            self._seen[name_of(func), engine, dtype, flops, moved, matrix] += 1


@dataclass(frozen=True)
class _Signature:
    """What an op does with its tensors.

    Attributes:
        results: whether each is written, rather than a view of an argument.
        arguments: name, whether it is written, whether it is read.
    """

    results: tuple[bool, ...]
    arguments: tuple[tuple[str, bool, bool], ...]
    writes: bool  # anything at all


@cache
def _signature(func: Any) -> _Signature:
    schema, overwrites = func._schema, func.overloadpacket in _OVERWRITES
    results = tuple(x.alias_info is None or x.alias_info.is_write for x in schema.returns)
    arguments = []
    for x in schema.arguments:
        written = x.alias_info is not None and x.alias_info.is_write
        arguments.append((x.name, written, not (written and (overwrites or x.kwarg_only))))  # out=
    writes = any(results) or any(written for _, written, _ in arguments)
    return _Signature(results, tuple(arguments), writes and func.overloadpacket not in _ALLOCATIONS)


def _bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Read and written; 0 for what is no kernel (views, allocation)."""
    signature = _signature(func)
    if not signature.writes:
        return 0
    if name_of(func) == "stream_r1.renew_sink_":
        return _renewed(*args, **kwargs)
    written: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    for fresh, value in zip(signature.results, _as_tuple(result), strict=False):
        if fresh:
            written |= {id(x): x for x in tensors_in(value)}
    for index, (name, writes, reads) in enumerate(signature.arguments):
        tensors = tensors_in(args[index] if index < len(args) else kwargs.get(name))
        if writes:
            written |= {id(x): x for x in tensors}
        if reads:
            read |= {id(x): x for x in tensors}
    if not written:
        return 0
    return sum(map(_size, written.values())) + sum(map(_size, read.values()))


def _renewed(
    storage: Tensor, sink_k: Tensor, sink_v: Tensor | None, slot: Any, ema: float | None, *_: Any
) -> int:
    """Of the cache's buffer the evicted chunk is read and the sink written, the rest not touched."""
    seen = sink_k.numel() * storage.element_size()  # of the keys; the values are as many
    if ema is None or sink_v is None:
        return _size(sink_k) + seen
    return 2 * (_size(sink_k) + _size(sink_v)) + 4 * seen


_ALLOCATIONS = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
    torch.ops.aten.detach,
    torch.ops.aten.lift_fresh,
    torch.ops.aten.resize_,
}


_OVERWRITES = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_}


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor, what is broadcast once."""
    size = tensor.element_size()
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        if step != 0 or n == 0:
            size *= n
    return size


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


# --- flops ---


def _arithmetic(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Engine, int]:
    packet = func.overloadpacket
    if name_of(func) == FP8_PRODUCT:
        return "matmul", 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    own = _OWN.get(name_of(func))
    if own is not None:
        return "attention", own(*args, **kwargs)
    if name_of(func) == "aten._addmm_activation":  # which torch's own table leaves out
        return "matmul", int(flop_registry[torch.ops.aten.addmm](*args[:3], out_val=result))
    if packet in flop_registry:
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
        if "attention" in name_of(func):
            return "attention", flops
        return ("convolution" if "conv" in name_of(func) else "matmul"), flops
    return "elementwise", 0


def _sdpa_cpu(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    batch, heads, tokens, head_dim = q.shape
    return 2 * 2 * batch * heads * tokens * k.shape[2] * head_dim


def _sdpa_cpu_backward(grad_out: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return _sdpa_cpu(q, k) // 2 * 5


_OWN: dict[str, Callable[..., int]] = {
    # the CPU's SDPA, which torch's own table of flops leaves out
    "aten._scaled_dot_product_flash_attention_for_cpu": _sdpa_cpu,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_cpu_backward,
}
