"""Decoding of a stream's chunks: in line, or on a CUDA stream beside the denoising of the next one.

    the device's current stream   denoise 0 | denoise 1           | denoise 2
    the side stream                         | decode 0, copy 0    | decode 1, copy 1

Events order what crosses: a chunk is decoded after it is made, its frames are read after they are decoded.
Memory that one stream took and another one uses is recorded with the allocator (`Tensor.record_stream`),
which does not give it away before that use is over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from stream_r1.clock import Moment
from stream_r1.models.autoencoder import StreamDecoder
from stream_r1.pixels import check_least_and_most, least_and_most, to_uint8


class SideStream:
    """A CUDA stream beside a GPU's current one, and what is needed to use both."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def current(self) -> AbstractContextManager[None]:
        """Within it the side stream is the current one."""
        return torch.cuda.stream(self._stream)

    def uses(self, tensor: Tensor) -> None:
        """Keeps a tensor's memory, once it is freed, until the current stream is done with it."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, there when the current stream is past it."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class Decoded:
    """Pixels of a chunk, which may be in the making.

    Args:
        frames: [B, t, 3, H, W] in [0, 1].
        begun, done: when decoding began and ended.
        side: where it is; None: frames are there for the current stream.
        host: of them, on their way to the CPU: bytes [B, t, H, W, 3] and the least and the largest value.
    """

    def __init__(
        self,
        frames: Tensor,
        begun: Moment,
        done: Moment,
        side: SideStream | None = None,
        host: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.begun, self.done = begun, done
        self.count = frames.shape[1]
        self._frames, self._side, self._host = frames, side, host

    def frames(self) -> Tensor:
        """[B, t, 3, H, W] in [0, 1], on the decoder's device, for its current stream."""
        if self._side is not None:
            self.done.wait()
            self._side.uses(self._frames)
        return self._frames

    def to_uint8(self) -> Tensor:
        """[B, t, 3, H, W] uint8 on the CPU; waits for it, and for nothing that was asked for later.

        Raises:
            ValueError: frames that are not numbers in [0, 1].
        """
        if self._host is None:
            pixels, ends = _bytes(self._frames), least_and_most(self._frames)
            self._host = pixels.cpu(), ends.cpu()
        self.done.synchronize()
        pixels, ends = self._host
        check_least_and_most(ends, "Chunk.to_uint8: frames", finite=True)
        return pixels.movedim(-1, 2)


class ChunkDecoder:
    """Decodes a stream's chunks, one after the other.

    Args:
        decoder: of the stream.
        device: where its latents are made.
        side: on the decoder's device, which is theirs; None: decode in line.
        use: is called with the model before it works.
    """

    def __init__(
        self,
        decoder: StreamDecoder,
        device: torch.device,
        side: SideStream | None = None,
        use: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        self._decoder, self._device, self._side, self._use = decoder, device, side, use
        self._last: Moment | None = None  # when the chunk before is done

    @property
    def beside(self) -> bool:
        """Whether chunks are decoded while later ones are made."""
        return self._side is not None

    @torch.no_grad()
    def decode(self, latents: Tensor, made: Moment) -> Decoded:
        """The next chunk's latents [B, F, C, h, w], there at `made`, as pixels.

        On a side stream it waits for the chunk before: two at most are under way, and memory stays bounded.
        """
        self._use(self._decoder.vae)
        side = self._side
        if side is None:
            begun, frames = Moment(self._device), self._decoder.decode(latents)
            if frames.device.type == "cuda" and frames.device != self._device:
                torch.cuda.synchronize(frames.device)  # events of two GPUs can't be compared
            return Decoded(frames, begun, Moment(self._device))
        if self._last is not None:
            self._last.synchronize()
        with side.current():
            made.wait()
            side.uses(latents)
            begun, frames = Moment(self._device), self._decoder.decode(latents)
            host = side.to_host(_bytes(frames)), side.to_host(least_and_most(frames))
            self._last = Moment(self._device)
        return Decoded(frames, begun, self._last, side, host)


def _bytes(frames: Tensor) -> Tensor:
    """[B, t, 3, H, W] in [0, 1] -> [B, t, H, W, 3] uint8, as pictures lie in files."""
    return to_uint8(frames).movedim(2, -1).contiguous()
