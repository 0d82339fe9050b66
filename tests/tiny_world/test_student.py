"""The student's initialization: the teacher made causal, and not another teacher's."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from stream_r1.config import SettingsError
from stream_r1.models.block_vae import BlockVAE
from stream_r1.models.checkpoints import load_student
from stream_r1.tiny_world.student import StudentSettings, train_student
from stream_r1.tiny_world.teacher import TeacherSettings, teacher_config

ONE = {"steps": 1, "lr": 1e-12, "warmup": 0, "ema": 0.0}


def write_teacher(folder):
    sizes = TeacherSettings(
        out="", work="", latents="", vae="", heads=1, head_dim=16, layers=1, ffn_ratio=1, training=ONE
    )
    WanTransformer3DModel(**teacher_config(sizes, 4, 384)).save_pretrained(folder / "teacher")


@pytest.fixture
def settings(tmp_path):
    torch.manual_seed(0)
    BlockVAE(4, width=8, depth=1, fine_width=8).save_pretrained(tmp_path / "vae")
    write_teacher(tmp_path)
    places = {name: str(tmp_path / name) for name in ("out", "work", "latents", "vae", "teacher")}

    def made(**training):
        return StudentSettings(
            **places,
            clips=4,
            forced_clips=4,
            batch=2,
            training=ONE | training,
        )

    return made


def test_it_starts_with_the_teachers_weights_streams_in_chunks_and_learns(settings, tmp_path):
    train_student(settings())
    teacher = WanTransformer3DModel.from_pretrained(tmp_path / "teacher").state_dict()
    student = load_student(tmp_path / "out")
    assert student.config.frames_per_chunk == 3
    assert all(torch.allclose(w, teacher[name], atol=1e-3) for name, w in student.state_dict().items())
    train_student(settings(lr=1e-2).model_copy(update={"work": str(tmp_path / "again")}))
    learnt = load_student(tmp_path / "out").state_dict()
    assert not all(torch.allclose(w, teacher[name], atol=1e-3) for name, w in learnt.items())


def test_a_finished_training_is_not_taken_for_that_of_another_teacher(settings, tmp_path):
    train_student(settings())
    write_teacher(tmp_path)
    with pytest.raises(SettingsError, match="start was"):
        train_student(settings())
