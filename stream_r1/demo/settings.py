"""What the demo is told, and how a time budget becomes a number of steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stream_r1.config import Settings

Count = Annotated[int, Field(ge=1, le=10_000)]


class DemoSettings(Settings):
    """The demo around the distillation.

    budget: seconds for everything, from loading the models to the report.
    prompts: of the videos in the report.
    chunks: chunks that are streamed for each prompt.
    seed: of the noise of all videos.
    reference: statistics of drawings that KID compares with.
    judge: folder of the reward that judges; it is not the one that guides.
    baselines: figures of the teacher and of drawings for the table, see `stream-r1 data baselines`; left out,
        and said so, if not there or of other models.
    evaluated_videos: videos that the measures see, before and after.
    evaluated_batch: how many of them are made together.
    timed_chunks: chunks of the stream that is timed.
    teacher_steps: solver steps of the teacher's own samples; 0 leaves them out.
    finish: seconds kept for what comes after the second evaluation: timing, maps, report.
    least_distillation: seconds of distillation, whatever the budget says.
    """

    budget: Annotated[float, Field(ge=20, le=10**7)] = 330.0
    prompts: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)] = (
        "a red ball rolls to the left in a meadow at noon",
        "a yellow star bounces by the sea at night",
        "a blue box swings on a rope in the snow at dawn",
        "a pink ball floats up in the desert at dusk",
    )
    chunks: Count = 3
    seed: int = 0
    reference: str = "assets/tiny/reference/statistics.safetensors"
    judge: str = "assets/tiny/judge"
    baselines: str = "assets/tiny/reference/baselines.json"
    evaluated_videos: Annotated[int, Field(ge=2, le=10_000)] = 40
    evaluated_batch: Count = 8
    timed_chunks: Count = 8
    teacher_steps: Annotated[int, Field(ge=0, le=10_000)] = 24
    finish: float = 12.0
    least_distillation: float = 10.0


def seconds_to_distil(settings: DemoSettings, spent: float, to_repeat: float) -> float:
    """What the budget leaves for distilling.

    Args:
        settings: with the budget.
        spent: seconds used so far, distilling included.
        to_repeat: seconds that streaming and evaluating before took, which they will take again after.
    """
    left = settings.budget - spent - 1.1 * to_repeat - settings.finish
    return max(left, settings.least_distillation)


def steps_in(seconds: float, durations: list[float], period: int) -> int:
    """How many more steps fit: ``durations`` of steps done so far, every ``period``-th of which is longer.

    The first period is warm-up and is left out where there is more.
    """
    counted = durations[period:] if len(durations) > period else durations
    whole = len(counted) - len(counted) % period or len(counted)
    return max(0, int(seconds / (sum(counted[:whole]) / whole)))
