"""A mask of your own: chunks that see a dilated history. This file is all of it, for every backend.

A chunk sees itself and the chunks at distance 1, 2, 4, 8, ... before it: of n chunks about log2(n).

    python examples/dilated_mask.py        # draws the mask, runs attention with it, and takes gradients
"""

from dataclasses import dataclass

import torch

from stream_r1_kernels import RangeMask, chunk_attention


@dataclass(frozen=True)
class DilatedMask(RangeMask):
    """The chunks at distance 0, 1, 2, 4, 8, ...; the last chunk may be cut short."""

    tokens_per_chunk: int

    def blocks(self, tokens: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        size, blocks = self.tokens_per_chunk, []
        for begin in range(0, tokens, size):
            end = min(begin + size, tokens)
            seen, distance = [(begin, end)], size
            while distance <= begin:
                seen.insert(0, (begin - distance, begin - distance + size))
                distance *= 2
            blocks.append((begin, end, seen))
        return blocks


def picture(mask: RangeMask, tokens: int) -> str:
    """A line a query, a column a key: # where the query sees the key."""
    return "\n".join("".join("#" if seen else "." for seen in row) for row in mask.visible(tokens).tolist())


if __name__ == "__main__":
    print(picture(DilatedMask(1), 12))
    q, k, v = (torch.randn(1, 12 * 32, 4, 64, requires_grad=True) for _ in range(3))
    out = chunk_attention(q, k, v, DilatedMask(32))
    out.square().mean().backward()
    print(f"output {tuple(out.shape)}, gradient of the keys {k.grad.norm():.3f}")
