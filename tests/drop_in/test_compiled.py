"""The drop-ins under inductor: equal to eager, and no new graph once a window is full."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from stream_r1.drop_in.diffusers_attention import set_chunk_cache, set_chunk_mask
from stream_r1.drop_in.self_forcing import adopt, self_attention
from stream_r1_kernels import ChunkCache, ChunkMask, RotaryGrid

HEADS, WIDTH, ROWS, COLUMNS, CHUNK = 2, 8, 1, 3, 2
TOKENS = CHUNK * ROWS * COLUMNS
ROLLING = {"sink_frames": 2, "positions": "window", "ema": 0.9}
CHUNKS, WARM = 11, 4  # the window is full, and its sink was renewed, from chunk 4 on

pytestmark = pytest.mark.usefixtures("one_thread")


class PublishedAttention(nn.Module):
    """The members of Self Forcing's module, in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        dim = HEADS * WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.num_heads = HEADS

    def forward(self, x: Tensor, kv_cache: dict, current_start: int) -> Tensor:
        return x + self_attention(self, x, kv_cache, current_start)


class PublishedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([PublishedAttention() for _ in range(2)])

    def forward(self, x: Tensor, kv_caches: list[dict], current_start: int) -> Tensor:
        for block, kv_cache in zip(self.blocks, kv_caches, strict=True):
            x = block(x, kv_cache, current_start)
        return x


def adopted() -> tuple[list[dict], ChunkCache]:
    size = (1, 6 * ROWS * COLUMNS, HEADS, WIDTH)
    dictionaries = [
        {"k": torch.zeros(size), "v": torch.zeros(size)}
        | {name: torch.tensor([0]) for name in ("global_end_index", "local_end_index")}
        for _ in range(2)
    ]
    return dictionaries, adopt(dictionaries, rows=ROWS, columns=COLUMNS, frames_per_chunk=CHUNK, **ROLLING)


@torch.no_grad()
@pytest.mark.parametrize("way", ["whole", "a graph a block"])
def test_self_forcing(way):
    torch.compiler.reset()
    plain = PublishedModel()
    compiled = copy.deepcopy(plain)
    if way == "whole":
        compiled = torch.compile(compiled, fullgraph=True)
    else:
        for block in compiled.blocks:
            block.compile(fullgraph=True)
    (ours, our_cache), (theirs, their_cache) = adopted(), adopted()
    generator = torch.Generator().manual_seed(1)
    for chunk in range(CHUNKS):
        for _ in range(2):
            x = torch.randn(1, TOKENS, HEADS * WIDTH, generator=generator)
            with torch._dynamo.config.patch(error_on_recompile=chunk >= WARM):
                got = compiled(x, ours, chunk * TOKENS)
            torch.testing.assert_close(got, plain(x, theirs, chunk * TOKENS))
        torch.testing.assert_close(our_cache.storage, their_cache.storage)
        for name in ("global_end_index", "local_end_index"):
            assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs, strict=True))


def tiny_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    )


def inputs(frames: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, frames, 2 * ROWS, 2 * COLUMNS, generator=generator)
    return x, torch.rand(1, generator=generator) * 1000, torch.randn(1, 5, 8, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("way", ["whole", "a graph a block"])
def test_diffusers_streaming(way):
    torch.compiler.reset()
    model = tiny_wan().eval()
    plain = copy.deepcopy(model)
    ours, theirs = (
        ChunkCache(2, 1, HEADS, RotaryGrid(WIDTH), ROWS, COLUMNS, CHUNK, window_frames=6, **ROLLING)
        for _ in range(2)
    )
    set_chunk_cache(model, ours)
    set_chunk_cache(plain, theirs)
    compiled = torch.compile(model, fullgraph=True) if way == "whole" else model
    if way != "whole":
        model.compile_repeated_blocks(fullgraph=True)
    for chunk in range(CHUNKS):
        for passed in range(2):
            arguments = inputs(CHUNK, 2 * chunk + passed)
            with torch._dynamo.config.patch(error_on_recompile=chunk >= WARM):
                got = compiled(*arguments, return_dict=False)[0]
            expected = plain(*arguments, return_dict=False)[0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.storage, theirs.storage)
        for cache in (ours, theirs):
            cache.commit()


def test_diffusers_block_causal_training():
    torch.compiler.reset()
    model = tiny_wan()
    set_chunk_mask(model, ChunkMask(ROWS * COLUMNS, CHUNK, window_frames=4))
    compiled = torch.compile(model, fullgraph=True)
    for frames in (4, 6):
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            run(*inputs(frames, frames), return_dict=False)[0].square().mean().backward()
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
