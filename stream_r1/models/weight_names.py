"""The two families of names of a Wan transformer's weights, and what wrappers put into them.

diffusers' names are ours; the original ones of Wan are kept by Self Forcing, Reward Forcing and Stream-R1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from stream_r1.files import FileError

# original -> diffusers; what follows (.weight, .bias) stays
_TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{original}.{part}": f"{ours}.{renamed}"
    for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, renamed in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}
BLOCK_NAME = re.compile(r"(blocks\.\d{1,6})\.(.+)")
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_LEADING = ("model.", "module.", "diffusion_model.")


def to_diffusers_name(name: str) -> str:
    """An original Wan name -> diffusers' name. Names of no known part stay as they are."""
    return _rename(name, _TOP, _BLOCK)


def to_original_name(name: str) -> str:
    """A diffusers name -> the original Wan name. Names of no known part stay as they are."""
    return _rename(name, {new: old for old, new in _TOP.items()}, {new: old for old, new in _BLOCK.items()})


def to_original_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's state dict under the names that other Wan code bases load."""
    return {to_original_name(name): value for name, value in state.items()}


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    inside = BLOCK_NAME.fullmatch(name)
    lead, rest, table = (f"{inside[1]}.", inside[2], block) if inside else ("", name, top)
    for old, new in table.items():
        if rest == old or rest.startswith(old + "."):
            return lead + new + rest[len(old) :]
    return name


def strip_prefixes(name: str) -> str:
    """A parameter's name without what FSDP, checkpointing, torch.compile and wrapper classes put into it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(_LEADING):
        name = name.split(".", 1)[1]
    return name


def normalise(state: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """Any of the known namings -> diffusers' names.

    Raises:
        FileError: two entries become one name.
    """
    stripped = {name: strip_prefixes(name) for name in state}
    # The affine norm tells nothing (norm2 and norm3 are swapped between the two), so a file is judged as a
    # whole.
    original = any(".self_attn." in name or name.startswith("time_embedding.") for name in stripped.values())
    named: dict[str, Tensor] = {}
    for name, bare in stripped.items():
        ours = to_diffusers_name(bare) if original else bare
        if ours in named:
            raise FileError(f"{source}: several entries are named {ours}, one of them {name}")
        named[ours] = state[name]
    return named
