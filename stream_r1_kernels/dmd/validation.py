import torch
from torch import Tensor

from ..arguments import check_finite, check_float_tensor, check_tensor

WEIGHTS = (torch.float32, torch.float64)


def _check_predictions(op: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    check_float_tensor(op, "x", x)
    if x.dim() != 5 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x: expected shape [B, F, C, h, w], got {list(x.shape)}")
    for name, value in others.items():
        if value is None and name == "real_uncond":
            continue
        check_tensor(op, name, value)
        assert value is not None
        if value.shape != x.shape:
            raise ValueError(f"{op}: {name}: expected shape {list(x.shape)} as x, got {list(value.shape)}")
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: {name}: expected {x.dtype} as x, got {value.dtype}")


def _check_broadcast(op: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.dim() != 5 or any(got not in (1, size) for got, size in zip(value.shape, x.shape, strict=True)):
        raise ValueError(
            f"{op}: {name}: expected 5 dimensions that broadcast to {list(x.shape)} (each equal or 1), "
            f"got {list(value.shape)}"
        )


def check_dmd(
    op: str,
    x: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor | None,
    guidance: float,
    w_intra: Tensor | None,
    w_inter: Tensor | None,
    mask: Tensor | None,
) -> None:
    _check_predictions(op, x, {"fake": fake, "real_cond": real_cond, "real_uncond": real_uncond})
    check_finite(op, "guidance", guidance)  # with a NaN all of g would count as 0
    for name, value in (("w_intra", w_intra), ("w_inter", w_inter), ("mask", mask)):
        if value is not None:
            check_tensor(op, name, value)
    if w_intra is not None:
        _check_broadcast(op, "w_intra", w_intra, x)
    if w_inter is not None and w_inter.shape != x.shape[:1]:
        raise ValueError(f"{op}: w_inter: expected shape [{x.shape[0]}], got {list(w_inter.shape)}")
    for name, weight in (("w_intra", w_intra), ("w_inter", w_inter)):
        if weight is not None and weight.dtype not in WEIGHTS:
            raise TypeError(f"{op}: {name}: expected float32 or float64, got {weight.dtype}")
    if mask is not None:
        _check_broadcast(op, "mask", mask, x)
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask: expected bool, got {mask.dtype}")
    data = {
        "fake": fake,
        "real_cond": real_cond,
        "real_uncond": real_uncond,
        "w_intra": w_intra,
        "w_inter": w_inter,
        "mask": mask,
    }
    for name, value in data.items():
        if value is None:
            continue
        if value.device != x.device:
            raise ValueError(f"{op}: {name}: expected device {x.device} as x, got {value.device}")
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(f"{op}: {name}: only x has a gradient; pass {name}.detach()")


def check_buffer(op: str, buffer: Tensor, x: Tensor, scale: float) -> None:
    check_finite(op, "scale", scale)
    check_tensor(op, "buffer", buffer)
    if buffer.shape != x.shape:
        raise ValueError(f"{op}: buffer: expected shape {list(x.shape)} as x, got {list(buffer.shape)}")
    if buffer.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: buffer: expected {x.dtype} as x, or float32, got {buffer.dtype}")
    if buffer.device != x.device:
        raise ValueError(f"{op}: buffer: expected device {x.device} as x, got {buffer.device}")
    if buffer.requires_grad:
        raise ValueError(f"{op}: buffer: expected a tensor that does not require grad (for instance x.grad)")
