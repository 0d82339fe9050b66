"""A run on several processes is the run on one, up to the order of sums."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import tiny_student
from workers import (
    InitSettings,
    distiller,
    everything,
    joined,
    launch,
    settings,
    train,
    train_alone,
    train_four_heads,
)

from stream_r1.distill.settings import DistillSettings
from stream_r1.models.checkpoints import load_student


def assert_same_run(
    got: tuple, expected: tuple, start: dict[str, torch.Tensor], skipped: tuple[str, ...] = ()
) -> None:
    """The same numbers and weights to 1e-5, and the same way from the start to a thousandth."""
    for ours, theirs in zip(got[0], expected[0], strict=True):
        ours, theirs = ({k: v for k, v in line.items() if k not in skipped} for line in (ours, theirs))
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert got[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        if key.startswith("draws") or not value.is_floating_point():
            assert torch.equal(got[1][key], value), key
            continue
        torch.testing.assert_close(
            got[1][key], value, rtol=1e-5, atol=1e-5 * value.abs().max().item() + 1e-8, msg=key
        )
    for part in ("student/", "critic/"):
        keys = [key for key in start if key.startswith(part)]
        if keys:
            way = torch.cat([(expected[1][key] - start[key]).flatten() for key in keys]).norm()
            off = torch.cat([(expected[1][key] - got[1][key]).flatten() for key in keys]).norm()
            assert off < 1e-3 * way


@pytest.fixture(scope="module")
def alone() -> tuple:
    return train_alone(None, settings())


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"accumulation": 2}),
        (
            2,
            {
                "accumulation": 2,
                "distributed": {"shard": "full"},
                "rollout": {"gradient_checkpointing": True},
            },
        ),
        (4, {}),
        (4, {"distributed": {"shard": "hybrid", "replicas": 2}}),
        (2, {"distributed": {"sequence": 2, "shard": "full"}, "rollout": {"gradient_checkpointing": True}}),
        (4, {"distributed": {"sequence": 2}, "accumulation": 2}),
    ],
    ids=[
        "2-whole-accumulated",
        "2-sharded-accumulated-checkpointed",
        "4-whole",
        "4-hybrid",
        "2-sequence-sharded-checkpointed",
        "2x2-sequence-accumulated",
    ],
)
def test_distillation(alone: tuple, size: int, changes: dict[str, Any]) -> None:
    results = launch(size, train, None, settings(**changes))
    assert all(result[0] == results[0][0] for result in results)  # every rank knows the same numbers
    for result in results[1:]:
        assert all(torch.equal(result[1][key], value) for key, value in results[0][1].items())
    start = everything(distiller(None, None, settings()))
    of_micro_batches = ("inter/min", "inter/max") if "accumulation" in changes else ()
    # Accumulated or not, the run is that of the whole batch at once.
    assert_same_run(results[0], alone, start, of_micro_batches)


def test_four_processes_share_three_samples() -> None:
    """Of which the last decodes and scores none, and three do nothing for the guard but the passes."""
    chosen = {"batch": 3, "rollout": {"width": 8}, "guard": {"every": 1, "videos": 2}}
    expected = train_four_heads(settings(**chosen))
    got = launch(4, train_four_heads, settings(**chosen, distributed={"sequence": 4}))
    assert all(result[0] == got[0][0] for result in got)
    assert "guard/reward" in got[0][0][-1]
    assert_same_run(got[0], expected, {})


@pytest.mark.parametrize("shared", [{"shard": "full"}, {"sequence": 2}])
def test_long_rollouts(shared: dict[str, Any]) -> None:
    """Their lengths are drawn alike everywhere: ranks whose passes differ would wait for one another."""
    long = {"rollout": {"length": [6, 12]}, "critic_updates": 1}
    expected = train_alone(None, settings(**long))
    assert len({line["student/length"] for line in expected[0]}) > 1
    sharded = settings(**long, accumulation=2, distributed=shared)
    got = launch(2, train, None, sharded)
    assert got[0][0] == got[1][0]
    start = everything(distiller(None, None, settings()))
    assert_same_run(got[0], expected, start, ("inter/min", "inter/max"))


def _export(folder: Path, chosen: DistillSettings) -> None:
    with joined(chosen) as ranks:
        run = distiller(ranks, folder / "checkpoints", chosen)
        run.resume()
        run.export(folder / "student", ema=False)
        run.export_adapter(folder / "adapter", ema=False)


def test_adapters(tmp_path: Path) -> None:
    """Sharded, they are trained as by one process, resumed bit for bit, and gathered when written."""
    lora = {"lora": {"rank": 2}}
    changes: dict[str, Any] = {"student": lora, "critic": lora}
    expected = train_alone(None, settings(**changes))
    start = everything(distiller(None, None, settings(**changes)))
    sharded = settings(**changes, distributed={"shard": "full"}, rollout={"gradient_checkpointing": True})
    got = launch(2, train, None, sharded)[0]
    assert_same_run(got, expected, start)
    folder = tmp_path / "checkpoints"
    launch(2, train, folder, sharded.model_copy(update={"steps": 2}))
    again = launch(2, train, folder, sharded)[0]
    assert again[0] == got[0][2:]
    assert all(torch.equal(again[1][key], value) for key, value in got[1].items())
    launch(2, _export, tmp_path, sharded)
    base = tiny_student(num_layers=2, window_frames=6, sink_frames=3, positions="window", sink_ema=0.9)
    base.save_pretrained(tmp_path / "base")
    merged = load_student(tmp_path / "base", adapter=tmp_path / "adapter").state_dict()
    written = load_student(tmp_path / "student").state_dict()
    a, b = (got[1][f"student/blocks.1.ffn.net.2.lora_{half}.default.weight"] for half in "AB")
    name = "blocks.1.ffn.net.2.weight"
    torch.testing.assert_close(written[name], base.state_dict()[name] + b @ a)
    assert merged.keys() == written.keys()
    assert all(torch.equal(merged[key], value) for key, value in written.items())


def test_accumulated_gradients_of_shards_are_those_of_the_large_batch() -> None:
    """In bfloat16 too: the weights are gathered narrow, summed up and kept wide."""
    runs = {}
    for accumulation in (1, 2):
        chosen = settings(
            steps=2,
            accumulation=accumulation,
            precision="bfloat16",
            distributed={"shard": "full", "param_dtype": "bfloat16"},
        )
        runs[accumulation] = launch(2, train, None, chosen)[0]
    assert all(t.dtype != torch.bfloat16 for t in runs[1][1].values())
    for key in ("student/loss", "student/grad_norm", "critic/loss", "critic/grad_norm"):
        assert runs[1][0][0][key] == pytest.approx(runs[2][0][0][key], rel=2e-2)
    wide = launch(2, train, None, settings(steps=2))[0]
    assert runs[1][0][0]["critic/loss"] != wide[0][0]["critic/loss"]
    assert runs[1][0][0]["critic/loss"] == pytest.approx(wide[0][0]["critic/loss"], rel=3e-2)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_resumed_after_every_step_in_bfloat16(shard: str, tmp_path: Path) -> None:
    """Bit for bit, every step by processes of its own."""
    sharded = {"shard": shard, "param_dtype": "bfloat16"} if shard == "full" else {}
    chosen = settings(steps=3, precision="bfloat16", checkpoint_every=1, distributed=sharded)
    whole = launch(2, train, None, chosen)
    for step in range(1, 4):
        parts = launch(2, train, tmp_path / "checkpoints", chosen.model_copy(update={"steps": step}))
        assert [part[0] for part in parts] == [run[0][step - 1 : step] for run in whole]
    for part, run in zip(parts, whole, strict=True):
        assert all(torch.equal(part[1][key], value) for key, value in run[1].items())


@pytest.mark.parametrize("divided", [{}, {"shard": "full"}, {"sequence": 2}])
def test_the_training_of_a_start(divided: dict[str, Any]) -> None:
    chosen = {"steps": 4, "batch": 4, "optimizer": {"lr": 1e-2, "eps": 1e-2, "clip": 1.0}, "warmup": 2}
    expected = train_alone(None, InitSettings.model_validate(chosen))
    got = launch(2, train, None, InitSettings.model_validate(chosen | {"distributed": divided}))
    assert_same_run(got[0], expected, {})
