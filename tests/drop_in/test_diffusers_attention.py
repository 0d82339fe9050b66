"""The ops inside diffusers' models against diffusers' own attention."""

import functools

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from stream_r1.drop_in.diffusers_attention import (
    register_backend,
    restore_attention,
    set_chunk_cache,
    set_chunk_mask,
)
from stream_r1_kernels import ChunkCache, ChunkMask, RotaryGrid

HEADS, WIDTH, FRAMES, ROWS, COLUMNS = 2, 12, 6, 2, 3
TOKENS = ROWS * COLUMNS


def tiny_wan(layers: int = 2) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
    )


def inputs(frames: int = FRAMES, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, frames, 2 * ROWS, 2 * COLUMNS, generator=generator)
    t = torch.rand(batch, frames, generator=generator) * 1000
    return x, t.repeat_interleave(TOKENS, 1), torch.randn(batch, 5, 8, generator=generator)


class MaskedByDiffusers(WanAttnProcessor):
    """diffusers' own processor and backend, given a dense mask in self-attention."""

    def __init__(self, mask: ChunkMask, tokens: int) -> None:
        super().__init__()
        self.mask = mask.visible(tokens)
        self.half = mask.teacher_forcing

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if self.half:
            rotary_emb = tuple(part[:, : part.shape[1] // 2].repeat(1, 2, 1, 1) for part in rotary_emb)
        mask = self.mask[None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def gradients(model: WanTransformer3DModel, x: Tensor, t: Tensor, text: Tensor) -> dict[str, Tensor]:
    leaves = dict(model.named_parameters()) | {"x": x.clone().requires_grad_()}
    v = model(leaves["x"], t, text, return_dict=False)[0]
    found = torch.autograd.grad(v.square().sum(), list(leaves.values()))
    return {"v": v.detach()} | dict(zip(leaves, found, strict=True))


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        bound = 1e-5 * max(value.abs().max().item(), 1e-3)  # float32, other orders of sums
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_backend_is_as_diffusers_own_forward_and_backward():
    model, arguments = tiny_wan(), inputs()
    expected = gradients(model, *arguments)
    register_backend()
    register_backend()  # again is once
    model.set_attention_backend("stream_r1")
    try:
        ours = gradients(model, *arguments)
        assert_same(ours, expected)
        assert not torch.equal(ours["v"], expected["v"])  # it is another kernel's work
    finally:
        model.set_attention_backend("native")
    assert torch.equal(gradients(model, *arguments)["v"], expected["v"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backend_keeps_to_the_error_of_the_dtype(dtype):
    register_backend()
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, length, 3, 32, generator=generator).to(dtype) for length in (70, 45, 45))
    truth = dispatch_attention_fn(q.double(), k.double(), v.double())
    native = (dispatch_attention_fn(q, k, v).double() - truth).abs().max()
    with attention_backend("stream_r1"):
        ours = dispatch_attention_fn(q, k, v)
    assert ours.dtype == dtype
    assert (ours.double() - truth).abs().max() <= 2 * native + torch.finfo(dtype).eps * truth.abs().max()


def test_backend_refuses_what_it_can_not_do():
    register_backend()
    q = torch.zeros(1, 4, 1, 8)
    for argument, name in (
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "attn_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"dropout_p": 0.5}, "dropout_p"),
        ({"enable_gqa": True}, "enable_gqa"),
        ({"attention_kwargs": {"return_lse": True}}, "return_lse"),
        ({"parallel_config": object()}, "parallel_config"),
    ):
        with pytest.raises(ValueError, match=f"expected dense attention without {name}"):
            dispatch_attention_fn(q, q, q, backend="stream_r1", **argument)


@torch.no_grad()
def test_backend_is_traced_into_one_graph():
    register_backend()
    model, arguments = tiny_wan(1).eval(), inputs()
    expected = model(*arguments, return_dict=False)[0]
    model.set_attention_backend("stream_r1")
    try:
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)
    finally:
        model.set_attention_backend("native")


MASKS = {
    "block-causal": ChunkMask(TOKENS, 2),
    "window and sink": ChunkMask(TOKENS, 2, window_frames=2, sink_frames=1),
    "first frame alone": ChunkMask(TOKENS, 2, first_chunk_frames=1),
    "teacher forcing": ChunkMask(TOKENS, 1, teacher_forcing=True),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_chunk_mask_is_as_a_dense_mask_in_diffusers(mask, checkpointing):
    model, arguments = tiny_wan(), inputs()
    for block in model.blocks:
        block.attn1.set_processor(MaskedByDiffusers(mask, FRAMES * TOKENS))
    expected = gradients(model, *arguments)
    if checkpointing:
        model.enable_gradient_checkpointing()
    set_chunk_mask(model, mask)
    assert_same(gradients(model, *arguments), expected)


def test_fused_projections_and_restored_attention():
    model, arguments = tiny_wan(), inputs()
    plain = model(*arguments, return_dict=False)[0]
    set_chunk_mask(model, MASKS["block-causal"])
    causal = model(*arguments, return_dict=False)[0]
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(*arguments, return_dict=False)[0], causal, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    restore_attention(model)
    assert torch.equal(model(*arguments, return_dict=False)[0], plain)
    assert not torch.allclose(causal, plain, atol=1e-3)


def new_cache(layers: int = 2, **settings) -> ChunkCache:
    return ChunkCache(layers, 2, HEADS, RotaryGrid(WIDTH), ROWS, COLUMNS, 2, **settings)


@pytest.mark.parametrize(
    ("settings", "mask"),
    [
        ({"max_frames": 6}, ChunkMask(TOKENS, 2)),
        ({"window_frames": 4, "sink_frames": 2}, ChunkMask(TOKENS, 2, window_frames=2, sink_frames=2)),
    ],
    ids=["whole past", "window and sink"],
)
def test_a_stream_is_as_the_whole_clip(settings, mask):
    """Every chunk's last pass on the same clean input: the stream shows it what the mask shows the clip."""
    model, (x, t, text) = tiny_wan().requires_grad_(False), inputs()
    set_chunk_mask(model, mask)
    expected = model(x, t, text, return_dict=False)[0]
    cache = new_cache(**settings)
    set_chunk_cache(model, cache)
    for start in range(0, FRAMES, 2):
        chunk, times = x[:, :, start : start + 2], t[:, start * TOKENS : (start + 2) * TOKENS]
        model(torch.randn_like(chunk), times, text)  # a pass that leaves nothing
        v = model(chunk, times, text, return_dict=False)[0]
        torch.testing.assert_close(v, expected[:, :, start : start + 2], rtol=1e-4, atol=1e-5)
        cache.commit()


def test_a_chunk_with_gradients_reads_the_cache_alone():
    model, (x, t, text) = tiny_wan(), inputs()
    cache = new_cache(max_frames=6)
    set_chunk_cache(model, cache)
    first, second = x[:, :, :2], x[:, :, 2:4].clone().requires_grad_()
    with torch.no_grad():
        model(first, t[:, : 2 * TOKENS], text)
    cache.commit()
    before = cache.storage.clone()
    v = model(second, t[:, 2 * TOKENS : 4 * TOKENS], text, return_dict=False)[0]
    assert torch.equal(cache.storage, before)
    (ours,) = torch.autograd.grad(v.square().sum(), second)

    # The clip's gradient on the second chunk's velocity alone is the same: the first chunk is a constant.
    set_chunk_mask(model, ChunkMask(TOKENS, 2))
    clip = torch.cat([first, second], 2)
    whole = model(clip, t[:, : 4 * TOKENS], text, return_dict=False)[0][:, :, 2:]
    torch.testing.assert_close(v, whole, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(whole.square().sum(), second)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


WRAPPERS = {
    "not reentrant": functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
    "reentrant": functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
}


def stream_gradients(
    way: str | None, settings: dict, *, at_once: bool, streams: int = 1, shared: bool = True
) -> dict[str, Tensor]:
    """Of 4 chunks, each with a pass with gradients and one that leaves its keys."""
    model, cache = tiny_wan(), new_cache(**settings)
    if way is not None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=WRAPPERS[way],
            check_fn=lambda module: type(module).__name__ == "WanTransformerBlock",
        )
    generator, losses = torch.Generator().manual_seed(1), []
    x, t, text = inputs(2)
    for stream in range(streams):
        if stream > 0 and not shared:
            cache = new_cache(**settings)
        cache.reset()
        set_chunk_cache(model, cache)
        for _ in range(4):
            x = torch.randn(x.shape, generator=generator)
            loss = model(x, t, text, return_dict=False)[0].square().sum()
            if at_once:
                loss.backward()
            else:
                losses.append(loss)
            with torch.no_grad():
                model(x, t, text)
            cache.commit()
    if losses:
        torch.stack(losses).sum().backward()
    named = model.named_parameters()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in named if p.grad is not None
    }


@pytest.mark.parametrize("way", WRAPPERS)
@pytest.mark.parametrize(
    "settings", [{"max_frames": 8}, {"window_frames": 4, "sink_frames": 2}], ids=["whole past", "window"]
)
def test_checkpointed_blocks_are_right_before_the_cache_moves_on_and_refused_after(way, settings):
    assert_same(
        stream_gradients(way, settings, at_once=True), stream_gradients(None, settings, at_once=False)
    )
    with pytest.raises(ValueError, match="activation checkpointing computes a chunk again"):
        stream_gradients(way, settings, at_once=False)


def test_a_backward_after_the_memory_was_used_again_is_right_or_raises():
    window = {"window_frames": 4, "sink_frames": 2}
    assert_same(
        stream_gradients(None, window, at_once=False, streams=2),
        stream_gradients(None, window, at_once=False, streams=2, shared=False),
    )
    with pytest.raises(ValueError, match=r"past: .*written since"):
        stream_gradients(None, {"max_frames": 8}, at_once=False, streams=2)


def test_what_would_go_wrong_in_silence_is_refused():
    model, (x, t, text) = tiny_wan(), inputs()
    with pytest.raises(TypeError, match="expected a WanTransformer3DModel, got Linear"):
        set_chunk_mask(torch.nn.Linear(1, 1), MASKS["block-causal"])
    with pytest.raises(ValueError, match="expected 2 layers, got 3"):
        set_chunk_cache(model, new_cache(3, max_frames=6))
    cache = new_cache(max_frames=6)
    set_chunk_cache(model, cache)
    times = t[:, : 2 * TOKENS]
    with pytest.raises(ValueError, match="a chunk of 2 frames of 2 x 3 tokens, got 36 tokens"):
        model(x, t, text)
    model(x[:, :, :2], times, text)  # with gradients: nothing is written
    cache.commit()
    with pytest.raises(ValueError, match="no pass without gradients has written frame 0"):
        model(x[:, :, :2], times, text)
    model.enable_gradient_checkpointing()
    set_chunk_cache(model, new_cache(max_frames=6))
    with pytest.raises(ValueError, match="expected no gradient checkpointing"):
        model(x[:, :, :2], times, text)
