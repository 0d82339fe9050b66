"""Qwen's vision-language models (Qwen3-VL, Qwen2.5-VL, Qwen2-VL) as one that answers questions about frames.

The model is transformers' own. Frames are cut into patches as tensors, as the VideoAlign reward does it:
transformers' processors of videos work on files and need torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stream_r1.files import FileError, read_json
from stream_r1.messages import shown
from stream_r1.models.library import read_library_model, read_tokenizer
from stream_r1.rewards import qwen_pixels

_VIDEO, _START, _END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
_TEMPERATURE = 0.7  # of an answer that is asked for again
# ChatML, for a tokenizer that brings no template of its own
_CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
_HALVES = (0.5, 0.5, 0.5)
_PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Seen:
    """Frames as the model reads them.

    patches: [N, values a patch]. grid: patches in time, rows and columns. seconds: of each frame.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """tokens: that were written, without the end. logits: [tokens, vocabulary] float32, of each before it was
    chosen.
    """

    tokens: list[int]
    logits: Tensor


class JudgeModel:
    """A Qwen vision-language model and its tokenizer.

    Args:
        model: of transformers, in eval mode.
        tokenizer: its own.
        mean, std: a channel, of the pixels that it was trained on.

    Raises:
        ValueError: a tokenizer without one token a digit.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mean: Sequence[float] = _HALVES, std: Sequence[float] = _HALVES
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._vision = model.config.vision_config
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        rows = [tokenizer.encode(str(n), add_special_tokens=False) for n in range(1, 6)]
        if any(len(row) != 1 for row in rows):
            raise ValueError(
                f"JudgeModel: tokenizer: expected one token for each digit from 1 to 5, got {rows}"
            )
        self.digits: list[int] = [row[0] for row in rows]
        added = tokenizer.added_tokens_decoder
        self._special: dict[str, int] = {str(token): n for n, token in added.items() if token.special}

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: str = "auto", device: str = "auto") -> JudgeModel:
        """Raises FileError for files that can't be used, FileNotFoundError where there is no config.json."""
        import transformers

        kinds = {
            "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
            "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
            "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        }
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: expected a folder with the config.json of a judge")
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in kinds:
            raise FileError(
                f"{folder / 'config.json'}: expected model_type {', '.join(kinds)}, got {shown(kind)}"
            )
        gpu = torch.cuda.is_available()
        target = torch.device(("cuda" if gpu else "cpu") if device == "auto" else device)
        of_type = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            dtype, torch.bfloat16 if target.type == "cuda" else torch.float32
        )
        model = read_library_model(kinds[kind], folder, dtype=of_type).to(target).eval()
        clip = kind != "qwen3_vl"
        mean = qwen_pixels.PIXEL_MEAN if clip else _HALVES
        std = qwen_pixels.PIXEL_STD if clip else _HALVES
        for name in _PROCESSORS:
            if (folder / name).is_file():
                told = read_json(folder / name)
                mean, std = told.get("image_mean", mean), told.get("image_std", std)
                break
        return cls(model, read_tokenizer(folder), mean, std)

    @property
    def multiple(self) -> int:
        """What the sides of frames must be multiples of."""
        return int(self._vision.patch_size * self._vision.spatial_merge_size)

    @property
    def _per_patch(self) -> int:
        return int(self._vision.temporal_patch_size)

    def see(self, frames: Tensor, seconds: Sequence[float]) -> Seen:
        """Frames [T, 3, H, W] in [0, 1]: T fills temporal patches, sides are multiples of `multiple`."""
        patches, grid = qwen_pixels.patchify(
            ((frames - self._mean) / self._std)[None],
            patch=self._vision.patch_size,
            frames=self._per_patch,
            merge=self._vision.spatial_merge_size,
        )
        return Seen(patches[0], grid, tuple(seconds))

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.inference_mode()
    def answer(self, seen: Seen, question: str, *, max_tokens: int, seed: int | None = None) -> Answer:
        """The model's answer.

        Args:
            seed: None: the likeliest token each; else drawn by it.

        Raises:
            ValueError: a question with one of the model's own tokens in it.
        """
        tokens = self.tokens(seen, question)
        device = self.model.device
        ids = torch.tensor([tokens], device=device)
        video = ids == self.tokenizer.convert_tokens_to_ids(_VIDEO)
        timing = {}
        if self.model.config.model_type == "qwen2_5_vl":
            gap = (seen.seconds[-1] - seen.seconds[0]) / max(len(seen.seconds) - 1, 1)
            timing["second_per_grid_ts"] = torch.tensor([gap * self._per_patch], device=device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if seed is not None:
            drawn = {"do_sample": True, "temperature": _TEMPERATURE, "top_p": 1.0, "top_k": 0}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed or 0)
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=2 * video.int(),  # 0 is text, 2 video
                pixel_values_videos=seen.patches.to(device, self.model.dtype),
                video_grid_thw=torch.tensor([seen.grid], device=device),
                max_new_tokens=max_tokens,
                output_logits=True,
                return_dict_in_generate=True,
                **timing,
                **drawn,
            )
        written: list[int] = made.sequences[0, len(tokens) :].tolist()
        ends = set(self._special.values())
        length = next((n for n, token in enumerate(written) if token in ends), len(written))
        logits = (
            torch.stack([step[0].float().cpu() for step in made.logits[:length]])
            if length
            else torch.empty(0)
        )
        return Answer(written[:length], logits)

    def tokens(self, seen: Seen, question: str) -> list[int]:
        """Token numbers of frames and question, up to where the model answers."""
        held = [token for token in self._special if token in question]
        if held:
            raise ValueError(
                f"JudgeModel: question: expected none of the model's own tokens, got {', '.join(held)}"
            )
        asked = self._places(seen) + question
        if self.tokenizer.chat_template:
            told = [{"role": "user", "content": asked}]
            text = self.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        else:
            text = _CHAT.format(question=asked)
        row: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return row

    def _places(self, seen: Seen) -> str:
        """Where the frames are in the text: Qwen3-VL has the time before each patch in time."""
        count, rows, columns = seen.grid
        each = _VIDEO * (rows * columns // self._vision.spatial_merge_size**2)
        if self.model.config.model_type != "qwen3_vl":
            return f"{_START}{each * count}{_END}"
        n = self._per_patch
        times = [(seen.seconds[n * k] + seen.seconds[n * k + n - 1]) / 2 for k in range(count)]
        return "".join(f"<{time:.1f} seconds>{_START}{each}{_END}" for time in times)
