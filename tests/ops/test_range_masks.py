"""Masks of one's own: any ranges, on every backend of a CPU, against dense attention in float64."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream_r1_kernels import ChunkMask, RangeMask, chunk_attention
from stream_r1_kernels.attention.mask import blocks_of, transposed
from stream_r1_kernels.attention.reference import dense_attention

Rows = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
EXAMPLE = Path(__file__).parents[2] / "examples/dilated_mask.py"


@dataclass(frozen=True)
class GivenMask(RangeMask):
    rows: Rows

    def blocks(self, tokens: int) -> Rows:
        return self.rows


@st.composite
def given_masks(draw: st.DrawFn) -> tuple[GivenMask, int]:
    """Any blocks, each with any ranges, or none; and the tokens."""
    lengths = draw(st.lists(st.integers(1, 70), max_size=6))
    tokens, rows, begin = sum(lengths), [], 0
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(0, tokens), max_size=10)))
        pairs = zip(cuts[::2], cuts[1::2], strict=False)
        touching = draw(st.booleans()) and len(cuts) > 2
        ranges = ((cuts[0], cuts[1]), (cuts[1], cuts[2])) if touching else tuple(pairs)
        rows.append((begin, begin + length, ranges))
        begin += length
    return GivenMask(tuple(rows)), tokens


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One query at a time, of the keys that it sees."""
    rows = [
        dense_attention(q[:, i : i + 1], k[:, seen], v[:, seen], 0.3)[0] for i, seen in enumerate(visible)
    ]
    return torch.cat(rows, 1) if rows else q


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    mask=given_masks(),
    width=st.sampled_from([3, 16, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    backend=st.sampled_from(["cpu", "sdpa", "reference"]),
)
@hypothesis.example((GivenMask(((0, 9, ((0, 1),)),)), 9), 40, torch.float32, "cpu")  # one key: no gradient
def test_any_ranges(mask: tuple[GivenMask, int], width: int, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    backend = "reference" if dtype == torch.float64 else backend  # others have no float64
    given_mask, tokens = mask
    leaves = [torch.randn(2, tokens, 2, width).to(dtype).requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, tokens, 2, width).to(dtype)
    out = chunk_attention(*leaves, given_mask, scale=0.3, backend=backend)
    grads = torch.autograd.grad(out, leaves, upstream)

    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for begin, end, ranges in given_mask.rows:
        for first, last in ranges:
            visible[begin:end, first:last] = True
    assert torch.equal(given_mask.visible(tokens), visible)
    assert given_mask.visible_pairs(tokens) == int(visible.sum())
    exact = [x.detach().double().requires_grad_() for x in leaves]
    true = dense(*exact, visible)
    true_grads = torch.autograd.grad(true, exact, upstream.double()) if tokens else exact
    unseen = ~visible.any(1)
    assert not out[:, unseen].any()
    assert not grads[0][:, unseen].any()
    unit = torch.finfo(dtype).eps
    # What a probability's gradient and its row's mean, computed in float32 or better, may differ by where
    # they cancel in exact numbers, times what they are multiplied with.
    size = [x.detach().abs().amax().item() if tokens else 0.0 for x in (*leaves, upstream)]
    cancelled = min(unit, torch.finfo(torch.float32).eps) * 0.3 * max(size[:2]) * width * size[2] * size[3]
    for ours, theirs in zip((out, *grads), (true, *true_grads), strict=True):
        largest = max(1.0, theirs.abs().max().item()) if tokens else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * unit, atol=8 * unit * largest + cancelled)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mask=given_masks())
def test_transposed_is_the_mask_from_the_keys(mask: tuple[GivenMask, int]) -> None:
    given_mask, tokens = mask
    seen, place = torch.zeros(tokens, tokens, dtype=torch.bool), 0
    for first, last, ranges in transposed(blocks_of(given_mask.table(tokens))):
        assert place == first < last
        place = last
        for begin, end in ranges:
            assert not seen[first:last, begin:end].any()
            seen[first:last, begin:end] = True
    assert place == tokens
    assert torch.equal(seen.T, given_mask.visible(tokens))


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_the_example_sees_a_dilated_history(example: dict[str, Any]) -> None:
    visible = example["DilatedMask"](3).visible(31)  # the last chunk is cut short
    for query in range(31):
        chunk = query // 3
        near = {chunk, *(chunk - 2**n for n in range(5))}
        assert visible[query].nonzero().flatten().tolist() == [key for key in range(31) if key // 3 in near]


def test_the_page_shows_the_example(example: dict[str, Any]) -> None:
    page = (EXAMPLE.parents[1] / "docs/drop-in/masks.md").read_text()
    source = EXAMPLE.read_text()
    assert source[source.index("@dataclass") : source.index("\n\ndef picture")] in page
    assert example["picture"](example["DilatedMask"](1), 12) in page


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "..#...#.###." in capsys.readouterr().out


def test_gradients_by_differences(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, 13, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = example["DilatedMask"](3)
    assert torch.autograd.gradcheck(lambda *qkv: chunk_attention(*qkv, mask, backend="reference"), leaves)


def test_other_lengths_in_a_compiled_graph(example: dict[str, Any]) -> None:
    """A length's table is a constant of the graph: another length has another graph, and the right one."""
    torch.compiler.reset()

    def attend(q: Tensor, mask: RangeMask) -> Tensor:
        return chunk_attention(q, q, q, mask, backend="cpu")

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, chunk in ((7, 3), (31, 3), (20, 5)):
        q, mask = torch.randn(1, tokens, 2, 8), example["DilatedMask"](chunk)
        assert torch.equal(compiled(q, mask), attend(q, mask))


@dataclass
class Unfrozen(RangeMask):
    def blocks(self, tokens: int) -> Rows:
        return ((0, tokens, ((0, tokens),)),)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GivenMask(((1, 4, ()),)).table(4), ValueError, r"begins at query 0, got \[1, 4\)"),
        (lambda: GivenMask(((0, 0, ()),)).table(4), ValueError, r"begins at query 0, got \[0, 0\)"),
        (lambda: GivenMask(((0, 3, ()),)).table(4), ValueError, "blocks up to query 4, got them up to 3"),
        (lambda: GivenMask(((0, 4, ((0, 5),)),)).table(4), ValueError, r"within \[0, 4\), got \[0, 5\)"),
        (lambda: GivenMask(((0, 4, ((2, 2),)),)).table(4), ValueError, r"each with a key.*got \[2, 2\)"),
        (lambda: GivenMask(((0, 4, ((2, 4), (0, 1))),)).table(4), ValueError, r"in order.*got \[0, 1\)"),
        (lambda: GivenMask(((0, 3.5, ()),)).table(4), TypeError, "expected an integer, got 3.5"),
        (lambda: Unfrozen().table(4), TypeError, "Unfrozen: expected a mask that is a frozen dataclass"),
    ],
)
def test_blocks_that_are_none(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((), "got 0 numbers for n = -1"),
        ((1, 0, 6), "expected n, then rows of 2 \\+ 2 n numbers, got 3 numbers for n = 1"),
        ((1, 0, 5, 0, 6), "blocks up to query 6, got them up to 5"),
        ((1, 0, 7, 0, 6), "blocks up to query 6, got them up to 7"),
        ((1, 0, 6, -1, 6), "ranges in order up to 6, got one from -1 to 6"),
        ((1, 0, 6, 0, 7), "ranges in order up to 6, got one from 0 to 7"),
        ((2, 0, 6, 3, 6, 0, 2), "ranges in order up to 6, got one from 0 to 2"),
        ((1, 3, 6, 0, 6), "a block from query 0 on, got one from 3 to 6"),
        ((2**62, 0, 6), "rows of 2 \\+ 2 n numbers"),
    ],
)
def test_tables_that_are_none_are_not_read(table: tuple[int, ...], message: str) -> None:
    q = torch.zeros(1, 6, 1, 8)
    with pytest.raises(ValueError, match=message):
        torch.ops.stream_r1.chunk_attention(q, q, q, table, 0.5)


def test_equal_masks_share_a_table() -> None:
    assert ChunkMask(2, 2).table(8) is ChunkMask(2, 2).table(8)
