"""Autoencoders from folders: which class a folder holds stands in its config."""

from __future__ import annotations

from pathlib import Path

import torch

from stream_r1.files import read_json
from stream_r1.messages import shown
from stream_r1.models.autoencoder import VideoAutoencoder
from stream_r1.models.block_vae import BlockVAE
from stream_r1.models.vae import VideoVAE

AUTOENCODERS: dict[str, type[VideoVAE] | type[BlockVAE]] = {
    "AutoencoderKLWan": VideoVAE,
    "BlockVAE": BlockVAE,
}
"""What reads a folder, by the `_class_name` in its `config.json`."""


def load_autoencoder(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> VideoAutoencoder:
    """The frozen autoencoder of a folder with `config.json` and weights.

    Raises:
        FileNotFoundError: no such config.
        ValueError: a class that is none of `AUTOENCODERS`.
        CheckpointError: files that can't be read, or do not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"load_autoencoder: expected {path} of a {' or '.join(AUTOENCODERS)}")
    found = read_json(path).get("_class_name")
    kind = AUTOENCODERS.get(str(found))
    if kind is None:
        expected = " or ".join(AUTOENCODERS)
        raise ValueError(f"load_autoencoder: {folder} must hold a {expected}, got {shown(found)}")
    return kind.from_pretrained(folder, dtype=dtype, device=device)
