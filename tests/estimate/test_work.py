"""Counted work against torch's own counter, closed forms, and the sizes of what is moved."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from stream_r1.estimate import streaming
from stream_r1.estimate.devices import DEVICES
from stream_r1.estimate.live import LiveBytes, Reading
from stream_r1.estimate.memoize import alike_pieces
from stream_r1.estimate.roofline import ASSUMED, seconds_a_call
from stream_r1.estimate.work import (
    FP8_PRODUCT,
    Watching,
    Work,
    cast,
    count,
    fake_tensors,
    grown_work,
    repeat,
    total_bytes,
    total_flops,
)
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE
from stream_r1_kernels import ChunkMask, Past, cached_chunk_attention, chunk_attention, gated_add

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 3,
    "text_len": 6,
    "frames_per_chunk": 2,
    "window_frames": 6,
    "sink_frames": 2,
}


def test_a_student_of_real_tensors_does_as_many_flops() -> None:
    """As torch counts them while they run, attention by the op's own formula; and by hand."""
    dim, ffn, layers, batch = 24, SMALL["ffn_dim"], SMALL["num_layers"], 2

    def inputs(student: CausalWanTransformer) -> tuple:
        x, t, text = torch.zeros(batch, 2, 4, 6, 8), torch.zeros(batch), torch.zeros(batch, 6, 8)
        return x, t, student.encode_text(text), student.new_cache(batch, 6, 8)

    student = CausalWanTransformer(**SMALL).eval()
    with torch.no_grad():
        x, t, text, cache = inputs(student)
        with FlopCounterMode(display=False) as counter:
            student.forward_chunk(x, t, text, cache)
    with fake_tensors():
        student = CausalWanTransformer(**SMALL).eval()
        fake = inputs(student)
        work = count(lambda: student.forward_chunk(*fake))
    counted = [w for w in work if w.engine in ("matmul", "attention")]
    assert total_flops(counted) == counter.get_total_flops()

    tokens = 2 * 12
    attended = 4 * batch * tokens * dim * (tokens + SMALL["text_len"]) * layers  # itself, the text
    assert total_flops([w for w in work if w.engine == "attention"]) == attended
    blocks = layers * batch * tokens * (12 * dim**2 + 4 * dim * ffn)  # q, k, v, out; q, out; up, down
    head = 2 * batch * tokens * 2 * (4 * 4) * dim  # patches in and out
    time = 2 * batch * (16 * dim + dim**2 + 6 * dim**2)
    matmuls = [w for w in work if w.engine == "matmul"]
    assert total_flops(matmuls) == blocks + head + time


def test_a_later_chunk_sees_more() -> None:
    with fake_tensors():
        student = CausalWanTransformer(**SMALL)
        x, t, text = torch.zeros(1, 2, 4, 6, 8), torch.zeros(1), torch.zeros(1, 6, 8)
        context, cache = student.encode_text(text), student.new_cache(1, 6, 8)
        flops = []
        for _ in range(5):
            work = count(lambda: student.forward_chunk(x, t, context, cache))
            flops.append(total_flops([w for w in work if w.op.endswith("cached_chunk_attention")]))
            cache.commit()
    tokens, text_len = 2 * 12, SMALL["text_len"]
    a_key = 4 * tokens * 24 * SMALL["num_layers"]
    seen = [tokens * chunks + text_len for chunks in (1, 2, 3, 3, 3)]  # a window of three chunks; the text
    assert flops == [a_key * keys for keys in seen]


def test_backward() -> None:
    with fake_tensors():
        q, k, v = (torch.zeros(2, 10, 3, 8, requires_grad=True) for _ in range(3))
        past = Past(torch.zeros(2, 7, 3, 8), torch.zeros(2, 7, 3, 8), False)
        out = cached_chunk_attention(q, k, v, past)
        work = count(lambda: out.sum().backward())
    a_matmul = 2 * 2 * 3 * 10 * 8  # per key
    assert total_flops(work) == a_matmul * (5 * 10 + 3 * 7)


MASKS = [
    ChunkMask(4, 2),
    ChunkMask(4, 2, window_frames=3, sink_frames=1),
    ChunkMask(4, 3, window_frames=3, first_chunk_frames=1),
    ChunkMask(4, 2, window_frames=2, sink_frames=3, teacher_forcing=True),
]


@pytest.mark.parametrize("mask", MASKS)
def test_visible_pairs(mask: ChunkMask) -> None:
    for frames in (1, 2, 5, 8):
        tokens = frames * 4 * (2 if mask.teacher_forcing else 1)
        assert mask.visible_pairs(tokens) == int(mask.visible(tokens).sum())
        with fake_tensors():
            q = torch.zeros(1, tokens, 2, 8, requires_grad=True)
            work = count(lambda: chunk_attention(q, q, q, mask).sum().backward())  # noqa: B023
        assert total_flops(work) == 2 * 2 * 8 * mask.visible_pairs(tokens) * (2 + 5)


def test_bytes() -> None:
    """Inputs once, outputs once; views and allocation cost nothing, what is broadcast counts once."""
    with fake_tensors():
        x, y = torch.zeros(10, 100), torch.zeros(1, 100).expand(10, 100)
        for run, numbers in (
            (lambda: x + y, 1000 + 100 + 1000),
            (lambda: x.t().view(100, 2, 5)[3], 0),
            (lambda: torch.empty(1000), 0),
            (lambda: torch.zeros(1000), 1000),
            (lambda: x.copy_(y), 1000 + 100),
            (lambda: x.add_(1), 1000 + 1000),
            (lambda: x[:5].contiguous().view(-1), 0),
            (lambda: x.t().contiguous(), 2000),
        ):
            assert total_bytes(count(run)) == 4 * numbers
        z = torch.zeros(2, 6, 8, dtype=torch.bfloat16)
        work = count(lambda: gated_add(z, z, torch.zeros(2, 3, 8)))
    assert [(w.op, w.bytes) for w in work if w.op.startswith("stream_r1")] == [
        ("stream_r1.gated_add", 2 * 2 * 96 + 4 * 48)
    ]


def test_equal_calls_are_one_line() -> None:
    with fake_tensors():
        a = torch.zeros(3, 4)
        work = count(lambda: [a @ a.t() for _ in range(5)])
    assert [(w.op, w.calls, w.flops) for w in work] == [("aten.mm", 5, 2 * 3 * 3 * 4)]
    assert total_flops(repeat(work, 2)) == 2 * total_flops(work)


def test_cast_keeps_what_diffusers_keeps() -> None:
    with fake_tensors():
        student = cast(CausalWanTransformer(**SMALL), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32


def test_a_deep_students_chunk_follows_from_two_shallow_ones() -> None:
    """The sink's renewal too, which is one call for all layers."""
    rolling = SMALL | {"positions": "window", "sink_ema": 0.9}
    with fake_tensors(), streaming.as_on(DEVICES["H100"]):
        one, two, five = (
            streaming._student_work(rolling | {"num_layers": n}, (6, 8), [1000]) for n in (1, 2, 5)
        )
    assert any(w.op == "stream_r1.renew_sink_" for w in five)
    assert set(grown_work(one, one, two, 4)) == set(five)


def test_alike_pieces_are_decoded_once_and_counted_each_time() -> None:
    def decoded(alike: bool) -> tuple[set[Work], set[Work], Reading]:
        with fake_tensors() as mode, torch.no_grad():
            vae = VideoVAE(cast(AutoencoderKLWan(base_dim=8, num_res_blocks=1), torch.bfloat16))
            vae = alike_pieces(vae) if alike else vae
            live, latents = LiveBytes(), torch.zeros(1, 5, 16, 60, 104)  # of which one frame is a piece
            for tensor in (*vae.parameters(), *vae.buffers(), latents):
                live.ignore(mode.from_tensor(tensor))
            with Watching(live):
                whole, reading = live.read(lambda: count(lambda: vae.decode(latents)))
            decoder = vae.stream_decoder(1)
            first, second = (count(lambda: decoder.decode(latents[:, :3])) for _ in range(2))
        assert total_flops(first) < total_flops(second)
        return set(whole), set(second), reading

    assert decoded(alike=True) == decoded(alike=False)


def test_a_chunk_in_fp8_does_the_same_products_in_half_the_bytes() -> None:
    sizes = SMALL | {"num_layers": 1, "attention_head_dim": 16, "ffn_dim": 48}
    with fake_tensors(), streaming.as_on(DEVICES["H100"]):
        whole, fp8 = (
            streaming._student_work(sizes, (6, 8), [1000], quantize=quantize) for quantize in (None, "fp8")
        )
    products = [[w for w in each if w.engine == "matmul"] for each in (whole, fp8)]
    assert total_flops(products[0]) == total_flops(products[1])
    narrow = [w for w in products[1] if w.op == FP8_PRODUCT]
    assert sum(w.calls for w in narrow) == 2 * 8  # of a denoising pass and the cache's, 8 layers of a block
    made = {w.op for w in fp8} - {w.op for w in whole}
    made.remove("aten.copy_")  # of values into the cache, where a matmul in bfloat16 writes them
    assert made == {FP8_PRODUCT, "stream_r1.modulated_norm_fp8", "stream_r1.quantize_rows"}


def test_the_rate_of_fp8() -> None:
    work = Work(FP8_PRODUCT, "matmul", torch.bfloat16, flops=10**15, bytes=0)
    expected = 1e15 / (1979e12 * ASSUMED.matmul8)
    assert seconds_a_call(work, DEVICES["H100"]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected a GPU with FP8 tensor cores, got A100"):
        seconds_a_call(work, DEVICES["A100"])
    with pytest.raises(ValueError, match="quantize: expected None on A100, got 'fp8'"):
        streaming.chunk_work(SMALL, {}, (6, 8), [1000], DEVICES["A100"], quantize="fp8")


def test_keys_and_values_of_a_stream_are_those_of_the_sizes() -> None:
    sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "window_frames": 9}
    numbers = 30 * 2 * 9 * 30 * 52 * 12 * 128
    assert streaming.cache_bytes(sizes, (60, 104)) == 2 * numbers
    assert streaming.cache_bytes(sizes, (60, 104), torch.float8_e4m3fn) == numbers + 4 * numbers // 128
