"""Prompt embeddings on disk and in memory: for a prompt seen before, no encoder of many gigabytes is loaded,
and of many prompts only the tokens take room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from stream_r1.disk.whole import written
from stream_r1.files import FileError
from stream_r1.models.tensor_files import opened


class PromptCache:
    """Token states by prompt, one small `.safetensors` file each.

    Several processes can share a folder: a file appears whole or not at all. A file that can't be read counts
    as absent and is written again.

    Args:
        folder: made when something is first kept.
        model: what the states depend on besides the prompt; see `stream_r1.disk.fingerprint`.
    """

    def __init__(self, folder: str | Path, model: str) -> None:
        self.folder = Path(folder)
        self.model = model
        self._cleared = False  # a look at a folder of a hundred thousand files, once a process
        self.size: tuple[int, int] | None = None
        """Tokens at most, and the width, of the states that its encoder makes; others count as damaged."""

    def path(self, prompt: str) -> Path:
        """The file of a prompt."""
        key = hashlib.sha256("\0".join((self.model, prompt)).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """The states [tokens, dim] of a prompt, on the CPU, if they are kept."""
        try:
            with opened(self.path(prompt), "prompt's embedding") as file:
                states: Tensor = file.get_tensor("states")
                sound = states.dim() == 2 and states.is_floating_point() and bool(states.isfinite().all())
                if self.size is not None and sound:
                    sound = len(states) <= self.size[0] and states.shape[1] == self.size[1]
                return states if sound and file.metadata()["prompt"] == prompt else None
        except (OSError, FileError, KeyError, TypeError):
            return None

    def put(self, prompt: str, states: Tensor) -> None:
        """Keep a prompt's states [tokens, dim]."""
        content = save({"states": states.detach().cpu().contiguous()}, {"prompt": prompt})
        with written(self.path(prompt), clear=not self._cleared) as place:
            place.write_bytes(content)
        self._cleared = True


class PromptEmbeddings:
    """Embeddings [P, L, D] of many prompts, of which an index makes those that it names.

    One of Wan's is 4 MB in bfloat16, most of it padding: in memory are the tokens' states, or, where a cache
    keeps them, only the prompts.

    Args:
        states: by prompt its states [tokens, D], or the prompt where `cache` has them.
        length: L, positions with padding; states are zero there.
        dim: D.
        cache: where to read states from.
    """

    def __init__(
        self, states: Sequence[Tensor | str], length: int, dim: int, cache: PromptCache | None = None
    ) -> None:
        self._states, self._cache = list(states), cache
        self.shape = torch.Size([len(self._states), length, dim])

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, indices: Tensor | Sequence[int]) -> Tensor:
        """[B, L, D] on the CPU, in the encoder's dtype.

        Raises FileNotFoundError where a file of the cache is not there any more.
        """
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        return padded([self._read(self._states[number]) for number in numbers], self.shape[1])

    def _read(self, states: Tensor | str) -> Tensor:
        if isinstance(states, Tensor):
            return states
        assert self._cache is not None
        found = self._cache.get(states)
        if found is None:
            raise FileNotFoundError(
                f"{self._cache.path(states)}: the embedding of {states!r} was here and can't be read any more"
            )
        return found


def padded(states: Sequence[Tensor], length: int) -> Tensor:
    """B states [tokens <= length, D] -> [B, length, D], zeros after the last token of each."""
    out = states[0].new_zeros(len(states), length, states[0].shape[1])
    for row, state in zip(out, states, strict=True):
        row[: len(state)] = state
    return out
