"""Whole estimates: the published setting, a GPU that is too small, and what the command says."""

import json
from dataclasses import replace
from typing import Any

import pytest

from stream_r1 import recipe
from stream_r1.cli import main
from stream_r1.estimate.advice import Change, _settings, advise, changed, larger
from stream_r1.estimate.devices import DEVICES, Device
from stream_r1.estimate.pixels import pixel_phases
from stream_r1.estimate.training import Estimate, estimate

WAN = "recipes/wan2.1-1.3b/stream-r1.yaml"
TINY = "recipes/tiny/stream-r1.yaml"
SMALL = ["rollout={frames: 3, gradient_checkpointing: true}", "batch=1"]
STUDENT, TEACHER = 1.42e9, 14.3e9  # weights of Wan 2.1 1.3B and 14B
ENCODER = 5.68e9  # of UMT5-XXL's encoder


@pytest.fixture(scope="module")
def published() -> Estimate:
    return estimate(recipe.load(WAN), DEVICES["A100"], 8)


def test_the_published_setting_fits_eight_gpus_of_80_gb(published: Estimate) -> None:
    assert published.fits
    assert published.plan.samples == 1
    parts = published.worst.parts
    assert parts["weights"] == pytest.approx((2 * STUDENT + TEACHER) * 4 / 8, rel=0.02)
    assert parts["optimizer"] == pytest.approx(2 * STUDENT * 8 / 8, rel=0.02)
    assert parts["average"] == pytest.approx(STUDENT * 4 / 8, rel=0.02)


def test_umt5_is_there_while_prompts_are_encoded_and_stays_only_without_a_folder(published: Estimate) -> None:
    embeddings = 1024 * 100 * 4096
    before = next(moment for moment in published.moments if moment.phase == "start: prompts")
    assert before.parts == {"text encoder": pytest.approx(2 * ENCODER, rel=0.01)}
    assert published.worst.parts["text encoder"] == 2 * embeddings
    kept = estimate(recipe.load(WAN, ["text={dtype: float32, cache: null}"]), DEVICES["A100"], 8)
    assert kept.worst.parts["text encoder"] == pytest.approx(4 * (ENCODER + embeddings), rel=0.01)
    assert all(moment.phase != "start: prompts" for moment in kept.moments)


def test_time_is_at_least_what_the_teacher_takes_at_full_rate(published: Estimate) -> None:
    tokens, layers, dim, ffn = 21 * 30 * 52, 40, 5120, 13824
    pass_flops = layers * tokens * (2 * (6 * dim**2 + 2 * dim * ffn) + 4 * tokens * dim)
    assert published.critic_update is not None
    at_peak = 8 * 2 * pass_flops / DEVICES["A100"].matmul16  # 8 samples, with and without the text
    assert at_peak < published.student_update < 4 * at_peak
    assert published.step == pytest.approx(published.critic_update + published.student_update / 5)
    assert published.days(1000) == pytest.approx(1000 * published.step / 86400)


def test_frames_a_second_are_those_of_the_page_on_gpus(published: Estimate) -> None:
    assert published.fps is not None
    shown = [f"{fps:.1f}" for fps in published.fps]
    with open("docs/gpu.md", encoding="utf-8") as page:
        row = next(line for line in page if line.startswith("| A100 |"))
    assert row.split(" | ")[-2:] == [shown[0], f"{shown[1]} |\n"]


def advised(settings: recipe.Recipe, device: Device) -> tuple[Estimate, list[Change]]:
    before = estimate(settings, device, 1)
    assert not before.fits
    changes = advise(settings, device, 1, before)
    totals = [before.total, *(change.result.total for change in changes)]
    assert totals == sorted(totals, reverse=True)
    assert [change.result.fits for change in changes[:-1]] == [False] * (len(changes) - 1)
    return before, changes


def test_one_gpu_of_24_gb_does_not_and_hears_what_to_change() -> None:
    small = ["models={teacher: weights/1.3B, reward: assets/tiny/reward, text: minilm}", "batch=2"]
    small += ["rollout={frames: 3, height: 16, width: 16}", "reward.fps=null", "accumulation=2"]
    small += ["stream.window_frames=6"]
    _, changes = advised(recipe.load(WAN, small), DEVICES["RTX 4090"])
    named = {override.partition("=")[0] for change in changes for override in change.overrides}
    assert {"student.lora", "critic.lora"} <= named
    assert larger(90e9, DEVICES["RTX 4090"]) == ["H200", "B200"]


def test_a_text_encoder_that_does_not_fit_beside_the_rest_is_freed_and_nothing_else_changed() -> None:
    settings = recipe.load(TINY, [*SMALL, "models.text=weights/UMT5"])
    _, (change,) = advised(settings, replace(DEVICES["H100"], memory=24e9))
    assert change.overrides == ("text={dtype: bfloat16, cache: out/tiny/stream-r1/prompts}",)
    assert change.result.fits
    assert change.result.worst.parts == {"text encoder": pytest.approx(2 * ENCODER, rel=0.01)}


def test_a_shorter_window_is_offered_and_saves_its_keys_and_values() -> None:
    size = "rollout={frames: 12, height: 64, width: 64, gradient_checkpointing: true}"
    wide = recipe.load("recipes/tiny/uniform.yaml", ["batch=1", size, "stream.window_frames=12"])
    offered = [overrides for overrides, _ in _settings(wide, 1)]
    assert ("stream.window_frames=6",) in offered  # sink and chunk
    narrow = changed(wide, ("stream.window_frames=6",))
    rollouts = [estimate(each, DEVICES["H100"], 1).moments[0] for each in (wide, narrow)]
    a_frame = 5 * 2 * 32 * 32 * 256 * 2  # layers, keys and values, tokens, width, bytes
    assert [moment.parts["cache"] for moment in rollouts] == [12 * a_frame, 6 * a_frame]


def test_a_change_that_is_named_can_be_made() -> None:
    tiny = recipe.load(TINY, ["rollout.gradient_checkpointing=false"])
    tried = changed(tiny, ("rollout.gradient_checkpointing=true", "student.lora={rank: 8}"))
    assert tried.rollout.gradient_checkpointing
    assert tried.student.lora is not None
    assert tried.student.lora.rank == 8


def test_gpus_that_share_a_sample_hold_a_part_of_it_and_send_the_rest() -> None:
    size = "rollout={frames: 9, gradient_checkpointing: true, steps: [1000]}"
    alone = estimate(recipe.load(TINY, ["batch=1", size]), DEVICES["H100"], 1)
    shared = estimate(recipe.load(TINY, ["batch=1", size, "distributed.sequence=4"]), DEVICES["H100"], 4)
    assert shared.plan.samples == 1
    whole, part = (
        next(m.parts for m in each.moments if m.phase == "student: rollout") for each in (alone, shared)
    )
    assert part["cache"] == whole["cache"] / 4
    # text, modulation and latents are whole on every rank, and weigh in a model this small
    assert whole["activations"] / 4 < part["activations"] < whole["activations"] / 2
    assert alone.exchanged == 0
    assert shared.exchanged > 0
    twice = recipe.load(TINY, ["batch=2", "accumulation=2", size, "distributed.sequence=4"])
    assert estimate(twice, DEVICES["H100"], 4).exchanged == pytest.approx(2 * shared.exchanged)
    four = estimate(recipe.load(TINY, ["batch=4", size, "distributed.sequence=4"]), DEVICES["H100"], 4)
    assert four.plan.samples == 4
    assert pixel_phases(four.plan) == pixel_phases(alone.plan)  # each decodes and scores one


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", *arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = [TINY, *SMALL, "--gpus", "1"]
    code, out, _ = run(capsys, *small, "--device", "h 100")
    assert code == 0
    assert out.startswith("Prediction for recipes/tiny/stream-r1.yaml on 1 x H100")
    for words in ("activations", "optimizer", "critic's update", "1000 steps", "FPS", "Fits, with"):
        assert words in out
    code, out, _ = run(capsys, *small, "--json")
    said: dict[str, Any] = json.loads(out)
    assert code == 0
    assert (said["prediction"], said["device"], said["memory"]["fits"]) == (True, "H100", True)
    parts = sum(said["memory"]["parts"].values())
    assert said["memory"]["total"] == pytest.approx(parts + said["memory"]["overhead"])
    assert max(sum(phase.values()) for phase in said["memory"]["phases"].values()) == pytest.approx(parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [WAN, "--device", "h101"],
            "--device: expected one of A100, H100, H200, RTX 4090, B200, got 'h101' (did",
        ),
        ([WAN, "--gpus", "0"], "--gpus"),
        ([WAN, "--gpus", "12"], "batch: expected a multiple of 12 GPUs x accumulation 8, got 64"),
        (
            [WAN, "distributed={shard: hybrid, replicas: 3}", "--gpus", "8"],
            "--gpus: expected a multiple of 3 (distributed.replicas), got 8",
        ),
        ([WAN, "weighting.mode=ful"], "did you mean 'full'?"),
        (
            [WAN, "models.teacher=weights/big"],
            "models.teacher: weights/big: expected a folder with a config.json",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err.replace("\n", " ")
