"""The student chunk by chunk: what it writes and what gradients reach, against one with an explicit past."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stream_r1.models.transformer import CausalWanTransformer

HEADS, WIDTH, DIM = 2, 16, 32
STREAMS = {
    "whole past": {},
    "static sink": {"window_frames": 9, "sink_frames": 3},
    "averaged sink at the window": {
        "window_frames": 9,
        "sink_frames": 3,
        "sink_ema": 0.8,
        "positions": "window",
    },
}


def make_student(**settings) -> CausalWanTransformer:
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 2,
        "text_len": 6,
    }
    return CausalWanTransformer(**(sizes | settings)).eval()


def make_inputs(chunks: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy and clean chunks [chunks, B, 3, C, h, w], text embeddings."""
    generator = torch.Generator().manual_seed(1)
    noisy, clean = torch.randn(2, chunks, batch, 3, 4, 4, 6, generator=generator)
    return noisy, clean, torch.randn(batch, 6, 12, generator=generator)


def plain_rotate(x: Tensor, frames: list[int]) -> Tensor:
    """[B, T, H, D] rotated at these frames, 2 x 3 tokens each, with complex numbers."""
    spatial = 2 * (WIDTH // 6)
    angles = []
    for frame in frames:
        for row in range(2):
            for column in range(3):
                axes = ((frame, WIDTH - 2 * spatial), (row, spatial), (column, spatial))
                angles.append([p * 10000 ** (-2 * i / n) for p, n in axes for i in range(n // 2)])
    turn = torch.polar(torch.ones(()).double(), torch.tensor(angles).double())[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * WIDTH**-0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


class PlainStream:
    """The student written down once more: torch alone, the past a list of detached un-rotated frames."""

    def __init__(self, student: CausalWanTransformer, embeds: Tensor) -> None:
        self.student = student
        self.embeds = embeds
        self.past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in student.blocks]
        self.averaged = False

    def chunk(self, x: Tensor, t: Tensor, keep: bool = False) -> Tensor:
        model = self.student
        conditions = model.condition_embedder
        h = model.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
        phase = t[:, None] * 10000 ** (-torch.arange(8) / 8)
        e = conditions.time_embedder.linear_1(torch.cat((phase.cos(), phase.sin()), -1))
        e = conditions.time_embedder.linear_2(functional.silu(e))
        modulation = conditions.time_proj(functional.silu(e)).unflatten(-1, (6, -1))
        text = conditions.text_embedder.linear_1(self.embeds)
        text = conditions.text_embedder.linear_2(functional.gelu(text, approximate="tanh"))
        for block, past in zip(model.blocks, self.past, strict=True):
            s1, c1, g1, s2, c2, g2 = (block.scale_shift_table + modulation).chunk(6, 1)  # [B, 1, D]
            attn = block.attn1
            a = functional.layer_norm(h, (DIM,), eps=1e-6) * (1 + c1) + s1
            q, k = (
                plain_rms(p(a), n.weight).unflatten(-1, (HEADS, WIDTH))
                for p, n in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
            )
            v = attn.to_v(a).unflatten(-1, (HEADS, WIDTH))
            h = h + attn.to_out[0](self.attend(past, q, k, v)) * g1
            attn = block.attn2
            q = plain_rms(attn.to_q(block.norm2(h)), attn.norm_q.weight).unflatten(-1, (HEADS, WIDTH))
            text_k = plain_rms(attn.to_k(text), attn.norm_k.weight).unflatten(-1, (HEADS, WIDTH))
            text_v = attn.to_v(text).unflatten(-1, (HEADS, WIDTH))
            h = h + attn.to_out[0](plain_attend(q, text_k, text_v))
            a = functional.layer_norm(h, (DIM,), eps=1e-6) * (1 + c2) + s2
            h = h + block.ffn.net[2](functional.gelu(block.ffn.net[0].proj(a), approximate="tanh")) * g2
            if keep:
                past.extend(zip(k.detach().split(6, 1), v.detach().split(6, 1), strict=True))
        shift, scale = (model.scale_shift_table + e[:, None]).chunk(2, 1)
        out = model.proj_out(functional.layer_norm(h, (DIM,), eps=1e-6) * (1 + scale) + shift)
        return torch.einsum("bfrcpqd->bfdrpcq", out.reshape(-1, 3, 2, 3, 2, 2, 4)).flatten(5).flatten(3, 4)

    def attend(self, past: list[tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = self.student.config
        window, sink = config["window_frames"], config["sink_frames"]
        seen = list(range(len(past)))
        if window is not None and len(past) + 3 > window:
            oldest = len(past) + 3 - window + sink
            seen = seen[:sink] + seen[oldest:]
        places = seen if config["positions"] == "absolute" else list(range(len(seen)))
        here = len(past) if config["positions"] == "absolute" else len(seen)
        own = [here, here + 1, here + 2]
        keys = [plain_rotate(past[f][0], [p]) for f, p in zip(seen, places, strict=True)]
        keys.append(plain_rotate(k, own))
        return plain_attend(
            plain_rotate(q, own), torch.cat(keys, 1), torch.cat([past[f][1] for f in seen] + [v], 1)
        )

    def average(self) -> None:
        """Before a chunk: what it evicts goes into the sink."""
        config = self.student.config
        ema, sink = config["sink_ema"], config["sink_frames"]
        for past in self.past:
            oldest = len(past) - (config["window_frames"] or 10**9) + sink
            if ema is None or oldest < sink:
                continue
            for i in range(sink):
                past[i] = tuple(
                    ema * a + (1 - ema) * b for a, b in zip(past[i], past[oldest + i], strict=True)
                )


def roll_out(student: CausalWanTransformer, noisy: Tensor, clean: Tensor, embeds: Tensor) -> list[Tensor]:
    """Every chunk: one step with grad, then the clean pass that stays; the outputs of the steps with grad."""
    text = student.encode_text(embeds)
    cache = student.new_cache(noisy.shape[1], 4, 6, max_frames=3 * len(noisy))
    t, zero = torch.full((noisy.shape[1],), 500.0), torch.zeros(noisy.shape[1])
    outputs = []
    for x, x0 in zip(noisy, clean, strict=True):
        cache.begin_chunk()
        with torch.no_grad():  # an earlier step, whose keys the later ones overwrite
            student.forward_chunk(x + 1, t, text, cache)
        outputs.append(student.forward_chunk(x, t, text, cache, write=False))
        student.forward_chunk(x0, zero, text, cache)
        cache.commit()
    return outputs


def plain_roll_out(
    student: CausalWanTransformer, noisy: Tensor, clean: Tensor, embeds: Tensor
) -> list[Tensor]:
    stream = PlainStream(student, embeds)
    outputs = []
    for x, x0 in zip(noisy, clean, strict=True):
        stream.average()
        outputs.append(stream.chunk(x, torch.full((noisy.shape[1],), 500.0)))
        with torch.no_grad():
            stream.chunk(x0, torch.zeros(noisy.shape[1]), keep=True)
    return outputs


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_a_rollout_are_those_of_the_plain_formulation(settings, checkpointing):
    student = make_student(**settings)
    noisy, clean, embeds = make_inputs(6)
    noisy.requires_grad_()
    expected = plain_roll_out(student, noisy, clean, embeds)
    inputs = [noisy, *student.parameters()]
    weights = [torch.randn_like(v) for v in expected]
    loss = sum((w * v).sum() for w, v in zip(weights, expected, strict=True))
    expected_gradients = torch.autograd.grad(loss, inputs)

    if checkpointing:
        student.train().enable_gradient_checkpointing()
    outputs = roll_out(student, noisy, clean, embeds)
    for ours, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    # The backward comes after every later chunk was written, committed, evicted and the sink moved.
    loss = sum((w * v).sum() for w, v in zip(weights, outputs, strict=True))
    for ours, plain in zip(torch.autograd.grad(loss, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item() + 1e-7)


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_no_gradient_crosses_chunks(settings, checkpointing):
    student = make_student(**settings)
    if checkpointing:
        student.train().enable_gradient_checkpointing()
    noisy, clean, embeds = make_inputs(5)
    noisy.requires_grad_()
    clean.requires_grad_()
    for chunk, v in enumerate(roll_out(student, noisy, clean, embeds)):
        gradient, through_past = torch.autograd.grad(
            v.sum(), (noisy, clean), retain_graph=True, allow_unused=True
        )
        assert through_past is None
        norms = gradient.flatten(1).norm(dim=1)
        assert norms[chunk] > 0
        assert torch.count_nonzero(norms) == 1


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS.keys())
@torch.no_grad()
def test_only_its_own_slot_is_written_while_a_chunk_is_denoised(settings):
    student = make_student(**settings)
    noisy, _, embeds = make_inputs(6)
    text = student.encode_text(embeds)
    cache = student.new_cache(2, 4, 6, max_frames=18)
    for x in noisy:
        cache.begin_chunk()
        for layer in cache.layers:
            for part in layer.slot():
                part.zero_()
        before = cache.storage.clone()
        for t in (1000.0, 500.0, 0.0):
            student.forward_chunk(x, torch.full((2,), t), text, cache)
        assert not torch.equal(cache.storage, before)
        for layer in cache.layers:
            for part in layer.slot():
                assert part.abs().amin(dim=(2, 3)).max() > 0  # all of it
                part.zero_()
        assert torch.equal(cache.storage, before)
        student.forward_chunk(x, torch.zeros(2), text, cache, write=False)
        assert torch.equal(cache.storage, before)
        student.forward_chunk(x, torch.zeros(2), text, cache)
        cache.commit()


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS.keys())
@torch.no_grad()
def test_a_stream_repeats_bit_for_bit_and_each_sample_stands_alone(settings):
    student = make_student(**settings)
    noisy, _, embeds = make_inputs(6)
    text = student.encode_text(embeds)
    cache = student.new_cache(2, 4, 6, max_frames=18)
    runs = []
    for _ in range(2):
        cache.reset()
        runs.append([])
        for x in noisy:
            runs[-1].append(student.forward_chunk(x, torch.full((2,), 700.0), text, cache))
            cache.commit()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    single = student.new_cache(1, 4, 6, max_frames=18)
    text = student.encode_text(embeds[1:])
    for x, expected in zip(noisy, runs[0], strict=True):
        v = student.forward_chunk(x[1:], torch.full((1,), 700.0), text, single)
        single.commit()
        torch.testing.assert_close(v, expected[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"window_frames": 9}, {"window_frames": 9, "sink_frames": 3, "positions": "window"}]
)
@torch.no_grad()
def test_positions_have_no_end(settings):
    student = make_student(**settings)
    noisy, _, embeds = make_inputs(1)
    text = student.encode_text(embeds)
    cache = student.new_cache(2, 4, 6)
    outputs = {}
    # Only differences of positions count: the same chunk over and over comes to rest, at whatever frame.
    for chunk in range(400):
        if chunk < 12 or chunk >= 388:
            outputs[chunk] = student.forward_chunk(noisy[0], torch.full((2,), 700.0), text, cache)
        else:
            cache.begin_chunk()  # only time passes
        cache.commit()
    assert cache.next_frame > 1024
    torch.testing.assert_close(outputs[399], outputs[11], rtol=1e-4, atol=1e-5)
    assert (outputs[11] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_read_once_are_the_same_timesteps(dtype):
    student = make_student(window_frames=9, sink_frames=3).to(dtype)
    noisy, _, embeds = make_inputs(1)
    text, cache = student.encode_text(embeds.to(dtype)), student.new_cache(2, 4, 6)
    for t in (torch.tensor([700.0, 20.0]), torch.tensor([[700.0, 20.0, 937.5], [0.0, 1.0, 2.0]])):
        times = student.encode_time(t)
        for write in (True, False):
            expected = student.forward_chunk(noisy[0], t, text, cache, write=write)
            got = student.forward_chunk(noisy[0], times, text, cache, write=write)
            assert torch.equal(got, expected)
    got.square().mean().backward()
    assert student.condition_embedder.time_proj.weight.grad.abs().sum() > 0
    assert student.scale_shift_table.grad.abs().sum() > 0

    for wrong in (torch.zeros(1), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="t must have 2 layers, batch 2 and 1 or 3 frames, got 2 layers"):
            student.forward_chunk(noisy[0], student.encode_time(wrong), text, cache)
    with pytest.raises(ValueError, match=r"encode_time: t must be \[B\] or \[B, F\], got 0 dims"):
        student.encode_time(torch.tensor(3.0))


ROLLING = {"window_frames": 9, "sink_frames": 3, "sink_ema": 0.9, "positions": "window"}


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", ["one graph", "one graph, chunk and all", "a graph a block"])
def test_a_compiled_stream_is_the_eager_one_and_compiles_no_more_when_its_window_is_full(way):
    torch.compiler.reset()
    student = make_student(**ROLLING, num_layers=2)
    plain = copy.deepcopy(student)
    noisy, clean, embeds = make_inputs(11)
    text, t = student.encode_text(embeds), torch.full((2,), 700.0)
    run = student.forward_chunk
    if way == "a graph a block":
        student.compile_repeated_blocks(fullgraph=True)
    else:
        run = torch.compile(run, fullgraph=True)
    theirs, ours = student.new_cache(2, 4, 6), student.new_cache(2, 4, 6)
    for index, (x, x0) in enumerate(zip(noisy, clean, strict=True)):
        for latents, noise in ((x, t), (x0, torch.zeros(2))):
            for cache in (ours, theirs):
                if way != "one graph, chunk and all":
                    cache.begin_chunk()
            with torch._dynamo.config.patch(error_on_recompile=index >= 4):
                got = run(latents, noise, text, ours)
            torch.testing.assert_close(got, plain.forward_chunk(latents, noise, text, theirs))
        torch.testing.assert_close(ours.storage, theirs.storage)
        for cache in (ours, theirs):
            cache.commit()


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_merged_passes_compile_too():
    torch.compiler.reset()
    student = make_student(**ROLLING, num_layers=2)
    noisy, clean, embeds = make_inputs(7)
    text, times = student.encode_text(embeds), torch.tensor([[0.0] * 3 + [700.0] * 3] * 2)
    run = torch.compile(student.forward_chunk, fullgraph=True)
    theirs, ours = student.new_cache(2, 4, 6), student.new_cache(2, 4, 6)
    for cache in (theirs, ours):
        student.forward_chunk(noisy[0], times[:, 3:], text, cache)
    for index, (x, x0) in enumerate(zip(noisy[1:], clean[:-1], strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=index >= 4):
            got = run(x, times, text, ours, clean=x0)
        torch.testing.assert_close(got, student.forward_chunk(x, times, text, theirs, clean=x0))
        torch.testing.assert_close(ours.storage, theirs.storage)


@pytest.mark.usefixtures("one_thread")
def test_a_compiled_step_of_training_has_the_eager_gradients():
    torch.compiler.reset()
    student = make_student(**ROLLING, num_layers=1).train()
    noisy, clean, embeds = make_inputs(3)
    t = torch.full((2,), 700.0)

    def step(x, cache):
        return student.forward_chunk(x, t, student.encode_text(embeds), cache, write=False)

    compiled = torch.compile(step)
    cache = student.new_cache(2, 4, 6)
    for x, x0 in zip(noisy, clean, strict=True):
        grads = []
        for run in (compiled, step):
            student.zero_grad()
            run(x, cache).square().mean().backward()
            grads.append({name: p.grad.clone() for name, p in student.named_parameters()})
        torch.testing.assert_close(*grads)
        with torch.no_grad():
            student.forward_chunk(x0, torch.zeros(2), student.encode_text(embeds), cache)
        cache.commit()
