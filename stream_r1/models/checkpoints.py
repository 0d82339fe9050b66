"""Transformers from weights in whatever format (`weight_files`), under whatever names (`weight_names`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stream_r1.files import FileError
from stream_r1.messages import first_line, shown, some
from stream_r1.models.adapters import merge_adapter
from stream_r1.models.fp8 import make_room, quantize_student, refuse_quantization, take_stored
from stream_r1.models.tensor_files import require_finite
from stream_r1.models.transformer import FLOAT32_PARTS, CausalWanTransformer
from stream_r1.models.wan import refuse_unsupported_weights, unsupported_setting
from stream_r1.models.weight_files import model_folder, read_config, read_tensors
from stream_r1.models.weight_names import BLOCK_NAME, normalise

_TIME = "condition_embedder.time_embedder.linear_1.weight"
_TELLING = {  # weights that tell sizes, and their dimensions
    "patch_embedding.weight": 5,
    "proj_out.weight": 2,
    "condition_embedder.text_embedder.linear_1.weight": 2,
    _TIME: 2,
    "blocks.0.ffn.net.0.proj.weight": 2,
}


def read_weights(path: str | Path, network: str | None = None) -> dict[str, Tensor]:
    """The tensors of a transformer's checkpoint under diffusers' names.

    Arguments and errors are those of `read_tensors`; weights of models that are not supported are refused.
    """
    state = read_tensors(path, network)
    refuse_unsupported_weights(state, str(path))
    return normalise(state, str(path))


def infer_config(
    state: Mapping[str, Tensor], *, head_dim: int = 128, source: str = "state dict"
) -> dict[str, Any]:
    """The sizes that weights under diffusers' names tell; all but the number of heads, which `head_dim`
    gives.

    Raises:
        FileError: weights that tell a size are missing or have other dimensions, or `head_dim` does not
            divide the width.
    """
    absent = [name for name in _TELLING if name not in state]
    if absent:
        raise FileError(f"{source}: expected {', '.join(absent)}, found {some(state)}")
    for name, dims in _TELLING.items():
        if state[name].dim() != dims:
            got = list(state[name].shape)
            raise FileError(f"{source}: expected {name} with {dims} dimensions, got {got}")
    patches, head, text, time, ffn = (state[name].shape for name in _TELLING)
    if time[1] % 2:
        raise FileError(f"{source}: expected {_TIME} with an even width, got {list(time)}")
    dim, in_channels, patch_frames, patch_rows, patch_columns = patches
    if head_dim < 1 or dim % head_dim:
        raise FileError(f"{source}: head_dim must divide the width {dim}, got {head_dim}")
    blocks = {int(name.split(".")[1]) for name in state if BLOCK_NAME.fullmatch(name)}
    if max(blocks) >= len(state):
        raise FileError(f"{source}: expected blocks numbered from 0 on, got blocks.{max(blocks)}")
    return {
        "patch_size": (patch_frames, patch_rows, patch_columns),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": head[0] // (patch_frames * patch_rows * patch_columns),
        "text_dim": text[1],
        "freq_dim": time[1],
        "ffn_dim": ffn[0],
        "num_layers": max(blocks) + 1,
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
    }


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str = "state dict") -> None:
    """Copy weights under diffusers' names into a model; all of them or none.

    Raises:
        FileError: names the missing, unexpected and wrongly shaped parameters.
    """
    check_fit(model, state, source)
    model.load_state_dict(dict(state))


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not a model's own, by name and shape.

    Raises:
        FileError: names the missing, unexpected and wrongly shaped parameters, the first of many.
    """
    expected = model.state_dict()
    problems = []
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} (expected {list(expected[name].shape)}, got {list(state[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    whole = [
        f"{name} (expected floating point, got {str(state[name].dtype).removeprefix('torch.')})"
        for name in expected
        if name in state and not state[name].is_floating_point()
    ]
    for what, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", wrong),
        ("of another dtype", whole),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {some(names)}")
    if problems:
        raise FileError(f"{source}: the weights do not fit the model; " + "; ".join(problems))


def load_student(
    path: str | Path,
    *,
    network: str | None = None,
    config: Mapping[str, Any] | None = None,
    head_dim: int | None = None,
    adapter: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    runs_on: torch.device | str | None = None,
    **settings: Any,
) -> CausalWanTransformer:
    """A student from any of the formats.

    Args:
        path: a file or a folder of weights, see `read_tensors`. Of a file, and of a folder without
            `config.json`, sizes are read off the weights.
        network: which of several in a file, see `read_tensors`.
        config: settings that weights without a `config.json` do not tell, as those of the model they were
            trained from.
        head_dim: width of a head, which weights do not tell either; None: that of `config`, else 128.
        adapter: a LoRA adapter's folder, merged into the weights, see `merge_adapter`.
        dtype: of the weights; the time embedder, the modulation tables and the affine norms stay float32, as
            in diffusers.
        quantize: "fp8" or "fp8-emulated": linear layers of the blocks in FP8, see `quantize_student`; of a
            folder that a quantised student wrote, its FP8 weights as they are.
        runs_on: where it will compute, if not on `device`.
        settings: of `CausalWanTransformer`, over all others: `window_frames=9, sink_frames=3`, ...

    Raises:
        FileNotFoundError, FileError: see `read_tensors`, `infer_config` and `load_weights`.
        FileError: FP8 weights without `quantize`, or that are damaged.
        ValueError: settings that do not exist or do not fit, `quantize` where it can't be.
    """
    path = Path(path)
    if quantize is not None:
        refuse_quantization("load_student", quantize, dtype, runs_on or device)
    known = set(inspect.signature(CausalWanTransformer.__init__).parameters) - {"self", "quantization"}
    strange = [name for name in settings if name not in known]
    if strange:
        raise ValueError(
            f"load_student: no such setting: {', '.join(strange)}; there are {', '.join(sorted(known))}"
        )
    own = _config(path)
    state = read_weights(path, network)
    stored = take_stored({} if own is None else own, state, str(path))
    if stored and quantize is None:
        raise FileError(f"{path}: holds FP8 weights: expected quantize 'fp8' or 'fp8-emulated', got none")
    if own is None:
        own = dict(config or {})
        head_dim = head_dim or own.get("attention_head_dim", 128)
        own |= infer_config(state, head_dim=head_dim, source=str(path))
    else:
        require_told(own, state, model_folder(path) / "config.json")
    if adapter is not None:
        if stored:
            raise FileError(f"{path}: holds FP8 weights, into which no adapter can be merged, got {adapter}")
        state = merge_adapter(state, adapter)
    own = {name: value for name, value in own.items() if name in known} | settings
    student = student_from_state(
        own, state, dtype=dtype, device=device, source=str(path), quantized=quantize if stored else None
    )
    if quantize is not None and not stored:
        quantize_student(student, quantize, runs_on=runs_on)
    return student


def load_score_model(
    path: str | Path, *, device: torch.device | str = "cpu", head_dim: int | None = None
) -> nn.Module:
    """A teacher or a critic, a `WanTransformer3DModel` in float32 and eval mode, from any of the formats.

    Args:
        path: a file or a folder of weights, as for `load_student`.
        head_dim: width of a head where weights have no `config.json`; None: 128, as all published ones have.

    Raises:
        FileNotFoundError, FileError: as of `load_student`; it is conditioned by more than text.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    path = Path(path)
    config = _config(path)
    state = read_weights(path)
    source = str(path if config is None else model_folder(path) / "config.json")
    if config is None:
        config = infer_config(state, head_dim=head_dim or 128, source=source)
        _require_supported(config, source)
    else:
        require_told(config, state, source)
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    try:
        with torch.device("meta"):
            made: Any = WanTransformer3DModel(**{name: x for name, x in config.items() if name in known})
        sizes = made.config
        rotary = WanRotaryPosEmbed(sizes.attention_head_dim, sizes.patch_size, sizes.rope_max_seq_len)
    except Exception as error:  # whatever settings of any kind lead to
        raise FileError(f"{source}: {first_line(error)}") from error
    made.rope = rotary  # has no weights: its tables would stay on the meta device
    model: nn.Module = made
    check_fit(model, state, source)
    placed = {name: value.to(device, torch.float32) for name, value in state.items()}
    require_finite(placed.items(), source)
    model.load_state_dict(placed, assign=True)
    return model.to(device).requires_grad_(True).eval()


def _config(path: Path) -> dict[str, Any] | None:
    """As `read_config`; what is conditioned by more than text is refused."""
    config = read_config(path)
    if config is not None:
        _require_supported(config, str(model_folder(path) / "config.json"))
    return config


def _require_supported(config: Mapping[str, Any], source: str) -> None:
    problem = unsupported_setting(config)
    if problem is not None:
        raise FileError(f"{source}: {problem}")


def require_told(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse a configuration of other sizes than weights under diffusers' names have.

    Raises:
        FileError: names what differs, and what `infer_config` misses.
    """
    told = infer_config(state, head_dim=config.get("attention_head_dim", 128), source=str(source))
    for name, expected in told.items():
        got = config.get(name, expected)
        got = tuple(got) if isinstance(got, list) else got
        if got != expected and not (name == "out_channels" and not got):
            raise FileError(f"{source}: {name}: expected {expected} as in the weights, got {shown(got)}")


def student_from_state(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    source: str = "state dict",
    quantized: str | None = None,
) -> CausalWanTransformer:
    """A student with these settings and these weights (diffusers' names), in eval mode.

    `quantized`: the weights are those of a quantised student, to be used as "fp8" or "fp8-emulated".

    Raises:
        FileError: names the missing, unexpected and wrongly shaped parameters.
    """
    try:
        with torch.device("meta"):  # the weights are there already: no time for random ones
            model = CausalWanTransformer(**config)
            if quantized is not None:
                make_room(model, quantized)
    except Exception as error:  # whatever settings of any kind lead to
        raise FileError(f"{source}: {first_line(error)}") from error
    check_fit(model, state, source)
    wide = torch.promote_types(dtype, torch.float32)
    buffers = dict(model.named_buffers())  # FP8 weights and their scales
    placed = {
        name: value.to(device)
        if name in buffers
        else value.to(device, wide if any(part in FLOAT32_PARTS for part in name.split(".")) else dtype)
        for name, value in state.items()
    }
    require_finite(placed.items(), source)
    model.load_state_dict(placed, assign=True)
    return model.requires_grad_(quantized is None).eval()
