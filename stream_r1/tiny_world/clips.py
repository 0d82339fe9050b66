"""The film as the generators see it: latents of captioned clips, and the captions' embeddings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stream_r1.config import SettingsError
from stream_r1.data.film import load_film, load_shots, spread_clip_starts
from stream_r1.models.text import load_text_encoder
from stream_r1.models.vae import VideoVAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentClips:
    """Clips of the shots with the given captions, encoded.

    latents: float16 [N, F, C, h, w], normalised. caption: int64 [N], into text. text: float32 [P, L, D].
    empty: [L, D], the embedding of the empty prompt.
    """

    latents: Tensor
    caption: Tensor
    text: Tensor
    empty: Tensor

    def draw(self, batch: int, generator: torch.Generator, among: int | None = None) -> list[int]:
        """Rows of a batch: every caption equally often, then any of its clips."""
        chosen = torch.randint(len(self.text), (batch,), generator=generator)
        rows = []
        for caption in chosen.tolist():
            own = (self.caption == caption).nonzero().flatten()
            rows.append(int(own[torch.randint(len(own), (1,), generator=generator)]))
        return rows

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.latents.shape[2]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] in float32 of rows as `draw` gives them, and their embeddings [B, L, D]."""
        rows = self.draw(size, generator)
        return self.latents[rows].float(), self.text[self.caption[rows]]

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """All latents, however few are asked for, and which text each has."""
        return self.latents, self.caption


def encode_clips(
    vae_folder: Path,
    prompts: Sequence[str],
    frames: int,
    most_per_shot: int,
    work: Path,
    cache: Path | None = None,
) -> LatentClips:
    """Encode the training shots that carry ``prompts``; kept in ``work``, so that the second call is quick.

    Raises:
        SettingsError: a prompt is no caption of a training shot long enough for one clip.
    """
    shots = [shot for shot in load_shots() if not shot.held_out and shot.caption in set(prompts)]
    starts = [
        (start, prompts.index(shot.caption))
        for shot in shots
        for start in spread_clip_starts(shot, frames, most_per_shot)
    ]
    missing = [
        prompt for index, prompt in enumerate(prompts) if index not in {caption for _, caption in starts}
    ]
    if missing:
        raise SettingsError(
            f"prompts: expected captions of training shots of {frames} frames or more, got {missing[0]!r}"
        )
    kept = work / f"clips_{_fingerprint(vae_folder, frames, starts)}.pt"
    if kept.exists():
        latents = torch.load(kept, weights_only=True)
    else:
        vae, film, parts = VideoVAE.from_pretrained(vae_folder), load_film(cache), []
        for index in range(0, len(starts), 4):
            clips = torch.stack(
                [
                    torch.from_numpy(film[start : start + frames].copy())
                    for start, _ in starts[index : index + 4]
                ]
            )
            with torch.no_grad():
                parts.append(vae.encode(clips.movedim(-1, 2).float() / 255).half())
            if index % 80 == 0:
                log.info("encoded %d of %d clips", index, len(starts))
        latents = torch.cat(parts)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(latents, kept)
    text = load_text_encoder("minilm").encode([*prompts, ""])
    return LatentClips(
        latents, torch.tensor([caption for _, caption in starts]), text[:-1].clone(), text[-1].clone()
    )


def _fingerprint(vae_folder: Path, frames: int, starts: list[tuple[int, int]]) -> str:
    """Of everything that the encoded clips depend on."""
    digest = hashlib.sha256(repr((frames, [start for start, _ in starts])).encode())
    for path in sorted(vae_folder.glob("*.safetensors")) + sorted(vae_folder.glob("config.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
