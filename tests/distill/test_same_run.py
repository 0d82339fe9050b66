"""The same run is the same run, bit for bit: in every precision, watched, killed, whoever calls."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import torch
from distill_models import LATENT, StretchDecoder, tiny_student
from torch import Tensor, nn
from toy_rewards import SmoothReward

from stream_r1.distill.checkpoint_files import list_checkpoints
from stream_r1.distill.events import StepDone
from stream_r1.distill.initialise import InitTrainer, Samples
from stream_r1.distill.loop import TrainingLoop
from stream_r1.distill.noise import seed_global_streams
from stream_r1.distill.ode import OdePairs, OdeRegression
from stream_r1.distill.settings import InitSettings, RolloutSettings
from stream_r1.models.text import TransformersEncoder
from stream_r1.watch.settings import WatchSettings
from stream_r1.watch.watcher import Watcher

STEPS = 6
PRECISIONS = ["float32", "bfloat16"]


class SmallEncoder(TransformersEncoder):
    """A model with matrix products, so that its states differ under autocast; remembered as real ones are."""

    def __init__(self) -> None:
        super().__init__(dim=16, text_len=8, device="cpu")

    def _read_model(self) -> Any:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def _token_states(self, prompt: str) -> Tensor:
        return self._model(torch.tensor(list(b"^" + prompt.encode())[: self.text_len]))


class DrawingReward(SmoothReward):
    """Draws from every global stream, as dropout or a random crop does."""

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        drawn = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return super().score(video, prompts) + drawn


def distilled(folder: Path | None, precision: str, **parts: Any) -> TrainingLoop:
    chosen = small_run.settings(steps=STEPS, precision=precision, checkpoint_every=1)
    return small_run.trainer(chosen, folder, text_encoder=SmallEncoder(), **parts)


def started(folder: Path | None, precision: str) -> TrainingLoop:
    """A student's start, whose sample videos are of other prompts than it learns."""
    g = torch.Generator().manual_seed(2)
    text = SmallEncoder().encode(["a red fox", "still lake"])
    pairs = OdePairs(
        torch.randn(4, 3, 6, *LATENT, generator=g), torch.arange(4) % 2, text, torch.tensor([1000.0, 833.3])
    )
    size = {"frames": 6, "height": LATENT[1], "width": LATENT[2], "steps": [1000, 500]}
    shown = Samples(StretchDecoder(), {"a": text[:1]}, RolloutSettings.model_validate(size))
    chosen = {"steps": STEPS, "batch": 2, "precision": precision, "checkpoint_every": 1, "warmup": 3}
    return InitTrainer(
        InitSettings.model_validate(chosen),
        tiny_student(num_layers=1),
        OdeRegression(pairs),
        folder=folder,
        samples=shown,
    )


TRAINERS: dict[str, Callable[[Path | None, str], TrainingLoop]] = {"distilled": distilled, "started": started}


def trained(run: TrainingLoop, watched: Path | None = None, until: int = STEPS) -> TrainingLoop:
    """Resumed if it can be, and run up to a step as a command does."""
    run.resume()
    watcher = nullcontext()
    if watched is not None:
        watcher = Watcher(run, WatchSettings(sample_every=2, fps=8, tensorboard=False), watched)
    with watcher:
        for event in run.run():
            if watched is not None:
                watcher.see(event)
            if isinstance(event, StepDone) and event.step == until < STEPS:
                break
    return run


def assert_same(got: TrainingLoop, expected: TrainingLoop) -> None:
    assert got.step == expected.step
    mine, theirs = got.state.tensors(), expected.state.tensors()
    assert mine.keys() == theirs.keys()
    for part, named in mine.items():
        assert named.keys() == theirs[part].keys()
        differing = [name for name, t in named.items() if not torch.equal(t, theirs[part][name])]
        assert not differing, (part, differing)
    assert got.state.values() == expected.state.values()


@pytest.fixture(scope="module")
def unbroken() -> dict[tuple[str, str], TrainingLoop]:
    """By trainer and precision, a run that nobody watched and nothing broke."""
    torch.set_num_threads(1)
    return {(name, p): trained(make(None, p)) for name, make in TRAINERS.items() for p in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TRAINERS)
def test_resumed_after_every_step_and_watched(
    name: str, precision: str, unbroken: dict[tuple[str, str], TrainingLoop], tmp_path: Path
) -> None:
    """Every step by a trainer of its own, with samples before the first, at checkpoints and between them."""
    for step in range(1, STEPS + 1):
        run = trained(TRAINERS[name](tmp_path / "checkpoints", precision), tmp_path, until=step)
    assert_same(run, unbroken[name, precision])


@pytest.mark.parametrize("name", TRAINERS)
def test_killed_at_random_moments(
    name: str, unbroken: dict[tuple[str, str], TrainingLoop], tmp_path: Path
) -> None:
    """kill -9 again and again, amid steps, samples and checkpoints, in bfloat16."""
    moments, folder, longest, kills, there = random.Random(name), tmp_path / "checkpoints", 0.2, 0, []
    while kills < 8 or not there:
        child = os.fork()
        if child == 0:
            try:
                trained(TRAINERS[name](folder, "bfloat16"), tmp_path)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills, before, there = kills + 1, there, list_checkpoints(folder)
        longest *= 1.5 if there == before else 1  # on a busy machine a step takes longer
    assert kills
    assert_same(trained(TRAINERS[name](folder, "bfloat16"), tmp_path), unbroken[name, "bfloat16"])
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_caller_s_autocast_and_inference_change_nothing(
    precision: str, unbroken: dict[tuple[str, str], TrainingLoop]
) -> None:
    """autocast remembers narrow weights until its outermost context ends: for many steps, in a caller's."""
    run = distilled(None, precision)
    with torch.inference_mode():
        run.text_encoder.encode(run.prompts)
    with torch.autocast("cpu", torch.bfloat16):
        run.text_encoder.encode(["a prompt from elsewhere"])
        trained(run)
    assert_same(run, unbroken["distilled", precision])


def test_a_reward_that_draws_draws_the_same_again(tmp_path: Path) -> None:
    runs = [distilled(folder, "float32", reward=DrawingReward()) for folder in (None, tmp_path, tmp_path)]
    trained(runs[0])
    seed_global_streams(5)
    trained(runs[1], until=3)
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    assert_same(trained(runs[2]), runs[0])
    seed_global_streams(5)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: NPY002
