"""The memory model against what the allocator gave out, and against torch's own division of weights."""

import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile

from stream_r1 import assembly, recipe
from stream_r1.clock import Clock
from stream_r1.distill.dmd import as_own
from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.trainer import DistillTrainer, _Draw
from stream_r1.distill.weighting import StreamR1Weights
from stream_r1.estimate import memory, phases, pixels
from stream_r1.estimate.exchange import CountedSequence
from stream_r1.estimate.memory import cluster, moments, resident, shard_of, sizes
from stream_r1.estimate.networks import read_networks
from stream_r1.estimate.phases import training_phases
from stream_r1.estimate.plan import Plan, roles
from stream_r1.estimate.run import Phase
from stream_r1.estimate.work import total_flops
from stream_r1.models.transformer import CausalWanTransformer

SIZES = {"num_attention_heads": 3, "attention_head_dim": 32, "in_channels": 32, "out_channels": 32}
SIZES |= {"text_dim": 384, "freq_dim": 64, "ffn_dim": 320, "num_layers": 3}
STREAM = {"text_len": 32, "window_frames": 9, "sink_frames": 3, "positions": "window", "sink_ema": 0.99}
TOLERANCE = 0.15

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_collector")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    CausalWanTransformer(**SIZES, **STREAM).save_pretrained(folder / "student")
    CausalWanTransformer(**SIZES, text_len=32).save_pretrained(folder / "open")
    WanTransformer3DModel(**SIZES).save_pretrained(folder / "teacher")
    return folder


def load(folder: Path, *overrides: str) -> recipe.Recipe:
    models = [f"models.student={folder}/student", f"models.teacher={folder}/teacher"]
    common = ["precision=float32", "ema.start=0", "critic_updates=1", "batch=2"]
    common += ["rollout.frames=6", "rollout.steps=[1000, 500]"]
    return recipe.load("recipes/tiny/stream-r1.yaml", [*models, *common, *overrides])


@pytest.fixture(scope="module")
def frozen(folder: Path) -> dict[str, Any]:
    models = assembly.load_models(load(folder))
    return {"vae": models.vae, "reward": models.reward, "text_encoder": models.text}


def trainer(plan: Plan, frozen: dict[str, Any], **more: Any) -> DistillTrainer:
    """Of real tensors, after a step."""
    settings = plan.settings
    assert isinstance(settings, recipe.Recipe)
    student = CausalWanTransformer.from_pretrained(settings.models.student, **settings.stream.overrides())
    teacher: Any = WanTransformer3DModel.from_pretrained(settings.models.teacher)
    if plan.sequence > 1:
        teacher = as_own(teacher, 32)
    trainer = DistillTrainer(
        settings.distillation(), student=student, teacher=teacher, prompts=["one", "two"], **frozen | more
    )
    if plan.sequence > 1:
        for model in (trainer.student, trainer.teacher, trainer.critic):
            model.enable_sequence_parallel(_Echo(plan.sequence))  # type: ignore[operator]
    trainer.train_step()
    return trainer


class _Echo(CountedSequence):
    """Other ranks that have what this one has."""

    def all_to_all(self, x: Tensor) -> Tensor:
        return x.clone()

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack([x] * self.size)


def allocated(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that there were at once, over those before, by the profiler's record; and the result."""
    most, _, result = most_and_left(run)
    return most, result


def most_and_left(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """As `allocated`, and the bytes that are there in the end."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    profiler: Any = recorded.profiler
    events = profiler.kineto_results.events()
    most = now = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most, now, result


def storages(tensors: Iterable[Tensor]) -> int:
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(found.values())


def plan_of(settings: Any) -> Plan:
    samples, half = settings.batch // settings.accumulation, settings.precision != "float32"
    keeps = settings.accumulation == 1
    return Plan(settings, read_networks(settings), samples, half, False, keeps, device=None)


def always(plan: Plan) -> float:
    return sum(resident(plan, {role: sizes(network, 1) for role, network in roles(plan).items()}).values())


def over(plan: Plan, steps: list[Phase], learns: str) -> float:
    """The peak of an update, over what is there all the time."""
    return max(m.total for m in moments(plan, steps, 1) if m.phase.startswith(learns)) - always(plan)


CASES = {
    "plain": [],
    "checkpointing, one sample": ["rollout.gradient_checkpointing=true", "batch=1"],
    "checkpointing, attention again": ["rollout={gradient_checkpointing: true, keep_attention: false}"],
    "adapters": ["student.lora={rank: 4}", "critic.lora={rank: 4}"],
    "a narrow window": ["stream.window_frames=6", "rollout.frames=9"],
    "no window": ["models.student={folder}/open"],
    "bfloat16, two parts": ["precision=bfloat16", "accumulation=2"],
    "long": ["rollout.length=12"],
    "three ranks a sample": ["distributed.sequence=3", "rollout.width=12"],
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_updates_take_the_memory_that_is_predicted(
    overrides: list[str], folder: Path, frozen: dict[str, Any]
) -> None:
    """Of the transformers; without a reward, which would hide them."""
    settings = load(
        folder, "weighting.mode=uniform", *(text.replace("{folder}", str(folder)) for text in overrides)
    )
    plan = plan_of(settings)
    real = trainer(plan, frozen, reward=None)
    student, _ = allocated(lambda: real._update_student(Clock(real.device), {}))
    critic, _ = allocated(lambda: real._update_critic(Clock(real.device), {}))
    steps = phases._distillation(plan, 0)
    assert over(plan, steps, "student") == pytest.approx(student, rel=TOLERANCE)
    assert over(plan, steps, "critic") == pytest.approx(critic, rel=TOLERANCE)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("frames", [9, 12])
def test_a_rollout_leaves_what_is_predicted(
    keep: bool, frames: int, folder: Path, frozen: dict[str, Any]
) -> None:
    """Inputs of blocks, attention's results where they are kept, and the pasts of a window of 9 frames."""
    size = [f"rollout.frames={frames}", "rollout.gradient_checkpointing=true", "batch=1"]
    plan = plan_of(load(folder, "weighting.mode=uniform", *size, f"rollout.keep_attention={keep}"))
    real = trainer(plan, frozen, reward=None)
    text, draw = real._embed(["one"]), _Draw(["one"], [0], 0, frames)
    noise = SampleNoise([0], real.device)
    _, left, clip = most_and_left(lambda: real._rollout(text, noise, draw, grad=True))
    assert clip.x.requires_grad
    predicted = phases._distillation(plan, 0)[0]
    assert sum(predicted.after.values()) == pytest.approx(left, rel=0.03)


def test_the_reward_and_what_is_there_all_the_time(folder: Path, frozen: dict[str, Any]) -> None:
    settings = load(folder, "batch=1")
    plan = plan_of(settings)
    real = trainer(plan, frozen)
    peak, preview = allocated(lambda: real._update_student(Clock(real.device), {}))
    assert preview is not None
    assert over(plan, training_phases(plan), "student") == pytest.approx(peak, rel=TOLERANCE)

    encoders = [real.text_encoder._model, real.weights.reward._text_encoder._model]  # type: ignore[union-attr, attr-defined]
    modules = [real.student, real.critic, real.teacher, real.vae, real.weights.reward, *encoders]  # type: ignore[union-attr]
    tensors = [x for m in modules for x in (*m.parameters(), *m.buffers())]  # type: ignore[union-attr]
    optimizers = (real.step_student.optimizers[0], real.step_critic.optimizers[0])
    tensors += [x for o in optimizers for state in o.state.values() for x in state.values()]
    tensors += (real.ema.average or {}).values()
    assert always(plan) == pytest.approx(storages(tensors), rel=0.02)


def test_a_start_takes_the_memory_that_is_predicted(folder: Path) -> None:
    settings = recipe.load_start(
        "recipes/wan2.1-1.3b/teacher-forcing.yaml",
        [
            f"models={{student: {folder}/student, teacher: {folder}/teacher, text: minilm}}",
            "precision=float32",
            "rollout.frames=9",
            "rollout.height=8",
            "rollout.width=14",
            "batch=2",
            "accumulation=1",
            "distributed={shard: none, param_dtype: float32}",
        ],
    )
    plan = plan_of(settings)
    student = CausalWanTransformer.from_pretrained(folder / "student", **settings.stream.overrides()).train()
    student.enable_gradient_checkpointing()

    def step() -> None:
        x, text = torch.zeros(plan.latents), torch.zeros(2, 32, 384)
        v = student(x, torch.full((2, 9), 500.0), text, mask="causal", clean_x=x)
        (v - x).square().mean().backward()
        student.zero_grad()

    peak, _ = allocated(step)
    assert over(plan, training_phases(plan), "student") == pytest.approx(peak, rel=TOLERANCE)


def test_depth_follows_from_two_shallow_networks(folder: Path) -> None:
    """What is run of all layers, and what is run of one and of two: the same work, and memory but for how
    gradients come as the graph goes.
    """
    settings = load(folder, "rollout.gradient_checkpointing=true")
    plan = plan_of(settings)
    whole = {phase.name: phase for phase in phases._distillation(plan, 0)}
    for phase in training_phases(plan):
        if phase.name in whole:
            for part, size in whole[phase.name].peak.items():
                assert phase.peak[part] == pytest.approx(size, rel=0.02, abs=1), (phase.name, part)
            assert total_flops(phase.work) == total_flops(whole[phase.name].work)


@pytest.mark.parametrize("rows", [1, 5, 8, 1536, 1537])
def test_a_weights_part_is_what_torch_gives_the_first_rank(rows: int) -> None:
    for shards in (1, 2, 3, 8):
        first, _ = Shard.local_shard_size_and_offset(rows, shards, 0)
        assert shard_of((rows, 7), shards) == first * 7


def test_a_judge_is_counted_through_its_own_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Qwen2-VL runs on fake tensors: as many weights as it has, and layers that add up."""
    judge = {"type": "videoalign", "base_model": "base", "fps": "all", "video_fps": 16}
    base = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    base |= {"model_type": "qwen2_vl", "num_key_value_heads": 1, "vocab_size": 320, "video_token_id": 262}
    base |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    base["vision_config"] = {"depth": 4, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 32}
    (tmp_path / "base").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(judge))
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    plan = plan_of(load(folder, f"models.reward={tmp_path}", "batch=1"))
    grown = next(phase for phase in training_phases(plan) if phase.name == "student: reward")
    whole = pixels._score_and_saliency(plan, {"vision": 4, "language": 3})
    assert grown.peak["reward"] == pytest.approx(whole.peak["reward"], rel=0.02)
    assert total_flops(grown.work) == total_flops(whole.work)

    plan = plan_of(load(folder, f"models.reward={tmp_path}", "batch=1", "reward.fps=checkpoint"))
    fewer = pixels._score_and_saliency(plan, {"vision": 4, "language": 3})
    embedded = [total_flops([w for w in look.work if w.engine == "convolution"]) for look in (whole, fewer)]
    assert embedded[0] == 5 * embedded[1]  # of 21 frames, 20 or the least of 4 are shown

    one_by_one = ["batch=3", "weighting.samples_at_once=1", "reward.fps=checkpoint"]
    plan = plan_of(load(folder, f"models.reward={tmp_path}", *one_by_one))
    once = pixels._score_and_saliency(plan, {"vision": 1, "language": 1})
    monkeypatch.setattr(pixels, "_AlikeSamples", StreamR1Weights)
    each = pixels._score_and_saliency(plan, {"vision": 1, "language": 1})
    assert set(once.work) == set(each.work)
    assert once.peak["reward"] == pytest.approx(each.peak["reward"], rel=0.02)


def test_groups(folder: Path) -> None:
    settings = load(folder, "distributed.shard=hybrid", "batch=64")
    assert cluster(settings, 64, 1, 16) == memory.Cluster(16, 8)
    with pytest.raises(ValueError, match=r"--gpus: expected a multiple of 3 \(distributed.replicas\), got 8"):
        cluster(load(folder, "distributed={shard: hybrid, replicas: 3}"), 64, 1, 8)
    shared = load(folder, "distributed.sequence=3", "rollout.width=12", "batch=64")
    assert cluster(shared, 64, 4, 12) == memory.Cluster(12, 1, 3)
    with pytest.raises(ValueError, match=r"--gpus: expected a multiple of distributed\.sequence 3, got 8"):
        cluster(shared, 64, 1, 8)
    with pytest.raises(ValueError, match="--gpus: expected at least 1, got 0"):
        cluster(settings, 64, 1, 0)
    with pytest.raises(ValueError, match="batch: expected a multiple of 8 GPUs x accumulation 16, got 64"):
        cluster(settings, 64, 16, 8)
