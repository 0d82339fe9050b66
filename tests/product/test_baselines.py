"""The table's other columns: measured as the students are, kept, and shown where they are there."""

import numpy as np
import pytest

from stream_r1 import recipe
from stream_r1.assembly import load_models
from stream_r1.data.film import load_shots
from stream_r1.demo.baselines import clips_of_prompts, load_baselines, measure_baselines, save_baselines
from stream_r1.demo.settings import DemoSettings
from stream_r1.evaluation import Reference
from stream_r1.evaluation.report import MEASURES

FILM_LENGTH = max(shot.end for shot in load_shots())


def numbered_film(height=32, width=48):
    """Frame n holds n: its low byte in red, its high byte in green."""
    film = np.zeros((FILM_LENGTH, height, width, 3), np.uint8)
    numbers = np.arange(FILM_LENGTH)
    film[..., 0], film[..., 1] = (numbers % 256)[:, None, None], (numbers // 256)[:, None, None]
    return film


def first_frame_number(clip):
    red, green, _ = (clip[0, :, 0, 0] * 255).round().int().tolist()
    return red + 256 * green


def test_clips_are_of_the_captions_own_shots_and_differ():
    shots = [shot for shot in load_shots() if not shot.held_out and shot.frames >= 60]
    prompts = [shots[0].caption, shots[1].caption, shots[0].caption]
    clips = clips_of_prompts(numbered_film(), prompts, 33)
    starts = [first_frame_number(clip) for clip in clips]
    for prompt, start in zip(prompts, starts, strict=True):
        assert any(s.start <= start <= s.end - 33 for s in shots if s.caption == prompt)
    assert starts[0] != starts[2]


def test_a_prompt_that_is_no_caption_is_refused():
    with pytest.raises(ValueError, match="a red apple"):
        clips_of_prompts(numbered_film(), ["a red apple"], 9)


def test_measured_kept_and_read(world, tmp_path):
    caption = next(shot.caption for shot in load_shots() if not shot.held_out and shot.frames >= 60)
    (tmp_path / "prompts.txt").write_text(caption + "\n", encoding="utf-8")
    loaded = recipe.load(world / "recipe.yaml", ["rollout.frames=3", f"prompts={tmp_path / 'prompts.txt'}"])
    settings = DemoSettings(evaluated_videos=2, evaluated_batch=1, teacher_steps=1)
    reference = Reference.load(world / "reference.safetensors")
    columns = measure_baselines(load_models(loaded), loaded, settings, reference, numbered_film())
    assert set(columns) == {"teacher", "film", "film through the autoencoder"}
    expected = {f"reward/{axis}" for axis in ("VQ", "MQ", "TA")} | set(MEASURES) - {"prompt_match"}
    assert all(expected == set(row) for row in columns.values())
    path = tmp_path / "assets" / "baselines.json"
    save_baselines(path, columns)
    kept = load_baselines(path)
    assert kept["film"]["sharpness"] == pytest.approx(columns["film"]["sharpness"], abs=1e-4)
    assert load_baselines(tmp_path / "nothing.json") == {}
