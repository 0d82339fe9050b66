"""The drawn world as the generators see it: latents of clips, drawn when first asked for and kept in a
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stream_r1.drawn_world import FRAMES, HEIGHT, WIDTH, all_scenes, draw
from stream_r1.drawn_world.drawing import covered
from stream_r1.models.block_vae import BlockVAE
from stream_r1.models.text import load_text_encoder


class Clips:
    """The clips of seeds 0 to ``count - 1``, encoded: row i shows one of the scenes, by its seed.

    Args:
        vae_folder: of the autoencoder.
        count: clips there are.
        kept: folder of the file that keeps the latents; a second run finds them there.

    text: float32 [P, L, D], embeddings of the scenes' prompts. empty: [L, D], of the empty prompt.
    fingerprint: what tells these latents from those of another encoder.
    """

    def __init__(self, vae_folder: Path, count: int, kept: Path) -> None:
        self._vae = BlockVAE.from_pretrained(vae_folder)
        self._scenes = all_scenes()
        shape = (
            count,
            *[self._vae.latent_shape(FRAMES, HEIGHT, WIDTH)[0]],
            self._vae.channels,
            HEIGHT // 8,
            WIDTH // 8,
        )
        kept.mkdir(parents=True, exist_ok=True)
        self.fingerprint = _fingerprint(vae_folder)
        path = kept / f"clips_{self.fingerprint}_{count}.f16"
        self._latents = np.memmap(path, np.float16, "r+" if path.exists() else "w+", shape=shape)
        text = load_text_encoder("minilm").encode([*(scene.prompt for scene in self._scenes), ""])
        self.text, self.empty = text[:-1].clone(), text[-1].clone()
        self.channels = self._vae.channels

    def __len__(self) -> int:
        return len(self._latents)

    def scene(self, row: int) -> int:
        """Index of the scene that a row shows."""
        return int(np.random.default_rng([row, 1]).integers(len(self._scenes)))

    def latents(self, rows: Sequence[int]) -> Tensor:
        """float32 [N, F, C, h, w], normalised."""
        missing = [row for row in rows if not self._latents[row, 0].any()]  # a file starts as zeros
        if missing:
            frames = [
                torch.from_numpy(draw(self._scenes[self.scene(row)], [row, 2]).frames) for row in missing
            ]
            with torch.no_grad():
                self._latents[missing] = (
                    self._vae.encode(torch.stack(frames).movedim(-1, 2).float() / 255).half().numpy()
                )
        return torch.from_numpy(self._latents[list(rows)]).float()

    def covered(self, rows: Sequence[int]) -> Tensor:
        """How much of each latent the thing covers, in any of its frames: [N, F, 1, h, w] in [0, 1]."""
        cells = torch.from_numpy(
            np.stack([covered(self._scenes[self.scene(row)], [row, 2]) for row in rows])
        )  # [N, T, h, w]; the first latent is the first frame, each other one four frames
        later = cells[:, 1:].unflatten(1, (-1, 4)).amax(2)
        return torch.cat([cells[:, :1], later], 1).unsqueeze(2)

    def texts(self, rows: Sequence[int]) -> Tensor:
        """The embeddings of the rows' prompts, [N, L, D]."""
        return self.text[[self.scene(row) for row in rows]]

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """The latents of the first `count` rows and which text each has."""
        rows = range(min(count, len(self)))
        return self.latents(rows), torch.tensor([self.scene(row) for row in rows])

    def draw(self, batch: int, generator: torch.Generator, among: int | None = None) -> list[int]:
        """Rows of a batch, of all or of the first `among`."""
        return torch.randint(among or len(self), (batch,), generator=generator).tolist()


def _fingerprint(vae_folder: Path) -> str:
    """Of what the latents depend on: the encoder's weights, whatever the decoder's are."""
    from safetensors.torch import load_file

    state = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.startswith(("project.", "encoder.")) or name in ("mean", "std"):
            digest.update(state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
