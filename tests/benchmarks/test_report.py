"""The report is fed recorded numbers, and what it says is worked out by hand."""

import json
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from benchmarks.ceilings import Ceilings, measure
from benchmarks.report import Run, Timing, as_json, as_markdown, compare, timing_of, write

CEILINGS = Ceilings(
    flops={"float32": 100e9, "bfloat16": 400e9},
    memory={2**15: 200e9, 2**25: 40e9},
    matmul={"float32": 50e9, "bfloat16": 300e9},
)
RUN = Run("Some CPU", "avx2", 1, "2.13.0", "0123abc", CEILINGS)


def timing(implementation: str, median: float, **changes) -> Timing:
    """Rounds around a median of that many seconds."""
    recorded = {"family": "rows", "case": "gated_add B1 float32", "dtype": "float32", "shape": (1, 84, 256)}
    seconds = [median * factor for factor in (1.0, 0.8, 1.2, 0.9, 1.1)]
    return Timing(implementation=implementation, seconds=seconds, **recorded | changes)


TIMINGS = [
    timing("ours", 2e-3, bytes=60e6),
    timing("eager", 5e-3, bytes=60e6),
    timing("compiled", 3e-3, bytes=60e6),
    timing("ours", 4e-3, family="attention", case="dense bf16", dtype="bfloat16", flops=8e8, bytes=4e6),
    timing("sdpa", 3e-3, family="attention", case="dense bf16", dtype="bfloat16", flops=8e8, bytes=4e6),
]


def test_percentiles_are_of_the_rounds():
    one = timing("ours", 1.0)
    assert [one.percentile(p) for p in (20, 50, 80)] == pytest.approx([0.88, 1.0, 1.12])
    assert Timing("rows", "case", "ours", [3.0]).percentile(20) == 3.0


def test_the_nearer_ceiling_is_the_limit():
    rows, attention = compare(TIMINGS, CEILINGS)
    assert rows.limit == "bytes"
    assert rows.fraction_of_limit == pytest.approx(60e6 / 40e9 / 2e-3)  # 1.5 of 2 ms
    assert attention.limit == "flops"
    assert attention.fraction_of_limit == pytest.approx(8e8 / 400e9 / 4e-3)  # 2 of 4 ms, the bytes take 0.02
    (without,) = compare([timing("ours", 1e-3)], CEILINGS)
    assert without.fraction_of_limit is None


def test_small_cases_stand_beside_the_speed_of_caches():
    assert CEILINGS.seconds("float32", 0, 2**20) == {"bytes": 2**20 / 200e9}
    assert CEILINGS.seconds("float32", 0, 2**10) == {"bytes": 2**10 / 200e9}
    assert CEILINGS.seconds("float64", 1e9, 2**26) == {"bytes": 2**26 / 40e9}


def test_nothing_that_runs_here_passes_the_measured_limits():
    found = measure(1)
    assert found.flops["bfloat16"] >= found.flops["float32"] > 1e8
    rates = [found.memory[size] for size in sorted(found.memory)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 1e7


def test_json_has_an_object_for_each_baseline():
    assert json.loads(as_json(compare(TIMINGS, CEILINGS))) == [
        {
            "name": "gated_add B1 float32",
            "ratio": pytest.approx(2.5),
            "ours_ms": pytest.approx(2.0),
            "baseline": "eager",
            "baseline_ms": pytest.approx(5.0),
            "dtype": "float32",
            "shape": [1, 84, 256],
            "fraction_of_limit": pytest.approx(0.75),
        },
        {
            "name": "gated_add B1 float32",
            "ratio": pytest.approx(1.5),
            "ours_ms": pytest.approx(2.0),
            "baseline": "compiled",
            "baseline_ms": pytest.approx(3.0),
            "dtype": "float32",
            "shape": [1, 84, 256],
            "fraction_of_limit": pytest.approx(0.75),
        },
        {
            "name": "dense bf16",
            "ratio": pytest.approx(0.75),
            "ours_ms": pytest.approx(4.0),
            "baseline": "sdpa",
            "baseline_ms": pytest.approx(3.0),
            "dtype": "bfloat16",
            "shape": [1, 84, 256],
            "fraction_of_limit": pytest.approx(0.5),
        },
    ]


def test_markdown_has_a_table_for_each_family_and_says_where_it_was_measured():
    text = as_markdown(compare(TIMINGS, CEILINGS), RUN)
    assert "- machine: Some CPU, avx2, 1 thread\n" in text
    assert "torch 2.13.0, commit 0123abc" in text
    assert "- memory: 200 GB/s with 32 KiB, 40 GB/s with 32 MiB in use\n" in text
    assert "- bfloat16: 400 GFLOP/s; torch's own matmul reaches 0.75 of that\n" in text
    assert text.index("## rows") < text.index("## attention")
    row = "| gated_add B1 float32 | float32 | 1.76 / 2 / 2.24 | eager 5, compiled 3 | "
    assert row + "eager 2.50, compiled 1.50 | 0.75 of bytes |" in text


def test_files_are_written_and_the_drawing_has_a_label_for_each_case(tmp_path):
    write(tmp_path / "docs", TIMINGS, RUN)
    drawing = (tmp_path / "docs/roofline.svg").read_text()
    ElementTree.fromstring(drawing)
    assert "gated_add B1 float32" in drawing
    assert "dense bf16" in drawing
    assert len(json.loads((tmp_path / "docs/benchmarks.json").read_text())) == 3
    assert "(roofline.svg)" in (tmp_path / "docs/benchmarks.md").read_text()


def test_what_pytest_benchmark_records_is_read():
    recorded = SimpleNamespace(
        params={"implementation": "ours", "size": "tiny"},
        group="dense tiny",
        fullname="benchmarks/test_attention.py::test_dense[tiny-ours]",
        extra_info={"dtype": "float32", "shape": [2, 3], "flops": 7.0},
        stats=SimpleNamespace(data=[1.0, 2.0]),
    )
    read = timing_of(recorded)
    assert read == Timing("attention", "dense tiny", "ours", (1.0, 2.0), "float32", (2, 3), 7.0)
    recorded.params = {"size": "tiny"}
    assert timing_of(recorded) is None
