"""What guards a cache's memory, which later chunks use again, against backward passes that still need it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_NEVER = 1 << 62


@torch.library.custom_op("stream_r1::snapshot", mutates_args=())
def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


@_snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return x.clone()


def snapshot(x: Tensor) -> Tensor:
    """A copy that no later write to the memory of x reaches."""
    # inductor drops a plain clone, or makes it again in the backward, from what was written since
    return _snapshot(x) if torch.compiler.is_compiling() else x.clone()


class TrackedViews:
    """Views of a cache's memory that were handed out, until it is used again.

    Autograd counts the writes to a whole buffer and would refuse a backward over frames that nobody touched.
    So the views are handed out with counters of their own, which count when their own frames are written:
    what autograd saved of them raises then. The views become empty too, for what only remembers them, such
    as a checkpoint's arguments.
    """

    def __init__(self, layers: int) -> None:
        self._views: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{} for _ in range(layers)]

    def view(self, layer: int, storage: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [start, stop) of a layer's storage [2, B, T, H, D], without a graph."""
        views = self._views[layer].get((start, stop))
        if views is None or views[0].requires_grad or views[1].requires_grad:
            k, v = storage[0, :, start:stop], storage[1, :, start:stop]
            views = self._views[layer][start, stop] = k.data, v.data
        return views

    def invalidate(self, layers: slice, start: int, stop: int) -> None:
        """Tokens [start, stop) of these layers are about to be written."""
        if torch.compiler.is_compiling():
            return
        for views in self._views[layers]:
            for tokens in [tokens for tokens in views if tokens[0] < stop and start < tokens[1]]:
                for view in views.pop(tokens):
                    torch.autograd.graph.increment_version(view)
                    view.data = view.new_empty(0)


class Moments:
    """When a stream and its chunk began, for what is computed again in a backward pass.

    Activation checkpointing runs a forward again, at a time when the cache may have moved on. Autograd
    numbers the nodes of its graphs: the node whose backward runs tells when that forward was.
    """

    def __init__(self) -> None:
        self.begin_stream()

    @staticmethod
    def now() -> int:
        """The number of the next node."""
        # A graph can't look it up: then nothing that is computed again counts as of this chunk.
        return _NEVER if torch.compiler.is_compiling() else torch._C._autograd._get_sequence_nr()

    def begin_stream(self, at: int | None = None) -> None:
        """`at`: when it can have begun at the earliest; None: now."""
        if not torch.compiler.is_compiling():
            self._task = torch._C._current_graph_task_id()  # that of a backward pass, or -1
        self._stream = self._ended = self.now() if at is None else at
        self._chunk = _NEVER

    def begin_chunk(self) -> None:
        # At the end of the last one: what calls begin_chunk may lie in a node that is older than the call.
        self._chunk = (
            _NEVER if torch.compiler.is_compiling() else self._ended
        )  # a number that differs each time

    def end_chunk(self, at: int | None = None) -> None:
        """`at`: when the next one can have begun at the earliest; None: now."""
        self._ended = self.now() if at is None else at
        self._chunk = _NEVER

    def recomputed(self) -> Literal["chunk", "stream", "other stream"] | None:
        """What the backward pass under way computes again: of the chunk under way, of an earlier chunk of the
        stream, or of another stream. None outside of one, or where it began the stream itself.
        """
        if torch.compiler.is_compiling():
            return None
        task = torch._C._current_graph_task_id()
        if task in (-1, self._task):
            return None
        node = torch._C._current_autograd_node()
        made = -1 if node is None else node._sequence_nr()
        if made < self._stream:
            return "other stream"
        return "chunk" if made >= self._chunk else "stream"

    def refuse_write(self, what: str) -> None:
        """Raises ValueError where a backward pass computes something again."""
        if self.recomputed() is not None:
            raise ValueError(
                f"ChunkCache: {what}: expected no call where a backward pass computes something again "
                "(activation checkpointing), as it would write to the cache; leave begin_chunk(), slot() and "
                "commit() outside of what is checkpointed"
            )

    def refuse_earlier(self, what: str) -> None:
        """Raises ValueError where a backward pass computes something of an earlier chunk again."""
        if self.recomputed() not in (None, "chunk"):
            raise ValueError(
                f"ChunkCache: {what}: a backward pass computes an earlier chunk again (activation "
                "checkpointing), but the cache has moved on since; call it outside of what is checkpointed "
                "and hand in what it returns"
            )
