"""Figures of teacher and drawings: as the students' are made, kept with their spreads, and read again."""

import pytest
import torch

from stream_r1 import recipe
from stream_r1.assembly import load_models
from stream_r1.demo.baselines import (
    OtherBaselinesError,
    load_baselines,
    measure_baselines,
    measured_with,
    save_baselines,
)
from stream_r1.demo.settings import DemoSettings
from stream_r1.demo.stages import drawings
from stream_r1.drawn_world.measures import MEASURES
from stream_r1.evaluation import Reference
from stream_r1.files import FileError
from stream_r1.rewards import load_reward


def test_drawings_of_one_prompt_differ_and_come_again():
    prompt = "a pink box swings on a rope by the sea at night"
    one, other = drawings([prompt, prompt], 5)
    assert one.shape == (33, 3, 64, 112)
    assert not torch.equal(one, other)
    assert torch.equal(drawings([prompt], 6)[0], other)


def test_measured_kept_and_read(world, tmp_path):
    loaded = recipe.load(world / "recipe.yaml", ["rollout.frames=3"])
    settings = DemoSettings(evaluated_videos=2, evaluated_batch=1, teacher_steps=1)
    reference, judge = Reference.load(world / "reference.safetensors"), load_reward(world / "reward")
    columns = measure_baselines(load_models(loaded), loaded, settings, reference, judge)
    assert set(columns) == {"teacher", "drawings", "drawings through the autoencoder"}
    assert all({"kid", "sharpness", "judge/TA"} <= row.keys() for row in columns.values())
    assert all(columns["drawings"][name].value > 0.95 for name in MEASURES)
    path = tmp_path / "assets" / "baselines.json"
    of = measured_with(
        loaded, settings.model_copy(update={"reference": str(world / "reference.safetensors")})
    )
    save_baselines(path, columns, of)
    kept = load_baselines(path, of)["drawings"]["sharpness"]
    assert kept.value == pytest.approx(columns["drawings"]["sharpness"].value, abs=1e-4)
    assert kept.spread == pytest.approx(columns["drawings"]["sharpness"].spread, abs=1e-4)
    assert load_baselines(path, of | {"teacher_steps": 0}) == load_baselines(path, of)
    for key, value in {"teacher": "another", "teacher_steps": 2, "guidance_scale": 7.5}.items():
        with pytest.raises(OtherBaselinesError, match=rf"measured with {key} .*, here it is '?{value}"):
            load_baselines(path, of | {key: value})
    with pytest.raises(OtherBaselinesError, match=r"nothing\.json: no such file"):
        load_baselines(tmp_path / "nothing.json", of)


def test_a_file_of_something_else_is_refused(tmp_path):
    for content in ('{"teacher": {"kid": 0.5}}', '{"teacher": [1, 2]}', '{"teacher": {"kid": [1, "2"]}}'):
        (tmp_path / "it.json").write_text(
            f'{{"measured_with": {{}}, "figures": {content}}}', encoding="utf-8"
        )
        with pytest.raises(
            FileError, match=r"it\.json: 'figures\.teacher.*': expected measured_with and, by"
        ):
            load_baselines(tmp_path / "it.json", {})
