"""The predictions against closed forms, the kernels' sources, and the page that is in the repository."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.prediction import kernels, page, streaming, variants
from stream_r1.estimate.devices import DEVICES
from stream_r1.estimate.roofline import seconds
from stream_r1.estimate.work import Work, count, exchanged_bytes, fake_tensors, total_bytes, total_flops
from stream_r1_kernels import backends, dispatch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text()
CUDA = ROOT / "csrc" / "cuda"


@pytest.fixture(scope="module")
def on_h100() -> streaming.ChunkWork:
    return streaming.ours(DEVICES["H100"])


def test_a_chunk_does_the_flops_of_five_passes(on_h100: streaming.ChunkWork) -> None:
    tokens, keys, dim, ffn, layers, text = 3 * 30 * 52, 9 * 30 * 52, 1536, 8960, 30, 512
    attended = 5 * layers * 4 * tokens * (keys + text) * dim
    assert total_flops([w for w in on_h100.student if w.engine == "attention"]) == attended
    blocks = 5 * layers * 2 * tokens * (6 * dim**2 + 2 * dim * ffn)  # q, k, v, out; q, out; up, down
    patches = 5 * 2 * 2 * tokens * 16 * 4 * dim
    matmuls = total_flops([w for w in on_h100.student if w.engine == "matmul"])
    assert matmuls == blocks + patches  # timesteps were read before
    assert 38e12 < total_flops(on_h100.decoder) < 40e12  # Wan's decoder, folded upsampling


def test_ops_are_counted_with_the_backends_of_the_gpu(on_h100: streaming.ChunkWork) -> None:
    ours = {w.op.removeprefix("stream_r1.") for w in on_h100.student if w.op.startswith("stream_r1.")}
    assert ours == {"renew_sink_", "qk_norm_rotary_into", "modulated_norm", "gated_add", "rms_norm"}
    large = {w.op for w in on_h100.student if w.engine == "elementwise" and w.bytes > 1e7}
    # GELU is in a matmul, a matmul writes values into the cache, norms are one pass: the residual is left
    assert {op for op in large if not op.startswith("stream_r1.")} == {"aten.add"}
    assert streaming.attention_backend(DEVICES["H100"]) == "sdpa"
    a100 = streaming.ours(DEVICES["A100"], num_layers=1)
    own = [w for w in a100.student if w.op == "stream_r1.cached_chunk_attention"]
    assert sum(w.calls for w in own) == 5  # the text is attended to by torch's own on every GPU
    q = torch.zeros(1, 4, 2, 8)
    assert backends.resolve("auto", "cached_chunk_attention", q, q, q) == "cpu"  # as before


def test_the_published_flow_does_the_same_matmuls_and_moves_more() -> None:
    settings = {"num_layers": 2}
    ours, published = streaming.ours(DEVICES["A100"], **settings), streaming.published(**settings)
    for engine in ("matmul", "attention"):
        both = [total_flops([w for w in each.student if w.engine == engine]) for each in (ours, published)]
        assert both[0] == pytest.approx(both[1], rel=1e-3)  # timesteps are one a chunk, or one a frame
    assert total_bytes(published.student) > 2 * total_bytes(ours.student)


def test_the_share_of_convolutions_gives_the_published_time_of_the_decoder() -> None:
    with fake_tensors():
        work = streaming.diffusers_decoder(21, 90, 160)
    assert seconds(work, DEVICES["A100"]) == pytest.approx(page.FITTED_SECONDS, rel=0.03)


def test_renewing_the_sink_touches_two_chunks_of_the_buffer() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    with fake_tensors():
        storage = torch.zeros(2, 2, 1, 90, 3, 8, dtype=bf16)
        k, v = (torch.zeros(2, 1, 10, 3, 8, dtype=fp32) for _ in range(2))
        phase = torch.zeros(4)

        def renew(ema: float | None) -> list[Work]:
            values = None if ema is None else v
            return count(
                lambda: torch.ops.stream_r1.renew_sink_(
                    storage, k, values, 10, ema, False, phase, phase, phase, phase
                )
            )

        (averaged,), (moved,) = renew(0.9), renew(None)
    chunk = 2 * 10 * 3 * 8  # numbers of keys, of both layers
    assert averaged.bytes == 2 * (2 * chunk + 2 * 4 * chunk + 2 * chunk)  # evicted, kept twice, seen
    assert moved.bytes == 4 * chunk + 2 * chunk


def test_launches_are_those_of_the_sources() -> None:
    def constant(file: str, name: str) -> int:
        found = re.search(rf"\b{name} = (\d+)", (CUDA / file).read_text())
        assert found is not None, name
        return int(found[1])

    warps = [
        ("modulated_norm", "kNormWarps"),
        ("qk_norm_rotary", "kRotaryWarps"),
        ("gated_add", "kGateWarps"),
    ]
    warps += [("dmd", "kDmdWarps"), ("saliency", "kMapWarps")]
    assert constant("rms_norm_silu.cuh", "kSiluThreads") == 256
    assert {32 * constant(f"{file}.cuh", name) for file, name in warps} == {256}
    assert constant("saliency.cuh", "kBandThreads") == 128
    assert {constant("sink.cuh", "kSinkThreads"), constant("attention.cuh", "kThreads")} == {256}
    queries, keys = constant("attention.h", "kBlockQueries"), constant("attention.h", "kTileKeys")
    assert "return (kQueries + 2 * kKeys) * kHeadDim * 2;" in (CUDA / "attention.cuh").read_text()
    for width in (64, 128):
        assert kernels.DYNAMIC[f"attention_bf16_{width}"] == (queries + 2 * keys) * width * 2
    sizes = kernels.sizes()
    assert sizes["region_saliency_bf16"]["sm_80"].threads == 128
    assert sizes["attention_bf16_128"]["sm_90a"].shared == 65536


def test_every_op_with_cuda_kernels_is_on_the_page() -> None:
    with fake_tensors():
        found = kernels.ops()
    for op in found:
        assert f"| `{op.op}`, {op.size} | {op.work.bytes / 1e6:.1f} |" in PAGE
    names = {op.op.removesuffix("_backward").removesuffix("_into") for op in found}
    assert names == set(dispatch.OPS) - {*dispatch.CPU_ALONE}


def test_the_page_is_what_the_command_writes(on_h100: streaming.ChunkWork) -> None:
    """To a tenth: the code that is counted changes, and the page has to be written again by then."""
    row = next(line for line in PAGE.splitlines() if line.startswith("| H100 | sdpa |"))
    fps, without_decoding = (float(cell) for cell in row.strip("| ").split(" | ")[-2:])
    assert fps == pytest.approx(on_h100.fps(DEVICES["H100"]), rel=0.1)
    assert without_decoding == pytest.approx(12 / on_h100.seconds(DEVICES["H100"])[0], rel=0.1)


def test_ways_to_make_a_chunk(on_h100: streaming.ChunkWork) -> None:
    h100 = DEVICES["H100"]
    found = {(v.steps, v.linear, v.gpus): v for v in variants.variants(h100)}
    passes = total_flops([w for w in on_h100.student if w.engine in ("matmul", "attention")]) / 5
    for (steps, _, gpus), v in found.items():
        own = [w for w in v.wan.student if w.engine in ("matmul", "attention")]
        assert total_flops(own) == pytest.approx((steps + 1) * passes / gpus, rel=1e-3)
    assert total_flops(found[4, "bfloat16", 1].tiny.decoder) < total_flops(on_h100.decoder) / 10
    for v in found.values():
        (row,) = [
            line for line in PAGE.splitlines() if line.startswith(f"| {v.steps} | {v.linear} | {v.gpus} |")
        ]
        wan, tiny = (float(cell) for cell in row.strip("| ").split(" | ")[-2:])
        assert wan == pytest.approx(v.wan.fps(h100), rel=0.1)
        assert tiny == pytest.approx(v.tiny.fps(h100), rel=0.1)


def test_every_section_says_that_it_is_a_prediction() -> None:
    headings = [line for line in PAGE.splitlines() if line.startswith("#")]
    assert len(headings) > 5
    assert all("prediction" in heading.lower() for heading in headings)


def test_a_shared_chunk_is_a_part_of_its_work_and_the_bytes_that_are_sent(
    on_h100: streaming.ChunkWork,
) -> None:
    """Queries, keys, values and results of every layer and pass, and the head's patches."""
    gpus, tokens, dim = 4, 3 * 30 * 52, 1536
    shared = streaming.ours(DEVICES["H100"], gpus)
    own, others = tokens // gpus, gpus - 1
    exchanged = 5 * (30 * 4 * own * dim * 2 * others // gpus + others * own * 64 * 2)
    assert exchanged_bytes(shared.student) == exchanged
    for engine in ("attention", "matmul"):
        part, whole = (
            total_flops([w for w in each.student if w.engine == engine]) for each in (shared, on_h100)
        )
        assert gpus * part == whole
    assert shared.decoder == on_h100.decoder
