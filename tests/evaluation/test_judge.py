"""The judge on the real classes with random weights: what it sees, reads, and does not make up."""

import math

import numpy as np
import pytest
import torch
from judge_folder import write_judge
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from stream_r1.evaluation.judge import AXES, QUESTIONS, Judge, find_digit, shown_frames
from stream_r1.evaluation.judge_model import Answer, JudgeModel
from stream_r1.evaluation.plan import JudgeSettings
from stream_r1.files import FileError
from stream_r1.sampling.video import VideoWriter

KINDS = ("qwen3_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write_judge(path, request.param)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return JudgeModel.from_folder(folder)


class Scripted(JudgeModel):
    """The model, whose answers are put in its mouth, with logits of known probabilities."""

    def __init__(self, model, answers):
        super().__init__(model.model, model.tokenizer)
        self.answers, self.asked = list(answers), []

    def answer(self, seen, question, *, max_tokens, seed=None):
        self.asked.append((question, seed))
        tokens = self.tokenizer.encode(self.answers.pop(0), add_special_tokens=False)
        logits = torch.full((len(tokens), 263), -20.0)
        for row, token in zip(logits, tokens, strict=True):
            row[token] = 0.0
            if token in self.digits:
                row[self.digits] = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2]).log()
                row[ord("x")] = math.log(0.2)
        return Answer(tokens, logits)


def frames(count=4, side=64):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def seen(model):
    return frames(4, 2 * model.multiple)


def test_patches_are_those_of_the_model_s_own_processor(model):
    """A still picture, which its processor of pictures repeats in time."""
    side, patch = 2 * model.multiple, model.model.config.vision_config.patch_size
    picture = (frames(1, side)[0] * 255).byte()
    own = Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=side**2, max_pixels=side**2,
        image_mean=model._mean.flatten().tolist(), image_std=model._std.flatten().tolist(),
    )  # fmt: skip
    wanted = own(Image.fromarray(picture.movedim(0, -1).numpy()), return_tensors="pt")
    shown = model.see((picture / 255)[None].expand(2, -1, -1, -1), [0.0, 0.1])
    assert [list(shown.grid)] == wanted["image_grid_thw"].tolist()
    assert torch.allclose(shown.patches, wanted["pixel_values"], atol=1e-5)


def test_the_text_has_the_frames_where_the_model_was_trained_to_find_them(model):
    seconds = [0.0, 1.0, 2.0, 4.0]
    text = model.tokenizer.decode(model.tokens(model.see(seen(model), seconds), "which?"))
    each = "<|video_pad|>" * 4
    if model.model.config.model_type == "qwen3_vl":
        times = Qwen3VLProcessor._calculate_timestamps(None, [0, 1, 2, 4], 1.0, 2)
        wanted = "".join(f"<{t:.1f} seconds><|vision_start|>{each}<|vision_end|>" for t in times)
    else:
        wanted = f"<|vision_start|>{each * 2}<|vision_end|>"
    assert text == f"<|im_start|>user\n{wanted}which?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="expected none of the model's own tokens"):
        model.tokens(model.see(frames(2, model.multiple), [0, 1]), "a <|video_pad|>")


def test_an_answer_is_the_likeliest_next_token_of_the_whole_model(model):
    """Token by token without a cache, from the logits of a plain forward pass."""
    shown = model.see(seen(model), [0, 1, 2, 3])
    found = model.answer(shown, "how good?", max_tokens=3)
    row = model.tokens(shown, "how good?")
    extra = {"second_per_grid_ts": torch.tensor([2.0])} if "2_5" in model.model.config.model_type else {}
    for n, token in enumerate(found.tokens):
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=2 * (ids == 262).int(),
                pixel_values_videos=shown.patches, video_grid_thw=torch.tensor([shown.grid]), **extra,
            ).logits[0, -1]  # fmt: skip
        assert torch.allclose(found.logits[n], logits, atol=1e-3)
        assert token == int(logits.argmax())
        row = [*row, token]
    changed = model.answer(model.see(1 - seen(model), [0, 1, 2, 3]), "how good?", max_tokens=1)
    assert (changed.logits[0] - found.logits[0]).abs().max() > 1e-3  # it sees the frames


def test_random_weights_give_ratings_or_none_and_never_end_in_an_error(model, tmp_path):
    judge = Judge(model, JudgeSettings(folder="x", max_tokens=8, retries=1, max_frames=4))
    with VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.write(frames(40))
    ratings = judge.rate(tmp_path / "a.mp4", "a red apple", frames=40, fps=16)
    assert tuple(ratings) == AXES["rating"]
    for rating in ratings.values():
        assert (rating.digit is None) == (rating.tries == 2 and find_digit(rating.answer, "quality") is None)
        assert rating.digit is not None or rating.expected is None


def test_digits_and_their_probabilities_are_read_where_they_stand(model):
    answer = "visual quality: 4\nmotion dynamics: 3\ntext alignment: 5\n"
    scripted = Scripted(model, [answer])
    found = Judge(scripted, JudgeSettings(folder="x")).rate_frames(seen(model), [0, 1, 2, 3], "a red apple")
    assert [rating.digit for rating in found.values()] == [4, 3, 5]
    for rating in found.values():
        assert rating.expected == pytest.approx((0.1 + 0.2 + 0.6 + 0.8 + 1.0) / 0.8)
        assert rating.on_digits == pytest.approx(0.8, abs=1e-6)
        assert rating.tries == 1
    assert "a red apple" in scripted.asked[0][0]
    assert scripted.asked[0][1] is None  # the likeliest tokens


def test_a_refusal_is_asked_again_and_stays_one(model):
    sorry = "I can not rate this video.\n"
    partly = "visual quality: 2\nmotion dynamics: n/a\ntext alignment: 45"
    scripted = Scripted(model, [sorry, partly, "motion dynamics: 10, visual quality: 5"])
    found = Judge(scripted, JudgeSettings(folder="x", retries=2)).rate_frames(seen(model), [0, 1, 2, 3], "a")
    assert [rating.digit for rating in found.values()] == [2, None, None]
    assert [rating.expected is None for rating in found.values()] == [False, True, True]
    assert [rating.tries for rating in found.values()] == [2, 3, 3]
    assert [seed for _, seed in scripted.asked] == [None, 1, 2]


@pytest.mark.parametrize(
    ("text", "digit"),
    [
        ("Visual Quality: 3", "3"), ("visual quality (1-5): 2", None), ("visual quality - **4**/5", "4"),
        ("visual quality: 4.5", None), ("visual quality: 12", None), ("visual quality: 6", None),
        ("visual quality is poor", None), ("visual quality: 2\n...\nvisual quality: 4.", "4"),
    ],
)  # fmt: skip
def test_numbers_of_an_answer(text, digit):
    at = find_digit(text, "visual quality")
    assert (None if at is None else text[at]) == digit


def test_frames_of_a_long_video_are_few_even_and_small(tmp_path):
    """A minute: each frame's grey level is its second."""
    levels = torch.arange(960) / 1000
    with VideoWriter(tmp_path / "a.mp4", 16, crf=4) as writer:
        for part in levels.split(100):
            writer.write(part.view(-1, 1, 1, 1).expand(-1, 3, 64, 64))
    found, seconds = shown_frames(
        tmp_path / "a.mp4", 960, 16, shown=1.0, most=10, size=lambda height, width: (32, 32)
    )
    assert found.shape == (10, 3, 32, 32)
    assert seconds == pytest.approx(np.linspace(0, 959, 10).round() / 16)
    assert found.mean((1, 2, 3)).tolist() == pytest.approx([16 * s / 1000 for s in seconds], abs=0.01)


def test_questions_name_every_axis_and_files_that_are_no_judge_are_refused(tmp_path, folder):
    for kind, axes in AXES.items():
        assert all(axis in QUESTIONS[kind] for axis in axes)
    (tmp_path / "question.txt").write_text("Rate it.")
    with pytest.raises(FileError, match=r"question\.txt: expected \{text_prompt\} once, found it 0 times"):
        Judge.from_folder(JudgeSettings(folder=str(folder), instruction=str(tmp_path / "question.txt")))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileError, match=r"config\.json: expected model_type qwen3_vl"):
        JudgeModel.from_folder(tmp_path)
