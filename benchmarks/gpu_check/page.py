"""`docs/gpu-measured.md`, from `results.jsonl` alone: a section a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.fit import fitted, known_device
from benchmarks.gpu_check.records import Record, of_kind
from benchmarks.gpu_check.summary import summary
from stream_r1.estimate.devices import Device
from stream_r1.estimate.roofline import ASSUMED

HEAD = """# GPUs: measured

What `make gpu-check` measured, a section a GPU; running it again replaces that GPU's section. What is
predicted is in [gpu.md](gpu.md).
"""
NOBODY = "Nobody has run it yet: no GPU has been measured."


def put_section(file: Path, text: str) -> None:
    """Adds a section to the page, or replaces the one of the same machine."""
    page = file.read_text(encoding="utf-8") if file.exists() else ""
    _, *sections = re.split(r"(?m)^(?=## )", page)
    title = text.splitlines()[0]
    kept = [each for each in sections if each.splitlines()[0] != title]
    parts = [part.rstrip() for part in [HEAD, *kept, text]]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def section(records: list[Record]) -> str:
    """Everything that was found on one machine; what was not is left out."""
    machine = next((record["name"] for record in of_kind(records, "device")), "unknown device")
    parts = [f"## {machine}", _software(records), summary(records).rstrip()]
    parts += [
        part for part in (_sampler(records), _ops(records), _kernels(records), _training(records)) if part
    ]
    device = known_device(records)
    if device is not None and of_kind(records, "copy"):
        parts.append(_prediction(records, device))
    return "\n\n".join(parts) + "\n"


def _software(records: list[Record]) -> str:
    for r in of_kind(records, "versions"):
        packages = ", ".join(f"{name} {version}" for name, version in r["packages"].items() if version)
        return (
            f"Python {r['python']}, torch {r['torch']}, CUDA {r['cuda']}, cuDNN {r['cudnn']}, commit "
            f"{r['commit'] or 'unknown'}; {packages}. Models have random weights, at the sizes of Wan 2.1 "
            "1.3B, 480 x 832, bfloat16."
        )
    return "Versions were not recorded."


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """Markdown; the first `words` columns are text."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * words}{'---:|' * (len(head) - words)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _sampler(records: list[Record]) -> str:
    rows = []
    for r in of_kind(records, "sampler"):
        settings = {"CUDA graphs": r["cuda_graph"], "cudnn.benchmark": r["cudnn_benchmark"]}
        name = ", ".join([r["decoder"], *(setting for setting, on in settings.items() if on)])
        if r["fps"] is None:
            rows.append([name, "-", "-", "-", "-", "-"])
            continue
        ms = [f"{1e3 * r[part]:.0f}" for part in ("student", "decode", "first_frame")]
        rows.append([name, f"{r['fps']:.1f}", *ms, f"{r['memory'] / 1e9:.1f}"])
    head = [
        "decoder and passes",
        "FPS",
        "student, ms a chunk",
        "decoder, ms",
        "first frame, ms",
        "memory, GB",
    ]
    return "A stream whose window is full:\n\n" + table(head, rows) if rows else ""


def _ops(records: list[Record]) -> str:
    timings = of_kind(records, "timing")
    names = list(dict.fromkeys(r["backend"] for r in timings))
    rows = []
    for case in dict.fromkeys(r["case"] for r in timings):
        found = {r["backend"]: r for r in timings if r["case"] == case}
        rows.append([f"`{case}`", *(_time(found.get(name)) for name in names)])
    note = (
        "Ops, median µs of a call, inputs rotated past the L2 cache; ! marks a result off by more than 2 %:"
    )
    return f"{note}\n\n{table(['op', *names], rows)}" if rows else ""


def _time(record: Record | None) -> str:
    if record is None or not record["seconds"]:
        return ""
    wrong = record["error"] is None or record["error"] > 0.02
    return f"{1e6 * record['seconds']:.0f}{' !' if wrong else ''}"


def _kernels(records: list[Record]) -> str:
    parts = []
    for r in of_kind(records, "profile"):
        if r["kernels"]:
            rows = [
                [f"`{k['name'][:90]}`", k["calls"], f"{1e3 * k['seconds']:.2f}"] for k in r["kernels"][:15]
            ]
            title = (
                f"Kernels of one chunk with the decoder {r['decoder']}, {1e3 * r['seconds']:.0f} ms in all:"
            )
            parts.append(f"{title}\n\n{table(['kernel', 'calls', 'ms'], rows)}")
    return "\n\n".join(parts)


def _training(records: list[Record]) -> str:
    found = of_kind(records, "training")
    if not found:
        return ""
    names = list(found[0]["seconds"])
    rows = [
        [r["name"], *(f"{r['seconds'][n]:.2f}" for n in names), f"{r['memory'] / 1e9:.1f}"] for r in found
    ]
    return "A training step, seconds:\n\n" + table(["", *names, "memory, GB"], rows)


def _prediction(records: list[Record], device: Device) -> str:
    """The assumptions as measured beside those of the prediction, and what follows from both."""
    from benchmarks.prediction import streaming

    counted = streaming.ours(device)
    measured = fitted(records, device, counted.decoder)
    capability = device.capability
    rows = [
        [name, f"{of(ASSUMED):.3g}", f"{of(measured):.3g}"]
        for name, of in {
            "memory, share of the bandwidth": lambda a: a.memory,
            "matmuls, share of the 16-bit rate": lambda a: a.matmul,
            "matmuls in FP8, share of the FP8 rate": lambda a: a.matmul8,
            "convolutions": lambda a: a.convolution,
            "torch's attention": lambda a: a.library_attention[capability],
            "our attention": lambda a: a.own_attention[capability],
            "a kernel, µs at least": lambda a: 1e6 * a.kernel,
        }.items()
    ]
    fps = [f"{counted.fps(device, assumed=a):.1f}" for a in (ASSUMED, measured)]
    rows.append(["FPS that follow, Wan's decoder", *fps])
    return "The prediction's assumptions, and as measured here:\n\n" + table(
        ["", "assumed", "measured"], rows
    )
