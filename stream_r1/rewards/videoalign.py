"""VideoAlign's VideoReward: Qwen2-VL judges visual quality, motion quality and text alignment.

The video and a long instruction with three added tokens go through the model once; a linear head reads each
score at its token. Source: "Improving Video Generation with Human Feedback" (arXiv 2501.13918). Unlike the
public code it takes a whole batch and is differentiable from the pixels to the scores.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stream_r1.config import Settings, build
from stream_r1.files import FileError, read_json, read_text
from stream_r1.rewards import qwen_pixels
from stream_r1.rewards.base import ScoreNormalizer, check_video
from stream_r1.rewards.videoalign_checkpoint import (
    AXES,
    REWARD_TOKENS,
    VIDEO_TOKEN,
    RewardNetwork,
    load_network,
)

log = logging.getLogger(__name__)

# Of the published instruction, the blanks at its line ends included: any change of it changes the scores.
PUBLISHED_INSTRUCTION_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
# Qwen2-VL's chat format around one user message with a video, up to where the model would answer.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{VIDEO_TOKEN}<|vision_end|>%s<|im_end|>\n<|im_start|>assistant\n"
)
_PROMPT_FIELD = "{text_prompt}"
_MOST_INSTRUCTION = 2**18  # bytes


class VideoAlignSettings(Settings):
    """How a VideoReward checkpoint is run: the keys of a `config.json` beside or above it, all optional.

    type: what kind of reward the folder holds.
    checkpoint: the folder with `model_config.json` and `checkpoint-*`, relative to the `config.json`'s.
    step: which `checkpoint-<step>`; None: the last.
    base_model: folder (relative to the `config.json`'s) or hub name of Qwen2-VL-2B-Instruct; None: what
        `model_config.json` names.
    instruction: text file (relative to the `config.json`'s folder) with the instruction that the weights were
        trained with, holding {text_prompt} and the reward tokens; None: `instruction.txt` beside
        `model_config.json`.
    template: the instruction itself, instead of a file.
    video_fps: frames a second of the videos that are scored (Wan: 16).
    fps: frames a second that the model is shown. "checkpoint": as it was trained, 2. "all": every frame, as
        Stream-R1's public code does; then every frame has a gradient.
    min_pixels, max_pixels: of a resized frame; max_pixels None: the checkpoint's, 448 * 448.
    dtype: of the weights; "auto": bfloat16 on an accelerator, float32 on a CPU.
    gradient_checkpointing: keep a layer's input alone for the backward, and compute the layer again there.
    samples_at_once: videos that go through the model together; None: all.
    compat: "official": gradients land where Stream-R1's public code puts them, mostly not where they belong
        (see `qwen_pixels.patchify`). For comparisons.
    """

    type: Literal["videoalign"] = "videoalign"
    checkpoint: str = "."
    step: int | None = None
    base_model: str | None = None
    instruction: str | None = None
    template: str | None = None
    video_fps: float = Field(default=16.0, gt=0)
    fps: Annotated[float, Field(gt=0)] | Literal["checkpoint", "all"] = "checkpoint"
    min_pixels: int = Field(default=128 * 28 * 28, ge=1)
    max_pixels: int | None = Field(default=None, ge=28 * 28)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = True
    samples_at_once: int | None = Field(default=None, ge=1)
    compat: Literal["official"] | None = None


class VideoAlignReward(nn.Module):
    """A `Reward` with the axes VQ, MQ and TA.

    Args:
        network: a checkpoint in memory (`videoalign_checkpoint.load_network`).
        template: the instruction, with {text_prompt} and each reward token.
        settings: those about files (`checkpoint`, `instruction`, `dtype`, ...) are of no use here.

    Raises:
        ValueError: a template without exactly one of {text_prompt} and of each reward token.
    """

    axes: tuple[str, ...] = AXES

    def __init__(self, network: RewardNetwork, template: str, settings: VideoAlignSettings | None = None):
        super().__init__()
        self.settings = settings = settings or VideoAlignSettings()
        self.model = network.model
        if settings.gradient_checkpointing:
            # transformers' own switch acts in training mode only, and makes token embeddings need gradients.
            for layer in (*self.model.visual.blocks, *self.model.language_model.layers):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.head = nn.Buffer(network.head, persistent=False)
        self.normalizer = ScoreNormalizer(network.config.mean, network.config.std).to(network.head.device)
        self.tokenizer = network.tokenizer
        self.template = template
        if told := _missing_parts(template):
            raise ValueError(f"VideoAlignReward: template: {told}")
        fps = network.config.fps if settings.fps == "checkpoint" else settings.fps
        self.fps: float | None = None if fps == "all" else float(fps)
        self.max_pixels = settings.max_pixels or network.config.max_pixels
        self._video_token = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        self._reward_tokens = self.tokenizer.convert_tokens_to_ids(list(REWARD_TOKENS))

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores VQ, MQ and TA of a batch.

        Args:
            video: [B, T, 3, H, W] floating point in [0, 1], at `settings.video_fps` frames a second.
            prompts: B of them, put into the instruction as they are, without the cleaning that Wan's
                tokenizer does: that belongs to another model.

        Returns:
            [B, 3] float32, normalised by the checkpoint's means and deviations; differentiable in `video`
            (frames that are not shown have no gradient, see `settings.fps`).

        Raises:
            ValueError: a prompt holds one of the model's own tokens, such as <|video_pad|>.
        """
        check_video(video, prompts, name="VideoAlignReward.score")
        at_once = self.settings.samples_at_once or max(len(prompts), 1)
        scores = [
            self._score(video[start : start + at_once], prompts[start : start + at_once])
            for start in range(0, len(prompts), at_once)
        ]
        return torch.cat(scores) if scores else video.new_zeros(0, len(AXES), dtype=torch.float32)

    def _score(self, video: Tensor, prompts: list[str]) -> Tensor:
        patches, grid = self._patches(video)
        tokens = self._tokens(prompts, grid)  # [B, L]
        with torch.autocast(self.head.device.type, enabled=False):
            # VideoReward was trained without Qwen2-VL's three-dimensional positions: one count for all three.
            # Padding lies behind all that is read and attention is causal: no mask, so fast kernels serve.
            states = self.model(
                input_ids=tokens,
                position_ids=torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape),
                pixel_values_videos=patches.flatten(0, 1),
                video_grid_thw=torch.tensor([grid] * len(prompts), device=tokens.device),
                use_cache=False,
            ).last_hidden_state  # [B, L, width]
            raw = self._read(states, tokens)
            return self.normalizer(raw).to(video.device)

    def _patches(self, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, T, 3, H, W] -> [B, patches, values a patch], and their number in time, rows and columns."""
        vision = self.model.config.vision_config
        frames = qwen_pixels.choose_frames(
            video.shape[1],
            video_fps=self.settings.video_fps,
            fps=self.fps,
            multiple=vision.temporal_patch_size,
        )
        size = qwen_pixels.fit_size(
            *video.shape[-2:],
            min_pixels=min(self.settings.min_pixels, self.max_pixels),
            max_pixels=self.max_pixels,
            multiple=vision.patch_size * vision.spatial_merge_size,
        )
        shown = video[:, frames].to(self.head.device, torch.float32)
        return qwen_pixels.patchify(
            qwen_pixels.normalise(qwen_pixels.resize(shown, size)),
            patch=vision.patch_size,
            frames=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            misplaced=self.settings.compat == "official",
        )

    def _tokens(self, prompts: list[str], grid: tuple[int, int, int]) -> Tensor:
        """[B, L] token numbers; the video's place is as long as its tokens, padding is on the right."""
        merge = self.model.config.vision_config.spatial_merge_size
        places = grid[0] * grid[1] * grid[2] // merge**2
        rows = []
        for prompt in prompts:
            text = _CHAT % self.template.replace(_PROMPT_FIELD, prompt)
            row: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if any(row.count(token) != 1 for token in (self._video_token, *self._reward_tokens)):
                raise ValueError(
                    "VideoAlignReward.score: prompts: expected none of the tokens "
                    f"{', '.join((VIDEO_TOKEN, *REWARD_TOKENS))} in a prompt, got {prompt!r}"
                )
            start = row.index(self._video_token)
            rows.append(torch.tensor(row[:start] + [self._video_token] * places + row[start + 1 :]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.head.device)

    def _read(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[B, L, width] -> raw scores [B, 3], one at each reward token."""
        wanted = tokens.new_tensor(self._reward_tokens)
        at = (tokens[:, None] == wanted[:, None]).int().argmax(-1)  # [B, 3]
        states = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1])).float()  # [B, 3, width]
        # One row reads all scores; of three, each reads its own.
        return (states * self.head).sum(-1)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", **settings: Any
    ) -> VideoAlignReward:
        """Loads a published VideoReward folder, or a folder whose `config.json` says how to run one.

        Args:
            folder: has `model_config.json`, or a `config.json` with "type": "videoalign".
            settings: of `VideoAlignSettings`, over those of the `config.json`.

        Raises:
            FileNotFoundError: no instruction, or what `videoalign_checkpoint.load_network` misses.
            FileError, ValueError: see `videoalign_checkpoint.load_network`.
            SettingsError: settings that don't exist or don't fit.
        """
        folder = Path(folder)
        path = folder / "config.json"
        content = read_json(path) if path.is_file() else {}
        if content.get("type") != "videoalign":
            content = {}  # the base model's own configuration, which VideoAlign's training leaves there
        chosen = build(VideoAlignSettings, content | settings, str(path))
        template = chosen.template
        if template is None:
            checkpoint_folder = folder / chosen.checkpoint
            template = read_instruction(
                folder / chosen.instruction if chosen.instruction else checkpoint_folder / "instruction.txt"
            )
        base = chosen.base_model
        if base is not None and (folder / base).is_dir():
            base = str(folder / base)
        automatic = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        network = load_network(
            folder / chosen.checkpoint,
            base_model=base,
            step=chosen.step,
            dtype=automatic if chosen.dtype == "auto" else getattr(torch, chosen.dtype),
            device=device,
        )
        return cls(network, template, chosen)


def read_instruction(path: Path) -> str:
    """The instruction in a UTF-8 file, to the letter; a line in the log where it is not the published one.

    Raises:
        FileNotFoundError: no such file; the message says where the published text is.
        FileError: it is not in UTF-8, or is no template, see `VideoAlignReward`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"VideoAlignReward: instruction: expected the text that the weights were trained with in {path}; "
            'the published weights\' is "detailed_special" in prompt_template.py of KwaiVGI/VideoAlign '
            "(docs/reward-videoalign.md)"
        )
    text = read_text(path, "an instruction", _MOST_INSTRUCTION)  # line ends included
    if told := _missing_parts(text):
        raise FileError(f"{path}: {told}")
    if hashlib.sha256(text.encode()).hexdigest() != PUBLISHED_INSTRUCTION_SHA256:
        log.warning("%s is not the instruction that the published VideoReward was trained with", path)
    return text


def _missing_parts(template: str) -> str:
    """What a template has not once, "" where it has everything."""
    counts = {part: template.count(part) for part in (_PROMPT_FIELD, *REWARD_TOKENS)}
    wrong = [f"expected {part} once, found it {times} times" for part, times in counts.items() if times != 1]
    return wrong[0] if wrong else ""
