"""A run on several processes is the run on one, up to the order of sums."""

from typing import Any

import pytest
import torch
from workers import InitSettings, distiller, everything, launch, settings, train, train_alone


def assert_same_run(got: tuple, expected: tuple, start: dict[str, torch.Tensor]) -> None:
    """The same numbers and weights to 1e-5, and the same way from the start to a thousandth."""
    for ours, theirs in zip(got[0], expected[0], strict=True):
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
        way = torch.cat([(expected[1][key] - start[key]).flatten() for key in keys]).norm()
        off = torch.cat([(expected[1][key] - got[1][key]).flatten() for key in keys]).norm()
        assert not keys or 0 < off < 1e-3 * way or off == 0


@pytest.fixture(scope="module")
def alone() -> tuple:
    return train_alone(None, settings())


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"distributed": {"shard": "full"}}),
        (2, {}),
        (2, {"accumulation": 2}),
        (2, {"distributed": {"shard": "full"}, "rollout": {"gradient_checkpointing": True}}),
        (2, {"distributed": {"shard": "full"}, "accumulation": 2}),
        (4, {}),
        (4, {"distributed": {"shard": "full"}}),
        (4, {"distributed": {"shard": "hybrid", "replicas": 2}}),
    ],
    ids=str,
)
def test_distillation(alone: tuple, size: int, changes: dict[str, Any]) -> None:
    results = launch(size, train, None, settings(**changes))
    assert all(result[0] == results[0][0] for result in results)  # every rank knows the same numbers
    for result in results[1:]:
        assert all(torch.equal(result[1][key], value) for key, value in results[0][1].items())
    if changes.get("accumulation"):
        for line in (*results[0][0], *alone[0]):  # extremes are of micro-batches
            for key in ("inter/min", "inter/max"):
                line.pop(key, None)
    start = everything(distiller(None, None, settings()))
    assert_same_run(results[0], alone, start)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_the_training_of_a_start(shard: str) -> None:
    chosen = {"steps": 4, "batch": 4, "optimizer": {"lr": 1e-2, "eps": 1e-2, "clip": 1.0}, "warmup": 2}
    expected = train_alone(None, InitSettings.model_validate(chosen))
    got = launch(2, train, None, InitSettings.model_validate(chosen | {"distributed": {"shard": shard}}))
    assert_same_run(got[0], expected, {})
