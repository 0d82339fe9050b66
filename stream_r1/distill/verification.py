"""Whether a checkpoint is what was written, and what a run can continue from.

Everything is checked before anything of it touches the run: torch's fused optimizers, for one, write past
the end of a state that is smaller than its parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stream_r1.distill.ranks import Ranks
from stream_r1.distill.sharding import bit_sums, local
from stream_r1.messages import shown, some

Parts = Mapping[str, Mapping[str, Tensor]]

_INDEX = re.compile(r"(0|[1-9]\d{0,8})/(step|exp_avg|exp_avg_sq)")
_LARGEST = torch.finfo(torch.float64).max
_MOST_STEPS = 2**24  # that float32 counts, which is what an optimizer counts in


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: it belongs to another run, or to another version of this package."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was written: cut off, changed, incomplete, or not finite."""


@dataclass(frozen=True)
class Expected:
    """What a run can take back.

    models: by part, tensors that must be there, all of them and no others.
    averages: by part, parameters whose float32 averages are there, all or none.
    optimizers: by part, the parameters of an AdamW, whose states are there, each whole or not at all.
    generators: by part, states of random generators, as `models`.
    """

    models: Parts
    averages: Parts = field(default_factory=dict)
    optimizers: Mapping[str, list[Tensor]] = field(default_factory=dict)
    generators: Parts = field(default_factory=dict)


def describe(tensors: Mapping[str, Tensor], ranks: Ranks | None = None) -> dict[str, list[Any]]:
    """Of each tensor its dtype, its shape and a sum over its bits: what `require_as_written` compares.

    ranks: of tensors in parts; every rank must ask.
    """
    sums = bit_sums(tensors, ranks or Ranks())
    return {name: [*_kind(t), sums[name]] for name, t in tensors.items()}


def require_as_written(
    tensors: Mapping[str, Tensor], written: Any, source: str, ranks: Ranks | None = None
) -> None:
    """Raises DamagedCheckpointError where tensors are not those that `describe` was given.

    ranks: of tensors in parts; every rank must ask, and gets the same answer.
    """
    if not isinstance(written, dict) or not all(isinstance(told, list) for told in written.values()):
        raise DamagedCheckpointError(f"{source}: tensors: expected what was written, got {shown(written)}")
    require_names(tensors, written, source)
    for name, t in tensors.items():
        require_kind(t, written[name][:2], f"{source}: {name}")
    for name, told in describe(tensors, ranks).items():
        if told != written[name]:
            raise DamagedCheckpointError(
                f"{source}: {name}: expected the numbers that were written, got others"
            )


def require_kinds(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> None:
    """Raises DamagedCheckpointError for other names, dtypes or shapes than those of `like`."""
    require_names(tensors, like, source)
    for name, t in tensors.items():
        require_kind(t, list(_kind(like[name])), f"{source}: {name}")


def require_names(found: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Raises DamagedCheckpointError for missing and for other tensors."""
    missing, others = [n for n in expected if n not in found], [n for n in found if n not in expected]
    problems = [f"{len(missing)} missing: {some(missing)}"] if missing else []
    problems += [f"{len(others)} that do not belong there: {some(others)}"] if others else []
    if problems:
        raise DamagedCheckpointError(f"{source}: tensors: " + "; ".join(problems))


def require_kind(t: Tensor, expected: list[Any], what: str) -> None:
    """Raises DamagedCheckpointError for another dtype or shape."""
    if list(_kind(t)) != list(expected):
        want, got = (f"{dtype} {shown(shape)}" for dtype, shape in (expected, _kind(t)))
        raise DamagedCheckpointError(f"{what}: expected {want}, got {got}")


def require_usable(parts: Parts, expected: Expected, source: str) -> None:
    """Checks the tensors of a checkpoint against a run.

    Raises:
        CheckpointError: the weights are of another model.
        DamagedCheckpointError: anything else is missing, too much, of another dtype or shape, or not finite.
    """
    known = {*expected.models, *expected.averages, *expected.optimizers, *expected.generators}
    strange = [part for part in parts if part not in known]
    if strange:
        raise DamagedCheckpointError(f"{source}: expected {some(sorted(known))}, found {some(strange)} too")
    for part, named in expected.models.items():
        _require_model(parts.get(part, {}), named, f"{source}: {part}")
    for part, named in expected.generators.items():
        _require_generators(parts.get(part, {}), named, f"{source}: {part}")
    for part, named in expected.averages.items():
        if parts.get(part):
            floats = {
                name: torch.empty(p.shape, dtype=torch.float32, device="meta") for name, p in named.items()
            }
            require_kinds(parts[part], floats, f"{source}: {part}")
    for part, parameters in expected.optimizers.items():
        _require_states(parts.get(part, {}), parameters, f"{source}: {part}")
    for part, named in parts.items():
        for name, t in named.items():
            if t.is_floating_point() and not bool(local(t).isfinite().all()):
                raise DamagedCheckpointError(f"{source}: {part}/{name}: expected finite numbers")


def require_values(values: Any, step: int | None, source: str) -> None:
    """Raises DamagedCheckpointError for values that are not those of a run at this step (None: any)."""
    _require(isinstance(values, dict), f"{source}: values", "keys and values", values)
    for key in ("identity", "own", "skipped"):
        _require(isinstance(values.get(key), dict), f"{source}: {key}", "keys and values", values.get(key))
    at = values.get("step")
    _require(_whole(at, 0, _MOST_STEPS), f"{source}: step", f"a whole number below {_MOST_STEPS}", at)
    _require(step is None or at == step, f"{source}: step", f"{step} as in the name", at)
    for name, count in values["skipped"].items():
        good = _whole(count, 0, _MOST_STEPS)
        _require(good, f"{source}: skipped.{shown(name)}", "a whole number, 0 or more", count)


def require_order(order: Any, count: int, source: str) -> None:
    """Checks where a run is in its data.

    Raises:
        CheckpointError: the data are of another number.
        DamagedCheckpointError: it is no place in them.
    """
    keys = ("count", "epoch", "position")
    good = isinstance(order, dict) and all(_whole(order.get(key), 0, 2**53) for key in keys)
    _require(good, source, f"the whole numbers {some(keys)}", order)
    if order["count"] != count:
        raise CheckpointError(f"{source}: made with {order['count']} samples, this run has {count}")
    _require(order["position"] <= count, f"{source}.position", f"at most {count}", order["position"])


def require_history(found: Any, own: Mapping[str, Any], source: str) -> None:
    """Raises DamagedCheckpointError for a history of scores that a run like `own` would not have."""
    _require(isinstance(found, dict), source, "keys and values", found)
    for key in ("window", "axes"):
        _require(found.get(key) == own[key], f"{source}.{key}", str(own[key]), found.get(key))
    rows = found.get("history")
    good = isinstance(rows, list) and len(rows) <= own["window"]
    _require(good, f"{source}.history", f"a list of at most {own['window']} updates", rows)
    for row in rows:
        good = isinstance(row, list) and len(row) == own["axes"]
        good = good and all(type(n) in (int, float) and abs(n) < _LARGEST for n in row)
        _require(good, f"{source}.history", f"{own['axes']} finite numbers an update", row)


def _require(good: bool, what: str, expected: str, got: object) -> None:
    if not good:
        raise DamagedCheckpointError(f"{what}: expected {expected}, got {shown(got)}")


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high


def parse_values(text: Any, source: str) -> Any:
    """JSON without nan and infinities. Raises DamagedCheckpointError for anything else."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{source}: expected values as JSON; {error}") from None


def _require_model(found: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    try:
        require_kinds(found, own, source)
    except DamagedCheckpointError as error:
        raise CheckpointError(f"{error}: the checkpoint is of another model") from None


def _require_generators(found: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    require_kinds(found, own, source)
    for name, state in found.items():
        try:
            torch.Generator().set_state(state)
        except RuntimeError:
            raise DamagedCheckpointError(
                f"{source}/{name}: expected the state of a random generator, got other bytes"
            ) from None


def _require_states(found: Mapping[str, Tensor], parameters: list[Tensor], source: str) -> None:
    entries: dict[int, set[str]] = {}
    for name, t in found.items():
        match = _INDEX.fullmatch(name)
        if match is None or int(match[1]) >= len(parameters):
            expected = f"step, exp_avg and exp_avg_sq of {len(parameters)} parameters"
            raise DamagedCheckpointError(f"{source}: expected {expected}, found {shown(name)}")
        index, what = int(match[1]), match[2]
        entries.setdefault(index, set()).add(what)
        like = torch.empty((), dtype=torch.float32) if what == "step" else parameters[index]
        require_kind(t, list(_kind(like)), f"{source}/{name}")
        if what == "step":
            count = float(local(t))
            if not (count.is_integer() and 1 <= count < _MOST_STEPS):
                raise DamagedCheckpointError(f"{source}/{name}: expected a count of steps, got {count:g}")
        elif what == "exp_avg_sq" and bool((local(t) < 0).any()):
            raise DamagedCheckpointError(f"{source}/{name}: expected averages of squares, got negative ones")
    for index, there in entries.items():
        missing = [what for what in ("step", "exp_avg", "exp_avg_sq") if what not in there]
        if missing:
            raise DamagedCheckpointError(f"{source}/{index}: expected {some(missing)} too, found none")


def _kind(t: Tensor) -> tuple[str, list[int]]:
    return str(t.dtype), list(t.shape)
