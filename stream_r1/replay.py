"""Run recorded calls of another implementation through the student, and say how far the two are apart.

A file of the golden format is one safetensors file: `model.*` weights under original or diffusers' names,
`call.*` recorded inputs and outputs, and the configuration as JSON strings in its metadata. Streaming files
are replayed chunk by chunk with the real cache, training files forward and backward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stream_r1.models.checkpoints import student_from_state
from stream_r1.models.contexts import TextContext
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.weight_names import normalise

PASSES = 5  # calls a chunk; the last one leaves the keys and values that later chunks see


class RecordingError(ValueError):
    """A file that is no recording; the message names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Recording:
    """One file: `meta` decoded from JSON, `weights` under the file's names, `calls` without their `call.`."""

    source: str
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    calls: dict[str, Tensor]

    @property
    def streaming(self) -> bool:
        return "chunks" in self.meta


@dataclass(frozen=True)
class ReplayResult:
    """Relative errors (max |ours - recorded| / max |recorded|) by what was compared."""

    source: str
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    @property
    def worst_name(self) -> str:
        return max(self.errors, key=lambda name: self.errors[name])


def read_recording(path: str | Path) -> Recording:
    """Read a file of the golden format.

    Raises:
        FileNotFoundError: no such file.
        RecordingError: not a safetensors file, or without the metadata and calls of a recording.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such recording")
    try:
        with safe_open(str(path), "pt") as file:
            meta = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise RecordingError(f"{path}: expected safetensors with JSON metadata, got {error}") from None
    needed = ["config", "frames_per_chunk", "window_frames", "sink_frames", "positions"]
    calls = ["call.x", "call.t", "call.v", "call.context"]
    if "chunks" not in meta:
        needed.append("mask")
        calls.append("call.grad_v")
    missing = [name for name in needed if name not in meta] + [name for name in calls if name not in tensors]
    if missing:
        raise RecordingError(f"{path}: expected a recording, but it has no {', '.join(missing)}")
    return Recording(
        str(path),
        meta,
        {name: value for name, value in tensors.items() if not name.startswith("call.")},
        {name.removeprefix("call."): value for name, value in tensors.items() if name.startswith("call.")},
    )


def recorded_student(recording: Recording, dtype: torch.dtype = torch.float32) -> CausalWanTransformer:
    """The student that a recording describes, with its weights."""
    meta, sizes = recording.meta, recording.meta["config"]
    window = meta["window_frames"]
    config = {
        "num_attention_heads": sizes["num_heads"],
        "attention_head_dim": sizes["dim"] // sizes["num_heads"],
        "in_channels": sizes["in_dim"],
        "out_channels": sizes["out_dim"],
        "text_dim": sizes["text_dim"],
        "freq_dim": sizes["freq_dim"],
        "ffn_dim": sizes["ffn_dim"],
        "num_layers": sizes["num_layers"],
        "text_len": sizes["text_len"],
        "frames_per_chunk": meta["frames_per_chunk"],
        "window_frames": window if window is not None and window > 0 else None,
        "sink_frames": meta["sink_frames"],
        "positions": meta["positions"],
        "sink_ema": meta.get("ema_sink"),
        "first_chunk_frames": meta.get("first_chunk_frames"),
    }
    state = normalise(recording.weights, recording.source)
    return student_from_state(config, state, dtype=dtype, source=recording.source)


def replay(path: str | Path, dtype: torch.dtype = torch.float32) -> ReplayResult:
    """Run one recording through the student and compare everything it recorded.

    Args:
        path: a file of the golden format.
        dtype: to compute in; the recorded values are cast to it.
    """
    recording = read_recording(path)
    student = recorded_student(recording, dtype)
    calls = {name: value.to(dtype) for name, value in recording.calls.items()}
    calls["t"] = recording.calls["t"]
    compare = _replay_stream if recording.streaming else _replay_training
    return ReplayResult(recording.source, compare(student, recording.meta, calls))


def relative_error(ours: Tensor, recorded: Tensor) -> float:
    """max |ours - recorded| / max |recorded|; infinite where ours is not finite."""
    difference = (ours.double() - recorded.double()).abs().max().item()
    error = difference / max(recorded.double().abs().max().item(), torch.finfo(torch.float32).tiny)
    return error if error == error else float("inf")


@torch.no_grad()
def _replay_stream(
    student: CausalWanTransformer, meta: Mapping[str, Any], calls: Mapping[str, Tensor]
) -> dict[str, float]:
    x, t, v = calls["x"], calls["t"], calls["v"]  # [calls, B, F, C, h, w], [calls, B, F]
    text = student.encode_text(calls["context"])
    cache = student.new_cache(x.shape[1], *x.shape[-2:], max_frames=meta["chunks"] * meta["frames_per_chunk"])
    errors = {}
    for call in range(x.shape[0]):
        ours = student.forward_chunk(x[call], t[call], text, cache)
        errors[f"chunk {call // PASSES}, call {call % PASSES}"] = relative_error(ours, v[call])
        if call % PASSES == PASSES - 1:
            cache.commit()
    return errors


def _replay_training(
    student: CausalWanTransformer, meta: Mapping[str, Any], calls: Mapping[str, Tensor]
) -> dict[str, float]:
    if meta["mask"] not in ("block_causal", "teacher_forcing"):
        raise RecordingError(f"replay: mask must be block_causal or teacher_forcing, got {meta['mask']!r}")
    x = calls["x"].clone().requires_grad_()
    clean_x = calls["clean_x"].clone().requires_grad_() if "clean_x" in calls else None
    text: TextContext = student.encode_text(calls["context"])
    ours = student(x, calls["t"], text, mask="causal", clean_x=clean_x)
    errors = {"v": relative_error(ours, calls["v"])}
    ours.backward(calls["grad_v"])

    for name, leaf in (("grad_x", x), ("grad_clean_x", clean_x)):
        if name in calls:
            errors[name] = _gradient_error(None if leaf is None else leaf.grad, calls[name])
    recorded = normalise(
        {n.removeprefix("grad."): g for n, g in calls.items() if n.startswith("grad.")}, "call.grad"
    )
    parameters = dict(student.named_parameters())
    for name, gradient in recorded.items():
        errors[f"grad {name}"] = _gradient_error(parameters[name].grad, gradient)
    return errors


def _gradient_error(ours: Tensor | None, recorded: Tensor) -> float:
    return float("inf") if ours is None else relative_error(ours, recorded)
