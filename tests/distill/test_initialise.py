import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import LATENT, tiny_student, tiny_teacher
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stream_r1.distill.events import StepDone
from stream_r1.distill.initialise import InitTrainer, per_chunk
from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.ode import OdePairs, OdeRegression, load_ode_pairs, make_ode_pairs, ode_pairs
from stream_r1.distill.settings import InitSettings
from stream_r1.distill.teacher_forcing import TeacherForcing
from stream_r1.files import FileError
from stream_r1.schedule import FlowSchedule

SCHEDULE = FlowSchedule(5.0)
SIGMAS = [1, 0.9375, 5 / 6, 0.625]


class GaussianTeacher(nn.Module):
    """The exact velocity for videos that are normal around their text's first number, deviation 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        mean = text[:, 0, 0].view(-1, 1, 1, 1, 1)
        sigma = (t / 1000).view(-1, 1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * self.deviation**2 + sigma**2
        off = (x - (1 - sigma) * mean) / variance
        return (sigma * off - (mean + (1 - sigma) * self.deviation**2 * off),)


def test_trajectories_of_an_exact_teacher() -> None:
    """A normal distribution has a closed solution: (1 - sigma) mean + deviation(sigma) * noise."""
    noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    text, negative = torch.tensor([[[0.3]], [[-0.2]]]), torch.tensor([[[0.1]]])
    errors = {}
    for order in (1, 2):
        for solver_steps in (40, 80):
            got = ode_pairs(
                GaussianTeacher(),
                text,
                noise,
                negative=negative,
                schedule=SCHEDULE,
                guidance_scale=3.0,
                solver_steps=solver_steps,
                order=order,
            )
            assert got.shape == (2, 5, 3, 1, 2, 2)
            # The velocity is affine in the mean, so guidance moves the mean.
            mean = (text + 2.0 * (text - negative)).view(2, 1, 1, 1, 1)
            exact = torch.stack(
                [(1 - s) * mean + ((1 - s) ** 2 * 0.25 + s**2) ** 0.5 * noise for s in (*SIGMAS, 0)], dim=1
            )
            torch.testing.assert_close(got[:, 0], noise)
            errors[order, solver_steps] = (got - exact).abs().amax(dim=(0, 2, 3, 4, 5))
    assert errors[2, 80].max() < 2e-3
    assert (errors[1, 40][-1] / errors[1, 80][-1]).item() == pytest.approx(2, rel=0.2)
    assert errors[2, 40][-1] > 3 * errors[2, 80][-1]


def test_chunks_share_a_value() -> None:
    values = torch.arange(8).view(2, 4)
    got = per_chunk(values, tiny_student(), 7)
    assert got.tolist() == [[0, 0, 0, 1, 1, 1, 2], [4, 4, 4, 5, 5, 5, 6]]
    got = per_chunk(values, tiny_student(first_chunk_frames=1), 7)
    assert got.tolist() == [[0, 1, 1, 1, 2, 2, 2], [4, 5, 5, 5, 6, 6, 6]]


def random_pairs(count: int = 3) -> OdePairs:
    g = torch.Generator().manual_seed(2)
    trajectories = torch.randn(count, 5, 6, *LATENT, generator=g)
    text = torch.randn(2, 8, 16, generator=g)
    return OdePairs(trajectories, torch.arange(count) % 2, text, 1000 * torch.tensor(SIGMAS))


def test_ode_regression_is_what_it_says() -> None:
    """Spelled out for one sample at a time, with the states chosen again from the same stream."""
    pairs, student = random_pairs(), tiny_student().eval()
    got = OdeRegression(pairs).loss(student, [2, 1], SampleNoise([7, 8]))
    losses = []
    for sample, seed in ((2, 7), (1, 8)):
        states = SampleNoise([seed]).randint(4, 6)[0, :2].tolist()  # a chunk each
        trajectory = pairs.trajectories[sample]
        x = torch.cat([trajectory[states[0], :3], trajectory[states[1], 3:]])
        sigma = torch.tensor([SIGMAS[states[0]]] * 3 + [SIGMAS[states[1]]] * 3)
        v = student(x[None], 1000 * sigma[None], pairs.text[sample % 2][None], mask="causal")[0]
        x0 = x - sigma.view(-1, 1, 1, 1) * v
        losses.append((x0 - trajectory[-1]).square().mean())
    torch.testing.assert_close(got, torch.stack(losses).mean())


def test_teacher_forcing_is_denoising_after_clean_chunks() -> None:
    """Spelled out chunk by chunk: [clean chunks before | noisy chunk] under the block-causal mask."""
    g = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 6, *LATENT, generator=g), torch.randn(2, 8, 16, generator=g)
    objective = TeacherForcing(latents, text, schedule=SCHEDULE, steps=(1000, 750, 500, 250))
    student = tiny_student().eval()
    got = objective.loss(student, [0, 1], SampleNoise([5, 6]))
    again = SampleNoise([5, 6])
    choice, eps = again.randint(4, 6), again.randn(6, *LATENT)
    losses = []
    for b in range(2):
        for c, frames in enumerate((slice(0, 3), slice(3, 6))):
            sigma = sorted(SIGMAS)[choice[b, c]]
            noisy = (1 - sigma) * latents[b, frames] + sigma * eps[b, frames]
            x = torch.cat([latents[b, : 3 * c], noisy])[None]
            t = torch.tensor([0.0] * (3 * c) + [1000 * sigma] * 3)[None]
            v = student(x, t, text[b : b + 1], mask="causal")[0, -3:]
            losses.append((v - (eps[b, frames] - latents[b, frames])).square().mean())
    torch.testing.assert_close(got, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def settings(**changes: Any) -> InitSettings:
    base = {
        "steps": 6,
        "batch": 4,
        "optimizer": {"lr": 3e-3, "clip": 1.0},
        "warmup": 2,
        "checkpoint_every": 100,
    }
    return InitSettings.model_validate(base | changes)


def test_training_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    unbroken = InitTrainer(settings(), tiny_student(), OdeRegression(random_pairs()))
    losses = [e.scalars["student/loss"] for e in unbroken.run() if isinstance(e, StepDone)]
    assert losses[-1] < losses[0]
    list(InitTrainer(settings(steps=3), tiny_student(), OdeRegression(random_pairs()), folder=tmp_path).run())
    second = InitTrainer(settings(), tiny_student(seed=9), OdeRegression(random_pairs()), folder=tmp_path)
    assert second.resume() is not None
    rest = [e.scalars["student/loss"] for e in second.run() if isinstance(e, StepDone)]
    assert rest == losses[3:]
    for name, value in second.student.state_dict().items():
        assert torch.equal(value, unbroken.student.state_dict()[name])
        if name in unbroken.ema.tensors():
            assert torch.equal(second.ema.tensors()[name], unbroken.ema.tensors()[name])


def test_accumulation_is_the_large_batch() -> None:
    runs = []
    for accumulation in (1, 2):
        run = InitTrainer(settings(accumulation=accumulation), tiny_student(), OdeRegression(random_pairs()))
        runs.append(run.train_step().scalars)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def make(folder: Path, pairs: int, **changes: Any) -> list[int]:
    text = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {
        "latent_shape": (3, *LATENT),
        "negative": torch.zeros(1, 8, 16),
        "schedule": SCHEDULE,
        "steps": (1000, 500),
        "solver_steps": 3,
        "batch": 2,
    }
    return list(make_ode_pairs(tiny_teacher().eval(), text, folder, pairs=pairs, **(arguments | changes)))


def test_making_pairs_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    assert make(tmp_path / "whole", 5) == [2, 4, 5]
    make(tmp_path / "broken", 3)
    first = (tmp_path / "broken" / "pairs-000000.safetensors").stat().st_mtime_ns
    make(tmp_path / "broken", 5)
    assert (tmp_path / "broken" / "pairs-000000.safetensors").stat().st_mtime_ns == first
    text = torch.zeros(2, 8, 16)
    a, b = load_ode_pairs(tmp_path / "whole", text), load_ode_pairs(tmp_path / "broken", text)
    assert a.trajectories.shape == (5, 3, 3, *LATENT)
    files = [load_file(path)["trajectories"] for path in sorted((tmp_path / "whole").iterdir())]
    everything = torch.cat(files)
    order = [4, 0, 3, 1, 2]
    assert torch.equal(a.trajectories[order], everything[order])
    assert torch.equal(b.trajectories[order], everything[order])
    assert torch.equal(a.trajectories.only(-1)[order], everything[order, -1])
    assert a.trajectories.only(-1).shape == everything[:, -1].shape
    assert a.text_index.tolist() == b.text_index.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="was made with"):
        make(tmp_path / "whole", 5, guidance_scale=3.0)
    with pytest.raises(ValueError, match="made of other prompts"):
        load_ode_pairs(tmp_path / "whole", text[:1])
    (tmp_path / "broken" / "pairs-000002.safetensors").unlink()
    make(tmp_path / "other", 4, latent_shape=(6, *LATENT))
    shutil.copy(tmp_path / "other" / "pairs-000002.safetensors", tmp_path / "broken")
    with pytest.raises(ValueError, match=r"pairs-000002.* was made with latent_shape = \[6, .* is \[3, "):
        load_ode_pairs(tmp_path / "broken", text)


def test_files_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    """With each other in any setting or in the timesteps, or with what they say of themselves."""
    make(tmp_path / "whole", 4)
    other, text = tmp_path / "whole" / "pairs-000002.safetensors", torch.zeros(2, 8, 16)
    whole = other.read_bytes()
    for name, changes in {
        "guidance_scale": {"guidance_scale": 3.0},
        "solver_steps": {"solver_steps": 4},
        "steps": {"steps": (1000, 250)},
        "shift": {"schedule": FlowSchedule(3.0)},
        "seed": {"seed": 1},
        "weights": {"weights": "of another teacher"},
    }.items():
        make(tmp_path / name, 4, **changes)
        shutil.copy(tmp_path / name / "pairs-000002.safetensors", tmp_path / "whole")
        with pytest.raises(ValueError, match=rf"pairs-000002.* was made with .*{name} = "):
            load_ode_pairs(tmp_path / "whole", text)
    other.write_bytes(whole)
    tensors = load_file(other)
    with safe_open(other, "pt") as file:
        metadata = file.metadata()
    for name, value in {
        "timesteps": tensors["timesteps"] - 1,
        "text_index": tensors["text_index"] - 1,
        "trajectories": tensors["trajectories"][:, 1:].contiguous(),
    }.items():
        save_file(tensors | {name: value}, other, metadata)
        with pytest.raises(FileError, match=rf"pairs-000002.*{name}: expected"):
            load_ode_pairs(tmp_path / "whole", text)
    save_file(tensors, other)
    with pytest.raises(FileError, match=r"pairs-000002.*expected settings"):
        load_ode_pairs(tmp_path / "whole", text)


def test_a_damaged_file_is_named_and_made_again(tmp_path: Path) -> None:
    make(tmp_path, 4)
    path = tmp_path / "pairs-000002.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10]):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"pairs-000002\.safetensors: not a readable file of trajectories"
        ):
            load_ode_pairs(tmp_path, torch.zeros(2, 8, 16))
        assert make(tmp_path, 4) == [4]
        assert path.read_bytes() == whole


def test_processes_share_what_is_missing(tmp_path: Path) -> None:
    """Not one process all that one left behind, while the others wait until they give up."""
    make(tmp_path, 6, batch=1)
    files = sorted(tmp_path.iterdir())
    before = [path.read_bytes() for path in files]
    for path in files[::2]:
        path.unlink()
    assert make(tmp_path, 6, batch=1, share=(0, 2)) == [1, 5]
    assert make(tmp_path, 6, batch=1, share=(1, 2), agree=lambda _: [0, 2, 4]) == [3]
    assert [path.read_bytes() for path in files] == before


def test_pairs_are_made_in_the_precision_asked_for(tmp_path: Path) -> None:
    """A teacher's matmuls in bfloat16, the solver's sums in float32: near the float32 trajectories, not on
    a grid of bfloat16.
    """
    for precision in ("float32", "bfloat16"):
        make(tmp_path / precision, 2, precision=precision, dtype=torch.float32)
    full, narrow = (
        load_file(tmp_path / name / "pairs-000000.safetensors")["trajectories"]
        for name in ("float32", "bfloat16")
    )
    assert torch.equal(full[:, 0], narrow[:, 0])
    error = (full - narrow).norm() / full.norm()
    assert 1e-5 < error < 2e-2
    assert not torch.equal(narrow, narrow.bfloat16().float())
    with pytest.raises(ValueError, match="precision = 'float32', this is 'bfloat16'"):
        make(tmp_path / "float32", 4, precision="bfloat16")


def test_wrong_data_is_refused() -> None:
    pairs = random_pairs()
    with pytest.raises(ValueError, match="OdeRegression"):
        OdeRegression(pairs._replace(trajectories=pairs.trajectories[:, 1:]))
    with pytest.raises(ValueError, match="TeacherForcing"):
        TeacherForcing(torch.zeros(3, 6, *LATENT), torch.zeros(2, 8, 16), schedule=SCHEDULE)
    with pytest.raises(FileNotFoundError, match="no pairs"):
        load_ode_pairs(Path("nowhere"), pairs.text)
