"""FSDP2 on a Wan transformer: every block is sharded by itself, what is outside of the blocks together."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from stream_r1.models.transformer import CausalWanTransformer


def shard_model(model: nn.Module, mesh: DeviceMesh, *, bfloat16: bool) -> None:
    """Shards a transformer, in place.

    A whole block exists on a rank while it computes, forward or backward; so do the parameters outside of the
    blocks while a pass runs. Every call gathers them again, so what it computes with is never from before an
    update.

    Args:
        model: ours or diffusers', with `blocks`.
        mesh: of one dimension, or replicas x shards.
        bfloat16: whether weights are gathered, and so computed with, in bfloat16; gradients are reduced in
            float32 either way.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a timestep of 937.5 is not a bfloat16
    )
    # What our blocks give out may be a view; nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    blocks: Any = model.blocks
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if isinstance(model, CausalWanTransformer):
        for block in blocks:
            register_fsdp_forward_method(block, "text_keys_values")
            register_fsdp_forward_method(block, "modulation")
        for method in ("encode_text", "encode_time", "forward_chunk"):
            register_fsdp_forward_method(model, method)
