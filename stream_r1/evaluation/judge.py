"""A vision-language model rates a video from 1 to 5, axis by axis, in words that a rule reads.

Beside the digit that it writes stands the mean of the five digits by the probabilities that it gave them
there: a finer figure, and how much of the probability was on digits at all. An answer without a digit is
told as such.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stream_r1.evaluation.judge_model import JudgeModel
from stream_r1.evaluation.plan import JudgeSettings
from stream_r1.files import FileError, read_text
from stream_r1.recipe import locate
from stream_r1.rewards import qwen_pixels
from stream_r1.sampling.video_file import VideoFile

AXES = {
    "rating": ("visual quality", "motion dynamics", "text alignment"),
    "videoscore2": ("visual quality", "text-to-video alignment", "physical/common-sense consistency"),
}
FIELD = "{text_prompt}"
_HEAD = f"""These are frames of a video, in order. A program made the video for this text:
"{FIELD}"

Rate the video on three axes. Give each axis one whole number:
1 is bad, 2 is poor, 3 is fair, 4 is good, 5 is excellent.
"""
QUESTIONS = {
    "rating": _HEAD
    + """- visual quality: is the picture sharp, clean and well lit, from the first frame to the last?
- motion dynamics: is there enough motion, and is it smooth and as such things move?
- text alignment: does the video show everything that the text says, and nothing against it?

Answer with these three lines, each ending in your number, and nothing else:
visual quality:
motion dynamics:
text alignment:
""",
    "videoscore2": _HEAD
    + """(1) visual quality: is the picture sharp, clean and steady?
(2) text-to-video alignment: does the video show what the text says?
(3) physical/common-sense consistency: does everything behave as it would in the world?

Think first if you like. End with one line for each axis, its name, a colon and your number.
""",
}
_AGAIN = "\nYour last answer lacked a number. Write each axis with one whole number from 1 to 5.\n"
_PIECE = 32  # frames that are decoded at a time
_NUMBER = r"(?<![\d.])[1-5](?![\d.]\d|\d|\s*[-–]\s*\d)"

Size = Callable[[int, int], tuple[int, int]]


class Rating(NamedTuple):
    """On one axis.

    digit: that was written, 1 to 5. expected: mean of 1 to 5 by the model's probabilities at that place.
    on_digits: share of the probability that the five digits had there. Each None where no digit was written.
    tries: how often it was asked. answer: its last one.
    """

    digit: int | None
    expected: float | None
    on_digits: float | None
    tries: int
    answer: str


class Judge:
    """A model that rates videos.

    Args:
        model: answers questions about frames.
        settings: how much it is shown, and how often it is asked.
        question: with {text_prompt} once; None: that of `settings.kind`.
    """

    def __init__(self, model: JudgeModel, settings: JudgeSettings, question: str | None = None) -> None:
        self.model, self.settings = model, settings
        self.question = question or QUESTIONS[settings.kind]
        if self.question.count(FIELD) != 1:
            times = self.question.count(FIELD)
            raise ValueError(f"Judge: question: expected {FIELD} once, found it {times} times")
        self.axes = AXES[settings.kind]

    @classmethod
    def from_folder(cls, settings: JudgeSettings) -> Judge:
        """Loads the model, and the question where the settings name a file.

        Raises:
            FileError: files that can't be used.
        """
        question = None
        if settings.instruction is not None:
            path = locate(settings.instruction)
            question = read_text(path, "a question for a judge", 2**18)
            if question.count(FIELD) != 1:
                raise FileError(f"{path}: expected {FIELD} once, found it {question.count(FIELD)} times")
        model = JudgeModel.from_folder(locate(settings.folder), dtype=settings.dtype, device=settings.device)
        return cls(model, settings, question)

    def rate(self, path: Path, prompt: str, *, frames: int, fps: float) -> dict[str, Rating]:
        """Ratings by axis of a video file of so many frames, `fps` a second; it sees `shown_frames`."""
        settings = self.settings
        seen = shown_frames(path, frames, fps, shown=settings.fps, most=settings.max_frames, size=self._size)
        return self.rate_frames(*seen, prompt)

    def rate_frames(self, frames: Tensor, seconds: Sequence[float], prompt: str) -> dict[str, Rating]:
        """Ratings of frames [T, 3, H, W] in [0, 1], T even, that are seen at these seconds."""
        seen = self.model.see(frames, seconds)
        ratings: dict[str, Rating] = {}
        for attempt in range(1 + self.settings.retries):
            question = self.question.replace(FIELD, prompt) + (_AGAIN if attempt else "")
            answer = self.model.answer(
                seen, question, max_tokens=self.settings.max_tokens, seed=attempt or None
            )
            for axis in self.axes:
                if axis not in ratings or ratings[axis].digit is None:
                    ratings[axis] = self._read(axis, answer.tokens, answer.logits, attempt + 1)
            if all(rating.digit is not None for rating in ratings.values()):
                break
        return {axis: ratings[axis] for axis in self.axes}

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return qwen_pixels.fit_size(
            height,
            width,
            min_pixels=min(64 * 28 * 28, self.settings.max_pixels),
            max_pixels=self.settings.max_pixels,
            multiple=self.model.multiple,
        )

    def _read(self, axis: str, tokens: list[int], logits: Tensor, tries: int) -> Rating:
        text = self.model.text(tokens)
        place = find_digit(text, axis)
        if place is None:
            return Rating(None, None, None, tries, text)
        digit, expected, share = int(text[place]), None, None
        at = next(n for n in range(len(tokens)) if len(self.model.text(tokens[: n + 1])) > place)
        if tokens[at] == self.model.digits[digit - 1]:  # else it was written as a part of a longer token
            chances = logits[at].double().softmax(-1)[self.model.digits]
            share = float(chances.sum())
            expected = float((chances * torch.arange(1, 6, dtype=torch.float64)).sum() / chances.sum())
        return Rating(digit, expected, share, tries, text)


def find_digit(text: str, axis: str) -> int | None:
    """Where an answer has the number of an axis: the last place where its name is followed by one.

    A number from 1 to 5 by itself, at most 12 characters that are no digits behind the name; 10, 4.5, 45
    and 1-5 are none.
    """
    found = list(re.finditer(re.escape(axis) + r"[^\d\n]{0,12}?" + _NUMBER, text, re.IGNORECASE))
    return found[-1].end() - 1 if found else None


def shown_frames(
    path: Path, total: int, fps: float, *, shown: float, most: int, size: Size
) -> tuple[Tensor, list[float]]:
    """The frames that a judge sees of a video, and their seconds: `shown` a second, `most` at most, spread
    evenly from the first to the last, an even number. They alone are in memory, at their reduced size.

    Args:
        total: frames of the video, `fps` a second.
        size: from height and width of the video to those of what is shown.
    """
    rate = min(shown, most * fps / total)
    chosen = qwen_pixels.choose_frames(total, video_fps=fps, fps=rate)[: most // 2 * 2]
    wanted, kept, number = set(chosen), {}, 0
    with VideoFile(path) as file:
        for piece in file.pieces(_PIECE):
            for frame in piece:
                if number in wanted:
                    kept[number] = qwen_pixels.resize(frame[None, None], size(*frame.shape[-2:]))[0, 0]
                number += 1
    if number != total:
        raise ValueError(f"shown_frames: path: expected {total} frames, got {number} in {path}")
    return torch.stack([kept[number] for number in chosen]), [number / fps for number in chosen]
