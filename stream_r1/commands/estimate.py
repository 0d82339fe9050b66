"""``stream-r1 estimate``: what a recipe needs of some GPUs, before it is run. Predictions, all of it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from stream_r1.commands.console import make_console
from stream_r1.recipe import Recipe, load_any

if TYPE_CHECKING:
    from stream_r1.estimate.advice import Change
    from stream_r1.estimate.devices import Device
    from stream_r1.estimate.training import Estimate


def run(path: Path, overrides: list[str], *, gpus: int, device: str, as_json: bool) -> None:
    """Say what a step needs and how long it takes; what to change where it does not fit."""
    gpu = _device(device)
    recipe = load_any(path, overrides)
    from stream_r1.estimate.advice import advise
    from stream_r1.estimate.training import estimate

    console = make_console(stderr=as_json)
    with console.status("counting"):
        result = estimate(recipe, gpu, gpus)
    advice: list[Change] = []
    if not result.fits:
        with console.status("it does not fit; trying other settings"):
            advice = advise(recipe, gpu, gpus, result)
    if as_json:
        make_console().out(json.dumps(_as_json(result, advice), indent=2), highlight=False)
    else:
        _show(make_console(), path, result, advice)


def _device(name: str) -> Device:
    from stream_r1.estimate import devices

    try:
        return devices.find(name)
    except ValueError as error:
        known = {d.lower(): d for d in devices.DEVICES}
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" (did you mean {known[near[0]]}?)" if near else ""
        raise ValueError(f"--{error}{hint}") from None


def _show(console: Console, path: Path, result: Estimate, advice: list[Change]) -> None:
    from stream_r1.estimate.advice import larger

    group = result.cluster
    divided = f", models divided among {group.shards}" if group.shards > 1 else ""
    each = "a GPU" if group.sequence == 1 else f"{group.sequence} GPUs"
    title = f"{path} on {group.gpus} x {result.device.name}, {result.plan.samples} {each} at once{divided}"
    console.print(f"Prediction for {title}", soft_wrap=True, highlight=False)
    for line in result.plan.networks.assumed:
        console.print(f"  {line}", style="dim", soft_wrap=True, highlight=False)
    console.print()

    table = Table(box=None, pad_edge=False)
    for name, justify in (("memory of one GPU", "left"), ("GB", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for part, size in sorted(result.worst.parts.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{size / 1e9:.1f}")
    table.add_row("CUDA, NCCL, allocator (assumed)", f"{result.overhead / 1e9:.1f}")
    table.add_row(f"in all, at its worst in {result.worst.phase}", f"{result.total / 1e9:.1f}", style="bold")
    table.add_row(result.device.name, f"{result.device.memory / 1e9:.0f}")
    console.print(table)
    console.print()

    table = Table(box=None, show_header=False, pad_edge=False)
    for row in _times(result):
        table.add_row(*row)
    console.print(table)
    console.print()
    console.print(_verdict(result), soft_wrap=True, highlight=False)
    if result.fits:
        return
    for change in advice:
        what = " ".join(_quoted(override) for override in change.overrides)
        more = f" --gpus {change.gpus}" if change.gpus != group.gpus else ""
        console.print(
            f"  {what}{more}   {change.meaning}: {change.result.total / 1e9:.1f} GB",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    best = advice[-1].result if advice else result
    if best.fits:
        console.print("With all of these it fits.")
        return
    parts = sorted(best.worst.parts.items(), key=lambda item: -item[1])[:3]
    told = ", ".join(f"{part} {size / 1e9:.1f} GB" for part, size in parts)
    console.print(f"It still does not fit. The largest parts: {told}.", soft_wrap=True, highlight=False)
    names = larger(best.total, result.device)
    console.print(
        f"A GPU with the memory: {', '.join(names)}."
        if names
        else "No GPU that is known here has the memory: take a smaller teacher (models.teacher), fewer "
        "frames (rollout.frames) or smaller pictures (rollout.height, rollout.width).",
        soft_wrap=True,
        highlight=False,
    )


def _verdict(result: Estimate) -> str:
    if result.fits:
        room = (result.device.memory - result.total) / 1e9
        return f"Fits, with {room:.1f} GB to spare."
    over = (result.total - result.device.memory) / 1e9
    return f"Does not fit: {over:.1f} GB too much. What saves memory, each on top of those before:"


def _times(result: Estimate) -> list[tuple[str, str]]:
    recipe = result.plan.recipe
    lines = [("student's update", f"{result.student_update:.1f} s")]
    if isinstance(recipe, Recipe):
        lines.append(("critic's update", f"{result.critic_update:.1f} s"))
        lines.append((f"a step (one student's in {recipe.critic_updates})", f"{result.step:.1f} s"))
    for count in dict.fromkeys((1000, recipe.steps)):
        lines.append((f"{count} steps", f"{result.days(count):.2f} days"))
    shared = result.cluster.sequence
    if shared > 1:
        lines.append(("all-to-all, a GPU in a step", f"{result.exchanged / 1e9:.0f} GB"))
    if result.fps is not None:
        whole, denoising = result.fps
        name = "sampling, one stream" + (f" on {shared} GPUs" if shared > 1 else "")
        lines.append((name, f"{whole:.1f} FPS, {denoising:.1f} without decoding"))
    if result.fps_in_fp8 is not None:
        whole, denoising = result.fps_in_fp8
        lines.append(("the same with --quantize fp8", f"{whole:.1f} FPS, {denoising:.1f} without decoding"))
    if result.cache_bytes is not None:
        kept, fp8 = (size / 1e9 for size in result.cache_bytes)
        lines.append(("its keys and values", f"{kept:.2f} GB, {fp8:.2f} with --cache-dtype fp8"))
    return lines


def _quoted(override: str) -> str:
    return f"'{override}'" if " " in override else override


def _as_json(result: Estimate, advice: list[Change]) -> dict[str, Any]:
    """Bytes and seconds."""
    fps, in_fp8 = result.fps or (None, None), result.fps_in_fp8 or (None, None)
    cache = result.cache_bytes or (None, None)
    return {
        "prediction": True,
        "device": result.device.name,
        "gpus": result.cluster.gpus,
        "shards": result.cluster.shards,
        "sequence": result.cluster.sequence,
        "samples_at_once": result.plan.samples,
        "assumed": list(result.plan.networks.assumed),
        "memory": {
            "fits": result.fits,
            "available": result.device.memory,
            "total": result.total,
            "overhead": result.overhead,
            "worst_phase": result.worst.phase,
            "parts": result.worst.parts,
            "phases": {moment.phase: moment.parts for moment in result.moments},
        },
        "seconds": {
            "student_update": result.student_update,
            "critic_update": result.critic_update,
            "step": result.step,
        },
        "exchanged_bytes_a_step": result.exchanged,
        "days_to_1000_steps": result.days(1000),
        "sampling_fps": {"end_to_end": fps[0], "without_decoding": fps[1]},
        "sampling_fps_in_fp8": {"end_to_end": in_fp8[0], "without_decoding": in_fp8[1]},
        "cache_bytes": {"bfloat16": cache[0], "fp8": cache[1]},
        "advice": [
            {
                "overrides": list(change.overrides),
                "gpus": change.gpus,
                "total": change.result.total,
                "fits": change.result.fits,
            }
            for change in advice
        ],
    }
