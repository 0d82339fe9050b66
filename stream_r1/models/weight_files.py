"""Tensors out of the files that weights come in: one file, or a folder with one file or shards.

Files: `.safetensors`, and `.pt`, `.pth`, `.bin`, `.ckpt` of torch, with a bare state dict or several networks
(`generator`, `generator_ema`, `critic`). Nothing is unpickled but tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

NETWORKS = ("generator_ema", "generator", "critic")

_CLASSES = ("CausalWanTransformer", "WanTransformer3DModel")
_DIFFUSERS = "diffusion_pytorch_model"
_OF_A_RUN = (
    "{}: a training run's checkpoint; the run exports its student to OUT/student when it ends or is stopped"
)
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class CheckpointError(ValueError):
    """Weights that cannot be used; the message names the file, what was expected and what was found."""


def read_tensors(path: str | Path, network: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names they are stored by, on the CPU, in the dtype they have.

    Args:
        path: a file, or a folder: diffusers' weights (the model's, or a pipeline's with `transformer`), an
            index with its shards, a single file, or shards that make one state dict together.
        network: which of `generator_ema`, `generator`, `critic` in a file that holds several; None: the first
            there is, in this order, never the critic.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        CheckpointError: not a state dict, no such network, or shards that overlap.
    """
    path = Path(path)
    state: dict[str, Any] = {}
    if path.is_dir():
        for file in _weight_files(model_folder(path)):
            _add_shard(state, read_file(file), file)
    elif path.is_file():
        state = read_file(path)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder of weights")
    if any(str(name).startswith("student/") for name in state):
        raise CheckpointError(_OF_A_RUN.format(path))
    return _choose_network(state, network, str(path))


def model_folder(path: Path) -> Path:
    """The folder of a model: `path` itself, or the `transformer` of a pipeline."""
    inner = path / "transformer"
    return inner if (inner / "config.json").is_file() and not (path / "config.json").is_file() else path


def read_config(path: Path) -> dict[str, Any] | None:
    """The settings in a student's `config.json`; None for a file or a folder without one.

    Raises:
        CheckpointError: it is another kind of model's.
    """
    file = model_folder(path) / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    kind = config.get("_class_name", _CLASSES[0])
    if kind not in _CLASSES:
        raise CheckpointError(f"{file}: expected _class_name {' or '.join(_CLASSES)}, got {kind}")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def read_json(path: Path) -> dict[str, Any]:
    """A file of settings. Raises CheckpointError if it holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        raise CheckpointError(f"{path}: expected JSON; {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def opened(path: Path, what: str) -> Iterator[Any]:
    """A `.safetensors` file whose parts are read one by one. Raises CheckpointError if it is no `what`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable {what}: {error}") from None


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _weight_files(folder: Path) -> list[Path]:
    if any(folder.glob("*.distcp")):
        convert = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        raise CheckpointError(f"{folder}: a distributed checkpoint; make one file of it first: {convert}")
    if (folder / "values.json").is_file() and any(folder.glob("shard-*.safetensors")):
        raise CheckpointError(_OF_A_RUN.format(folder))
    indices = sorted(folder.glob(f"{_DIFFUSERS}*.index.json")) or sorted(folder.glob("*.index.json"))
    if indices:
        weight_map = read_json(indices[-1]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{indices[-1]}: expected a weight_map with shards, found none")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: the index names shards that are not there: {', '.join(missing)}"
            )
        return [folder / shard for shard in shards]
    for name in (f"{_DIFFUSERS}.safetensors", f"{_DIFFUSERS}.bin"):
        if (folder / name).is_file():
            return [folder / name]
    safe = sorted(folder.glob("*.safetensors"))
    files = safe or sorted(file for file in folder.iterdir() if file.suffix in _TORCH_SUFFIXES)
    if not files:
        expected = f"{_DIFFUSERS}.safetensors, an index with its shards, or *.safetensors or *.pt"
        raise FileNotFoundError(f"{folder}: expected weights ({expected}), found none")
    return files


def _add_shard(state: dict[str, Any], shard: Mapping[str, Any], file: Path) -> None:
    for name, value in shard.items():
        held = state.get(name)
        if isinstance(value, Mapping) and isinstance(held, dict):
            _add_shard(held, value, file)
        elif name not in state:
            state[name] = dict(value) if isinstance(value, Mapping) else value
        elif isinstance(value, Tensor):
            expected = "shards of one state dict"
            raise CheckpointError(f"{file.parent}: expected {expected}, found {name} in {file.name} again")


def read_file(path: Path) -> dict[str, Any]:
    """What a `.safetensors` or torch file holds, on the CPU, without unpickling anything but tensors.

    Raises:
        CheckpointError: the file is damaged, needs code to be read, or holds no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, not read: of three networks one is wanted. Files of an old torch are no archives.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # what is no pickle at all can raise anything when it is read as one
        # torch's own words on what it will not unpickle are advice to run it.
        telling = isinstance(error, SafetensorError | RuntimeError) and str(error)
        reason = str(error).splitlines()[0] if telling else "damaged, or holds more than tensors"
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
    strange = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange or not tensors:
        found = some(strange) or "nothing"
        raise CheckpointError(f"{source}: expected a state dict of tensors, found {found}")
    return tensors


def _network(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A network of a file that holds several: nested under its name, or flat with its name in front."""
    nested = state.get(name)
    if isinstance(nested, Mapping):
        return dict(nested)
    return {key[len(name) + 1 :]: value for key, value in state.items() if str(key).startswith(name + ".")}
