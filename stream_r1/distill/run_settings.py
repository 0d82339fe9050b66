"""Settings of any training run, whatever it trains, and of the processes that share it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stream_r1.config import Count, Settings
from stream_r1.distill.precision import Precision


class DistributedSettings(Settings):
    """How the processes of a run, started by a launcher, share the models.

    shard: "none": every process holds every model, gradients are averaged; "full": each holds a shard of
        every model, its gradients, optimizer and average; "hybrid": `replicas` groups, each with a full set
        of shards.
    replicas: groups of "hybrid"; None: one per machine.
    sequence: processes, neighbours by rank, that share every sample of student, teacher and critic: each has
        some of a frame's tokens and some of the attention's heads. A divisor of the processes, of the heads
        and of the tokens.
    backend: "auto" is nccl with a GPU and gloo without.
    param_dtype: of sharded weights in computation; stored weights and gradient reductions stay float32.
    async_checkpoints: write checkpoints at intervals in the background, from a copy in host memory.
    timeout_minutes: how long a process waits for the others.
    """

    shard: Literal["none", "full", "hybrid"] = "none"
    replicas: Count | None = None
    sequence: Count = 1
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    async_checkpoints: bool = False
    timeout_minutes: Annotated[float, Field(gt=0, le=10**6)] = 30.0

    @model_validator(mode="after")
    def _fits_together(self) -> DistributedSettings:
        if self.replicas is not None and self.shard != "hybrid":
            raise ValueError(f"replicas: only shard 'hybrid' has replicas, got shard {self.shard!r}")
        if self.param_dtype != "float32" and self.shard == "none":
            raise ValueError("param_dtype: only sharded weights are cast, got shard 'none'")
        return self


class RunSettings(Settings):
    """How long a run is, in which precision it computes, what it keeps, and on how many processes.

    steps: steps of the whole run.
    seed: of everything that is drawn; same seed, same machine, same run, bit for bit.
    precision: of matrix products; weights, optimizer and average stay float32; "auto": bfloat16 where the
        machine has it in hardware.
    max_skipped: updates in a row of a network that are skipped if they are not finite; one more ends the run.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: how many of the last are kept.
    distributed: how several processes divide the work.
    """

    steps: Count = 1000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Precision = "float32"
    max_skipped: Annotated[int, Field(ge=0)] = 5
    checkpoint_every: Count = 50
    keep_checkpoints: Count = 2
    distributed: DistributedSettings = DistributedSettings()

    @model_validator(mode="after")
    def _narrow_weights_in_narrow_sums(self) -> RunSettings:
        if self.distributed.param_dtype != "float32" and self.precision != self.distributed.param_dtype:
            raise ValueError(
                f"distributed.param_dtype: {self.distributed.param_dtype} needs precision "
                f"{self.distributed.param_dtype}, got {self.precision}"
            )
        return self

    def maths(self) -> dict[str, Any]:
        """What a resumed run may not change. How it is divided among processes it may, and what it keeps."""
        free = ("steps", "max_skipped", "checkpoint_every", "keep_checkpoints", "distributed", "guard")
        kept: dict[str, Any] = {"keep_attention": True}
        return self.model_dump(mode="json", exclude=dict.fromkeys(free, True) | kept | {"rollout": kept})
