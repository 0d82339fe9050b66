"""The small video reward: a frozen ImageNet network, MiniLM sentence vectors, three heads.

It judges visual quality (VQ), motion quality (MQ) and text alignment (TA) as VideoAlign does, at a size that
two CPU cores differentiate in well under a second. `stream_r1/tiny_world/reward.py` trains the heads.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from stream_r1.disk.whole import written
from stream_r1.files import FileError, read_json
from stream_r1.messages import first_line, shown
from stream_r1.models.checkpoints import check_fit
from stream_r1.models.tensor_files import read_file, require_finite
from stream_r1.models.text import MiniLMEncoder, TextEncoder
from stream_r1.rewards.base import ScoreNormalizer, check_video
from stream_r1.rewards.small_features import NETWORKS, FeatureExtractor, Features

AXES = ("VQ", "MQ", "TA")
_SENTENCE = 384


class SmallHeads(nn.Module):
    """Features -> raw scores. A hundred thousand parameters, the only ones that are trained.

    Args:
        sizes: numbers in appearance, motion and content, as `FeatureExtractor.sizes`.
        hidden: width of the two perceptrons.
        shared: width of the space in which content and sentence meet.
    """

    def __init__(self, sizes: tuple[int, int, int], hidden: int = 64, shared: int = 64):
        super().__init__()
        appearance, motion, content = sizes
        self.appearance_scale = _Standardize(appearance)
        self.motion_scale = _Standardize(motion)
        self.content_scale = _Standardize(content)
        self.visual = _perceptron(appearance, hidden)
        self.motion = _perceptron(motion, hidden)
        self.content_projection = nn.Sequential(nn.Dropout(0.3), nn.Linear(content, shared))
        self.sentence_projection = nn.Sequential(nn.Dropout(0.1), nn.Linear(_SENTENCE, shared))

    def forward(self, features: Features, sentences: Tensor) -> Tensor:
        """features of B videos, sentences [B, 384] -> raw scores [B, 3]."""
        content, text = self.meet(features.content, sentences)
        return torch.stack(
            [
                self.visual_score(features.appearance),
                self.motion_score(features.motion),
                (content * text).sum(1),
            ],
            1,
        )

    def visual_score(self, appearance: Tensor) -> Tensor:
        """[B, T, a] -> [B]: every frame is judged, then averaged."""
        return self.visual(self.appearance_scale(appearance)).squeeze(-1).mean(1)

    def motion_score(self, motion: Tensor) -> Tensor:
        """[B, m] -> [B]."""
        return self.motion(self.motion_scale(motion)).squeeze(-1)

    def meet(self, content: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """[B, c] and [N, 384] -> unit vectors [B, shared] and [N, shared]."""
        projected = self.content_projection(self.content_scale(content))
        return F.normalize(projected, dim=-1), F.normalize(self.sentence_projection(sentences), dim=-1)


class SmallReward(nn.Module):
    """A `Reward` with the axes VQ, MQ and TA, for small videos (the heads are trained at 64 x 112, 24 fps).

    Scores are normalised over clean and corrupted clips together, half each: a clean clip with its own
    caption scores about +0.7 an axis, a badly corrupted one about -1 or less, so that `exp(2 r)` stays within
    a few powers of e.

    Args:
        features: what it sees.
        heads: trained heads for these features.
        normalizer: one mean and deviation an axis.
        max_frames: longer videos are scored as the mean over windows of `window_frames` spread evenly over
            them, at most `max_frames` in all; frames between the windows then have no gradient.
        window_frames: frames of a window.
        text_encoder: gives MiniLM token states [B, L, 384], zero-padded; loaded at the first prompt if not
            given.
    """

    axes: tuple[str, ...] = AXES

    def __init__(
        self,
        features: FeatureExtractor,
        heads: SmallHeads,
        normalizer: ScoreNormalizer,
        *,
        max_frames: int = 84,
        window_frames: int = 21,
        text_encoder: TextEncoder | None = None,
    ):
        super().__init__()
        if not 3 <= window_frames <= max_frames:
            raise ValueError(
                "SmallReward: window_frames: expected 3 <= window_frames <= max_frames, "
                f"got {window_frames} and {max_frames}"
            )
        self.heads = heads.eval().requires_grad_(False)
        self.normalizer = normalizer
        self.features = features
        self.max_frames = max_frames
        self.window_frames = window_frames
        self._text_encoder = text_encoder

    def score(self, video: Tensor, prompts: list[str]) -> Tensor:
        """Scores VQ, MQ and TA of a batch.

        Args:
            video: [B, T, 3, H, W] floating point in [0, 1], any T >= 1 and any size (resized to 64 x 112).
            prompts: B captions.

        Returns:
            [B, 3] float32, differentiable in `video`.
        """
        check_video(video, prompts, name="SmallReward.score")
        if video.shape[0] == 0:
            return video.new_zeros(0, len(self.axes), dtype=torch.float32)
        windows = self._windows(video)  # [B, n, t, 3, H, W]
        count = windows.shape[1]
        sentences = sentence_vectors(self._encoder(), prompts).to(video.device).repeat_interleave(count, 0)
        with torch.autocast(video.device.type, enabled=False):
            raw = self.heads(self.features(windows.flatten(0, 1)), sentences)
            return self.normalizer(raw).unflatten(0, (-1, count)).mean(1)

    def _encoder(self) -> TextEncoder:
        if self._text_encoder is None:
            self._text_encoder = MiniLMEncoder()
        return self._text_encoder

    def _windows(self, video: Tensor) -> Tensor:
        frames, length = video.shape[1], self.window_frames
        if frames <= self.max_frames:
            return video[:, None]
        count = self.max_frames // length
        starts = [index * (frames - length) // max(count - 1, 1) for index in range(count)]
        return torch.stack([video[:, start : start + length] for start in starts], 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `heads.safetensors`."""
        config = {
            "type": "small",
            "network": self.features.network,
            "axes": list(self.axes),
            "mean": self.normalizer.mean.tolist(),
            "std": self.normalizer.std.tolist(),
            "hidden": self.heads.visual[1].out_features,
            "shared": self.heads.content_projection[1].out_features,
            "max_frames": self.max_frames,
            "window_frames": self.window_frames,
        }
        heads = {name: value.contiguous() for name, value in self.heads.state_dict().items()}
        with written(folder, replaces="heads.safetensors") as place:
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(heads, place / "heads.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, text_encoder: TextEncoder | None = None) -> SmallReward:
        """Reads what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the config is of another reward or other axes.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        if config.get("type") != "small" or config.get("axes") != list(AXES):
            raise ValueError(
                f'SmallReward.from_pretrained: folder: expected type "small", axes {list(AXES)} in {folder}, '
                f"got {shown(config.get('type'))} with {shown(config.get('axes'))}"
            )
        network = config.get("network")
        if network not in NETWORKS:
            told = f"network: expected one of {', '.join(NETWORKS)}, got {shown(network)}"
            raise FileError(f"{folder / 'config.json'}: {told}")
        features = FeatureExtractor(network)
        try:
            heads = SmallHeads(features.sizes, config["hidden"], config["shared"])
            normalizer = ScoreNormalizer(config["mean"], config["std"])
            frames = {name: config[name] for name in ("max_frames", "window_frames")}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            told = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise FileError(f"{folder / 'config.json'}: not a small reward's settings: {told}") from None
        weights = read_file(folder / "heads.safetensors")
        check_fit(heads, weights, str(folder / "heads.safetensors"))
        require_finite(weights.items(), str(folder / "heads.safetensors"))
        heads.load_state_dict(weights)
        return cls(features, heads, normalizer, text_encoder=text_encoder, **frames)


@torch.no_grad()
def sentence_vectors(encoder: TextEncoder, prompts: list[str]) -> Tensor:
    """N prompts -> unit vectors [N, 384]: the mean of MiniLM's token states (arXiv 1908.10084)."""
    states = encoder.encode(prompts).float()  # [N, L, 384], zeros where there is no token
    tokens = states.abs().amax(-1, keepdim=True) > 0
    return F.normalize(states.sum(1) / tokens.sum(1).clamp(min=1), dim=-1)


class _Standardize(nn.Module):
    """(x - mean) / std with the training set's statistics, kept with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def fit(self, examples: Tensor) -> None:
        """Takes the statistics of examples [..., features]."""
        examples = examples.flatten(0, -2)
        self.mean.copy_(examples.mean(0))
        self.std.copy_(examples.std(0) + 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        # Beyond a few deviations nothing was learnt: bounded, so that no single odd feature decides.
        return 4 * torch.tanh((x - self.mean) / self.std / 4)


def _perceptron(features: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.1), nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, 1))
