"""The demo on random models: stopped amid the distillation, gone on with, finished; and its budget."""

import signal
from contextlib import contextmanager

import pytest

from stream_r1 import recipe
from stream_r1.config import SettingsError
from stream_r1.demo.baselines import measured_with, save_baselines
from stream_r1.demo.record import Number, Record
from stream_r1.demo.report import write_report
from stream_r1.demo.run import Demo
from stream_r1.demo.settings import DemoSettings, seconds_to_distil, steps_in
from stream_r1.distill.events import StepDone


class Watcher:
    """Notes what happens; presses Ctrl-C after a step if told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.steps: list[int] = []
        self.titles: list[str] = []

    @contextmanager
    def stage(self, title):
        self.titles.append(title)
        yield

    @contextmanager
    def distillation(self, total, done):
        yield self

    def show(self, event):
        if isinstance(event, StepDone):
            self.steps.append(event.step)
            if event.step == self.stop_at:
                signal.raise_signal(signal.SIGINT)

    def plan(self, total, seconds_left):
        assert total >= max(self.steps, default=0)


@pytest.fixture(scope="module")
def settings(world):
    kid, sharpness = Number(value=0.5, spread=0.1), Number(value=8.0, spread=0.25)
    made = DemoSettings(
        prompts=("a red ball bounces in a meadow at noon",),
        chunks=1,
        evaluated_videos=2,
        timed_chunks=2,
        teacher_steps=1,
        least_distillation=3600.0,  # the recipe's steps end it, not the time
        reference=str(world / "reference.safetensors"),
        judge=str(world / "reward"),
        baselines=str(world / "baselines.json"),
    )
    figures = {"teacher": {"kid": kid}, "drawings": {"sharpness": sharpness}}
    loaded = recipe.load(world / "recipe.yaml", ["rollout.frames=3"])
    save_baselines(world / "baselines.json", figures, measured_with(loaded, made))
    return made


def test_figures_of_other_baselines_are_left_out_and_it_says_so(world, settings, tmp_path):
    loaded = recipe.load(world / "recipe.yaml", ["rollout.frames=3"])
    other = settings.model_copy(update={"teacher_steps": 2})
    record = Demo(loaded, other, tmp_path, Watcher(stop_at=1), source="it").run()
    assert record.evaluations["teacher"] == record.evaluations["drawings"] == {}
    page = write_report(record, tmp_path).read_text(encoding="utf-8")
    assert "No teacher and drawings" in page
    assert "measured with teacher_steps 1, here it is 2" in page


def test_stopped_and_gone_on_with(world, settings, tmp_path):
    loaded = recipe.load(world / "recipe.yaml", ["rollout.frames=3"])
    out = tmp_path / "demo"
    first = Watcher(stop_at=1)
    record = Demo(loaded, settings, out, first, source="it").run()
    assert first.steps == [1]
    assert record.stopped
    assert not record.finished
    assert [point.step for point in record.steps] == [1]
    assert set(record.clips) == {"before", "after", "teacher", "drawings"}
    assert set(record.evaluations) == {"before", "teacher", "drawings"}
    assert record.evaluations["teacher"] == {"kid": Number(value=0.5, spread=0.1)}
    assert record.evaluations["drawings"]["sharpness"].spread == 0.25
    assert "This run was stopped after 1 student step" in write_report(record, out).read_text(
        encoding="utf-8"
    )

    second = Watcher()
    record = Demo(loaded, settings, out, second, source="it").run()
    assert second.steps == [2, 3, 4]
    assert not any("before" in title for title in second.titles)  # nothing is done twice
    assert record.finished
    assert not record.stopped
    assert [point.step for point in record.steps] == [1, 3]  # every second step is one of the student
    assert record.critic_steps == 4
    assert {"kid", "warp_error", "judge/VQ"} <= record.evaluations["after"].keys() & record.evaluations[
        "before"
    ].keys()
    assert record.evaluations["after"] != record.evaluations["before"]
    assert record.timing.frames == 9 + 12
    assert record.timing.total >= record.timing.denoise + record.timing.decode
    assert Record.load(out) == record
    page = write_report(record, out).read_text(encoding="utf-8")
    assert page.count("data:video/mp4") == 4  # before, after, teacher, drawings

    again = Watcher()
    assert Demo(loaded, settings, out, again, source="it").run() == record  # nothing left to do
    assert again.titles == []
    assert again.steps == []

    other = recipe.load(world / "recipe.yaml", ["rollout.frames=3", "student.lr=1e-2"])
    assert Demo(other, settings, out, Watcher(), source="it").record.steps == []  # another run: a new record
    assert not list(out.glob("*.mp4"))


def test_what_is_missing_is_said_before_any_work(world, settings, tmp_path):
    broken = recipe.load(world / "recipe.yaml", ["models.reward=nowhere"])
    with pytest.raises(SettingsError, match=r"models\.reward: nowhere"):
        Demo(broken, settings, tmp_path / "demo", Watcher(), source="it")
    other = settings.model_copy(update={"prompts": ("a fat rabbit",)})
    with pytest.raises(
        SettingsError, match=r"prompts: expected those of the drawn world, got 'a fat rabbit'"
    ):
        Demo(recipe.load(world / "recipe.yaml"), other, tmp_path / "demo", Watcher(), source="it")
    assert not (tmp_path / "demo").exists()


def test_the_budget_leaves_time_for_what_comes_after():
    settings = DemoSettings(budget=300, finish=10, least_distillation=5)
    assert seconds_to_distil(settings, spent=60, to_repeat=40) == pytest.approx(300 - 60 - 44 - 10)
    assert seconds_to_distil(settings, spent=290, to_repeat=40) == 5


def test_steps_follow_from_whole_periods_without_the_warm_up():
    """A step of the student every third: 3 s, 1 s, 1 s; the first round is slower."""
    durations = [9.0, 4.0, 4.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.0]
    assert steps_in(50.0, durations, 3) == 30
    assert steps_in(50.0, durations[:3], 3) == int(50 / (17 / 3))
    assert steps_in(-5.0, durations, 3) == 0
