"""Proof that the execution tests can fail: faults are planted in the kernels' sources, each must be caught.

docs/planted-faults.md lists them. A fault is caught by a wrong result, or by the executor (a race, a bad
access).
"""

from __future__ import annotations

from collections.abc import Callable

import exact
import pytest
import toolchain
import torch
from attention_inputs import masked_attention
from machine import Machine

from ptx_executor import PtxError
from stream_r1_kernels import ChunkMask, RotaryGrid
from stream_r1_kernels.dmd.reference import dmd_loss_reference
from stream_r1_kernels.fp8.reference import modulated_norm_fp8_reference, quantize_rows_reference
from stream_r1_kernels.norm.reference import (
    gated_add_reference,
    modulated_norm_reference,
    rms_norm_silu_reference,
)
from stream_r1_kernels.rotary.reference import norm_rotary
from stream_r1_kernels.saliency.reference import intra_weights_reference, region_saliency_reference
from stream_r1_kernels.sink import renew_sink_


def kernel(name: str, header: str, args: str, body: str) -> str:
    """A source file with one of the kernels."""
    return (
        f'#include "cuda/{header}.cuh"\nusing namespace stream_r1;\nusing namespace stream_r1::cuda;\n'
        f'extern "C" __global__ void {name}(const __grid_constant__ {args} args) {{ {body}(args); }}\n'
    )


def attention(machine: Machine, seed: int) -> None:
    q, k, v = (torch.randn(1, n, 1, 64).bfloat16() for n in (150, 200, 200))
    past_k, past_v = (torch.randn(1, 70, 1, 64).bfloat16() for _ in range(2))
    k *= torch.linspace(0.2, 4, 200)[:, None, None]  # growing scores: the running maximum moves
    out, lse = machine.run("cached_chunk_attention", q, k, v, past_k, past_v, 0.2, seed=seed)
    true = masked_attention(
        q.double(), torch.cat((past_k, k), 1).double(), torch.cat((past_v, v), 1).double(), 0.2
    )
    torch.testing.assert_close(out.double(), true[0], rtol=0, atol=0.02)
    torch.testing.assert_close(lse.double(), true[1], rtol=1e-5, atol=1e-5)


def split_attention(machine: Machine, seed: int) -> None:
    q, k, v = (torch.randn(1, n, 1, 64).bfloat16() for n in (10, 530, 530))
    out, lse = machine.run("cached_chunk_attention", q, k, v, None, None, 0.125, seed=seed, processors=4)
    true = masked_attention(q.double(), k.double(), v.double(), 0.125)
    torch.testing.assert_close(out.double(), true[0], rtol=0, atol=0.005)
    torch.testing.assert_close(lse.double(), true[1], rtol=1e-5, atol=1e-5)


def chunked_attention(machine: Machine, seed: int) -> None:
    mask = ChunkMask(20, 2, window_frames=3, sink_frames=1, first_chunk_frames=1, teacher_forcing=True)
    q, k, v = (torch.randn(1, 200, 1, 64).bfloat16() for _ in range(3))
    out, _ = machine.run("chunk_attention", q, k, v, mask.table(200), 0.125, seed=seed)
    true = masked_attention(q.double(), k.double(), v.double(), 0.125, mask.visible(200))[0]
    torch.testing.assert_close(out.double(), true, rtol=0, atol=0.02)


def rotary(machine: Machine, seed: int) -> None:
    cos, sin = RotaryGrid(10).phases(3, 2, 5, 7)
    q, k = (torch.randn(1, 70, 30).bfloat16() for _ in range(2))
    w = 1 + 0.1 * torch.randn(30)
    ours = machine.run("qk_norm_rotary", q, k, w, w, cos, sin, 3, 1e-6, seed=seed)
    for out, x in zip(ours, (q, k), strict=True):
        true = norm_rotary(x.double(), w.double(), cos.double(), sin.double(), 3, 1e-6)
        exact.assert_close(out, true, norm_rotary(x, w, cos, sin, 3, 1e-6))


def rotary_backward(machine: Machine, seed: int) -> None:
    cos, sin = RotaryGrid(10).phases(3, 2, 5, 7)
    x, w, up = torch.randn(1, 70, 30), 1 + 0.1 * torch.randn(30), torch.randn(1, 70, 3, 10)
    ours = machine.run("qk_norm_rotary_backward", up, up, x, x, w, w, cos, sin, 3, 1e-6, seed=seed)
    leaves = [x.double().requires_grad_(), w.double().requires_grad_()]
    true = torch.autograd.grad(norm_rotary(*leaves, cos.double(), sin.double(), 3, 1e-6), leaves, up.double())
    torch.testing.assert_close(ours[0].double(), true[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[2].double(), true[1], rtol=1e-4, atol=1e-4)


def norm(machine: Machine, seed: int) -> None:
    x, shift, scale = torch.randn(2, 12, 43).bfloat16() + 1, torch.randn(2, 3, 43), torch.randn(2, 3, 43)
    out = machine.run("modulated_norm", x, shift, scale, 1e-6, seed=seed)[0]
    true = modulated_norm_reference(x.double(), shift.double(), scale.double(), 1e-6)
    exact.assert_close(out, true, modulated_norm_reference(x, shift, scale, 1e-6))


def whole_norm(machine: Machine, seed: int) -> None:
    """More rows than warps fit at once, of whole packs, and wider than what a lane holds in registers."""
    x, shift, scale = (
        torch.randn(1, 60, 1800).bfloat16() + 1,
        torch.randn(1, 2, 1800),
        torch.randn(1, 2, 1800),
    )
    out = machine.run("modulated_norm", x, shift, scale, 1e-6, seed=seed)[0]
    true = modulated_norm_reference(x.double(), shift.double(), scale.double(), 1e-6)
    exact.assert_close(out, true, modulated_norm_reference(x, shift, scale, 1e-6))


def silu(machine: Machine, seed: int) -> None:
    x, before = 3 * torch.randn(2, 5, 96).bfloat16(), torch.randn(2, 3, 96).bfloat16()
    weight = 1 + torch.randn(96)
    out = machine.run("rms_norm_silu", x, weight, before, 1e-6, seed=seed)
    true = rms_norm_silu_reference(x.double(), weight.double(), before.double(), 1e-6)
    exact.assert_close(out, true, rms_norm_silu_reference(x, weight, before, 1e-6))


def gate(machine: Machine, seed: int) -> None:
    """Rows of whole packs, of which none starts at a multiple of 16 bytes: a slice of a longer tensor."""
    x, y = (torch.randn(4 * 48 + 1).bfloat16()[1:].view(1, 4, 48) for _ in "xy")
    gate = torch.randn(1, 2, 48)
    out = machine.run("gated_add", x, y, gate, seed=seed)
    exact.assert_close(
        out, gated_add_reference(x.double(), y.double(), gate.double()), gated_add_reference(x, y, gate)
    )


def gate_backward(machine: Machine, seed: int) -> None:
    y, gate, up = (
        torch.randn(1, 150, 40).bfloat16(),
        torch.randn(1, 1, 40),
        torch.randn(1, 150, 40).bfloat16(),
    )
    grad_y, grad_gate = machine.run("gated_add_backward", up, y, gate, seed=seed)
    leaves = [y.double().requires_grad_(), gate.double().requires_grad_()]
    true = torch.autograd.grad(gated_add_reference(torch.zeros_like(leaves[0]), *leaves), leaves, up.double())
    torch.testing.assert_close(grad_y.double(), true[0], rtol=0.01, atol=0.01)
    torch.testing.assert_close(grad_gate.double(), true[1], rtol=1e-4, atol=1e-4)


def dmd(machine: Machine, seed: int) -> None:
    x, fake, cond, uncond = (torch.randn(2, 2, 2, 96, 128) for _ in range(4))
    fake[0, 1, 1, 3, 3] = float("nan")
    mask = torch.rand(2, 2, 1, 96, 128) > 0.3
    loss, _, _ = machine.run("dmd_loss", x, fake, cond, uncond, 3.0, None, None, mask, seed=seed)
    fake = fake.nan_to_num()
    true = dmd_loss_reference(
        x.double(), fake.double(), cond.double(), uncond.double(), 3.0, None, None, mask
    )
    torch.testing.assert_close(loss.double(), true, rtol=1e-3, atol=0)  # one element of 98304 counts as 0


def dmd_in_place(machine: Machine, seed: int) -> None:
    """The buffer is one of the predictions."""
    x, fake, cond = (torch.randn(1, 2, 2, 8, 16) for _ in range(3))
    ours, theirs = fake.clone(), fake.clone()
    machine.run("dmd_gradient_", ours, x, ours, cond, None, 0.0, None, None, None, 1.0, seed=seed)
    leaf = x.double().requires_grad_()
    loss = dmd_loss_reference(leaf, fake.double(), cond.double(), None, 0.0, None, None, None)
    theirs = theirs.double() + torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def saliency(machine: Machine, seed: int) -> None:
    grads = torch.randn(1, 1, 9, 3, 4, 320).bfloat16()  # cells of more than one pack, of more than one warp
    ours = machine.run("region_saliency", grads, 3, 2, 20, seed=seed)
    torch.testing.assert_close(
        ours.double(), region_saliency_reference(grads.double(), 3, 2, 20), rtol=1e-5, atol=0
    )


def weights(machine: Machine, seed: int) -> None:
    maps, scores = torch.rand(2, 2, 3, 20, 30), torch.randn(2, 2)
    settings = (1.0, 0.15, 0.2, 1.0, 1.0, True, True)
    ours = machine.run("intra_weights", maps, scores, *settings, seed=seed)
    true = intra_weights_reference(maps.double(), scores.double(), *settings)
    torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5)


def sink(machine: Machine, seed: int) -> None:
    storage = torch.randn(2, 2, 1, 12, 2, 16).bfloat16()
    kept = [torch.randn(2, 1, 4, 2, 16) for _ in "kv"]
    phases = [*RotaryGrid(16).temporal_shift(-5), *RotaryGrid(16).temporal_shift(3)]
    ours, theirs = ([x.clone() for x in (storage, *kept)] for _ in range(2))
    machine.run("renew_sink_", *ours, 8, 0.9, False, *phases, seed=seed)
    renew_sink_(*theirs, 8, 0.9, False, *phases)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def quantise(machine: Machine, seed: int) -> None:
    x = torch.randn(1, 6, 300).bfloat16()
    ties = torch.arange(-480, 480).float()[:300] * 2.0**-9 + 2.0**-10
    x[0, 0] = ties.where(torch.arange(300) > 0, torch.tensor(448.0)).bfloat16()  # a scale of 1
    x[0, 1, :200] = torch.linspace(8, 16, 200).bfloat16()
    x[0, 1, 200] = 448
    for row in x[0, 2:]:
        row[torch.randint(300, ())] = 9
    data, scale = machine.run("quantize_rows", x, False, seed=seed)
    true = quantize_rows_reference(x)
    assert torch.equal(scale, true.scale)
    assert torch.equal(data.view(torch.uint8), true.data.view(torch.uint8))


def norm_fp8(machine: Machine, seed: int) -> None:
    x = 50 + torch.rand(1, 12, 33).bfloat16()
    shift, scale = torch.randn(2, 1, 3, 33).bfloat16().unbind(0)
    data, row_scale = machine.run("modulated_norm_fp8", x, shift, scale, 1e-6, seed=seed)
    true = modulated_norm_fp8_reference(x, shift, scale, 1e-6)
    torch.testing.assert_close(row_scale, true.scale, rtol=1e-3, atol=0)
    torch.testing.assert_close(data.float() * row_scale, true.dequantize(torch.float32), rtol=0.13, atol=0.01)


Probe = Callable[[Machine, int], None]

KERNELS = {
    attention: kernel("attention_bf16_64", "attention", "AttentionArgs", "attention_block<Bf16, 64>"),
    chunked_attention: kernel("attention_bf16_64", "attention", "AttentionArgs", "attention_block<Bf16, 64>"),
    split_attention: kernel("attention_combine_bf16", "attention", "AttentionArgs", "combine_parts<Bf16>"),
    rotary: kernel("norm_rotary_bf16", "qk_norm_rotary", "NormRotaryArgs", "norm_rotary<Bf16>"),
    rotary_backward: kernel(
        "norm_rotary_grad_x_fp32", "qk_norm_rotary", "NormRotaryArgs", "norm_rotary_grad_x<float>"
    ),
    norm: kernel("modulated_norm_bf16", "modulated_norm", "ModulatedNormArgs", "modulated_norm<Bf16>"),
    whole_norm: kernel("modulated_norm_bf16", "modulated_norm", "ModulatedNormArgs", "modulated_norm<Bf16>"),
    quantise: kernel("quantize_rows_bf16", "quantize_rows", "QuantizeRowsArgs", "quantize_rows<Bf16>"),
    norm_fp8: kernel(
        "modulated_norm_fp8_bf16", "modulated_norm", "ModulatedNormArgs", "modulated_norm_fp8<Bf16>"
    ),
    silu: kernel("rms_norm_silu_bf16", "rms_norm_silu", "RmsNormSiluArgs", "rms_norm_silu<Bf16, true>"),
    gate: kernel("gated_add_bf16", "gated_add", "GatedAddArgs", "gated_add<Bf16, Bf16>"),
    gate_backward: kernel(
        "gated_add_backward_bf16", "gated_add", "GatedAddArgs", "gated_add_backward<Bf16, Bf16>"
    ),
    dmd: kernel("dmd_distances_fp32", "dmd", "DmdArgs", "dmd_distances<float>")
    + 'extern "C" __global__ void dmd_directions_fp32(const __grid_constant__ DmdArgs args)'
    " { dmd_directions<float, float, false>(args); }\n",
    dmd_in_place: kernel("dmd_gradient_fp32", "dmd", "DmdArgs", "dmd_directions<float, float, true>"),
    saliency: kernel("region_saliency_bf16", "saliency", "RegionSaliencyArgs", "region_saliency<Bf16>"),
    sink: kernel("renew_sink_bf16_fp32", "sink", "RenewSinkArgs", "renew_sink<Bf16, float>"),
    weights: kernel("intra_weights_fuse", "saliency", "IntraWeightsArgs", "fuse_frame")
    + 'extern "C" __global__ void intra_weights_weigh(const __grid_constant__ IntraWeightsArgs args)'
    " { weigh_frame(args); }\n",
}


A, R, C, S, D = (f"cuda/{name}.cuh" for name in ("attention", "rows", "column_sums", "saliency", "dmd"))
QK, N, G, K = (f"cuda/{name}.cuh" for name in ("qk_norm_rotary", "modulated_norm", "gated_add", "sink"))
RMS, F8 = "cuda/rms_norm_silu.cuh", "cuda/fp8.cuh"

# Of each kernel and source: what is planted, in place of what.
FAULTS: dict[tuple[Probe, str], dict[str, tuple[str, str]]] = {
    (attention, A): {
        "no barrier before the first keys are read": ("__syncthreads();  // queries", "// queries"),
        "no barrier before the values are read": ("__syncthreads();  // the values", "// the values"),
        "no barrier before the values are overwritten": ("__syncthreads();  // the next keys", "// the next"),
        "a wait for one copy too few": (
            "multiply_keys(key_tile, lane);\n    prim::wait_for_copies<0>();",
            "multiply_keys(key_tile, lane);\n    prim::wait_for_copies<1>();",
        ),
        "a tile of keys loaded twice": (
            "if (index + 1 < last) start_keys(tile = visible.after(tile));",
            "start_keys(tile);",
        ),
        "one key too many in the last tile": (">= keys) scores", "> keys) scores"),
        "sums of values not scaled down": ("out[n][j] *= decay[j / 2];", ";"),
        "sum of weights not scaled down": ("sum[r] *= decay[r];", ""),
        "maximum over half of a row": ("top[r] = fmaxf(top[r], prim::exchange(top[r], 2));", ""),
        "pieces written where they are not read": ("first, piece),", "first, piece ^ 1),"),
        "keys of the wrong segment": ("row == nullptr ? tile.range : 1", "1"),
        "queries past the end are written": ("if (row >= present) continue;\n    uint16_t", "uint16_t"),
    },
    (split_attention, A): {
        "a part's weight left out": ("total += weight *", "total +="),
        "log-sum-exp of one part": ("shift + prim::log2(total)", "shift"),
    },
    (chunked_attention, A): {
        "every range begins where the first does": ("row[3 + 2 * tile.range]", "row[3]"),
        "tiles continue past the end of a range": (
            "while (tile.begin >= tile.end)",
            "while (tile.begin >= args.queries)",
        ),
    },
    (norm, R): {
        "a sum over half a warp": ("mask > 0; mask /= 2) value += ", "mask > 1; mask /= 2) value += "),
    },
    (norm, N): {
        "padding counts in the variance": ("if (j < count) squares", "squares"),
        "the next frame's modulation": ("frame = t / (args.tokens / args.frames)", "frame = t % args.frames"),
    },
    (whole_norm, R): {
        "a warp's last row left out": ("i < rows_a_warp && row", "i < rows_a_warp - 1 && row"),
        "a row past the end": ("row < rows; ++i", "row <= rows; ++i"),
        "a row for two warps": ("row += kWarps", "row += 1"),
        "a held pack used in place of the next": (
            "body(i, WholePack{}, to_pack(held_[n]))",
            "body(i, WholePack{}, to_pack(held_[n / 2 * 2]))",
        ),
        "packs that are not held left out": (
            "for (; i < width_; i += step_)",
            "for (; i + step_ < width_; i += step_)",
        ),
    },
    (gate, G): {
        "rows of part packs taken for whole ones": ("if (args.whole)", "if (true)"),
    },
    (dmd_in_place, D): {
        "the buffer read as unchanging": ("kAdds ? Memory::own : Memory::unchanging", "Memory::unchanging"),
    },
    (sink, K): {
        "the kept sink read as unchanging": ("load_pack<Memory::own>(kept_k", "load_pack(kept_k"),
        "the sink not turned to the window": ("args.window_cos == nullptr ? k", "true ? k"),
        "another chunk averaged in": ("stored(1, args.slot + token)", "stored(1, token)"),
    },
    (quantise, F8): {
        "the largest of half a warp": ("mask > 0; mask /= 2)", "mask > 1; mask /= 2)"),
        "ties away from even": ("0x7ffff + (magnitude >> 20 & 1)", "0x80000"),
        "steps of the smallest numbers too wide": ("0x1p14f", "0x1p15f"),
    },
    (norm_fp8, F8): {
        "bytes stored wherever they start": ("count >= kPack && reinter", "count >= kPack || reinter"),
    },
    (norm_fp8, N): {
        "padding counts in a row's largest": ("if (j < count) largest", "largest"),
    },
    (silu, RMS): {
        "rows without a sum over their lanes": ("int mask = lanes / 2", "int mask = lanes / 4"),
        "the past taken for rows to norm": ("copied = t < 0", "copied = t < -1"),
    },
    (rotary, QK): {
        "phases of the wrong head": ("row[(i + 2 * j) % head_dim / 2]", "row[i % head_dim / 2]"),
    },
    (rotary_backward, QK): {
        "a gradient rotated forwards": ("cos, sin, -1.f)", "cos, sin, 1.f)"),
    },
    (gate_backward, C): {
        "no barrier between the stages of a column sum": ("__syncthreads();", ""),
        "the last warp's rows not summed": ("l < kSumLanes; ++l", "l < kSumLanes - 1; ++l"),
    },
    (gate_backward, G): {
        "the last row of a stretch left out": (
            "frame * tokens + begin + least(tokens - begin,",
            "frame * tokens + begin - 1 + least(tokens - begin,",
        ),
    },
    (dmd, R): {
        "no barrier before a block's sum is read": (
            "  __syncthreads();\n  float total = identity;",
            "  float total = identity;",
        ),
        "no barrier between two sums of a block": ("__syncthreads();  // the next", "// the next"),
    },
    (dmd, D): {
        "sums of the first sample for all": ("sums[sample * blocks + i]", "sums[i]"),
        "NaN let through": ("fabsf(difference) < infinity() ? difference : 0.f", "difference"),
        "elements that the mask drops are counted": ("kept += keep.v[j];", "kept += 1;"),
    },
    (saliency, S): {
        "pixel frames of the wrong latent frame": ("1 + factor * (frame - 1)", "factor * (frame - 1)"),
        "no barrier before cells are summed": ("__syncthreads();  // all columns", "// all columns"),
    },
    (gate, R): {
        "packs read wherever they start": ("count >= kPack && is_aligned(from)", "count >= kPack"),
    },
    (weights, S): {
        "a stronger axis gets more": ("lowest - scores[m]", "scores[m] - lowest"),
        "a map that is not divided by its mean": ("args.map_sums[unit]);", "static_cast<float>(n));"),
    },
}


@pytest.mark.parametrize("probe", KERNELS, ids=lambda probe: probe.__name__)
def test_probes_pass_without_a_fault(machine: Machine, probe: Probe) -> None:
    with machine.replaced(toolchain.compile_ptx(KERNELS[probe], {})):
        torch.manual_seed(0)
        probe(machine, 0)


@pytest.mark.parametrize(
    ("probe", "file", "fault"),
    [
        pytest.param(*place, fault, id=name)
        for place, faults in FAULTS.items()
        for name, fault in faults.items()
    ],
)
def test_planted_faults_are_caught(machine: Machine, probe: Probe, file: str, fault: tuple[str, str]) -> None:
    ptx = toolchain.compile_ptx(KERNELS[probe], {file: fault})

    def three_seeds() -> None:
        for seed in range(3):
            torch.manual_seed(seed)
            probe(machine, seed)

    with machine.replaced(ptx), pytest.raises((AssertionError, PtxError)):
        three_seeds()


def test_the_list_is_complete() -> None:
    page = (toolchain.cuda.ROOT / "docs/planted-faults.md").read_text()
    names = [name for faults in FAULTS.values() for name in faults]
    assert [name for name in names if f"| {name} |" not in page] == []
