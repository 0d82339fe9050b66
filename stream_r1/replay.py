"""Run recorded calls of another implementation through the student, and say how far the two are apart.

A file of the golden format is one safetensors file: `model.*` weights under original or diffusers' names,
`call.*` recorded inputs and outputs, and the configuration as JSON strings in its metadata. Streaming files
are replayed chunk by chunk with the real cache, training files forward and backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stream_r1.chunk_loop import StudentPasses
from stream_r1.files import FileError, parse_json
from stream_r1.messages import first_line, shown, some
from stream_r1.models.checkpoints import require_told, student_from_state
from stream_r1.models.contexts import TextContext
from stream_r1.models.sizes import require_sizes
from stream_r1.models.tensor_files import opened, require_finite
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.weight_names import normalise

PASSES = 5  # calls a chunk; the last one leaves the keys and values that later chunks see


_MOST_CHUNKS = 4096
_SIZES = (
    "num_heads",
    "dim",
    "in_dim",
    "out_dim",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "text_len",
)


class RecordingError(FileError):
    """A file that is no recording."""


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
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such recording")
    try:
        with opened(path, "recording (safetensors)") as file:
            meta = {name: parse_json(value, name) for name, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        require_finite(tensors.items(), str(path))
        whole = [name for name, t in tensors.items() if not t.is_floating_point() and name != "call.t"]
        if whole:
            raise FileError(f"{path}: expected floating point, got other numbers in {some(whole)}")
    except FileError as error:
        told = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise RecordingError(told) from None
    needed = ["config", "frames_per_chunk", "window_frames", "sink_frames", "positions"]
    calls = ["call.x", "call.t", "call.v", "call.context"]
    if "chunks" not in meta:
        needed.append("mask")
        calls.append("call.grad_v")
    if not isinstance(meta.get("config", {}), dict):
        raise RecordingError(f"{path}: config: expected keys and values, got {shown(meta['config'])}")
    missing = [name for name in needed if name not in meta]
    missing += [f"config.{name}" for name in _SIZES if name not in meta.get("config", _SIZES)]
    missing += [name for name in calls if name not in tensors]
    if missing:
        raise RecordingError(f"{path}: expected a recording, but it has no {some(missing)}")
    for name in ("dim", "num_heads"):
        if type(meta["config"][name]) is not int or meta["config"][name] < 1:
            got = shown(meta["config"][name])
            raise RecordingError(f"{path}: config.{name}: expected a whole number, 1 or more, got {got}")
    if "chunks" in meta and (type(meta["chunks"]) is not int or not 1 <= meta["chunks"] <= _MOST_CHUNKS):
        expected = f"a whole number from 1 to {_MOST_CHUNKS}"
        raise RecordingError(f"{path}: chunks: expected {expected}, got {shown(meta['chunks'])}")
    for name, window in (("window_frames", meta["window_frames"]), ("sink_frames", meta["sink_frames"])):
        if window is not None and type(window) is not int:
            raise RecordingError(f"{path}: {name}: expected a whole number, got {shown(window)}")
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
    require_sizes(config, recording.source)
    require_told(config, state, recording.source)
    return student_from_state(config, state, dtype=dtype, source=recording.source)


def replay(path: str | Path, dtype: torch.dtype = torch.float32) -> ReplayResult:
    """Run one recording through the student and compare everything it recorded.

    Args:
        path: a file of the golden format.
        dtype: to compute in; the recorded values are cast to it.

    Raises:
        FileNotFoundError: no such file.
        RecordingError: not a recording, or one whose parts do not fit together.
    """
    try:
        return _replay(path, dtype)
    except RecordingError:
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
    ) as error:  # of what the file says
        lines = str(error).splitlines() or [""]
        reason = lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}"
        reason = reason.removeprefix(f"{path}: ")
        raise RecordingError(
            f"{path}: expected a recording whose parts fit together, got {reason}"
        ) from error


def _replay(path: str | Path, dtype: torch.dtype) -> ReplayResult:
    recording = read_recording(path)
    student = recorded_student(recording, dtype)
    calls = {name: value.to(dtype) for name, value in recording.calls.items()}
    calls["t"] = recording.calls["t"]
    compare = _replay_stream if recording.streaming else _replay_training
    try:
        return ReplayResult(recording.source, compare(student, recording.meta, calls))
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from None
    except (ValueError, TypeError, RuntimeError, LookupError) as error:  # calls that do not fit the weights
        raise RecordingError(f"{path}: its calls do not fit its weights: {first_line(error)}") from error


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
    passes, errors = StudentPasses(student, cache, text), {}
    for call in range(x.shape[0]):
        ours = passes.velocity(x[call], t[call])
        errors[f"chunk {call // PASSES}, call {call % PASSES}"] = relative_error(ours, v[call])
        if call % PASSES == PASSES - 1:
            cache.commit()
    return errors


def _replay_training(
    student: CausalWanTransformer, meta: Mapping[str, Any], calls: Mapping[str, Tensor]
) -> dict[str, float]:
    if meta["mask"] not in ("block_causal", "teacher_forcing"):
        raise RecordingError(f"mask: expected block_causal or teacher_forcing, got {shown(meta['mask'])}")
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
