"""``stream-r1 info``: what this machine can run, and what is in a folder, a file or a recipe."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stream_r1.commands.console import make_console

_PACKAGES = ("stream-r1", "torch", "diffusers", "transformers", "triton", "av")
_FEW = 12  # configuration values longer than this many items are cut


def run(paths: list[Path]) -> None:
    """Describe the machine, or each of ``paths``."""
    console = make_console()
    if not paths:
        _machine(console)
    for path in paths:
        _describe(console, path)


def _machine(console: Console) -> None:
    import torch

    table = _table()
    for name in _PACKAGES:
        table.add_row(name, _version(name))
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    table.add_row(
        "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch's own kernels {_isa()}"
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("gpu", ", ".join(gpus) or "none that torch can use")
    console.print(table)
    console.print()
    from stream_r1_kernels import info

    console.print(info.describe(), highlight=False, soft_wrap=True)


def _isa() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe(console: Console, path: Path) -> None:
    if path.is_dir():
        _folder(console, path)
    elif path.suffix == ".safetensors":
        console.print(Text.assemble((str(path), "bold"), f"  {_weights(path)}"), soft_wrap=True)
    elif path.suffix in (".yaml", ".yml"):
        from stream_r1.commands.train import show
        from stream_r1.recipe import load_any

        show(console, load_any(path))
    elif not path.exists():
        raise FileNotFoundError(2, "No such file or folder", str(path))
    else:
        raise ValueError(f"{path}: expected a model folder, a .safetensors file or a .yaml recipe")


def _folder(console: Console, path: Path) -> None:
    parts = [p for p in sorted(path.iterdir()) if p.is_dir() and any(p.glob("*.safetensors"))]
    config, weights = path / "config.json", sorted(path.glob("*.safetensors"))
    if not os.path.lexists(config) and not weights and not parts:
        raise ValueError(
            f"{path}: neither a model folder (config.json, *.safetensors) nor a folder of such folders"
        )
    from stream_r1.files import read_json

    console.print(Text(str(path), style="bold"), soft_wrap=True)
    table = _table()
    if os.path.lexists(config):
        for key, value in read_json(config).items():
            if not key.startswith("_") or key == "_class_name":
                table.add_row(key, _short(value))
    for file in weights:
        table.add_row(file.name, _weights(file))
    if table.row_count:
        console.print(table)
    for part in parts:
        _folder(console, part)


def _weights(path: Path) -> str:
    """Counts from the file's header; no tensor is read."""
    import math

    from stream_r1.models.tensor_files import opened

    count, numbers, dtypes = 0, 0, set()
    with opened(path, ".safetensors file") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            part = file.get_slice(name)
            count += 1
            numbers += math.prod(part.get_shape())
            dtypes.add(part.get_dtype())
    size, kinds = path.stat().st_size / 2**20, ", ".join(sorted(dtypes))
    return f"{count} tensors, {numbers / 1e6:.2f} M numbers, {kinds}, {size:.1f} MB"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > _FEW:
        return f"{value[:3]} ... ({len(value)} values)"
    return json.dumps(value)


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    return table
