"""Student weights in the formats they come in, and the two families of names.

Formats: diffusers folders (sharded or not), `.safetensors`, and `.pt` files that hold a bare state dict or
several networks (`generator`, `generator_ema`, `critic`). Names: those of diffusers, or the original ones of
Wan, which Self Forcing, Reward Forcing and Stream-R1 keep, with whatever prefixes their wrappers left.
Nothing is unpickled but tensors.
"""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stream_r1.models.transformer import FLOAT32_PARTS, CausalWanTransformer

NETWORKS = ("generator_ema", "generator", "critic")

# original -> diffusers; what follows (.weight, .bias) stays
_TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{original}.{part}": f"{ours}.{renamed}"
    for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, renamed in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}
_BLOCK_NAME = re.compile(r"(blocks\.\d+)\.(.+)")
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_LEADING = ("model.", "module.", "diffusion_model.")


class CheckpointError(ValueError):
    """Weights that cannot be used; the message names the file, what was expected and what was found."""


def to_diffusers_name(name: str) -> str:
    """An original Wan name -> diffusers' name. Names of no known part stay as they are."""
    return _rename(name, _TOP, _BLOCK)


def to_original_name(name: str) -> str:
    """A diffusers name -> the original Wan name. Names of no known part stay as they are."""
    return _rename(name, {new: old for old, new in _TOP.items()}, {new: old for old, new in _BLOCK.items()})


def to_original_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's state dict under the names that other Wan code bases load."""
    return {to_original_name(name): value for name, value in state.items()}


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    inside = _BLOCK_NAME.fullmatch(name)
    lead, rest, table = (f"{inside[1]}.", inside[2], block) if inside else ("", name, top)
    for old, new in table.items():
        if rest == old or rest.startswith(old + "."):
            return lead + new + rest[len(old) :]
    return name


def strip_prefixes(name: str) -> str:
    """A parameter's name without what FSDP, checkpointing, torch.compile and wrapper classes put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_LEADING):
        name = name.split(".", 1)[1]
    return name


def normalise(state: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """Any of the known namings -> diffusers' names.

    Raises:
        CheckpointError: two entries become one name.
    """
    stripped = {name: strip_prefixes(name) for name in state}
    # The affine norm tells nothing (norm2 and norm3 are swapped between the two), so a file is judged as a
    # whole.
    original = any(".self_attn." in name or name.startswith("time_embedding.") for name in stripped.values())
    named: dict[str, Tensor] = {}
    for name, bare in stripped.items():
        ours = to_diffusers_name(bare) if original else bare
        if ours in named:
            raise CheckpointError(f"{source}: several entries are named {ours}, one of them {name}")
        named[ours] = state[name]
    return named


def read_weights(path: str | Path, network: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under diffusers' names, on the CPU, in the dtype they were stored in.

    Args:
        path: a `.safetensors` or `.pt` file, or a folder with diffusers' weights (the model's, or a
            pipeline's with `transformer`).
        network: which of `generator_ema`, `generator`, `critic` in a file that holds several; None: the first
            there is, in this order, never the critic.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        CheckpointError: not a state dict, or no such network.
    """
    path = Path(path)
    if path.is_dir():
        files = _weight_files(model_folder(path))
        state: dict[str, Any] = {}
        for file in files:
            state.update(read_file(file))
    elif path.is_file():
        state = read_file(path)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder of weights")
    return normalise(_choose_network(state, network, str(path)), str(path))


def model_folder(path: Path) -> Path:
    """The folder with the transformer's `config.json`: `path` itself, or its `transformer`."""
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path}: expected a diffusers folder, found no config.json here or under transformer"
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: the index names shards that are not there: {', '.join(missing)}"
            )
        return [folder / shard for shard in shards]
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(
        f"{folder}: expected diffusion_pytorch_model.safetensors (or its index), found neither"
    )


def read_file(path: Path) -> dict[str, Any]:
    """What a `.safetensors` or `.pt` file holds, on the CPU, without unpickling anything but tensors.

    Raises:
        CheckpointError: the file is damaged, needs code to be read, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, not read: of three networks one is wanted. Files of an old torch are no archives.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: expected tensors, readable without running code; {reason}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, got {type(content).__name__}")
    return dict(content)


def _choose_network(state: Mapping[str, Any], network: str | None, source: str) -> dict[str, Tensor]:
    if network is not None and network not in NETWORKS:
        raise CheckpointError(f"{source}: network must be one of {', '.join(NETWORKS)}, got {network!r}")
    networks = {name: _network(state, name) for name in NETWORKS}
    present = [name for name, tensors in networks.items() if tensors]
    if present:
        chosen = network or next((name for name in present if name != "critic"), None)
        if chosen not in present:
            wanted = network or "generator or generator_ema"
            raise CheckpointError(f"{source}: expected {wanted}, found {', '.join(present)}")
        tensors = networks[chosen]
    elif network is not None:
        raise CheckpointError(
            f"{source}: expected several networks with {network} among them, found a bare state dict"
        )
    else:
        inner = next(
            (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state
        )
        tensors = dict(inner)
    strange = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange or not tensors:
        found = ", ".join(map(str, list(tensors)[:5])) or "nothing"
        raise CheckpointError(f"{source}: expected a state dict of tensors, found {found}")
    return tensors


def _network(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A network of a file that holds several: nested under its name, or flat with its name in front."""
    nested = state.get(name)
    if isinstance(nested, Mapping):
        return dict(nested)
    return {key[len(name) + 1 :]: value for key, value in state.items() if str(key).startswith(name + ".")}


def infer_config(
    state: Mapping[str, Tensor], *, head_dim: int = 128, source: str = "state dict"
) -> dict[str, Any]:
    """The sizes that weights under diffusers' names tell; all but the number of heads, which `head_dim`
    gives.

    Raises:
        CheckpointError: a weight that tells a size is missing, or `head_dim` does not divide the width.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise CheckpointError(f"{source}: expected {name}, found {_some(state)}")
        return state[name].shape

    dim, in_channels, patch_frames, patch_rows, patch_columns = shape("patch_embedding.weight")
    if head_dim < 1 or dim % head_dim:
        raise CheckpointError(f"{source}: head_dim must divide the width {dim}, got {head_dim}")
    blocks = {int(name.split(".")[1]) for name in state if _BLOCK_NAME.fullmatch(name)}
    return {
        "patch_size": (patch_frames, patch_rows, patch_columns),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0] // (patch_frames * patch_rows * patch_columns),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": max(blocks) + 1,
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
    }


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str = "state dict") -> None:
    """Copy weights under diffusers' names into a model; all of them or none.

    Raises:
        CheckpointError: names the missing, unexpected and wrongly shaped parameters.
    """
    check_fit(model, state, source)
    model.load_state_dict(dict(state))


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError if a parameter is missing, unexpected or of another shape; it names them."""
    expected = model.state_dict()
    problems = []
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} (expected {list(expected[name].shape)}, got {list(state[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)):
        if names:
            problems.append(f"{len(names)} {what}: {_some(names)}")
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the model; " + "; ".join(problems))


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load_student(
    path: str | Path,
    *,
    network: str | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> CausalWanTransformer:
    """A student from any of the formats.

    Args:
        path: a diffusers folder, or a `.pt` or `.safetensors` file (its sizes are read off the weights).
        network: see `read_weights`.
        head_dim: width of a head, which a file without a configuration does not tell.
        dtype: of the weights; the time embedder, the modulation tables and the affine norms stay float32, as
            in diffusers.
        settings: of `CausalWanTransformer`, over those of the folder: `window_frames=9, sink_frames=3`, ...

    Raises:
        FileNotFoundError, CheckpointError: see `read_weights`, `infer_config` and `load_weights`.
        ValueError: settings that do not exist or do not fit.
    """
    path = Path(path)
    state = read_weights(path, network)
    if path.is_dir():
        config = json.loads((model_folder(path) / "config.json").read_text())
        config = {name: value for name, value in config.items() if not name.startswith("_")}
    else:
        config = infer_config(state, head_dim=head_dim, source=str(path))
    known = set(inspect.signature(CausalWanTransformer.__init__).parameters) - {"self"}
    strange = [name for name in settings if name not in known]
    if strange:
        raise ValueError(
            f"load_student: no such setting: {', '.join(strange)}; there are {', '.join(sorted(known))}"
        )
    config = {name: value for name, value in config.items() if name in known} | settings
    return student_from_state(config, state, dtype=dtype, device=device, source=str(path))


def student_from_state(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    source: str = "state dict",
) -> CausalWanTransformer:
    """A student with these settings and these weights (diffusers' names), in eval mode.

    Raises:
        CheckpointError: names the missing, unexpected and wrongly shaped parameters.
    """
    with torch.device("meta"):  # the weights are there already: no time for random ones
        model = CausalWanTransformer(**config)
    check_fit(model, state, source)
    wide = torch.promote_types(dtype, torch.float32)
    placed = {
        name: value.to(device, wide if any(part in FLOAT32_PARTS for part in name.split(".")) else dtype)
        for name, value in state.items()
    }
    model.load_state_dict(placed, assign=True)
    return model.requires_grad_(True).eval()
