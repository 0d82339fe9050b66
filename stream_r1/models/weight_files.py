"""Tensors out of the files that weights come in: one file, or a folder with one file or shards.

Files: `.safetensors`, and `.pt`, `.pth`, `.bin`, `.ckpt` of torch, with a bare state dict or several networks
(`generator`, `generator_ema`, `critic`). Nothing is unpickled but tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stream_r1.files import FileError, read_json, require_file
from stream_r1.messages import shown, some
from stream_r1.models.sizes import read_sizes, require_sizes
from stream_r1.models.tensor_files import TORCH_SUFFIXES, read_file, require_plain, shapes_in
from stream_r1.models.wan import refuse_unsupported_place, under_diffusers_keys

NETWORKS = ("generator_ema", "generator", "critic")

_CLASSES = ("CausalWanTransformer", "WanTransformer3DModel")
_DIFFUSERS = "diffusion_pytorch_model"
_OF_A_RUN = (
    "{}: a training run's checkpoint; the run exports its student to OUT/student when it ends or is stopped"
)


def read_tensors(path: str | Path, network: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names they are stored by, on the CPU, in the dtype they have.

    Args:
        path: a file, or a folder: diffusers' weights (the model's, or a pipeline's with `transformer`), an
            index with its shards, a single file, or shards that make one state dict together.
        network: which of `generator_ema`, `generator`, `critic` in a file that holds several; None: the first
            there is, in this order, never the critic.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        FileError: not a state dict, no such network, or shards that overlap.
    """
    path = Path(path)
    state: dict[str, Any] = {}
    if path.is_dir():
        for file in _weight_files(model_folder(path)):
            _add_shard(state, read_file(file), file)
    elif path.exists():
        state = read_file(path)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder of weights")
    if any(str(name).startswith("student/") for name in state):
        raise FileError(_OF_A_RUN.format(path))
    return _choose_network(state, network, str(path))


def model_folder(path: Path) -> Path:
    """The folder of a model: `path` itself, or the `transformer` of a pipeline."""
    inner = path / "transformer"
    return inner if (inner / "config.json").is_file() and not (path / "config.json").is_file() else path


def read_config(path: Path) -> dict[str, Any] | None:
    """The settings in a transformer's `config.json`, under diffusers' keys; None for a file or a folder
    without one.

    Raises:
        FileError: it is another kind of model's.
    """
    refuse_unsupported_place(model_folder(path))
    file = model_folder(path) / "config.json"
    if not file.is_file():
        return None
    config = under_diffusers_keys(read_sizes(file), str(file))
    require_sizes(config, str(file))
    kind = config.get("_class_name", _CLASSES[0])
    if kind not in _CLASSES:
        raise FileError(f"{file}: expected _class_name {' or '.join(_CLASSES)}, got {some([kind])}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _weight_files(folder: Path) -> list[Path]:
    if any(folder.glob("*.distcp")):
        convert = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        raise FileError(f"{folder}: a distributed checkpoint; make one file of it first: {convert}")
    if (folder / "values.json").is_file() and any(folder.glob("shard-*.safetensors")):
        raise FileError(_OF_A_RUN.format(folder))
    indices = sorted(folder.glob(f"{_DIFFUSERS}*.index.json")) or sorted(folder.glob("*.index.json"))
    if indices:
        return _indexed(indices[-1])
    for name in (f"{_DIFFUSERS}.safetensors", f"{_DIFFUSERS}.bin"):
        if (folder / name).is_file():
            return [folder / name]
    safe = sorted(folder.glob("*.safetensors"))
    files = safe or sorted(file for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES)
    if not files:
        expected = f"{_DIFFUSERS}.safetensors, an index with its shards, or *.safetensors or *.pt"
        raise FileNotFoundError(f"{folder}: expected weights ({expected}), found none")
    return files


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names: files of its own folder, each with the tensors that it is said to have.

    Links may lead out of the folder only as those of a hub's cache do, to `blobs` beside its `snapshots`.
    """
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: weight_map: expected tensors' names and shards, got {shown(weight_map)}")
    named: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == os.path.basename(shard) and shard.isprintable()
        if not plain or Path(shard).suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise FileError(
                f"{index}: weight_map: {shown(name)}: expected a file beside it, got {shown(shard)}"
            )
        named.setdefault(shard, []).append(name)
    missing = [shard for shard in named if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: the index names shards that are not there: {some(sorted(missing))}"
        )
    for shard, names in named.items():
        _require_beside(folder / shard, index)
        if (folder / shard).suffix == ".safetensors":
            held = shapes_in(folder / shard)
            absent = [name for name in names if name not in held]
            others = [name for name in held if weight_map.get(name) != shard]
            if absent or others:
                problem = f"lacks {some(absent)}" if absent else f"has {some(others)}, which it does not name"
                raise FileError(
                    f"{folder / shard}: expected the tensors that {index.name} names; it {problem}"
                )
    return [folder / shard for shard in sorted(named)]


def _require_beside(shard: Path, index: Path) -> None:
    """Refuses a file that is a link to somewhere else."""
    real, folder = os.path.realpath(shard), os.path.realpath(index.parent)
    blobs = os.path.join(folder.rpartition(f"{os.sep}snapshots{os.sep}")[0], "blobs")
    if os.path.dirname(real) != folder and os.path.dirname(real) != blobs:
        raise FileError(f"{index}: expected files beside it, got {shard.name}, a link to {real}")


def require_readable_weights(folder: Path) -> int:
    """Bytes of a folder's weights, whose index and headers are sound. Raises as `read_tensors`."""
    files = _weight_files(folder)
    sizes = [require_file(file, "a file of tensors") for file in files]
    for file, size in zip(files, sizes, strict=True):
        if file.suffix == ".safetensors":
            shapes_in(file)
        else:
            require_plain(file, size)
    return sum(sizes)


def _add_shard(state: dict[str, Any], shard: Mapping[str, Any], file: Path) -> None:
    for name, value in shard.items():
        held = state.get(name)
        if isinstance(value, Mapping) and isinstance(held, dict):
            _add_shard(held, value, file)
        elif name not in state:
            state[name] = dict(value) if isinstance(value, Mapping) else value
        elif isinstance(value, Tensor):
            expected = "shards of one state dict"
            raise FileError(f"{file.parent}: expected {expected}, found {name} in {file.name} again")


def _choose_network(state: Mapping[str, Any], network: str | None, source: str) -> dict[str, Tensor]:
    if network is not None and network not in NETWORKS:
        raise FileError(f"{source}: network must be one of {', '.join(NETWORKS)}, got {shown(network)}")
    networks = {name: _network(state, name) for name in NETWORKS}
    present = [name for name, tensors in networks.items() if tensors]
    if present:
        chosen = network or next((name for name in present if name != "critic"), None)
        if chosen not in present:
            wanted = network or "generator or generator_ema"
            raise FileError(f"{source}: expected {wanted}, found {', '.join(present)}")
        tensors = networks[chosen]
    elif network is not None:
        raise FileError(
            f"{source}: expected several networks with {network} among them, found a bare state dict"
        )
    else:
        inner = next(
            (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state
        )
        tensors = dict(inner)
    strange = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange or not tensors:
        found = some(strange) or "nothing"
        raise FileError(f"{source}: expected a state dict of tensors, found {found}")
    return tensors


def _network(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A network of a file that holds several: nested under its name, or flat with its name in front."""
    nested = state.get(name)
    if isinstance(nested, Mapping):
        return dict(nested)
    return {key[len(name) + 1 :]: value for key, value in state.items() if str(key).startswith(name + ".")}
