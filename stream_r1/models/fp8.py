"""A student whose blocks multiply in FP8: float8_e4m3fn weights with a scale an output channel, and rows of
activations with a scale a token, found as they are made.

Quantised are the linear layers that every token of every pass goes through: projections of self-attention,
queries and output of cross-attention, feed-forward. All else stays as it was: the first and the last
projection read and write latents, where an error goes straight into the picture; embedding and modulation of
time steer whole frames with a few numbers; keys and values of the text are computed once a prompt. Together
they are less than a hundredth of the work of a pass's linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stream_r1.files import FileError
from stream_r1.messages import shown, some
from stream_r1_kernels import QuantizedRows, multiply_rows, quantize_rows
from stream_r1_kernels.fp8.rows import FP8

QUANTIZATIONS = ("fp8", "fp8-emulated")
STORED = "fp8"  # `quantization` in the config of a folder with FP8 weights
_OLDEST = (8, 9)  # compute capability with FP8 tensor cores
_MULTIPLE = 16  # of widths, which `scaled_mm` takes alone


class Fp8Linear(nn.Module):
    """A frozen linear layer in FP8.

    Args:
        weight: [N, K] and [N, 1], see `QuantizedRows`.
        bias: [N]; results are in its dtype.
        emulated: dequantise both factors into that dtype and multiply there, which any machine can, instead
            of `multiply_rows`.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: QuantizedRows, bias: Tensor, *, emulated: bool) -> None:
        super().__init__()
        # Buffers: parameters in 8 bits would pass for the dtype of the model.
        self.register_buffer("weight", weight.data)
        self.register_buffer("weight_scale", weight.scale)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.emulated = emulated

    def quantize(self, x: Tensor | QuantizedRows) -> QuantizedRows:
        """x [B, T, K] as the layer multiplies it; what is quantised already stays as it is."""
        return x if isinstance(x, QuantizedRows) else quantize_rows(x)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """[B, T, K] -> [B, T, N].

        Raises:
            TypeError: the weights were cast, as by `model.to(dtype)`: then their scales are worth nothing.
        """
        if self.weight.dtype != FP8 or self.weight_scale.dtype != torch.float32:
            raise TypeError(
                f"Fp8Linear: expected weights in {FP8} and scales in float32 (a quantised model can be "
                f"moved, but not cast), got {self.weight.dtype} and {self.weight_scale.dtype}"
            )
        rows, weight = self.quantize(x), QuantizedRows(self.weight, self.weight_scale)
        if not self.emulated:
            return multiply_rows(rows, weight, self.bias)
        dtype = self.bias.dtype
        return functional.linear(rows.dequantize(dtype), weight.dequantize(dtype), self.bias)


def refuse_quantization(where: str, quantize: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises ValueError for a name that is none, and for "fp8" where a student can't multiply in it."""
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"{where}: quantize: expected {' or '.join(QUANTIZATIONS)}, got {quantize!r}")
    if quantize == "fp8":
        device = torch.device(device)
        got = str(device)
        if device.type == "cuda" and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
            got = "" if capability >= _OLDEST else "compute capability {}.{}".format(*capability)
        if got:
            expected = "a GPU with FP8 tensor cores (compute capability 8.9 or later)"
            raise ValueError(
                f"{where}: quantize 'fp8' needs {expected}, got {got}; 'fp8-emulated' runs anywhere"
            )
        if dtype != torch.bfloat16:
            expected = "a student in bfloat16, the one dtype that torch's row-wise product writes"
            raise ValueError(f"{where}: quantize 'fp8' needs {expected}, got {dtype}")


def layers_in_fp8(student: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where the layers are that are quantised: the module that has one, and its name there."""
    for block in student.blocks:  # type: ignore[union-attr]
        for name in ("to_q", "to_k", "to_v"):
            yield block.attn1, name
        yield block.attn1.to_out, "0"
        yield block.attn2, "to_q"
        yield block.attn2.to_out, "0"
        yield block.ffn.net[0], "proj"
        yield block.ffn.net, "2"


def quantize_student(student: Any, quantize: str, *, runs_on: torch.device | str | None = None) -> None:
    """Replace the linear layers of a student's blocks by FP8 ones, in place; it can't be trained after that.

    `student.save_pretrained(folder)` writes the FP8 weights then, and `load_student(folder, quantize=...)`
    reads them.

    Args:
        student: a `CausalWanTransformer` with its weights, adapters merged.
        quantize: "fp8", or "fp8-emulated" (on any device and in any dtype, to measure quality).
        runs_on: where it will compute, if that is not where it is.

    Raises:
        ValueError: "fp8" on a device without it, or of a student that is not in bfloat16; layers that are no
            plain linear ones, or of a width that is no multiple of 16.
    """
    device = runs_on or student.device
    refuse_quantization("quantize_student", quantize, student.dtype, device)
    emulated = quantize != "fp8"
    layers = list(layers_in_fp8(student))
    for owner, name in layers:
        _refuse_layer(getattr(owner, name), emulated)
    for owner, name in layers:
        layer = getattr(owner, name)
        rows = quantize_rows(layer.weight.detach()[None])
        weight = QuantizedRows(rows.data[0], rows.scale[0])
        setattr(owner, name, Fp8Linear(weight, layer.bias.detach(), emulated=emulated))
    student.requires_grad_(False)
    student.register_to_config(quantization=STORED)


def _refuse_layer(layer: nn.Module, emulated: bool) -> None:
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"quantize_student: expected linear layers with nothing added to them, got {type(layer).__name__}"
        )
    if not emulated and (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE):
        got = f"{layer.in_features} to {layer.out_features}"
        raise ValueError(f"quantize_student: 'fp8' needs widths that are multiples of 16, got {got}")


def take_stored(config: MutableMapping[str, Any], state: Mapping[str, Tensor], source: str) -> bool:
    """Whether a student's weights are stored in FP8; takes the word for it out of its config.

    Raises:
        FileError: config and weights disagree, or scales that no quantisation gives.
    """
    stored = config.pop("quantization", None)
    if stored not in (None, STORED):
        raise FileError(f"{source}: quantization: expected null or {STORED!r}, got {shown(stored)}")
    narrow = [name for name, value in state.items() if value.dtype == FP8]
    scaled = [name for name in state if f"{name}_scale" in state]
    if stored is None:
        if scaled:
            expected = f"a config.json with quantization {STORED!r} beside weights with scales"
            raise FileError(f"{source}: expected {expected}, got none beside {some(scaled)}")
        return False
    wrong = sorted({*scaled} ^ {*narrow})
    if wrong or not narrow:
        raise FileError(
            f"{source}: expected weights in {FP8}, each with its scale, got "
            + (f"another dtype or no scale: {some(wrong)}" if wrong else "none")
        )
    for name in narrow:
        scale, rows = state[f"{name}_scale"], state[name].shape[0]
        if scale.dtype != torch.float32 or scale.shape != (rows, 1):
            got = f"{scale.dtype} {list(scale.shape)}"
            raise FileError(f"{source}: {name}_scale: expected torch.float32 [{rows}, 1], got {got}")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise FileError(f"{source}: {name}_scale: expected positive finite numbers")
    return True


def make_room(student: Any, quantize: str) -> None:
    """Put empty FP8 layers into a student on the meta device, for weights that are stored so."""
    for owner, name in layers_in_fp8(student):
        layer = getattr(owner, name)
        _refuse_layer(layer, quantize != "fp8")
        weight = torch.empty_like(layer.weight, dtype=FP8, requires_grad=False)
        scale = torch.empty(len(weight), 1, device=weight.device)
        room = Fp8Linear(QuantizedRows(weight, scale), layer.bias.detach(), emulated=quantize != "fp8")
        setattr(owner, name, room)
    student.register_to_config(quantization=STORED)
