"""The loop that makes a video chunk by chunk, for sampling, for training's rollouts and for replays.

    noise -> pass, re-noise, pass, re-noise, pass, re-noise, pass -> x0
                                                                     x0 -> clean pass at t = 0 -> cache

The cache-update (clean) pass of a chunk runs when the next chunk is asked for: a chunk's x0 comes earlier,
and the last chunk of a finite video needs none. What a chunk reads of earlier chunks is data, so the
gradient of its x0 goes through its own pass and nothing else.
Sources: Self Forcing (2506.08009), without its in-place cache; Reward Forcing (2512.04678).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stream_r1.models.contexts import TextContext, TimeContext
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule
from stream_r1_kernels import ChunkCache

Renoise = Callable[[int, int, Tensor], Tensor]
"""Standard normal noise by chunk, pass and a tensor that it is to be like; the pass after the last denoising
one is the cache update's.
"""


class StudentPasses:
    """Passes of a student over the chunk that comes next in a cache.

    Args:
        cache: from `student.new_cache`.
        text: the prompts, from `student.encode_text`; with a graph where its weights should learn.
        share_times: read a timestep once for all passes at it. Under autocast that rounds otherwise than
            reading it in every pass, as training does.
    """

    def __init__(
        self, student: CausalWanTransformer, cache: ChunkCache, text: TextContext, *, share_times: bool = True
    ) -> None:
        self.student, self.cache, self.text = student, cache, text
        self._share_times = share_times
        self._times: dict[float, TimeContext] = {}  # by timestep: every chunk has the same ones
        self._fused_times: dict[int, TimeContext] = {}  # by the first chunk's frames

    def velocity(self, x: Tensor, t: float | Tensor, *, grad: bool = False) -> Tensor:
        """v like x [B, `cache.frames`, C, h, w].

        Args:
            t: timestep in [0, 1000]; or a tensor of them, as for `forward_chunk`.
            grad: build a graph: fresh keys and values are arguments beside the past. Without it they go to
                their slot of the cache, and the result is data.
        """
        time: Tensor | TimeContext
        if isinstance(t, Tensor):
            time = t
        else:
            time = _timestep(t, x) if grad or not self._share_times else self._time(t, x)
        return self.student.forward_chunk(x, time, self.text, self.cache, write=not grad)

    def fused(self, clean: Tensor, t_clean: float, x: Tensor, t: float) -> Tensor:
        """The cache update of `clean`, the chunk under way, and v of x, the next one, in one pass.

        One t a call, all calls alike; needs `cache.keeps_last`.
        """
        length = clean.shape[1]
        if length not in self._fused_times:
            after = self._time(t, x)
            self._fused_times[length] = self._time(t_clean, x).beside(length, after, x.shape[1])
        both = self._fused_times[length]
        return self.student.forward_chunk(x, both, self.text, self.cache, clean=clean)

    def switch(self, text: TextContext) -> None:
        """Other prompts of the same batch, from the next pass on."""
        self.text = text

    @torch.no_grad()
    def _time(self, t: float, x: Tensor) -> TimeContext:
        if t not in self._times:
            self._times[t] = self.student.encode_time(_timestep(t, x))
        return self._times[t]


class ChunkLoop:
    """A student's video in the making.

    Args:
        passes: of the student, the prompts and an empty cache.
        steps: denoising timesteps, already warped, falling, in (0, 1000].
        renoise: noise between the passes.
        context_noise: timestep in [0, 1000) of the cache update; 0 shows later chunks the clean x0.
        fuse: run a chunk's cache update and the next chunk's first denoising pass as one, the same to
            rounding, where the cache keeps both.

    `index` is that of the next chunk.
    """

    def __init__(
        self,
        passes: StudentPasses,
        *,
        schedule: FlowSchedule,
        steps: Sequence[float],
        renoise: Renoise,
        context_noise: float = 0.0,
        fuse: bool = False,
    ) -> None:
        self.passes, self.cache = passes, passes.cache
        self.schedule, self.steps, self.renoise = schedule, [float(t) for t in steps], renoise
        self.context_noise = float(context_noise)
        self.fuse = fuse
        self.index = 0
        self._last: Tensor | None = None  # the last chunk's x0, until its cache update

    @property
    def frames(self) -> int:
        """Latent frames of the next chunk."""
        return self.cache.frames if self._last is None else self.cache.frames_per_chunk

    @property
    def owes_update(self) -> bool:
        """Whether the last chunk's cache update is to come, in a pass by itself."""
        return self._last is not None and not (self.fuse and self.cache.keeps_last)

    def denoise(self, noise: Tensor, *, grad: bool = False) -> Tensor:
        """The next chunk's x0 from its noise, both [B, `frames`, C, h, w] float32.

        grad: build a graph at the last step; without it the chunk is data.
        """
        if self.owes_update:
            self.update_cache()
        last, x = self._last, noise
        if last is None:
            self.cache.begin_chunk()
        for step, t in enumerate(self.steps):
            learns = grad and torch.is_grad_enabled() and step == len(self.steps) - 1
            with torch.set_grad_enabled(learns):
                if step > 0:
                    x = self._noised(x, self.index, step, t)
                if last is not None and step == 0:
                    v = self.passes.fused(self._context(last, self.index - 1), self.context_noise, x, t)
                else:
                    v = self.passes.velocity(x, t, grad=learns)
                x = self.schedule.x0_from_v(x, v, self.schedule.sigma(t))
        self._last = x.detach()
        self.index += 1
        return x

    def update_cache(self) -> None:
        """The clean pass over the last chunk; nothing if it was already."""
        if self._last is not None:
            self.show(self._last, self.index - 1)
            self._last = None

    def append(self, x0: Tensor) -> None:
        """Takes a finished chunk [B, `frames`, C, h, w] as the next one, and shows it to the cache."""
        self.show(x0, self.index)
        self.index += 1

    def recompute(self, held: list[tuple[int, Tensor]]) -> None:
        """Empties the cache and shows it these chunks, by index, the last of them as the last one made."""
        if self._last is not None and held:
            self._last = held.pop()[1]  # its pass is to come in any case
        self.cache.reset()
        for chunk, x0 in held:
            self.show(x0, chunk)

    @torch.no_grad()
    def show(self, x0: Tensor, chunk: int) -> None:
        """The clean pass over a finished chunk, whose keys and values later chunks see."""
        self.cache.begin_chunk()
        self.passes.velocity(self._context(x0, chunk), self.context_noise)
        self.cache.commit()

    def _context(self, x0: Tensor, chunk: int) -> Tensor:
        """x0 as noisy as later chunks are to see it."""
        t = self.context_noise
        return x0 if t == 0 else self._noised(x0, chunk, len(self.steps), t)

    def _noised(self, x0: Tensor, chunk: int, step: int, t: float) -> Tensor:
        return self.schedule.add_noise(x0, self.renoise(chunk, step, x0), self.schedule.sigma(t))


def _timestep(t: float, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, device=x.device)
