"""The smallest student, autoencoder and text encoder that stream."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from stream_models import CHANNELS, TEXT_DIM, TEXT_LEN, tiny_student
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from stream_r1.models.vae import VideoVAE

SIZE = (16, 32)  # pixels of a picture of `save_tiny_wan`'s


def tiny_autoencoder() -> AutoencoderKLWan:
    """Residual, with patches, as Wan 2.2's."""
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * CHANNELS,
        latents_std=[0.8] * CHANNELS,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
    ).eval()


def plain_autoencoder(temporal: tuple[bool, ...] = (False, True, True)) -> AutoencoderKLWan:
    """As Wan 2.1's: 8 x 8 pixels a latent cell."""
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=list(temporal),
        latents_mean=[0.1] * CHANNELS,
        latents_std=[0.8] * CHANNELS,
    ).eval()


def tiny_vae() -> VideoVAE:
    return VideoVAE(tiny_autoencoder())


class WordEncoder:
    """A text encoder without weights: each word's characters seed its embedding."""

    text_len = TEXT_LEN
    dim = TEXT_DIM

    def encode(self, prompts: list[str]) -> Tensor:
        out = torch.zeros(len(prompts), self.text_len, self.dim)
        for row, prompt in zip(out, prompts, strict=True):
            for position, word in enumerate(prompt.split()[: self.text_len]):
                generator = torch.Generator().manual_seed(sum(word.encode()))
                row[position] = torch.randn(self.dim, generator=generator)
        return out


def save_tiny_wan(folder: Path, autoencoder: AutoencoderKLWan | None = None) -> None:
    """A diffusers folder, as small as it gets: transformer, vae, text_encoder, tokenizer."""
    tiny_student().save_pretrained(folder / "transformer")
    (autoencoder or tiny_autoencoder()).save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=32, d_model=TEXT_DIM, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", "fat", "rabbit"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder / "tokenizer")
