"""Models whose modules others have hung something onto: accelerate's offloading, hooks of their own."""

import copy
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from stream_r1.drop_in.diffusers_attention import set_chunk_cache, set_chunk_mask
from stream_r1.drop_in.self_forcing import adopt, self_attention
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.vae import VideoVAE
from stream_r1_kernels import ChunkCache, ChunkMask, RotaryGrid

SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}
LATENTS, TEXT, TIME = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 16), torch.full((1,), 500.0)


def offload(model: nn.Module) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def hook(model: nn.Module) -> nn.Module:
    """A hook on every layer that changes what it gives, as a scale does."""
    for module in model.modules():
        if not list(module.children()) and list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda _module, _inputs, output: 1.5 * output)
    return model


@torch.no_grad()
def student(model: CausalWanTransformer) -> Tensor:
    cache, text = model.new_cache(1, 4, 4), model.encode_text(TEXT)
    whole = model(LATENTS, TIME, text, mask="causal")
    cache.begin_chunk()
    chunk = model.forward_chunk(LATENTS, model.encode_time(TIME), text, cache)
    return torch.cat([whole, chunk])


def make_student() -> CausalWanTransformer:
    torch.manual_seed(0)
    return CausalWanTransformer(**SIZES, text_len=6, window_frames=6).eval()


def diffusers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(LATENTS.transpose(1, 2), TIME, TEXT, return_dict=False)[0]


def masked() -> nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES)
    set_chunk_mask(model, ChunkMask(4, 3))
    return model


def cached() -> nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES)
    set_chunk_cache(model, ChunkCache(1, 1, 2, RotaryGrid(12), 2, 2, 3, window_frames=9))
    return model


class Published(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(24, eps=1e-6), nn.RMSNorm(24, eps=1e-6)


@torch.no_grad()
def published(model: nn.Module) -> Tensor:
    kept = [{"k": torch.zeros(1, 36, 2, 12), "v": torch.zeros(1, 36, 2, 12)}]
    kept[0] |= {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
    adopt(kept, rows=2, columns=2, frames_per_chunk=3)
    return self_attention(model, torch.linspace(-1, 1, 288).view(1, 12, 24), kept[0], 0)


def make_vae() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
    }
    return VideoVAE(
        AutoencoderKLWan(**sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval().requires_grad_(False)
    )


@torch.no_grad()
def coded(model: VideoVAE) -> Tensor:
    video = torch.linspace(0, 1, 5 * 3 * 64).view(1, 5, 3, 8, 8)
    return model.decode(model.encode(video))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "student": (make_student, student),
    "set_chunk_mask": (masked, diffusers),
    "set_chunk_cache": (cached, diffusers),
    "self_attention": (Published, published),
    "vae": (make_vae, coded),
}


@pytest.mark.parametrize("name", CASES)
def test_offloaded_by_accelerate(name: str) -> None:
    make, run = CASES[name]
    expected = run(make())
    torch.testing.assert_close(run(offload(make())), expected)


def group_offload(model: nn.Module, folder: Path) -> nn.Module:
    """Every layer's weights are read from the disk for its call, and mean nothing between calls."""
    apply_group_offloading(
        model, onload_device="cpu", offload_type="leaf_level", offload_to_disk_path=str(folder)
    )
    return model


@pytest.mark.parametrize("name", ["set_chunk_mask", "set_chunk_cache", "self_attention"])
def test_offloaded_by_layers(name: str, tmp_path: Path) -> None:
    make, run = CASES[name]
    torch.testing.assert_close(run(group_offload(make(), tmp_path)), run(make()))


def test_offloading_by_layers_is_refused_where_weights_are_read_between_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scale_shift_table: expected weights that .* group offloading"):
        student(group_offload(make_student(), tmp_path))


@pytest.mark.parametrize("name", ["student", "set_chunk_mask", "set_chunk_cache", "self_attention"])
def test_hooks_act(name: str) -> None:
    """None is passed by where an op would take the weights of several modules at once."""
    make, run = CASES[name]
    plain, hooked = make(), hook(make())
    factor = copy.deepcopy(plain)  # the same by weights that are scaled
    with torch.no_grad():
        for module in factor.modules():
            if not list(module.children()):
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(1.5)
    torch.testing.assert_close(run(hooked), run(factor), rtol=1e-4, atol=1e-5)
