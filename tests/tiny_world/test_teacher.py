"""The teacher's training: from nothing or from weights, and where its error weighs more."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from stream_r1.config import SettingsError
from stream_r1.models.block_vae import BlockVAE
from stream_r1.tiny_world.teacher import TeacherSettings, train_teacher


@pytest.fixture
def settings(tmp_path):
    torch.manual_seed(0)
    BlockVAE(4, width=8, depth=1, fine_width=8).save_pretrained(tmp_path / "vae")

    def made(name, **changes):
        return TeacherSettings(
            out=str(tmp_path / name),
            work=str(tmp_path / "work" / name),
            latents=str(tmp_path / "latents"),
            vae=str(tmp_path / "vae"),
            **{"clips": 4, "heads": 1, "head_dim": 16, "layers": 1, "ffn_ratio": 1, "batch": 2} | changes,
        )

    return made


def trained(settings):
    train_teacher(settings)
    return WanTransformer3DModel.from_pretrained(settings.out).state_dict()


def test_a_training_without_a_step_writes_what_it_started_with(settings):
    one = {"steps": 1, "lr": 1e-3, "warmup": 0}
    first = trained(settings("first", training=one))
    again = trained(
        settings("again", training={**one, "lr": 1e-12, "seed": 9}, start=settings("first", training=one).out)
    )
    assert all(torch.allclose(first[name], again[name], atol=2e-3) for name in first)


def test_a_finished_training_is_not_taken_for_that_of_another_start_or_codec(settings, tmp_path):
    one = {"steps": 1, "lr": 1e-3, "warmup": 0}
    trained(settings("first", training=one))
    first = str(tmp_path / "first")
    begun = trained(settings("second", training=one, start=first))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            begun.values(), trained(settings("second", training=one, start=first)).values(), strict=True
        )
    )
    trained(settings("first", training={**one, "steps": 2}))
    with pytest.raises(SettingsError, match="start was"):
        train_teacher(settings("second", training=one, start=first))
    torch.manual_seed(1)
    BlockVAE(4, width=8, depth=1, fine_width=8).save_pretrained(tmp_path / "vae")
    with pytest.raises(SettingsError, match="clips was"):
        train_teacher(settings("first", training={**one, "steps": 2}))


def test_the_weight_of_the_thing_changes_what_is_learnt(settings):
    one = {"steps": 2, "lr": 1e-2, "warmup": 0, "ema": 0.0}
    plain, weighed = (
        trained(settings("plain", training=one)),
        trained(settings("weighed", training=one, thing_weight=12)),
    )
    assert any(not torch.equal(plain[name], weighed[name]) for name in plain)
