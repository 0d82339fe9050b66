"""What ranks tell one another, and how a run of several ends."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_rewards import SmoothReward
from workers import Processes, distiller, everything, joined, launch, settings, starter

from stream_r1.config import SettingsError, build
from stream_r1.distill.events import StepDone
from stream_r1.distill.ranks import RankError
from stream_r1.distill.settings import DistillSettings, InitSettings


def _talk() -> dict[str, Any]:
    with joined(settings()) as ranks:
        x = torch.arange(3.0) + 10 * ranks.rank
        weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3)), torch.zeros(1)]
        weights[0].grad, weights[1].grad = torch.full((2,), 1.0 + ranks.rank), x.clone()
        ranks.average_gradients(weights)
        return {
            "mean": ranks.mean(x),
            "gather": ranks.gather(x[:, None]),
            "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
            "summary": ranks.summary(
                {"a": float(ranks.rank), "b/min": 1.0 + ranks.rank, "b/max": 2.0 * ranks.rank}
            ),
            "first": ranks.broadcast(f"said by {ranks.rank}"),
            "gradients": [weights[0].grad, weights[1].grad],
        }


def test_what_they_tell_one_another() -> None:
    for said in launch(2, _talk):
        assert said["mean"].tolist() == [5.0, 6.0, 7.0]
        assert said["gather"].flatten().tolist() == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
        assert said["any"] == [True, False]
        assert said["summary"] == {"a": 0.5, "b/min": 1.0, "b/max": 2.0}
        assert said["first"] == "said by 0"
        assert [g.tolist() for g in said["gradients"]] == [[1.5, 1.5], [5.0, 6.0, 7.0]]


class SpoiledReward(SmoothReward):
    """Not a number, at the first call of one rank."""

    def __init__(self, spoiled: bool) -> None:
        self.spoiled = spoiled

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        out = super().score(video, prompts) * (float("nan") if self.spoiled else 1.0)
        self.spoiled = False
        return out


def _spoil(chosen: DistillSettings) -> tuple[list[dict[str, float]], int, dict[str, Tensor]]:
    with joined(chosen) as ranks:
        run = distiller(ranks, None, chosen, reward=SpoiledReward(ranks.rank == 1))
        before = everything(run)
        first = run.train_step().scalars
        unmoved = all(
            torch.equal(v, before[k]) for k, v in everything(run).items() if k.startswith("student/")
        )
        return [first, run.train_step().scalars], unmoved, everything(run)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(shard: str) -> None:
    results = launch(2, _spoil, settings(critic_updates=1, distributed={"shard": shard}))
    for scalars, unmoved, state in results:
        assert [line["student/skipped"] for line in scalars] == [1.0, 0.0]
        assert unmoved
        # Finite samples of the spoiled update, of both ranks, are in the history; so is the update after it.
        assert len(state["history"]) == 2
        assert torch.equal(state["history"], results[0][2]["history"])


def _stop_by_one(chosen: DistillSettings, number: int) -> tuple[int, int]:
    with joined(chosen) as ranks:
        run = distiller(ranks, None, chosen)
        for event in run.run():
            if isinstance(event, StepDone) and event.step == 2 and ranks.rank == 1:
                os.kill(os.getpid(), number)
        return run.step, run.stopped_by


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_stop_after_the_step_in_which_one_is_told_to(number: int) -> None:
    assert launch(2, _stop_by_one, settings(), number) == [(2, number), (2, number)]


def _fail_to_watch(folder: Path, chosen: DistillSettings) -> None:
    with joined(chosen) as ranks:
        run = distiller(ranks, folder, chosen)
        for event in run.run():
            if event.step == 2 and ranks.rank == 1:
                raise OSError("the disk is full")


def test_a_rank_that_fails_between_steps_waits_for_nobody(tmp_path: Path) -> None:
    """It does not begin a checkpoint that the others know nothing of."""
    results = Processes(2, _fail_to_watch, tmp_path, settings()).results(timeout=60)
    assert "rank 1 of 2: OSError: the disk is full" in str(results[1])
    assert "SystemExit(2)" in str(results[0])


def _differ(chosen: DistillSettings, what: str) -> None:
    with joined(chosen) as ranks:
        other = settings(seed=ranks.rank) if what == "seed" else chosen
        extra = {"prompts": ["a", "b"[: ranks.rank] or "c"]} if what == "data" else {}
        run = distiller(ranks, None, other, **extra)
        if what == "error" and ranks.rank == 1:
            raise ValueError("the disk is on fire")
        run.train_step()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("seed", "every rank must have the same seed: rank 0 has 0, rank 1 has 1"),
        ("data", "every rank must have the same data"),
        ("error", "rank 1 of 2: ValueError: the disk is on fire"),
    ],
)
def test_a_run_ends_with_one_message(what: str, told: str) -> None:
    results = Processes(2, _differ, settings(), what).results(timeout=60)
    (spoken,) = (r for r in results if isinstance(r, RankError))
    assert told in str(spoken)
    (silent,) = (r for r in results if r is not spoken)
    assert "SystemExit(2)" in str(silent)


def _join_at_port_0(chosen: Any) -> None:
    os.environ["MASTER_PORT"] = "0"
    with joined(chosen):
        pass


def test_port_0_is_refused_instead_of_waited_at() -> None:
    """torchrun --master-port 0 gives it to every process."""
    told = [str(result) for result in Processes(2, _join_at_port_0, settings()).results(timeout=60)]
    assert sum("MASTER_PORT: expected the port" in each for each in told) == 1
    assert sum("SystemExit(2)" in each for each in told) == 1


def _refuse(chosen: Any) -> None:
    with joined(chosen) as ranks:
        (distiller if isinstance(chosen, DistillSettings) else starter)(ranks, None, chosen)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (
            settings(batch=6, accumulation=2),
            "batch: expected a multiple of 2 processes x accumulation 2, got 6",
        ),
        (InitSettings(batch=3), "batch: expected a multiple of 2 processes"),
        (
            settings(distributed={"shard": "hybrid", "replicas": 3}),
            "expected a divisor of the 2 processes, got 3",
        ),
    ],
)
def test_what_does_not_divide_is_refused(chosen: Any, told: str) -> None:
    results = Processes(2, _refuse, chosen).results(timeout=60)
    assert sum(told in str(result) for result in results) == 1


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"shard": "half"}, "'none', 'full' or 'hybrid'"),
        ({"replicas": 2}, "only shard 'hybrid' has replicas"),
        ({"param_dtype": "bfloat16"}, "only sharded weights are cast"),
        ({"shard": "full", "param_dtype": "bfloat16"}, "needs precision bfloat16, got float32"),
    ],
)
def test_impossible_settings_are_refused(section: dict, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        build(DistillSettings, {"distributed": section})
