"""ODE regression: a causal few-step student learns where the teacher's trajectories end.

The teacher walks from noise to video by its probability-flow ODE; kept are its states at the student's
timesteps and the end. The student, under the block-causal mask and with every chunk at a timestep of its own,
predicts the end from such a state. Source: CausVid (2412.07772, section 4.3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stream_r1.disk.whole import written
from stream_r1.distill.dmd import velocity
from stream_r1.distill.initialise import per_chunk
from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.precision import Precision, computing_in
from stream_r1.files import FileError, parse_json
from stream_r1.messages import shown
from stream_r1.models.prompt_cache import PromptEmbeddings
from stream_r1.models.tensor_files import opened, require_finite
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.schedule import FlowSchedule


@torch.no_grad()
def ode_pairs(
    teacher: nn.Module,
    text: Tensor,
    noise: Tensor,
    *,
    negative: Tensor,
    schedule: FlowSchedule,
    steps: Sequence[float] = (1000, 750, 500, 250),
    solver_steps: int = 48,
    guidance_scale: float = 4.0,
    order: int = 2,
) -> Tensor:
    """The teacher's trajectories from `noise`, at the student's timesteps and at the end.

    Args:
        teacher: a bidirectional model, see `velocity`.
        text: [B, L, D]; negative [1, L, D]: where guidance comes from.
        noise: [B, F, C, h, w], standard normal.
        steps: the student's unshifted timesteps, the first of them 1000.
        solver_steps: of the grid, uniform before the shift; `steps` that are not on it are added.
        guidance_scale: v = uncond + scale (cond - uncond); 1 saves half the work.
        order: 1 is Euler; 2 is Adams-Bashforth, which costs the same and errs less.

    Returns:
        [B, K + 1, F, C, h, w] for K steps, noise first, x0 last.
    """
    if order not in (1, 2):
        raise ValueError(f"ode_pairs: order must be 1 or 2, got {order}")
    stops = schedule.denoising_steps(steps)
    if stops[0] != 1000.0:
        raise ValueError(f"ode_pairs: steps must begin at 1000, got {list(steps)}")
    # Rounded, so that a stop and its grid point, equal up to rounding errors, are one.
    grid = sorted({round(t, 6) for t in (*schedule.timesteps(solver_steps), *stops)}, reverse=True)
    kept = {round(t, 6) for t in stops}
    x, before, trajectory = noise.float(), None, []
    for t, t_next in zip(grid, [*grid[1:], 0.0], strict=True):
        if t in kept:
            trajectory.append(x)
        v = _guided(teacher, x, t, text, negative, guidance_scale)
        step = (t_next - t) / 1000
        slope = v
        if order == 2 and before is not None:
            v_before, step_before = before
            slope = v + (v - v_before) * (step / (2 * step_before))
        x, before = x + step * slope, (v, step)
    return torch.stack([*trajectory, x], dim=1)


def _guided(teacher: nn.Module, x: Tensor, t: float, text: Tensor, negative: Tensor, scale: float) -> Tensor:
    time = torch.full((len(x),), t, device=x.device)
    if scale == 1:
        return velocity(teacher, x, time, text)
    both = torch.cat([text, negative.to(text).expand_as(text)])
    cond, uncond = velocity(teacher, torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
    return cond + (scale - 1) * (cond - uncond)


class StoredTrajectories:
    """Trajectories [N, K + 1, F, C, h, w] that stay in their files; an index reads those that it names.

    One at Wan's size is 21 MB in float16: a process a GPU that held them all would fill the machine.

    Args:
        files: as `make_ode_pairs` writes them.

    Raises:
        ValueError: files of different shapes.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._state: int | None = None  # of all states only this one
        shapes = []
        for path in files:
            with _opened(path) as file:
                shapes.append(file.get_slice("trajectories").get_shape())
        other = next((i for i, shape in enumerate(shapes) if shape[1:] != shapes[0][1:]), None)
        if other is not None:
            raise ValueError(
                f"StoredTrajectories: files: expected {shapes[0][1:]} in {files[other]} as in "
                f"{files[0]}, got {shapes[other][1:]}"
            )
        self._rows = [
            (path, row) for path, shape in zip(files, shapes, strict=True) for row in range(shape[0])
        ]
        self.shape = torch.Size([len(self._rows), *shapes[0][1:]])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        """[B, K + 1, F, C, h, w], or [B, F, C, h, w] of one state, in the files' dtype."""
        return torch.stack([self._read(*self._rows[index]) for index in indices])

    def only(self, state: int) -> StoredTrajectories:
        """One state of every trajectory, [N, F, C, h, w]; -1 is the end."""
        one = copy(self)
        one._state = state % self.shape[1]
        one.shape = torch.Size([len(self), *self.shape[2:]])
        return one

    def _read(self, path: Path, row: int) -> Tensor:
        with _opened(path) as file:
            stored = file.get_slice("trajectories")
            out: Tensor = stored[row] if self._state is None else stored[row, self._state]
        require_finite([(f"trajectories[{row}]", out)], str(path))
        return out


class OdePairs(NamedTuple):
    """Trajectories of a teacher, ready to learn from."""

    trajectories: Tensor | StoredTrajectories  # [N, K + 1, F, C, h, w], noise first, x0 last
    text_index: Tensor  # [N], which of `text` each belongs to
    text: Tensor | PromptEmbeddings  # [P, L, D]
    timesteps: Tensor  # [K], shifted, of all states but the last
    settings: Mapping[str, Any] = MappingProxyType({})  # that they were made with


def make_ode_pairs(
    teacher: nn.Module,
    text: Tensor | PromptEmbeddings,
    folder: Path | str,
    *,
    pairs: int,
    latent_shape: Sequence[int],
    negative: Tensor,
    schedule: FlowSchedule,
    steps: Sequence[float] = (1000, 750, 500, 250),
    solver_steps: int = 48,
    guidance_scale: float = 4.0,
    order: int = 2,
    batch: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    precision: Precision = "float32",
    data: str = "",
    weights: str = "",
    share: tuple[int, int] = (0, 1),
    agree: Callable[[list[int]], list[int]] = list,
) -> Iterator[int]:
    """Writes trajectories to `folder`, `batch` to a file, and yields after each the number of its last.

    Files that are there are kept, so a broken-off call is continued by the same call; a folder made with
    other settings is refused. Pair i has text i modulo P and noise that depends on `seed` and i alone.
    `load_ode_pairs` reads them.

    Args:
        text: [P, L, D]; negative [1, L, D].
        pairs: how many trajectories.
        latent_shape: (F, C, h, w).
        dtype: of the trajectories on disk.
        precision: that the teacher computes in; the solver's sums are float32.
        data: tells other texts from these.
        weights: tells other teachers from this one, such as `fingerprint` of its folder.
        share: (which, of how many): write only every so many-th of the missing files; processes that share
            the work make the files that one would make.
        agree: gives processes that share the work the first one's list of what is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(teacher.parameters()).device
    settings: dict[str, Any] = {
        "steps": list(map(float, steps)),
        "solver_steps": solver_steps,
        "guidance_scale": guidance_scale,
        "order": order,
        "seed": seed,
        "batch": batch,
        "precision": precision,
        "latent_shape": list(latent_shape),
        "shift": schedule.shift,
        "data": data,
        "weights": weights,
    }
    files = {start: folder / f"pairs-{start:06d}.safetensors" for start in range(0, pairs, batch)}
    counts = {start: min(batch, pairs - start) for start in files}
    which, shares = share
    missing = agree([start for start, path in files.items() if _pairs_in(path, settings) < counts[start]])
    for start in missing[which::shares]:
        index = torch.arange(start, start + counts[start])
        noise = SampleNoise([seed * 1_000_003 + i for i in index.tolist()], device).randn(*latent_shape)
        words = text[index % len(text)].to(device, torch.float32)
        with computing_in(precision, device):
            found = ode_pairs(
                teacher,
                words,
                noise,
                negative=negative,
                schedule=schedule,
                steps=steps,
                solver_steps=solver_steps,
                guidance_scale=guidance_scale,
                order=order,
            )
        tensors = {"trajectories": found.to("cpu", dtype).contiguous(), "text_index": index % len(text)}
        tensors["timesteps"] = torch.tensor(schedule.denoising_steps(steps))
        with written(files[start]) as place:
            save_file(tensors, place, metadata={"settings": json.dumps(settings)})
        yield start + counts[start]


def _pairs_in(path: Path, settings: dict[str, Any]) -> int:
    """How many pairs a file holds, 0 if it is not there. Raises ValueError if it was made otherwise."""
    if not path.exists():
        return 0
    try:
        made_with, _, index = _read_header(path)
    except FileError:
        return 0  # damaged: it is written again
    if told := _differences(made_with, settings):
        raise ValueError(
            f"make_ode_pairs: folder: {path} was made with {told}: name another folder or remove it"
        )
    return len(index)


def _opened(path: Path) -> AbstractContextManager[Any]:
    return opened(path, "file of trajectories")


def load_ode_pairs(folder: Path | str, text: Tensor | PromptEmbeddings, *, data: str = "") -> OdePairs:
    """Opens what `make_ode_pairs` wrote for the same `text` [P, L, D], told by the same `data`; trajectories
    are read from the files when they are learnt from.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file was made of other texts, or with other settings or timesteps than the first.
        FileError: a file can't be read, or does not agree with itself.
    """
    paths = sorted(Path(folder).glob("pairs-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"load_ode_pairs: no pairs-*.safetensors in {folder}")
    indices: list[Tensor] = []
    first: tuple[dict[str, Any], Tensor] | None = None
    for path in paths:
        made_with, timesteps, index = _read_header(path)
        if made_with.get("data") != data or int(index.max()) >= len(text):
            raise ValueError(f"load_ode_pairs: folder: {path} was made of other prompts")
        indices.append(index)
        settings, expected = first = first or (made_with, timesteps)
        if told := _differences(made_with, settings):
            raise ValueError(f"load_ode_pairs: folder: {path} was made with {told}, as {paths[0]}")
        if not torch.equal(timesteps, expected):
            raise ValueError(
                f"load_ode_pairs: folder: {path}: timesteps: expected {expected.tolist()} as in {paths[0]}, "
                f"got {timesteps.tolist()}"
            )
    return OdePairs(StoredTrajectories(paths), torch.cat(indices), text, expected, settings)


def _read_header(path: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Settings, timesteps [K] and text_index [n] of a file that agrees with itself."""
    with _opened(path) as file:
        if missing := {"trajectories", "timesteps", "text_index"} - set(file.keys()):
            raise FileError(f"{path}: not a file of trajectories: no {', '.join(sorted(missing))}")
        try:
            settings = parse_json((file.metadata() or {})["settings"], f"{path}: settings")
        except KeyError:
            raise FileError(f"{path}: not a file of trajectories: expected settings in JSON") from None
        stored = file.get_slice("trajectories")
        shape, dtype = stored.get_shape(), stored.get_dtype()
        timesteps, index = file.get_tensor("timesteps"), file.get_tensor("text_index")
    if not isinstance(settings, dict) or len(shape) != 6:
        raise FileError(
            f"{path}: trajectories: expected [n, K + 1, F, C, h, w] and settings as a mapping, got {shape}"
        )
    if not dtype.startswith(("F", "BF")):
        raise FileError(f"{path}: trajectories: expected floating point, got {dtype}")
    if timesteps.shape != (shape[1] - 1,) or index.shape != (shape[0],) or shape[0] == 0:
        raise FileError(
            f"{path}: trajectories: expected {len(index)} at {len(timesteps)} timesteps and the end, as its "
            f"other tensors say, got {shape}"
        )
    if index.is_floating_point() or int(index.min()) < 0:
        raise FileError(f"{path}: text_index: expected integers >= 0, got {index[:8].tolist()}")
    if "steps" in settings and "shift" in settings:
        try:
            meant = FlowSchedule(settings["shift"]).denoising_steps(settings["steps"])
        except (TypeError, ValueError) as error:
            raise FileError(f"{path}: settings: {error}") from None
        if [round(t, 2) for t in meant] != [round(t, 2) for t in timesteps.tolist()]:
            raise FileError(f"{path}: timesteps: expected {meant} by its settings, got {timesteps.tolist()}")
    return settings, timesteps, index


def _differences(made_with: dict[str, Any], expected: dict[str, Any]) -> str:
    """What settings differ in, "" where they agree."""
    return "; ".join(
        f"{name} = {shown(made_with.get(name))}, this is {shown(value)}"
        for name, value in expected.items()
        if made_with.get(name) != value
    )


def texts_used(folder: Path | str) -> int:
    """How many texts, the first ones, the trajectories in a folder need."""
    most = 0
    for path in Path(folder).glob("pairs-*.safetensors"):
        with _opened(path) as file:
            most = max(most, int(file.get_tensor("text_index").max()) + 1)
    return most


class OdeRegression:
    """Learning the end of the teacher's trajectories; an objective for `InitTrainer`."""

    def __init__(self, pairs: OdePairs) -> None:
        shape, states = pairs.trajectories.shape, len(pairs.timesteps) + 1
        if len(shape) != 6 or shape[1] != states or pairs.text_index.shape != shape[:1]:
            raise ValueError(
                f"OdeRegression: expected trajectories [N, {states}, F, C, h, w] and text_index [N], "
                f"got {list(shape)} and {list(pairs.text_index.shape)}"
            )
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs.trajectories)

    @property
    def latent_shape(self) -> torch.Size:
        """[F, C, h, w] of a sample."""
        return self.pairs.trajectories.shape[2:]

    def loss(self, student: CausalWanTransformer, indices: list[int], noise: SampleNoise) -> Tensor:
        """mean (x0 predicted - x0 of the teacher)^2, every chunk from a random state of the trajectory."""
        pairs, device = self.pairs, noise.device
        trajectories = pairs.trajectories[indices].to(device, torch.float32)  # [B, K + 1, F, C, h, w]
        text = pairs.text[pairs.text_index[indices]].to(device, torch.float32)
        batch, _, frames = trajectories.shape[:3]
        state = per_chunk(noise.randint(len(pairs.timesteps), frames), student, frames)  # [B, F]
        rows = torch.arange(batch, device=device)[:, None]
        x_t = trajectories[rows, state, torch.arange(frames, device=device)]  # [B, F, C, h, w]
        t = pairs.timesteps.to(device)[state]
        v = student(x_t, t, text, mask="causal")
        return (FlowSchedule.x0_from_v(x_t, v, FlowSchedule.sigma(t)) - trajectories[:, -1]).square().mean()
