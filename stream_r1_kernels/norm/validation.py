import torch
from torch import Tensor

from ..arguments import FLOATS, check_eps, check_float_tensor, check_tensor


def _check_tokens(op: str, x: Tensor) -> None:
    check_float_tensor(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x: expected shape [B, T, D], got {list(x.shape)}")


def _check_per_frame(op: str, name: str, value: Tensor, x: Tensor) -> None:
    check_tensor(op, name, value)
    batch, tokens, width = x.shape
    if value.dim() != 3 or value.shape[0] != batch or value.shape[2] != width:
        raise ValueError(f"{op}: {name}: expected shape [{batch}, F, {width}], got {list(value.shape)}")
    frames = value.shape[1]
    if frames == 0 or tokens % frames != 0:
        raise ValueError(f"{op}: {name}: expected frames that divide {tokens} tokens, got {frames}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name}: expected device {x.device} as x, got {value.device}")


def check_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    op = "modulated_norm"
    _check_tokens(op, x)
    for name, value in (("shift", shift), ("scale", scale)):
        _check_per_frame(op, name, value, x)
        if value.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{op}: {name}: expected {x.dtype} as x, or float32, got {value.dtype}")
    if scale.shape != shift.shape:
        raise ValueError(f"{op}: scale: expected shape {list(shift.shape)} as shift, got {list(scale.shape)}")
    if scale.dtype != shift.dtype:
        raise TypeError(f"{op}: scale: expected {shift.dtype} as shift, got {scale.dtype}")
    check_eps(op, eps)


def check_gated_add(x: Tensor, y: Tensor, gate: Tensor) -> None:
    op = "gated_add"
    _check_tokens(op, x)
    check_tensor(op, "y", y)
    if y.shape != x.shape:
        raise ValueError(f"{op}: y: expected shape {list(x.shape)} as x, got {list(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"{op}: y: expected device {x.device} as x, got {y.device}")
    if y.dtype != x.dtype and not (x.dtype == torch.float32 and y.dtype in (torch.bfloat16, torch.float16)):
        allowed = "float32, bfloat16 or float16" if x.dtype == torch.float32 else f"{x.dtype} as x"
        raise TypeError(f"{op}: y: expected {allowed}, got {y.dtype}")
    _check_per_frame(op, "gate", gate, x)
    if gate.dtype not in (y.dtype, torch.float32):
        raise TypeError(f"{op}: gate: expected {y.dtype} as y, or float32, got {gate.dtype}")


def check_rms_norm(op: str, x: Tensor, weight: Tensor, eps: float) -> None:
    _check_tokens(op, x)
    check_tensor(op, "weight", weight)
    width = x.shape[2]
    if weight.shape != (width,):
        raise ValueError(f"{op}: weight: expected shape [{width}], got {list(weight.shape)}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"{op}: weight: expected a floating-point dtype, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"{op}: weight: expected device {x.device} as x, got {weight.device}")
    check_eps(op, eps)


def check_rms_norm_silu(x: Tensor, weight: Tensor, before: Tensor | None, eps: float) -> None:
    op = "rms_norm_silu"
    check_rms_norm(op, x, weight, eps)
    batch, _, width = x.shape
    if before is not None:
        check_tensor(op, "before", before)
        if before.dim() != 3 or before.shape[0] != batch or before.shape[2] != width:
            expected = f"[{batch}, P, {width}]"
            raise ValueError(f"{op}: before: expected shape {expected}, got {list(before.shape)}")
        if before.dtype != x.dtype:
            raise TypeError(f"{op}: before: expected {x.dtype} as x, got {before.dtype}")
        if before.device != x.device:
            raise ValueError(f"{op}: before: expected device {x.device} as x, got {before.device}")
