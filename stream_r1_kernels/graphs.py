"""What compiled graphs do to a cache: ops that are given its whole storage, and where in it.

A view that an op writes to is no good there. inductor gives the op the view's sizes and strides, but where an
offset differs from call to call it may take 0 for it, so that every chunk would be written over the sink. An
op that gets all of a tensor has no offset to lose. In eager mode views are as safe, and quicker.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .backends import resolve
from .sink import renew_sink_

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("stream_r1", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def integers_may_change(function: Callable[P, R]) -> Callable[P, R]:
    """Where `function` is traced, let integers that it reads differ from call to call.

    torch.compile takes those below an nn.Module (a model that holds its cache, an attention processor) for
    constants, and would compile every chunk again.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


# storage [L, 2, B, T, H, D]; k, v [B, T', H, D] go to a layer's tokens from `start` on.
_LIBRARY.define(
    "write_slot_(Tensor(a!) storage, Tensor k, Tensor v, SymInt layer, SymInt start) -> ()", tags=_TAGS
)


@torch.library.impl(_LIBRARY, "write_slot_", "CompositeExplicitAutograd")
def _write_slot(storage: Tensor, k: Tensor, v: Tensor, layer: int, start: int) -> None:
    slot = storage[layer, :, :, start : start + k.shape[1]]
    slot[0].copy_(k)
    slot[1].copy_(v)


_LIBRARY.define(
    "renew_sinks_(Tensor(a!) storage, Tensor(b!) sink_k, Tensor(c!)? sink_v, SymInt layer, SymInt layers,"
    " SymInt slot, float? ema, SymInt since_first, Tensor evicted_cos, Tensor evicted_sin,"
    " Tensor? window_cos, Tensor? window_sin, SymInt place=0) -> ()",
    tags=_TAGS,
)


@torch.library.impl(_LIBRARY, "renew_sinks_", "CompositeExplicitAutograd")
def renew_sinks_(
    storage: Tensor,
    sink_k: Tensor,
    sink_v: Tensor | None,
    layer: int,
    layers: int,
    slot: int,
    ema: float | None,
    since_first: int,
    evicted_cos: Tensor,
    evicted_sin: Tensor,
    window_cos: Tensor | None,
    window_sin: Tensor | None,
    place: int = 0,
) -> None:
    """`renew_sink_` of the layers from `layer` on, `layers` of them, by the kernel where there is one.

    `since_first` is 0 at a stream's first renewal: a number, as graphs are made again for another bool.
    """
    some = slice(layer, layer + layers)
    values = None if sink_v is None else sink_v[some]
    phases = (evicted_cos, evicted_sin, window_cos, window_sin)
    arguments = (storage[some], sink_k[some], values, slot, ema, since_first == 0, *phases)
    if place or resolve("auto", "renew_sink_", storage) == "reference":
        renew_sink_(*arguments, place)
    else:
        torch.ops.stream_r1.renew_sink_(*arguments)


@torch.library.register_fake("stream_r1::write_slot_")
@torch.library.register_fake("stream_r1::renew_sinks_")
def _(*_: object) -> None:
    return None
