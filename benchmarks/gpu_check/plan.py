"""The stages, in the order of their worth: what comes first is known even if the time is cut short."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 530.0  # seconds that the deadlines below are meant for


@dataclass(frozen=True)
class Stage:
    """One process group.

    Attributes:
        until: seconds after the beginning at which it is killed, of a budget of `BUDGET`.
        what: it finds out.
        kernels: whether it needs the compiled extension, and so waits for a build under way.
    """

    name: str
    until: float
    what: str
    kernels: bool = True

    def deadline(self, budget: float) -> float:
        """Seconds after the beginning, of this budget."""
        return self.until * budget / BUDGET


BUILD_UNTIL = 150.0  # of the build, which runs beside the stages that do not need it
STAGES = (
    Stage("environment", 25, "versions, the GPU, which attention torch takes", kernels=False),
    Stage("ceilings", 45, "copies and matrix products at the sizes of Wan 2.1 1.3B", kernels=False),
    Stage("tests", 110, "tests/gpu, a time-out a test"),
    Stage("accuracy", 170, "every op at full size against float32, on poisoned memory, on a second stream"),
    Stage("timings", 260, "every op beside SDPA and eager torch, inputs rotated past the L2 cache"),
    Stage("sampler", 340, "frames a second: eager and CUDA graphs, Wan's decoder and the tiny one"),
    Stage("profile", 400, "the kernels of one chunk, beside the prediction"),
    Stage("training", 450, "a training step with its backward; FSDP2 on one NCCL rank"),
    Stage("sanitizer", 490, "compute-sanitizer on small cases"),
    Stage("counters", 530, "Nsight Compute on five kernels; FlexAttention"),
)
NAMES = tuple(stage.name for stage in STAGES)
