import functools
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from distill_models import LetterEncoder, tiny_student, tiny_teacher
from small_run import numbers
from torch import Tensor
from toy_rewards import SmoothReward

from stream_r1.distill import checkpoint_files
from stream_r1.distill.checkpoint_files import list_checkpoints, load_checkpoint, save_checkpoint
from stream_r1.distill.events import Saved, StepDone
from stream_r1.distill.optimizer_step import DivergedError, OptimizerStep
from stream_r1.distill.run_state import Ema
from stream_r1.distill.settings import DistillSettings
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.distill.verification import CheckpointError

MODES = ["uniform", "re-dmd", "spatial", "temporal", "no-balance", "full"]


BASE = small_run.SETTINGS | {
    "steps": 6,
    "student": {"lr": 1e-3},
    "critic": {"lr": 1e-3},
    "ema": {"decay": 0.5, "start": 2},
}


def settings(**changes: Any) -> DistillSettings:
    return small_run.settings(BASE, **changes)


def trainer(
    folder: Path | None = None, *, reward: Any = None, model: Any = None, **changes: Any
) -> DistillTrainer:
    return small_run.trainer(settings(**changes), folder, reward=reward, student=model)


def everything(t: DistillTrainer) -> dict[str, Tensor]:
    """Every tensor that training changed, and every number."""
    out = {f"student/{k}": v for k, v in t.student.state_dict().items()}
    out |= {f"critic/{k}": v for k, v in t.critic.state_dict().items()}
    out |= {f"ema/{k}": v for k, v in t.ema.tensors().items()}
    for name, optimizer in (("so", t.step_student.optimizers[0]), ("co", t.step_critic.optimizers[0])):
        for index, entry in optimizer.state_dict()["state"].items():
            out |= {f"{name}/{index}/{key}": value for key, value in entry.items()}
    out["random"] = t.state.random.get_state()
    out["order"] = torch.tensor(list(t.state.order.state_dict().values()))
    assert t.weights is not None
    out["history"] = torch.tensor(t.weights.state_dict()["history"], dtype=torch.float64)
    out["step"] = torch.tensor(t.step)
    return out


def test_bfloat16_is_near_float32_and_keeps_float32_weights(tmp_path: Path) -> None:
    """The same steps in both precisions: other bits, nearly the same loss and scores."""
    runs = {precision: trainer(precision=precision, steps=2) for precision in ("float32", "bfloat16")}
    wide, narrow = (numbers(run)[0] for run in runs.values())
    assert wide["critic/loss"] != narrow["critic/loss"]
    for key in ("critic/loss", "reward/mean"):
        assert narrow[key] == pytest.approx(wide[key], rel=3e-2)
    for t in runs.values():
        assert all(tensor.dtype != torch.bfloat16 for tensor in everything(t).values())
        assert all(p.dtype == torch.float32 for p in (*t.student.parameters(), *t.critic.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_unbroken_run(mode: str, tmp_path: Path) -> None:
    unbroken = trainer(weighting={"mode": mode})
    expected = numbers(unbroken)
    first = trainer(tmp_path, weighting={"mode": mode}, steps=3)
    before = numbers(first)
    second = trainer(tmp_path, weighting={"mode": mode}, model=tiny_student(seed=99, num_layers=1))
    torch.manual_seed(12345)
    assert second.resume() is not None
    assert second.step == 3
    after = numbers(second)
    assert before + after == expected
    a, b = everything(unbroken), everything(second)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert len(a["history"]) == 2


def test_students_and_critics_turns() -> None:
    events = numbers(trainer(steps=5, critic_warmup=1, critic_updates=3))
    assert ["student/loss" in scalars for scalars in events] == [False, True, False, False, True]
    assert all("critic/loss" in scalars for scalars in events)


def test_accumulation_is_the_large_batch() -> None:
    """Gradients of an update, before the optimizer: Adam would hide or blow up their differences."""
    gradients = []
    for accumulation in (1, 4):
        run = trainer(batch=4, accumulation=accumulation, rollout={"steps": [1000, 500]})
        caught: dict[str, list[Tensor]] = {}

        def catch(step: OptimizerStep, *_: Any, into: dict[str, list[Tensor]] = caught) -> bool:
            into[step.name] = [p.grad.clone() for p in step.parameters]
            return True

        for step in ("step_student", "step_critic"):
            setattr(run, step, functools.partial(catch, getattr(run, step)))
        run.train_step()
        assert run.weights is not None
        gradients.append((caught["student"], caught["critic"], run.weights.state_dict()["history"]))
    (student, critic, history), (student4, critic4, history4) = gradients
    assert all(g.abs().max() > 0 for g in student)
    for g, g4 in zip(student + critic, student4 + critic4, strict=True):
        torch.testing.assert_close(g, g4, rtol=1e-4, atol=1e-4 * g.abs().max().item())
    torch.testing.assert_close(torch.tensor(history), torch.tensor(history4))


def test_gradients_are_clipped_once_an_update() -> None:
    run = trainer(
        student={"lr": 1e-3, "clip": 1e-9}, critic={"lr": 1e-3, "clip": 1e-9}, batch=4, accumulation=2
    )
    seen: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.stack([g.norm() for g in grads]).norm().item())

    run.step_student.optimizers[0].register_step_pre_hook(measure)
    run.step_critic.optimizers[0].register_step_pre_hook(measure)
    run.train_step()
    assert seen == pytest.approx([1e-9, 1e-9], rel=1e-3)


class SpoiltReward(SmoothReward):
    """Scores of some calls are multiplied by infinity or what is not a number."""

    def __init__(self, value: float, *calls: int) -> None:
        self.value, self.calls, self.bad = value, 0, calls

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        return super().score(video, prompts) * (self.value if self.calls in self.bad else 1.0)


def spoil_once(kind: str, run: DistillTrainer) -> None:
    """Makes something of the next update of the student infinite or not a number."""
    if kind == "gradient":
        handle = next(run.student.parameters()).register_hook(lambda grad: handle.remove() or grad * math.inf)
    elif kind == "teacher":
        handle = run.teacher.register_forward_hook(lambda *call: handle.remove() or (call[-1][0] * math.nan,))


@pytest.mark.parametrize(
    ("mode", "kind", "value"),
    [
        ("full", "reward", math.nan),
        ("full", "reward", math.inf),
        ("re-dmd", "reward", math.nan),
        ("re-dmd", "reward", math.inf),  # never seen by a gradient, and bounded as a weight
        ("re-dmd", "reward", -math.inf),
        ("full", "gradient", 1),
        ("uniform", "teacher", 1),
    ],
)
def test_an_update_that_is_not_finite_is_skipped(mode: str, kind: str, value: float) -> None:
    run = trainer(reward=SpoiltReward(value, 1), critic_updates=1, steps=2, weighting={"mode": mode})
    spoil_once(kind, run)
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    first = run.train_step().scalars
    assert first["student/skipped"] == 1
    assert first["critic/skipped"] == 0
    assert first["scores/not_finite"] == (kind == "reward")
    assert all(torch.equal(v, before[k]) for k, v in run.student.state_dict().items())
    second = run.train_step().scalars
    assert second["student/skipped"] == 0
    assert any(not torch.equal(v, before[k]) for k, v in run.student.state_dict().items())
    assert run.weights is not None
    history = torch.tensor(run.weights.state_dict()["history"])
    assert history.isfinite().all()
    assert len(history) == (1 if kind == "reward" else 2)


def test_an_update_too_many_ends_the_run_and_leaves_the_checkpoint_from_before(tmp_path: Path) -> None:
    run = trainer(tmp_path, critic_updates=1, max_skipped=2, checkpoint_every=1, keep_checkpoints=1)
    skipped = []

    def watch() -> None:
        for event in run.run():
            if isinstance(event, StepDone):
                skipped.append(event.scalars["student/skipped"])
            if event.step == 3:
                next(run.critic.parameters()).data.fill_(math.nan)

    told = r"3 updates of the student in a row were not finite, at step 6 \(loss nan.*max_skipped is 2: lower"
    with pytest.raises(DivergedError, match=told):
        watch()
    assert skipped == [0, 0, 0, 1, 1]
    (path,) = list_checkpoints(tmp_path)
    assert path.name == "step-00000002.safetensors"
    assert all(t.isfinite().all() for named in load_checkpoint(path)[0].values() for t in named.values())


def test_a_bad_reward_is_named_when_it_ends_the_run() -> None:
    run = trainer(reward=SpoiltReward(math.inf, 1), critic_updates=1, max_skipped=0)
    told = (
        "an update of the student was not finite, at step 1 .*100% of the reward's scores.*look at the reward"
    )
    with pytest.raises(DivergedError, match=told):
        run.train_step()


def test_checkpoints_wait_while_updates_are_skipped(tmp_path: Path) -> None:
    """At an interval; one of a run that is stopped is kept beside the last good ones."""
    chosen: dict[str, Any] = {"critic_updates": 1, "checkpoint_every": 2, "keep_checkpoints": 1}
    run = trainer(tmp_path, reward=SpoiltReward(math.nan, 2, 6), steps=9, **chosen)
    saved = []
    for event in run.run():
        if isinstance(event, Saved):
            saved.append((event.step, event.why))
        elif event.step == 6:
            run.stop()
    assert saved == [(3, "interval"), (4, "interval"), (6, "stopped")]
    assert [p.name[:13] for p in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]


def test_leaving_the_loop_keeps_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    for event in run.run():
        if event.step == 2:
            break
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_keeps_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run, events = trainer(tmp_path), []
    for event in run.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher and a scheduler may both send it
    assert run.stopped
    assert run.stopped_by == number
    assert isinstance(events[-1], Saved)
    assert events[-1].why == "stopped"
    assert len(events) == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    again = trainer(tmp_path)
    assert again.resume() == events[-1].path
    assert len(numbers(again)) == 4
    assert not again.stopped


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    events = trainer(tmp_path).run()
    next(events)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    events.close()


def test_checkpoints_come_at_intervals_and_old_ones_go(tmp_path: Path) -> None:
    saved = [
        e for e in trainer(tmp_path, checkpoint_every=2, keep_checkpoints=2).run() if isinstance(e, Saved)
    ]
    assert [(e.step, e.why) for e in saved] == [(2, "interval"), (4, "interval"), (6, "finished")]
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    list(trainer(tmp_path, steps=1).run())
    with pytest.raises(CheckpointError, match=r"weighting\.beta = 2\.0, this run has 1\.0"):
        trainer(tmp_path, weighting={"beta": 1.0}).resume()
    assert trainer(tmp_path, steps=9).resume() is not None


def test_the_average_of_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2).bfloat16()
    ema = Ema(model, decay=0.75, start=1)
    values = []
    for step in range(4):
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 2), float(step + 1)))
        ema.update(step)
        values.append(ema.tensors()["weight"][0, 0].item() if step else None)
    # starts as a copy at step 1 (2.0), then 0.75 * old + 0.25 * new in float32
    assert values[1:] == [2.0, 2.25, 2.6875]
    own = model.weight.clone()
    with ema.applied():
        assert model.weight[0, 0].item() == 2.6875
    assert torch.equal(model.weight, own)


def test_export_writes_the_averaged_student(tmp_path: Path) -> None:
    run = trainer(steps=4)
    list(run.run())
    run.export(tmp_path)
    loaded = type(run.student).from_pretrained(tmp_path)
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p, run.ema.tensors()[name], rtol=0, atol=0)


def _die_amid_saving(folder: Path) -> None:
    """Half of the file is on the disk when the process is killed."""
    write = checkpoint_files.save_file

    def write_half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        write(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_files.save_file = write_half
    save_checkpoint(folder, 2, {"a": {"x": torch.zeros(9)}}, {"n": 2})


def test_a_process_killed_amid_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"a": {"x": torch.ones(9)}}, {"n": 1})
    child = os.fork()
    if child == 0:
        try:
            _die_amid_saving(tmp_path)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (path,) = list_checkpoints(tmp_path)
    parts, values = load_checkpoint(path)
    assert values == {"n": 1}
    assert torch.equal(parts["a"]["x"], torch.ones(9))
    assert list(tmp_path.glob(".step-00000002*"))  # the half-written one is still there, under another name
    save_checkpoint(tmp_path, 3, parts, values, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.safetensors"]


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": {"x": torch.ones(99)}}, {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 4, "accumulation": 3}, "divisor of batch"),
        ({"critic_warmup": 6}, "never learn"),
        ({"rollout": {"steps": [500, 750]}}, "falling"),
        ({"matching": {"timestep_low": 990.0}}, "low < high"),
        ({"student": {"lr": -1.0}}, "greater than 0"),
        ({"weighting": {"mode": "best"}}, "no-balance"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_rewardless_run_must_be_uniform() -> None:
    arguments: dict[str, Any] = {
        "student": tiny_student(),
        "teacher": tiny_teacher(),
        "prompts": ["a"],
        "text_encoder": LetterEncoder(),
    }
    with pytest.raises(ValueError, match="reward must be given"):
        DistillTrainer(settings(), **arguments)
    with pytest.raises(ValueError, match="vae must be given"):
        DistillTrainer(settings(), reward=SmoothReward(), **arguments)
    with pytest.raises(ValueError, match="whole chunks"):
        DistillTrainer(settings(rollout={"frames": 7}, weighting={"mode": "uniform"}), **arguments)
    plain = DistillTrainer(settings(steps=1, weighting={"mode": "uniform"}), **arguments)
    (event,) = plain.run()
    assert isinstance(event, StepDone)
    assert event.preview is None
    assert "reward/mean" not in event.scalars
