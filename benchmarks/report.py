"""From timed benchmarks to docs/benchmarks.md, docs/benchmarks.json and docs/roofline.svg.

A benchmark takes part if it has a parameter `implementation` ("ours" or a baseline's name) and a group that
ours and its baselines share. `extra_info` may give `dtype`, `shape`, and `flops` and `bytes`: the work that
can't be avoided. The limit of a case is the longer of two times: its bytes at the speed of memory with so
many in use, its flops at that of multiply-adds in its dtype; both are measured in the same run, by loops of
their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks.ceilings import Ceilings


@dataclass(frozen=True)
class Timing:
    """One implementation of one case; `seconds` has the time of every round."""

    family: str
    case: str
    implementation: str
    seconds: Sequence[float]
    dtype: str = ""
    shape: tuple[int, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0

    def percentile(self, percent: int) -> float:
        """In seconds, linear between rounds."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Comparison:
    """Ours beside its baselines. `limit` names the ceiling that is nearer, "" where a case has none."""

    ours: Timing
    baselines: tuple[Timing, ...]
    limit: str
    fraction_of_limit: float | None

    def ratio(self, baseline: Timing) -> float:
        """Median time of the baseline by median time of ours: above 1, ours is faster."""
        return baseline.percentile(50) / self.ours.percentile(50)


@dataclass(frozen=True)
class Run:
    """What the numbers were measured on."""

    machine: str
    isa: str
    threads: int
    torch: str
    commit: str
    ceilings: Ceilings = field(default_factory=Ceilings)


def timing_of(benchmark: Any) -> Timing | None:
    """The Timing of a finished benchmark of pytest-benchmark, None where it does not take part."""
    implementation = (benchmark.params or {}).get("implementation")
    if implementation is None or benchmark.group is None or not benchmark.stats.data:
        return None
    info = benchmark.extra_info
    return Timing(
        family=Path(benchmark.fullname.split("::")[0]).stem.removeprefix("test_"),
        case=benchmark.group,
        implementation=implementation,
        seconds=tuple(benchmark.stats.data),
        dtype=info.get("dtype", ""),
        shape=tuple(info.get("shape", ())),
        flops=info.get("flops", 0.0),
        bytes=info.get("bytes", 0.0),
    )


def compare(timings: Iterable[Timing], ceilings: Ceilings) -> list[Comparison]:
    """One Comparison a case that ours took part in, in the order of the timings."""
    cases: dict[tuple[str, str], list[Timing]] = {}
    for timing in timings:
        cases.setdefault((timing.family, timing.case), []).append(timing)
    comparisons = []
    for members in cases.values():
        ours = next((member for member in members if member.implementation == "ours"), None)
        if ours is not None:
            baselines = tuple(member for member in members if member is not ours)
            comparisons.append(Comparison(ours, baselines, *_limit(ours, ceilings)))
    return comparisons


def _limit(timing: Timing, ceilings: Ceilings) -> tuple[str, float | None]:
    seconds = ceilings.seconds(timing.dtype, timing.flops, timing.bytes)
    if not seconds:
        return "", None
    nearest = max(seconds, key=lambda name: seconds[name])
    return nearest, seconds[nearest] / timing.percentile(50)


def as_json(comparisons: Iterable[Comparison]) -> str:
    """One object for each baseline of each case, a line each; times are medians in milliseconds."""
    rows = [
        {
            "name": comparison.ours.case,
            "ratio": round(comparison.ratio(baseline), 4),
            "ours_ms": round(comparison.ours.percentile(50) * 1e3, 6),
            "baseline": baseline.implementation,
            "baseline_ms": round(baseline.percentile(50) * 1e3, 6),
            "dtype": comparison.ours.dtype,
            "shape": list(comparison.ours.shape),
            "fraction_of_limit": _rounded(comparison.fraction_of_limit),
        }
        for comparison in comparisons
        for baseline in comparison.baselines
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def _rounded(fraction: float | None) -> float | None:
    return None if fraction is None else round(fraction, 4)


def as_markdown(comparisons: Sequence[Comparison], run: Run) -> str:
    """A table a family of cases."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. A ratio is the baseline's median time by ours: above 1, ours is faster.",
        "The limit of a case is the time that the processor needs at least for the flops that it must do,",
        "or for the bytes that it must move. Both are measured in the same run by loops that do nothing",
        "else: multiply-adds on registers, and reads and copies of as many bytes as the case moves, so that",
        "small cases stand beside a cache's speed.",
        "",
        f"- machine: {run.machine}, {run.isa}, {run.threads} thread{'s' if run.threads != 1 else ''}",
        f"- torch {run.torch}, commit {run.commit}",
        *_ceilings(run.ceilings),
    ]
    for family in dict.fromkeys(comparison.ours.family for comparison in comparisons):
        lines += [
            "",
            f"## {family}",
            "",
            "| case | dtype | ours p20 / p50 / p80, ms | baselines p50, ms | ratios of medians | of limit |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(comparison) for comparison in comparisons if comparison.ours.family == family]
    lines += ["", "![Fraction of the limit by case](roofline.svg)", ""]
    return "\n".join(lines)


def _row(comparison: Comparison) -> str:
    ours = " / ".join(_milliseconds(comparison.ours.percentile(p)) for p in (20, 50, 80))
    baselines = ", ".join(
        f"{b.implementation} {_milliseconds(b.percentile(50))}" for b in comparison.baselines
    )
    ratios = ", ".join(f"{b.implementation} {comparison.ratio(b):.2f}" for b in comparison.baselines)
    fraction = comparison.fraction_of_limit
    limit = "" if fraction is None else f"{fraction:.2f} of {comparison.limit}"
    return f"| {comparison.ours.case} | {comparison.ours.dtype} | {ours} | {baselines} | {ratios} | {limit} |"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _ceilings(ceilings: Ceilings) -> list[str]:
    """The limits, and how much of them torch's own matmul reaches, which the baselines are built on."""
    if not ceilings.flops:
        return []
    memory = ", ".join(
        f"{rate / 1e9:.0f} GB/s with {_size(size)}" for size, rate in sorted(ceilings.memory.items())
    )
    lines = [f"- memory: {memory} in use"]
    for dtype, rate in ceilings.flops.items():
        line = f"- {dtype}: {rate / 1e9:.0f} GFLOP/s"
        if dtype in ceilings.matmul:
            line += f"; torch's own matmul reaches {ceilings.matmul[dtype] / rate:.2f} of that"
        lines.append(line)
    return lines


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"


def draw_roofline(comparisons: Sequence[Comparison], path: Path) -> None:
    """A bar a case: how near ours comes to its ceiling."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    limited = [c for c in comparisons if c.fraction_of_limit is not None]
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(limited)), layout="constrained")
    axes = figure.add_subplot()
    colours = {"bytes": "#4c72b0", "flops": "#dd8452"}
    for kind, colour in colours.items():
        rows = [i for i, c in enumerate(limited) if c.limit == kind]
        widths = [limited[i].fraction_of_limit or 0.0 for i in rows]
        axes.barh(rows, widths, color=colour, label=f"limit: {kind}")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(limited)), [c.ours.case for c in limited], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the ceiling measured in the same run")
    axes.legend(loc="lower right", fontsize=7)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "roofline"}):  # text, and no noise
        FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})


def write(folder: Path, timings: Iterable[Timing], run: Run) -> None:
    """The three files, in `folder`."""
    comparisons = compare(timings, run.ceilings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text(as_markdown(comparisons, run))
    (folder / "benchmarks.json").write_text(as_json(comparisons))
    draw_roofline(comparisons, folder / "roofline.svg")
