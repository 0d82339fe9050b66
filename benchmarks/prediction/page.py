"""docs/gpu.md from the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.prediction.kernels import OpWork
from benchmarks.prediction.streaming import ChunkWork
from benchmarks.prediction.variants import Variant
from stream_r1.estimate.devices import DEVICES, Device
from stream_r1.estimate.roofline import ASSUMED, KernelSize, limit, seconds, seconds_a_call, tile_share
from stream_r1.estimate.work import Work, exchanged_bytes, total_bytes, total_flops

PUBLISHED_FPS = 23.1  # Stream-R1 (2605.03849), which samples as Reward Forcing does; H100, 832 x 480
BEST_FPS = 34.9  # the highest found for a student of this size, at this resolution
SHARED = (1, 2, 4)  # GPUs, divisors of 12 heads
FITTED_SECONDS = 10.3  # of Wan 2.1's decoder, 81 frames of 720p on an A800


@dataclass(frozen=True)
class Predictions:
    """What the page is made of.

    `ours` by GPU; `shared`: the work of the first of so many H100s; `fp8` by GPU that has it, without and
    with keys and values in it; `decoder` is the decoding that the share of convolutions was fitted to.
    """

    ours: Mapping[str, ChunkWork]
    shared: Mapping[int, ChunkWork]
    fp8: Mapping[str, tuple[ChunkWork, ChunkWork]]
    variants: Sequence[Variant]
    published: ChunkWork
    decoder: Sequence[Work]
    attention: Mapping[str, str]  # GPU -> the backend that "auto" takes in sampling
    ops: Sequence[OpWork]
    sizes: Mapping[str, Mapping[str, KernelSize]]


def markdown(p: Predictions) -> str:
    sections = (
        _head(),
        _sampler(p),
        _reach(p),
        _shared(p),
        _fp8(p),
        _check(p),
        _where(p),
        _ops(p),
        _occupancy(p),
        _assumptions(p),
    )
    return "\n\n".join(sections) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head() -> str:
    return """# GPUs: a prediction

No GPU has run this project's kernels yet. Every number on this page is a prediction: work that is counted
op by op from the code that would run, at the rates of datasheets, of which kernels are assumed to reach a
share. `python -m benchmarks.prediction` writes the page; `make gpu-check` on a machine with a GPU
measures what is predicted here and writes `docs/gpu-measured.md`."""


def _sampler(p: Predictions) -> str:
    rows = []
    for name, chunk in p.ours.items():
        device = DEVICES[name]
        student, decoder = chunk.seconds(device)
        without = 12 / student
        cells = [f"{1e3 * student:.0f}", f"{1e3 * decoder:.0f}", f"{chunk.fps(device):.1f}", f"{without:.1f}"]
        rows.append([name, p.attention[name], *cells])
    calls = sum(w.calls for w in next(iter(p.ours.values())).student)
    head = ["GPU", "attention", "student, ms", "decoder, ms", "predicted FPS", "without decoding"]
    launched = 1e3 * calls * ASSUMED.dispatch
    return f"""## Prediction: the sampler of Wan 2.1 1.3B

One stream of 832 x 480, all in bfloat16: chunks of 3 latent frames (12 frames of video), 4 denoising
passes and the pass that leaves keys and values, a window of 9 latent frames with an averaged sink of 3,
Wan's decoder. Predicted time of one chunk with a full window:

{table(head, rows)}

The student is counted on each GPU with the backends that `auto` takes there. CUDA graphs change nothing
in this prediction: starting the student's {calls} ops of a chunk one by one is taken to need
{launched:.0f} ms of Python, which is hidden while the GPU needs longer. They matter for smaller models
and for processors that are slower than that.

Published for an H100: {PUBLISHED_FPS} FPS (Stream-R1, 2605.03849, whose data flow is the next
table's); the highest figure that we found for a student of this size at this resolution is {BEST_FPS}.
How the second was measured, we do not know."""


def _reach(p: Predictions) -> str:
    device, rows = DEVICES["H100"], []
    for v in p.variants:
        student, wan = v.wan.seconds(device)
        _, tiny = v.tiny.seconds(device)
        cells = [f"{1e3 * student:.0f}", f"{v.wan.fps(device):.1f}", f"{v.tiny.fps(device):.1f}"]
        rows.append([str(v.steps), v.linear, str(v.gpus), *cells])
    head = ["steps", "linear layers", "H100s", "student, ms", "FPS, Wan's decoder", "FPS, tiny decoder"]

    def reaching(wanted: float, decoder: str, found: Iterable[Variant]) -> str:
        rates = {v.name: getattr(v, decoder).fps(device) for v in found}
        there = [f"{name} ({fps:.0f})" for name, fps in rates.items() if fps >= wanted]
        return ", ".join(there) if there else f"none of these (at most {max(rates.values()):.0f})"

    alone = [v for v in p.variants if v.gpus == 1 and v.steps == 4]
    return f"""## Prediction: what reaches 45 and 80 frames a second

On H100s, all but the linear layers in bfloat16. A chunk takes Wan's decoder
{1e3 * wan:.0f} ms and the tiny one (TAEHV) {1e3 * tiny:.0f} ms, on one GPU, before the next chunk begins.

{table(head, rows)}

- 45 FPS on one H100 with 4 steps: with Wan's decoder {reaching(45, "wan", alone)}, with the tiny one
  {reaching(45, "tiny", alone)}.
- 45 FPS with Wan's decoder: {reaching(45, "wan", p.variants)}.
- 80 FPS with the tiny decoder: {reaching(80, "tiny", p.variants)}.

How good two steps look is another question: it takes a student that was distilled for them."""


def _shared(p: Predictions) -> str:
    device, rows, least = DEVICES["H100"], list[list[str]](), 1e6 * ASSUMED.collective
    keys = 2 * 2 * 9 * 1560 * 1536 * 30  # bytes: K and V, of a window, of all layers
    for gpus, chunk in p.shared.items():
        student, _ = chunk.seconds(device)
        sent = [w for w in chunk.student if w.engine == "link"]
        cells = [f"{1e3 * student:.0f}", f"{1e3 * seconds(sent, device, graph=True):.0f}"]
        cells += [f"{exchanged_bytes(sent) / 1e6:.0f}", f"{keys / gpus / 1e9:.1f}"]
        rows.append([str(gpus), *cells, f"{chunk.fps(device):.1f}", f"{12 / student:.1f}"])
    head = ["GPUs", "student, ms", "of it all-to-all, ms", "MB to each", "keys and values, GB each"]
    head += ["predicted FPS", "without decoding"]
    return f"""## Prediction: one stream on several H100s

`--sequence-parallel N` ([sampling](sampling.md)): the same chunk, whose tokens and heads N GPUs of a machine
share; the first one decodes.

{table(head, rows)}

Links move {device.link / 2e9:.0f} GB/s in each direction (datasheet). Collectives are assumed to
reach {ASSUMED.link:.0%} of that, and to take {least:.0f} µs at least, while nothing else runs. Each GPU
starts as many ops as one alone, and more."""


def _fp8(p: Predictions) -> str:
    rows = []
    for name, (linear, both) in p.fp8.items():
        device = DEVICES[name]
        cells = []
        for chunk in (p.ours[name], linear, both):
            cells += [f"{1e3 * chunk.seconds(device)[0]:.0f}", f"{chunk.fps(device):.1f}"]
        rows.append([name, *cells])
    head = ["GPU", "bfloat16: student, ms", "FPS", "linear layers: student, ms", "FPS"]
    head += ["keys and values too: student, ms", "FPS"]
    return f"""## Prediction: the sampler in FP8

The same stream with `--quantize fp8`, and with `--cache-dtype fp8` on top, which saves memory and costs
time: keys and values are dequantised by torch's ops, a layer at a time ([FP8](fp8.md)).

{table(head, rows)}"""


def _check(p: Predictions) -> str:
    rows = []
    for name, device in DEVICES.items():
        student, decoder = p.published.seconds(device)
        ratio = p.ours[name].fps(device) / p.published.fps(device)
        measured = f"{PUBLISHED_FPS}" if name == "H100" else ""
        cells = [f"{1e3 * student:.0f}", f"{1e3 * decoder:.0f}", f"{p.published.fps(device):.1f}"]
        rows.append([name, *cells, measured, f"{ratio:.2f}"])
    off = p.published.fps(DEVICES["H100"]) / PUBLISHED_FPS - 1
    error = f"{abs(off):.0%} {'below' if off < 0 else 'above'}"
    head = ["GPU", "student, ms", "decoder, ms", "predicted FPS", "published FPS", "ours / this, predicted"]
    return f"""## A check of the prediction: the published data flow

The same model on the data flow of the published code (`benchmarks/published_flow.py`: keys kept
unrotated, the window concatenated and rotated in complex128 in each pass, every op in eager torch) with
diffusers' decoder:

{table(head, rows)}

For the H100 the prediction is {error} what is published: so wrong, at least, are the other numbers likely
to be. The last column compares a prediction with a prediction, in which common errors cancel in part."""


KINDS = (
    (
        "self-attention",
        lambda w: "cached_chunk_attention" in w.op or (w.engine == "attention" and w.bytes > 6e7),
    ),
    ("cross-attention", lambda w: w.engine == "attention"),
    ("matmuls", lambda w: w.engine == "matmul"),
    ("kernels of this project", lambda w: w.op.startswith("stream_r1.")),
    ("element-wise ops of torch", lambda w: w.engine == "elementwise"),
)


def _where(p: Predictions) -> str:
    device, rows = DEVICES["H100"], []
    for label, work in (("ours", p.ours["H100"].student), ("published flow", p.published.student)):
        left = list(work)
        for kind, belongs in KINDS:
            part, left = [w for w in left if belongs(w)], [w for w in left if not belongs(w)]
            if part:
                rows.append([f"student, {label}", kind, *_sums(part, device)])
        assert not left
    for label, work in (("ours", p.ours["H100"].decoder), ("diffusers", p.published.decoder)):
        for kind, wanted in (("convolutions", True), ("everything else", False)):
            part = [w for w in work if (w.engine == "convolution") == wanted]
            rows.append([f"decoder, {label}", kind, *_sums(part, device)])
    head = ["", "ops", "calls", "TFLOP", "GB", "predicted ms"]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""## Prediction: where the time of a chunk goes, on an H100

| {" | ".join(head)} |
|---|---|---:|---:|---:|---:|
{text}"""


def _sums(part: Sequence[Work], device: Device) -> list[str]:
    busy = seconds(part, device, graph=True)
    calls = sum(w.calls for w in part)
    return [
        str(calls),
        f"{total_flops(part) / 1e12:.1f}",
        f"{total_bytes(part) / 1e9:.0f}",
        f"{1e3 * busy:.0f}",
    ]


def _ops(p: Predictions) -> str:
    rows = []
    for op in p.ops:
        flops = f"{op.work.flops / 1e9:.0f}" if op.work.flops else "-"
        times = [
            f"{1e6 * seconds_a_call(op.work, device):.0f} {limit(op.work, device)[0]}"
            for device in DEVICES.values()
        ]
        rows.append([f"`{op.op}`, {op.size}", f"{op.work.bytes / 1e6:.1f}", flops, *times])
    head = ["op", "MB", "GFLOP", *(f"{name}, µs" for name in DEVICES)]
    return f"""## Prediction: each op with CUDA kernels

At the sizes of 1.3B, in bfloat16, batch 1: sampling first, then training. MB are inputs read once and
outputs written once; GFLOP are those of matrix products. The letter after a predicted time is what limits
it: **m**emory, **c**ompute, **l**aunch.

{table(head, rows)}"""


def _occupancy(p: Predictions) -> str:
    rows = []
    for name, by_arch in p.sizes.items():
        cells = []
        for device in DEVICES.values():
            size = by_arch[device.architecture]
            cells.append(f"{size.resident_blocks(device)} ({size.occupancy(device):.0%})")
        one = by_arch["sm_90a"]
        rows.append([f"`{name}`", str(one.threads), str(one.registers), f"{one.shared}", *cells])
    head = ["kernel", "threads", "registers", "shared, bytes", *DEVICES]
    return f"""## Prediction: occupancy

Blocks that fit a processor at once, and the share of its warps that they are, from the registers and the
shared memory that the compiler reports (`tests/cuda/compiled.tsv`; the two columns are those of sm_90a)
and the launches' threads and dynamic shared memory. The time model above does not use them.

{table(head, rows)}"""


def _assumptions(p: Predictions) -> str:
    a = ASSUMED
    shares = [
        ["memory, share of the bandwidth", *[f"{a.memory:.2f}"] * len(DEVICES)],
        [
            "matmuls, share of the 16-bit tensor rate, by full rounds of tiles",
            *[f"{a.matmul:.2f}"] * len(DEVICES),
        ],
        ["matmuls in FP8, the same of the FP8 tensor rate", *[f"{a.matmul8:.2f}"] * len(DEVICES)],
        ["convolutions, share of the 16-bit tensor rate", *[f"{a.convolution:.2f}"] * len(DEVICES)],
        [
            "torch's attention, the same",
            *(f"{a.library_attention[d.capability]:.2f}" for d in DEVICES.values()),
        ],
        ["our attention, the same", *(f"{a.own_attention[d.capability]:.2f}" for d in DEVICES.values())],
        ["bandwidth, TB/s (datasheet)", *(f"{d.bandwidth / 1e12:.2f}" for d in DEVICES.values())],
        ["16-bit tensor rate, TFLOP/s (datasheet)", *(f"{d.matmul16 / 1e12:.0f}" for d in DEVICES.values())],
        [
            "FP8 tensor rate, TFLOP/s (datasheet)",
            *("-" if d.matmul8 is None else f"{d.matmul8 / 1e12:.0f}" for d in DEVICES.values()),
        ],
    ]
    fitted, least = seconds(p.decoder, DEVICES["A100"]), 1e6 * a.kernel
    lost = 1 - tile_share(4680, 1536, DEVICES["H100"].processors)
    return f"""## Assumptions of the prediction

{table(["", *DEVICES], shares)}

- An op takes the longer of its bytes at the bandwidth's share and its flops at the rate's share, and
  {least:.0f} µs at least. Ops run one after the other; nothing overlaps; nothing is found in the L2
  cache. A stream decodes a chunk beside the denoising of the next one: what that gains is not predicted,
  for both keep a GPU busy. It can't be more than the shorter of the two.
- Bytes are inputs read once and outputs written once. Kernels that read an input twice, or spill, take
  longer.
- None of the shares was measured by this project. Those of attention lean on what FlashAttention-2 and
  cuDNN publish; ours uses mma.sync, which reaches a third of an H100's tensor rate and less of a B200's.
  The share of convolutions is fitted: with it diffusers' decoder takes {fitted:.1f} s for 81 frames of
  720p on an A100, and {FITTED_SECONDS} s is published for an A800.
- On compute capability 9.0 and later `auto` takes torch's attention for sampling. That choice rests on
  these shares, so it is a prediction too.
- Matmuls are cut into tiles of 128 x 256 or 128 x 128, one a processor at a time: what tiles have past the
  edges, and processors without a tile in the last round, cost as much. The projections of a chunk lose
  {lost:.0%} to that on an H100.
- Clocks hold; no other work is on the GPU; the VAE runs in bfloat16, the default on a GPU, as in the
  published code. That the published figure includes decoding is our reading of it.
- Writing the mp4, text encoding and the first chunks, whose window is not full, are left out."""
