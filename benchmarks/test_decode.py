"""A stream's decode beside diffusers' own loop over latent frames, on the same weights

    pytest benchmarks/test_decode.py --benchmark-only

Both have the past of earlier chunks in their caches, and give pixels in [0, 1] of one chunk more. "channels
last" is diffusers' loop once more, its weights in the layout that torch recommends for convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from benchmarks.case import DTYPES
from stream_r1.models.vae import VideoVAE

TINY: dict[str, Any] = {
    "base_dim": 32,
    "z_dim": 48,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
WAN_2_1: dict[str, Any] = {}  # diffusers' defaults
SIZES = {  # the network, latent rows and columns
    "tiny-8x14": (TINY, 8, 14),
    "wan2.1-width-4x6": (WAN_2_1, 4, 6),
}
FRAMES = 3  # latent, of a chunk
# Of the largest value of [-1, 1]: two bfloat16 decoders round differently at every layer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}


class Published:
    """diffusers' decoder, run a latent frame a call as `AutoencoderKLWan.decode` does, its cache kept."""

    def __init__(self, module: Any) -> None:
        module.clear_cache()
        self.module = module
        self.mean, self.std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (module.config.latents_mean, module.config.latents_std)
        )
        self.started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        module = self.module
        z = module.post_quant_conv((latents * self.std + self.mean).movedim(2, 1).to(module.dtype))
        pieces = []
        for frame in z.split(1, dim=2):
            first, self.started = not self.started, True
            options = {"first_chunk": True} if first else {}
            pieces.append(module.decoder(frame, feat_cache=module._feat_map, feat_idx=[0], **options))
        out = torch.cat(pieces, 2)
        if module.config.patch_size is not None:
            out = unpatchify(out, patch_size=module.config.patch_size)
        return (out.clamp(-1, 1).float() / 2 + 0.5).movedim(2, 1)


def make(config: dict[str, Any], dtype: torch.dtype) -> AutoencoderKLWan:
    """Random weights that use most of [-1, 1]."""
    torch.manual_seed(0)
    module: Any = AutoencoderKLWan(**config)
    del module.encoder, module.quant_conv
    module.decoder.conv_out.weight.data *= 2
    return module.to(dtype).eval().requires_grad_(False)


def flops(run: Callable[[], object]) -> int:
    def count(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: count}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("implementation", ["ours", "published", "channels last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", list(SIZES))
def test_decode_of_a_chunk(benchmark: Callable, size: str, dtype: str, implementation: str) -> None:
    """Three latent frames of a stream that has begun: twelve pixel frames."""
    config, rows, columns = SIZES[size]
    shape = (1, FRAMES, config.get("z_dim", 16), rows, columns)
    ours = VideoVAE(make(config, DTYPES[dtype])).stream_decoder(1)
    module = make(config, DTYPES[dtype])
    if implementation == "channels last":
        for layer in module.modules():
            if isinstance(layer, nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d)
            elif isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)
    theirs = Published(module)
    for _ in range(2):
        latents = torch.randn(shape)
        got, expected = ours.decode(latents), theirs.decode(latents)
        assert expected.std() > 0.01
        error = (got - expected).abs().max().item()
        assert error <= TOLERANCE[dtype], f"decode {size} {dtype}: wrong by {error}: not timed"
    benchmark.group = f"decode of a chunk {size} {dtype}"  # type: ignore[attr-defined]
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        dtype=dtype, shape=list(shape), flops=flops(lambda: ours.decode(latents))
    )
    run = ours.decode if implementation == "ours" else theirs.decode
    benchmark.pedantic(  # type: ignore[attr-defined]
        run, args=(latents,), rounds=30 if config is TINY else 5, warmup_rounds=1
    )
