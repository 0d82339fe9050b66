"""A watched start: sample videos as a distillation would make them, and a training that is not disturbed."""

from pathlib import Path

import pytest
import small_run
import torch
from distill_models import LATENT, LetterEncoder, StretchDecoder, tiny_student

from stream_r1.distill.events import StepDone
from stream_r1.distill.initialise import InitTrainer, Samples
from stream_r1.distill.ode import OdePairs, OdeRegression
from stream_r1.distill.settings import InitSettings, RolloutSettings
from stream_r1.sampling.video import read_video
from stream_r1.watch.settings import WatchSettings
from stream_r1.watch.watcher import Watcher
from stream_r1.watch.writers import read_metrics

PROMPTS = ["a red fox", "still lake"]
ROLLOUT = {"frames": 6, "height": LATENT[1], "width": LATENT[2], "steps": [1000, 500]}


def start(samples: bool) -> InitTrainer:
    g = torch.Generator().manual_seed(2)
    text = LetterEncoder().encode(PROMPTS)
    trajectories = torch.randn(4, 3, 6, *LATENT, generator=g)
    pairs = OdePairs(trajectories, torch.arange(4) % 2, text, torch.tensor([1000.0, 833.3]))
    chosen = {"steps": 3, "batch": 4, "accumulation": 2, "optimizer": {"lr": 3e-3}}
    shown = Samples(
        StretchDecoder(),
        dict(zip(PROMPTS, text.split(1), strict=True)),
        RolloutSettings.model_validate(ROLLOUT),
    )
    return InitTrainer(
        InitSettings.model_validate(chosen),
        tiny_student(num_layers=1),
        OdeRegression(pairs),
        samples=shown if samples else None,
    )


def test_samples_are_those_of_a_distillation() -> None:
    distillation = small_run.trainer(small_run.settings(rollout=ROLLOUT), prompts=PROMPTS)
    run = start(samples=True)
    assert torch.equal(run.sample(PROMPTS, [3, 4]), distillation.sample(PROMPTS, [3, 4]))
    assert run.student.training
    with pytest.raises(ValueError, match="made without samples"):
        start(samples=False).sample(PROMPTS, [3, 4])


def test_a_watched_start_is_the_start_bit_for_bit(tmp_path: Path) -> None:
    plain = start(samples=False)
    expected = [event.scalars for event in plain.run() if isinstance(event, StepDone)]
    run, numbers, told = start(samples=True), [], []
    with Watcher(run, WatchSettings(sample_every=2, fps=8), tmp_path, warn=told.append) as watcher:
        for event in run.run():
            watcher.see(event)
            if isinstance(event, StepDone):
                numbers.append(event.scalars)
    assert told == []
    assert numbers == expected
    for name, value in plain.student.state_dict().items():
        assert torch.equal(value, run.student.state_dict()[name]), name
    rows = list(read_metrics(tmp_path / "metrics.csv"))
    # 4 samples of 6 frames of 4 x 6 cells in patches of 2 x 2
    assert [row["tokens/second"] * row["seconds/step"] for row in rows] == [pytest.approx(4 * 6 * 6)] * 3
    videos = sorted((tmp_path / "samples").glob("*/*"))
    assert [f"{path.parent.name[-1]}/{path.name}" for path in videos] == [
        f"{step}/sample-{index}.mp4" for step in (0, 2, 3) for index in (0, 1)
    ]
    shown = StretchDecoder().decode(run.sample(PROMPTS[1:], [1]))[0]
    video, fps = read_video(videos[-1])
    assert fps == 8
    assert (video - shown).abs().mean() < 0.05  # mp4 is lossy
