"""Activation checkpointing: a block's inside is computed again in the backward instead of being kept.

What self-attention gave may be kept all the same: its time grows with the square of the tokens, while its
result is as small as the block's input. torch has this as `create_selective_checkpoint_contexts`, which finds
each op of the second run among those of the first and raises where there are others, as there are under
autocast: a weight that was cast once before is cast again. Here attention alone is looked at.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

_TOKENS_FIRST = {  # [B, T, H, D]
    "stream_r1.cached_chunk_attention",
    "stream_r1.chunk_attention",
    "stream_r1.triton_attention",
}
_HEADS_FIRST = {  # [B, H, T, D]
    f"aten._scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "flash_attention_for_cpu",
        "fused_attention_overrideable",
    )
}
_Kept = list[list[tuple[Any, int]]]  # results of every call, with the versions of tensors


def enable_checkpointing(model: Any, *, keep_attention: bool) -> None:
    """Turns activation checkpointing on, block by block.

    Args:
        model: a transformer of diffusers or ours.
        keep_attention: keep what self-attention gave, its log-sum-exp too, rather than computing it again.
            The gradients are the same, bit for bit.
    """
    model.enable_gradient_checkpointing(_checkpoint_keeping if keep_attention else _checkpoint)


def _checkpoint(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False)


def _checkpoint_keeping(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[_Keeping, _Giving]:
    kept: _Kept = []
    return _Keeping(kept), _Giving(kept)


class _Keeping(TorchDispatchMode):
    """The first run."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if _is_self_attention(func, args):
            # As the results, versions too, without the graph that they get and that holds what is kept.
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                self._kept.append([_version(x.detach() if isinstance(x, Tensor) else x) for x in results])
        return results


class _Giving(TorchDispatchMode):
    """The second run, or another one where the graph is kept."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept, self._call = kept, 0

    def __enter__(self) -> _Giving:
        self._call = 0
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _is_self_attention(func, args):
            return func(*args, **(kwargs or {}))
        kept = self._kept[self._call]
        self._call += 1
        if any(_version(x)[1] != version for x, version in kept):
            raise RuntimeError("what attention gave was written to in place before its backward")
        return tuple(x.detach() if isinstance(x, Tensor) else x for x, _ in kept)


def _version(x: Any) -> tuple[Any, int]:
    return x, x._version if isinstance(x, Tensor) else 0


@cache
def _tokens_dim(func: Any) -> int | None:
    """The dimension of the tokens in an attention's queries and keys; None: another op."""
    name = str(func.overloadpacket)
    return 1 if name in _TOKENS_FIRST else 2 if name in _HEADS_FIRST else None


def _is_self_attention(func: Any, args: tuple[Any, ...]) -> bool:
    """Rather than attention to a text, which has fewer keys than queries and is soon computed."""
    dim = _tokens_dim(func)
    return dim is not None and args[1] is not None and args[1].shape[dim] >= args[0].shape[dim]
