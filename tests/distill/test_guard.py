"""The guard's judgement, on figures made by known changes of a picture."""

import json

import pytest
import torch
from small_run import settings, trainer
from torch.nn import functional

from stream_r1.distill.events import Alarm, StepDone
from stream_r1.distill.guard import Guard, figures_of
from stream_r1.distill.settings import GuardSettings
from stream_r1.models.checkpoints import load_student


def videos(saturation=1.0, blur=0, speed=1.0):
    """Coloured noise that slides: [2, 9, 3, 32, 48]."""
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 32, 160)
    if blur:
        picture = functional.avg_pool2d(picture, 2 * blur + 1, 1, blur)
    grey = picture.mean(1, keepdim=True)
    picture = (grey + saturation * (picture - grey)).clamp(0, 1)
    frames = [picture[..., round(2 * speed * t) : round(2 * speed * t) + 48] for t in range(9)]
    return torch.stack(frames, 1)


def test_each_figure_follows_what_it_is_named_for():
    usual = figures_of(videos())
    assert figures_of(videos(saturation=0.5))["saturation"] == pytest.approx(
        0.5 * usual["saturation"], rel=0.05
    )
    assert figures_of(videos(blur=2))["sharpness"] < 0.8 * usual["sharpness"]
    assert figures_of(videos(blur=2, speed=0.5))["motion"] < figures_of(videos(blur=2))["motion"]
    assert figures_of(videos(speed=0))["motion"] == 0
    faded = figures_of(0.5 + 0.3 * (videos() - 0.5))  # less contrast is neither blur nor standstill
    assert faded["sharpness"] == pytest.approx(usual["sharpness"], rel=0.02)
    assert faded["motion"] == pytest.approx(usual["motion"], rel=0.02)


def judged(*looks, **settings):
    guard = Guard(GuardSettings(**settings))
    return guard, [guard.check(look) for look in looks]


def look(reward=None, **changes):
    return figures_of(videos(**changes)) | ({} if reward is None else {"reward": reward})


def test_a_student_that_changes_little_raises_no_alarm():
    guard, faults = judged(*[look(saturation=1 - 0.02 * i, reward=0.1 * i) for i in range(5)])
    assert faults == [None] * 5
    assert guard.alarm is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"saturation": 0.7}, "saturation is 0.7"),
        ({"blur": 3}, "sharpness is "),
        ({"speed": 0}, "motion is 0.00 of the start's, expected 0.6 to 4"),
    ],
)
def test_a_figure_past_its_bound_is_told_after_so_many_checks(changes, told):
    free = {"saturation": (0.0, 9.0)} if "blur" in changes else {}  # blurred noise has no colours
    guard, faults = judged(look(), look(**changes), look(), look(**changes), look(**changes), **free)
    assert faults[0] is faults[2] is None
    assert told in faults[1]
    assert told in guard.alarm
    assert judged(look(), look(**changes), **free)[0].alarm is None  # patience is 2


def test_a_fall_within_the_bounds_is_a_fault_only_while_the_reward_rises():
    assert judged(look(reward=1.0), look(reward=0.9, saturation=0.87))[1][1] is None
    assert judged(look(), look(saturation=0.87))[1][1] is None  # no reward
    fault = judged(look(reward=1.0), look(reward=1.4, saturation=0.87))[1][1]
    assert fault.startswith("saturation fell to 0.87")
    assert fault.endswith("while the reward rose by 0.40")


def test_a_critic_that_loses_track_and_updates_that_explode_are_told():
    guard = Guard(GuardSettings(patience=1))
    for _ in range(20):
        guard.update(1.0, 0.1)
    guard.check(look())
    for _ in range(8):
        guard.update(1.0, 0.9)
    assert "the critic's loss is 9.0 times" in guard.check(look())
    guard = Guard(GuardSettings())
    guard.check(look())
    for size in [1.0] * 20 + [100.0] * 3 + [float("nan")]:
        guard.update(size, 0.1)
    assert "updates are 100.0 times their median" in guard.check(look())


def test_a_guard_goes_on_from_its_state():
    whole, parts = Guard(GuardSettings()), Guard(GuardSettings())
    looks = [look(), look(saturation=0.7), look(saturation=0.6)]
    for each in looks:
        whole.check(each)
    for each in looks:
        parts.check(each)
        again = Guard(GuardSettings())
        again.load_state_dict(json.loads(json.dumps(parts.state_dict())), {})
        parts = again
    assert parts.alarm == whole.alarm is not None


def test_bounds_that_hold_no_start_are_refused():
    with pytest.raises(ValueError, match=r"motion: expected least < 1 < greatest, got \[1.2, 3.0\]"):
        GuardSettings(motion=(1.2, 3.0))


WATCHED = {"every": 1, "videos": 3, "patience": 1}
TIGHT = WATCHED | {"saturation": (0.9999999, 1.0000001), "sharpness": (0, 99), "motion": (0, 99)}


def weights(run):
    return {name: t.clone() for name, t in run.student.state_dict().items()}


def test_a_guard_changes_no_update_and_tells_what_it_sees():
    free, watched = trainer(settings()), trainer(settings(guard=WATCHED | {"then": "warn"}))
    plain = [event.scalars for event in free.run() if isinstance(event, StepDone)]
    seen = [event.scalars for event in watched.run() if isinstance(event, StepDone)]
    assert all(
        torch.equal(a, b) for a, b in zip(weights(free).values(), weights(watched).values(), strict=True)
    )
    assert [{k: v for k, v in row.items() if not k.startswith("guard/")} for row in seen] == plain
    assert {"guard/saturation", "guard/sharpness", "guard/motion", "guard/reward"} <= seen[0].keys()


def test_an_alarm_ends_the_run_with_the_student_of_the_last_look_without_fault(tmp_path):
    """Bounds that nothing but the start can keep: the student of step 0 is what is left."""
    start = weights(trainer(settings()))
    run = trainer(settings(steps=8, guard=TIGHT), tmp_path / "out")
    alarms = [event for event in run.run() if isinstance(event, Alarm)]
    assert [(alarm.kept_step, alarm.ends) for alarm in alarms] == [(0, True)]
    assert "saturation is" in alarms[0].reason
    assert run.step < 8
    run.export(tmp_path / "student")
    kept = load_student(tmp_path / "student").state_dict()
    assert all(torch.equal(kept[name], t) for name, t in start.items())
    assert not all(torch.equal(run.student.state_dict()[name], t) for name, t in start.items())

    again = trainer(settings(steps=8, guard=TIGHT), tmp_path / "out")
    again.resume()
    assert not [event for event in again.run() if isinstance(event, StepDone)]  # it stays ended
    again.export(tmp_path / "again")
    kept = load_student(tmp_path / "again").state_dict()
    assert all(torch.equal(kept[name], t) for name, t in start.items())


def test_a_guard_that_warns_lets_the_run_go_on():
    run = trainer(settings(guard=TIGHT | {"then": "warn"}))
    events = list(run.run())
    assert [event.ends for event in events if isinstance(event, Alarm)] == [False]
    assert run.step == 4


def test_a_watched_run_in_two_parts_is_the_run_in_one(tmp_path):
    guarded = settings(guard=WATCHED | {"then": "warn"})
    whole = trainer(guarded)
    list(whole.run())
    first = trainer(guarded, tmp_path)
    for event in first.run():
        if isinstance(event, StepDone) and event.step == 2:
            first.stop()
    second = trainer(guarded, tmp_path)
    second.resume()
    list(second.run())
    assert second.state.guard.state_dict() == whole.state.guard.state_dict()
    assert second.state.guard.kept_step == whole.state.guard.kept_step
    for name, value in whole.state.guard.kept.items():
        assert torch.equal(value, second.state.guard.kept[name])
