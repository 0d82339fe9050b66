"""The passes of a stream as CUDA graphs, one a ring slot: Python starts one graph, not a thousand kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stream_r1.chunk_loop import StudentPasses
from stream_r1.models.contexts import TextContext
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1_kernels import ChunkCache

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


def refuse_graphs(where: str, student: CausalWanTransformer) -> None:
    """Raises ValueError where a student's passes can't be CUDA graphs: off a GPU, or without a window."""
    if student.device.type != "cuda":
        raise ValueError(f"{where}: cuda_graph needs the student on a CUDA device, got {student.device}")
    _refuse_endless_past(where, student)


def _refuse_endless_past(where: str, student: CausalWanTransformer) -> None:
    if student.config["window_frames"] is None:
        expected = "a student with window_frames (without, every chunk has shapes of its own)"
        raise ValueError(f"{where}: cuda_graph needs {expected}, got window_frames None")


class CudaCapture:
    """Captures a function's kernels in a CUDA graph; the graphs of one `CudaCapture` share their memory.

    So they must not be replayed at the same time, and a result lasts until the next replay of any of them.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Casts that autocast remembered are freed when it ends: a graph has to have its own.
        cast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        # What other threads do meanwhile, as the live page's that decodes, does not end the capture.
        with cast, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class PassGraphs(StudentPasses):
    """The passes of one stream, from graphs once its window is full.

    From then on a pass differs from the last one at its ring slot by numbers alone. They lie in tensors that
    stay: latents and timestep here, rotary phases, keys and values in the cache, the prompt in `text`. The
    first pass at a slot runs as it is, so that libraries set themselves up; the second is captured; later
    ones are replayed. Passes of a window that fills run as they are. Without gradients, and never fused.

    Args:
        student: in eval mode; its weights may change in place, but not move.
        cache: the stream's, from `student.new_cache`; its rotary phases are pinned.
        text: the prompts, of the cache's batch; kept, and written by `switch`.
        capture: makes a replay of a function; None: a CUDA graph.

    Raises:
        ValueError: the student is not on a GPU (where `capture` is None), or has no window; `text` is of
            another batch.
    """

    def __init__(
        self,
        student: CausalWanTransformer,
        cache: ChunkCache,
        text: TextContext,
        capture: Capture | None = None,
    ) -> None:
        if capture is None:
            refuse_graphs("PassGraphs", student)
            capture = CudaCapture()
        _refuse_endless_past("PassGraphs", student)
        if text.batch != cache.batch:
            raise ValueError(f"PassGraphs: text must be of batch {cache.batch}, got {text.batch}")
        cache.pin_positions()
        super().__init__(student, cache, text, share_times=False)
        self._capture = capture
        _, patch_rows, patch_columns = student.config["patch_size"]
        size = (cache.rows * patch_rows, cache.columns * patch_columns)
        shape = (cache.batch, cache.frames_per_chunk, student.config["in_channels"], *size)
        self._x = torch.zeros(shape, device=student.device)
        self._t = torch.zeros(cache.batch, device=student.device)
        self._warm: set[int] = set()  # slots of one pass
        self._graphs: dict[int, Replay] = {}  # by slot

    @property
    def captured(self) -> int:
        """Graphs so far; in the end one a slot of the ring."""
        return len(self._graphs)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: float | Tensor, *, grad: bool = False) -> Tensor:
        """As `StudentPasses` gives it; x is float32."""
        cache = self.cache
        cache.begin_chunk()
        if not cache.full:
            return super().velocity(x, t)
        if x.shape != self._x.shape or x.dtype != self._x.dtype:
            expected = f"{list(self._x.shape)} {self._x.dtype}"
            raise ValueError(f"PassGraphs.velocity: x must be {expected}, got {list(x.shape)} {x.dtype}")
        self._x.copy_(x)
        self._t.copy_(t) if isinstance(t, Tensor) else self._t.fill_(t)
        slot = cache.slot_start
        if slot not in self._warm:
            self._warm.add(slot)
            return self._pass()
        if slot not in self._graphs:
            self._graphs[slot] = self._capture(self._pass)
        return self._graphs[slot]().clone()  # the next replay writes over it

    def switch(self, text: TextContext) -> None:
        """Other prompts of the same batch, from the next pass on."""
        for kept, new in zip((*self.text.k, *self.text.v), (*text.k, *text.v), strict=True):
            kept.copy_(new)

    def _pass(self) -> Tensor:
        return self.student.forward_chunk(self._x, self._t, self.text, self.cache)
