"""Models in parts: each rank keeps a slice of every weight and fetches a block's whole while it computes.

Source: FSDP2 of torch, `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from stream_r1.disk.whole import written
from stream_r1.distill.fsdp import shard_model
from stream_r1.distill.lora import is_adapted, save_adapter, without_adapters
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.run_settings import DistributedSettings
from stream_r1.models.adapters import merge_adapter
from stream_r1.models.sequence import SequenceParallel
from stream_r1.models.transformer import CausalWanTransformer

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sharding:
    """Brings models to the ranks' devices, in parts where the settings say so, and has ranks share samples.

    Raises:
        ValueError: replicas that do not divide the ranks.
    """

    def __init__(self, settings: DistributedSettings, ranks: Ranks) -> None:
        self.settings = settings
        self.ranks = ranks
        self.mesh = self._make_mesh() if ranks.launched and settings.shard != "none" else None
        self.sequence = self._make_sequence() if ranks.sequence > 1 else None

    def _make_mesh(self) -> DeviceMesh:
        kind, size = self.ranks.device.type, self.ranks.size
        if self.settings.shard == "full":
            return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        replicas = self.settings.replicas or max(1, size // self.ranks.local_size)
        if size % replicas:
            raise ValueError(
                f"distributed.replicas: expected a divisor of the {size} processes, got {replicas}"
            )
        return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))

    def _make_sequence(self) -> SequenceParallel:
        """Beside the mesh of the shards: whose ranks have which tokens says nothing about weights."""
        shape = (self.ranks.parts, self.ranks.sequence)
        mesh = init_device_mesh(self.ranks.device.type, shape, mesh_dim_names=("data", "sequence"))
        return SequenceParallel(mesh.get_group("sequence"))

    def place(self, model: nn.Module) -> None:
        """Brings a transformer to the rank's device, sharded if the settings say so; see `shard_model`.

        Raises ValueError for heads that the ranks of a sequence can't share.
        """
        if not self.ranks.launched:
            return
        if self.sequence is not None:
            assert isinstance(model, CausalWanTransformer)
            model.enable_sequence_parallel(self.sequence)
        if self.mesh is None:
            model.to(self.ranks.device)
            return
        shard_model(model, self.mesh, bfloat16=self.settings.param_dtype == "bfloat16")


def full_tensor(x: Tensor) -> Tensor:
    """A tensor that may be in parts, gathered; every rank must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor that may be in parts."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(x: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, the same on all ranks, divided as `like` is."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def weight_sum(model: nn.Module) -> int:
    """One number that tells other weights from these: exact, so the same wherever it is computed."""
    total = 0
    for p in model.parameters():
        total = (total * 31 + bit_sum(p)) % 2**61
    return total


def bit_sum(x: Tensor) -> int:
    """A sum over the bits of a tensor: another one when any bit changes."""
    bits = x.detach().contiguous().view(_BITS[x.element_size()])
    return int(bits.sum(dtype=torch.int64))


def bit_sums(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """`bit_sum` of each tensor, whole or in parts; every rank must ask, and gets the same."""
    sums = [bit_sum(local(x)) if _counts(x, ranks) else 0 for x in tensors.values()]
    return dict(zip(tensors, ranks.totals(sums), strict=True))


def _counts(x: Tensor, ranks: Ranks) -> bool:
    """Whether this rank is the first of those that hold the same."""
    if not isinstance(x, DTensor):
        return ranks.is_main
    place = x.device_mesh.get_coordinate()
    assert place is not None  # every rank is in the mesh
    return all(at == 0 for at, how in zip(place, x.placements, strict=True) if how.is_replicate())


def export_student(student: CausalWanTransformer, folder: Path | str, ranks: Ranks) -> None:
    """Writes a diffusers folder from the first rank, adapters merged; every rank must call it."""
    if not isinstance(student, FSDPModule) and not is_adapted(student):
        if ranks.is_main:
            _save(student, folder)
        ranks.barrier()
        return
    state = _whole_state(student)
    if ranks.is_main:
        if is_adapted(student):
            with TemporaryDirectory() as adapter:
                save_adapter(student, state, adapter)
                state = merge_adapter(without_adapters(state), adapter)
        with torch.device("meta"):
            gathered: CausalWanTransformer = CausalWanTransformer.from_config(student.config)
        gathered.load_state_dict(state, assign=True)
        _save(gathered, folder)
    ranks.barrier()


def _save(student: CausalWanTransformer, folder: Path | str) -> None:
    with written(folder, replaces="diffusion_pytorch_model*") as place:
        student.save_pretrained(place)


def export_adapter(student: CausalWanTransformer, folder: Path | str, ranks: Ranks) -> None:
    """Writes the student's adapters as peft does, from the first rank; every rank must call it."""
    state = _whole_state(student)
    if ranks.is_main:
        save_adapter(student, state, folder)
    ranks.barrier()


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state, whole; of a model in parts it is empty but on the first rank."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state
