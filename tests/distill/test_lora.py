"""Adapters in place of weights: the dense formula's gradients, what is kept, and what others read."""

import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from distill_models import LATENT, LetterEncoder, tiny_student
from torch import Tensor, nn

from stream_r1.config import SettingsError
from stream_r1.distill.checkpoint_files import load_checkpoint
from stream_r1.distill.events import StepDone
from stream_r1.distill.initialise import InitTrainer
from stream_r1.distill.lora import without_adapters
from stream_r1.distill.ode import OdePairs, OdeRegression
from stream_r1.distill.run_state import trained
from stream_r1.distill.settings import InitSettings, LoraSettings
from stream_r1.distill.trainer import DistillTrainer
from stream_r1.distill.verification import CheckpointError
from stream_r1.models.checkpoints import load_student

LORA = {"rank": 2, "alpha": 6.0}  # a factor of 3


def trainer(
    folder: Path | None = None,
    *,
    lora: dict[str, Any] | None = LORA,
    critic_lora: dict[str, Any] | None = None,
    student: Any = None,
    **changes: Any,
) -> DistillTrainer:
    chosen = small_run.settings(student={"lora": lora}, critic={"lora": critic_lora}, **changes)
    return small_run.trainer(chosen, folder, student=student)


def gradients(run: DistillTrainer) -> dict[str, Tensor]:
    """Of the student's first update, before the optimizer."""
    caught = {}

    def catch(name: str, model: nn.Module) -> bool:
        caught.update({f"{name}/{key}": p.grad.clone() for key, p in trained(model).items()})
        return True

    run.step_student = lambda *_: catch("student", run.student)  # type: ignore[assignment]
    run.step_critic = lambda *_: catch("critic", run.critic)  # type: ignore[assignment]
    run.train_step()
    return caught


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_dense_formula_s(checkpointing: bool) -> None:
    """W' = W + 3 B A, so dL/dA = 3 B' dL/dW' and dL/dB = 3 dL/dW' A'; dL/dW' from a dense run on W'."""
    rollout = {"gradient_checkpointing": checkpointing}
    run = trainer(rollout=rollout)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # from the start B is zero
        for name, p in trained(run.student).items():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            assert ".lora_" in name
    state = run.student.state_dict()
    merged = {name: value.clone() for name, value in without_adapters(state).items()}
    layers = {name.partition(".lora_A")[0] for name in state if ".lora_A" in name}
    assert len(layers) == 10  # of 1 block: q, k, v and out of two attentions, two of the feed-forward
    for layer in layers:
        a, b = (state[f"{layer}.lora_{half}.default.weight"] for half in "AB")
        assert a.shape[0] == b.shape[1] == 2
        merged[f"{layer}.weight"] += 3 * b @ a
    dense = tiny_student(num_layers=1)
    dense.load_state_dict(merged)
    got, expected = gradients(run), gradients(trainer(lora=None, student=dense, rollout=rollout))
    assert len([name for name in got if name.startswith("student/")]) == 20
    for layer in layers:
        a, b = (state[f"{layer}.lora_{half}.default.weight"] for half in "AB")
        dw = expected[f"student/{layer}.weight"]
        for half, formula in (("A", 3 * b.T @ dw), ("B", 3 * dw @ a.T)):
            ours = got[f"student/{layer}.lora_{half}.default.weight"]
            assert ours.norm() > 0
            torch.testing.assert_close(ours, formula, rtol=1e-3, atol=1e-4 * formula.abs().max().item())


def everything(run: DistillTrainer) -> dict[str, Tensor]:
    return {f"{part}/{k}": v for part, named in run.state.tensors().items() for k, v in named.items()}


def test_adapters_alone_are_trained_kept_and_averaged(tmp_path: Path) -> None:
    run = trainer(tmp_path, critic_lora=LORA)
    before = {id(p): p.clone() for m in (run.student, run.critic) for p in m.parameters()}
    list(run.run())
    for model, step in ((run.student, run.step_student), (run.critic, run.step_critic)):
        adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
        assert [id(p) for group in step.optimizers[0].param_groups for p in group["params"]] == list(
            map(id, adapters)
        )
        for name, p in model.named_parameters():
            assert torch.equal(p, before[id(p)]) is (".lora_" not in name), name
    parts, _ = load_checkpoint(tmp_path / "step-00000004.safetensors")
    for part in ("student", "critic", "ema"):
        assert parts[part].keys() == trained(run.critic if part == "critic" else run.student).keys()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path, dropout: float) -> None:
    lora = LORA | {"dropout": dropout}
    torch.manual_seed(1)
    unbroken = trainer(lora=lora, critic_lora=lora)
    expected = [event.scalars for event in unbroken.run() if isinstance(event, StepDone)]
    before = trainer(tmp_path, lora=lora, critic_lora=lora, steps=2)
    got = [event.scalars for event in before.run() if isinstance(event, StepDone)]
    torch.manual_seed(2)
    after = trainer(tmp_path, lora=lora, critic_lora=lora)
    after.resume()
    got += [event.scalars for event in after.run() if isinstance(event, StepDone)]
    assert got == expected
    ours, theirs = everything(after), everything(unbroken)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    without = trainer(lora=LORA, critic_lora=LORA)
    same = [event.scalars for event in without.run() if isinstance(event, StepDone)] == expected
    assert same is (dropout == 0)


def test_another_base_is_refused(tmp_path: Path) -> None:
    list(trainer(tmp_path, steps=1).run())
    with pytest.raises(CheckpointError, match=r"made with frozen_weights\.student = "):
        trainer(tmp_path, student=tiny_student(seed=7, num_layers=1)).resume()


def test_others_read_what_is_written(tmp_path: Path) -> None:
    """The folder by our loader and by peft's, and the merged student, are the averaged student."""
    from peft import PeftModel

    base = tiny_student(num_layers=1)
    base.save_pretrained(tmp_path / "base")
    run = trainer(student=base)
    list(run.run())
    run.export(tmp_path / "student")
    run.export_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    x = torch.randn(1, 6, *LATENT, generator=torch.Generator().manual_seed(3))
    t, text = torch.full((1,), 500.0), LetterEncoder().encode(["fox"])
    plain = load_student(tmp_path / "base")
    with torch.no_grad():
        with run.ema.applied() as student:
            expected = student.eval()(x, t, text)
        assert (plain(x, t, text) - expected).abs().max() > 1e-3
        by_peft = PeftModel.from_pretrained(load_student(tmp_path / "base"), str(tmp_path / "adapter"))
        for got in (
            load_student(tmp_path / "base", adapter=tmp_path / "adapter"),
            load_student(tmp_path / "student"),
            by_peft.base_model.model,
        ):
            torch.testing.assert_close(got.eval()(x, t, text), expected, rtol=1e-4, atol=1e-5)


def test_a_start_is_learnt_by_adapters(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(2)
    trajectories, text = torch.randn(4, 3, 6, *LATENT, generator=g), torch.randn(4, 8, 16, generator=g)
    pairs = OdePairs(trajectories, torch.arange(4), text, torch.tensor([1000.0, 625.0]))
    chosen = {"steps": 5, "batch": 4, "optimizer": {"lr": 1e-2}, "lora": {"rank": 4}}
    student = tiny_student(num_layers=1)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    run = InitTrainer(InitSettings.model_validate(chosen), student, OdeRegression(pairs), folder=tmp_path)
    losses = [event.scalars["student/loss"] for event in run.run() if isinstance(event, StepDone)]
    assert losses[-1] < losses[0]
    kept = without_adapters(student.state_dict())
    assert all(torch.equal(kept[name], value) for name, value in weights.items())


def test_what_cannot_be_adapted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"lora\.targets: .* got 'to_x': nothing of that name"):
        trainer(lora=LORA | {"targets": ["to_q", "to_x"]})
    with pytest.raises(SettingsError, match=r"got 'norm_q': blocks\.0\.attn1\.norm_q, a RMSScale"):
        trainer(lora=LORA | {"targets": ["norm_q"]})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        LoraSettings(rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"needs the package peft: pip install 'stream-r1\[lora\]'"):
        trainer()
