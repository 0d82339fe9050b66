"""The tiny world's reward: the heads of a `SmallReward`, trained on drawings.

Pairs teach the order: a clip above its corrupted version, a weak corruption above a strong one, its own
prompt above every other one. Each axis is taught to ignore what belongs to another one. Features are computed
once; the heads then train in seconds. The report compares on held-out clips, with corruptions seen and never
seen in training, and with prompts that are wrong in one word.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stream_r1.config import Settings
from stream_r1.disk.whole import write_text
from stream_r1.drawn_world import HELD_OUT, Scene, all_scenes, draw_random
from stream_r1.models.text import MiniLMEncoder
from stream_r1.rewards import corruptions
from stream_r1.rewards.base import ScoreNormalizer
from stream_r1.rewards.corruptions import Corruption
from stream_r1.rewards.small import AXES, SmallHeads, SmallReward, sentence_vectors
from stream_r1.rewards.small_features import FeatureExtractor, Features

log = logging.getLogger(__name__)

_LEAST_CHANGE = 1 / 255  # a corruption that changes the clip less (mean absolute) proves nothing
_FIGURES = ("clean_above_weak", "clean_above_strong", "weak_above_strong", "any_clean_above_strong")


class RewardTrainingSettings(Settings):
    """How the heads are trained.

    out: folder that the reward is written to.
    network: that it sees through.
    seed: of the clips, their corruptions and the heads: two seeds have nothing in common.
    frames: of a clip.
    clips: how many are corrupted.
    plain_clips: more clips, for the prompts alone.
    held_out: clips of the report.
    kinds_per_clip: corruptions an axis that each training clip is corrupted by.
    weak: range of the strength of "a little"; "much" is twice as strong.
    steps, batch, learning_rate, weight_decay: of the heads' training.
    neutrality: weight of ignoring what is another axis' in the loss.
    """

    out: str
    network: Literal["lite0", "lite2"] = "lite0"
    seed: int = Field(default=0, ge=0)
    frames: int = Field(default=21, ge=3)
    clips: int = Field(default=300, ge=1)
    plain_clips: int = Field(default=500, ge=1)
    held_out: int = Field(default=12, ge=2)
    kinds_per_clip: int = Field(default=1, ge=1)
    weak: tuple[float, float] = (0.25, 0.5)
    steps: int = Field(default=800, ge=1)
    batch: int = Field(default=48, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    neutrality: float = Field(default=0.3, ge=0)


class SpoiltClips(NamedTuple):
    """Features of N clips; version 0 of each is clean, then come K x (weak, strong) corrupted ones."""

    features: Features  # appearance [N, 1+2K, T, a] float16, motion [N, 1+2K, m], content [N, 1+2K, c]
    kinds: np.ndarray  # [N, K] names
    changed: Tensor  # [N, K] bool: the strong version differs visibly
    scenes: Tensor  # [N], into all_scenes()


def train_reward(settings: RewardTrainingSettings) -> None:
    """Train the heads and write `config.json`, `heads.safetensors` and `metrics.json` into ``settings.out``.

    The same settings on the same machine give the same heads.
    """
    clip_rng, batch_rng = (np.random.default_rng([settings.seed, part]) for part in range(2))
    extract = FeatureExtractor(settings.network)
    sentences = sentence_vectors(MiniLMEncoder(), [scene.prompt for scene in all_scenes()])
    groups = (corruptions.VISUAL, corruptions.MOTION)
    every = {**groups[0], **groups[1], **corruptions.VISUAL_UNSEEN, **corruptions.MOTION_UNSEEN}

    def some_kinds() -> list[str]:
        chosen = (clip_rng.permutation(list(group))[: settings.kinds_per_clip] for group in groups)
        return [str(kind) for kinds in chosen for kind in kinds]

    seeds = clip_rng.integers(HELD_OUT, size=settings.clips + settings.plain_clips).tolist()
    held_out = list(range(HELD_OUT, HELD_OUT + settings.held_out))
    train, plain, test = (
        _spoilt_clips(chosen, kinds, every, extract, settings, clip_rng)
        for chosen, kinds in (
            (seeds[: settings.clips], some_kinds),
            (seeds[settings.clips :], list),
            (held_out, lambda: list(every)),
        )
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        heads = _fit(train, plain, sentences, extract.sizes, settings, batch_rng)
    normalizer, metrics = _report(heads, test, sentences)
    out = Path(settings.out)
    SmallReward(extract, heads, normalizer).save_pretrained(out)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    log.info("%s: %s", out, metrics["pair_accuracy"])


@torch.no_grad()
def _spoilt_clips(
    seeds: Sequence[int],
    draw_kinds: Callable[[], list[str]],
    every: Mapping[str, Corruption],
    extract: FeatureExtractor,
    settings: RewardTrainingSettings,
    rng: np.random.Generator,
) -> SpoiltClips:
    appearance, motion, content, kinds, changed, shown = [], [], [], [], [], []
    scenes = all_scenes()
    for number, seed in enumerate(seeds):
        drawing = draw_random(scenes, seed, settings.frames)
        shown.append(scenes.index(drawing.scene))
        clip = torch.from_numpy(drawing.frames).movedim(-1, 1).float() / 255  # [T, 3, H, W]
        chosen = draw_kinds()
        versions = [clip]
        for kind in chosen:
            weak, seed_here = rng.uniform(*settings.weak), int(rng.integers(2**31))
            versions += [
                every[kind](clip, strength, np.random.default_rng(seed_here)) for strength in (weak, 2 * weak)
            ]
        video = (torch.stack(versions) * 255).round() / 255  # what a file would hold
        # One version at a time: what a pass touches then fits the caches.
        features = Features(*map(torch.cat, zip(*(extract(v[None]) for v in video), strict=True)))
        appearance.append(features.appearance.half())
        motion.append(features.motion)
        content.append(features.content)
        kinds.append(chosen)
        changed.append((video[2::2] - clip).abs().mean((1, 2, 3, 4)) >= _LEAST_CHANGE)
        if number % 50 == 0:
            log.info("clip %d of %d", number, len(seeds))
    features = Features(torch.stack(appearance), torch.stack(motion), torch.stack(content))
    return SpoiltClips(features, np.array(kinds), torch.stack(changed), torch.tensor(shown))


def _fit(
    train: SpoiltClips,
    plain: SpoiltClips,
    sentences: Tensor,
    sizes: tuple[int, int, int],
    settings: RewardTrainingSettings,
    rng: np.random.Generator,
) -> SmallHeads:
    """Trains new heads on precomputed features; sentences [P, 384] of all scenes."""
    heads = SmallHeads(sizes)
    heads.appearance_scale.fit(train.features.appearance.float())
    heads.motion_scale.fit(train.features.motion)
    heads.content_scale.fit(train.features.content)
    heads.train()
    visual = torch.from_numpy(np.isin(train.kinds, list(corruptions.VISUAL)))  # [N, K]
    neutral = torch.from_numpy(~np.isin(train.kinds, list(corruptions.NOT_NEUTRAL)))
    log_scale = torch.nn.Parameter(torch.tensor(2.5))  # of the softmax over prompts
    optimizer = torch.optim.AdamW(
        [*heads.parameters(), log_scale], settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        b = torch.from_numpy(rng.choice(len(train.scenes), settings.batch))
        # One visual and one motion corruption a clip: column k of `kinds` is versions 1 + 2k (weak) and 2 +
        # 2k (strong).
        k_visual, k_motion = _draw(visual[b], rng), _draw(~visual[b], rng)
        # clean, visual weak, visual strong, motion weak, motion strong; all of the clip b
        v = torch.stack(
            [torch.zeros_like(b), 1 + 2 * k_visual, 2 + 2 * k_visual, 1 + 2 * k_motion, 2 + 2 * k_motion]
        )
        vq = heads.visual_score(train.features.appearance[b, v].float().flatten(0, 1)).view(5, -1)
        mq = heads.motion_score(train.features.motion[b, v])
        vq_neutral = neutral[b, k_motion] * ((vq[3:] - vq[0]).square().mean(0))
        mq_neutral = (mq[1:3] - mq[0]).square().mean(0)
        shown = train.changed[b, k_motion]
        loss = _ranking(vq[0], vq[1], vq[2], train.changed[b, k_visual]) + _ranking(
            mq[0], mq[3], mq[4], shown
        )
        loss = loss + settings.neutrality * (vq_neutral.mean() + mq_neutral.mean())
        loss = loss + 1e-3 * (vq.square().mean() + mq.square().mean())
        # Which of all prompts it is (as CLIP, Radford et al., arXiv 2103.00020), also where the clip is
        # corrupted, and as surely.
        visually = torch.from_numpy(rng.integers(0, 3, len(b)))
        p = torch.from_numpy(rng.choice(len(plain.scenes), settings.batch))
        seen = (
            train.features.content[b, 0],
            train.features.content[b, v.gather(0, visually[None])[0]],
            plain.features.content[p, 0],
        )
        content, text = heads.meet(torch.cat(seen), sentences)
        own = torch.cat([train.scenes[b], train.scenes[b], plain.scenes[p]])
        loss = loss + F.cross_entropy(content @ text.T * log_scale.exp(), own)
        clean, corrupted, _ = content.chunk(3)
        loss = loss + ((clean - corrupted) * text[train.scenes[b]]).sum(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log.info("step %d/%d  loss %.3f", step, settings.steps, loss.item())
    return heads.eval()


def _draw(allowed: Tensor, rng: np.random.Generator) -> Tensor:
    """A random index of a true entry of each row: [N, K] bool -> [N]."""
    return (torch.from_numpy(rng.random(allowed.shape)) * allowed).argmax(1)


def _ranking(clean: Tensor, weak: Tensor, strong: Tensor, shown: Tensor) -> Tensor:
    """Bradley-Terry losses within a clip, and between clips so that their scores can be compared."""
    within = F.softplus(weak - clean) + F.softplus(strong - weak) + F.softplus(strong - clean)
    between = F.softplus(strong[None, :] - clean[:, None]).mean(0) + 0.5 * F.softplus(
        weak[None, :] - clean[:, None]
    ).mean(0)
    return ((within + between) * shown).sum() / shown.sum().clamp(min=1)


@torch.no_grad()
def _report(
    heads: SmallHeads, test: SpoiltClips, sentences: Tensor
) -> tuple[ScoreNormalizer, dict[str, object]]:
    """Constants of the normalisation and the held-out figures."""
    vq = torch.stack([heads.visual_score(a.float()) for a in test.features.appearance])  # [N, 1+2K]
    mq = heads.motion_score(test.features.motion)
    content, text = heads.meet(test.features.content[:, 0], sentences)
    alignment = content @ text.T  # [N, prompts]
    own = F.one_hot(test.scenes, len(text)).bool()
    right, wrong = alignment[own], alignment[~own].view(len(own), -1)
    kinds = [str(kind) for kind in test.kinds[0]]

    def columns(scores: Tensor, group: Mapping[str, Corruption]) -> Tensor:
        chosen = [k for k, kind in enumerate(kinds) if kind in group]
        return torch.cat([scores[:, 1 + 2 * k : 3 + 2 * k] for k in chosen], 1).flatten()

    sides = (
        (vq[:, 0], columns(vq, corruptions.VISUAL)),
        (mq[:, 0], columns(mq, corruptions.MOTION)),
        (right, wrong),
    )
    middles = [((clean.mean() + corrupted.mean()) / 2).item() for clean, corrupted in sides]
    sizes = [
        ((clean - m).square().mean() + (corrupted - m).square().mean()).div(2).sqrt().item()
        for (clean, corrupted), m in zip(sides, middles, strict=True)
    ]
    vq, mq, right = ((raw - middles[i]) / sizes[i] for i, raw in enumerate((vq, mq, right)))
    by_kind = {kind: _of_kind(test, k, kind, vq, mq) for k, kind in enumerate(kinds)}
    accuracy: dict[str, float] = {}
    for axis in AXES[:2]:
        for name, was_seen in (("seen", True), ("unseen", False)):
            rows = [row for row in by_kind.values() if row["axis"] == axis and row["seen"] == was_seen]
            for figure in _FIGURES:
                accuracy[f"{axis}_{name}_{figure}"] = round(float(np.mean([row[figure] for row in rows])), 3)
    accuracy["TA_right_above_wrong"] = _share(alignment[own][:, None] > wrong)
    for word in Scene.__dataclass_fields__:
        accuracy[f"TA_right_above_wrong_{word}"] = _share(_beside_wrong(alignment, test.scenes, word) > 0)
    scores = {"VQ": vq[:, 0], "MQ": mq[:, 0], "TA": right}
    clean = {axis: [_mean(x), round(x.std().item(), 3)] for axis, x in scores.items()}
    metrics = {"pair_accuracy": accuracy, "held_out_scores": clean, "corruptions": by_kind}
    return ScoreNormalizer(middles, sizes), metrics


def _of_kind(test: SpoiltClips, k: int, kind: str, vq: Tensor, mq: Tensor) -> dict[str, object]:
    """What the k-th corruption does to the scores of its axis."""
    is_motion = kind in corruptions.MOTION or kind in corruptions.MOTION_UNSEEN
    own, other = (mq, vq) if is_motion else (vq, mq)
    rows = test.changed[:, k]
    clean, weak, strong = own[rows, 0], own[rows, 1 + 2 * k], own[rows, 2 + 2 * k]
    shares = (clean > weak, clean > strong, weak > strong, own[:, :1] > strong)
    return {
        "axis": "MQ" if is_motion else "VQ",
        "seen": kind in corruptions.VISUAL or kind in corruptions.MOTION,
        **dict(zip(_FIGURES, map(_share, shares), strict=True)),
        "score_weak": _mean(weak),
        "score_strong": _mean(strong),
        "other_axis_moves_by": _mean((other[rows, 2 + 2 * k] - other[rows, 0]).abs()),
    }


def _beside_wrong(alignment: Tensor, scenes: Tensor, word: str) -> Tensor:
    """How much nearer clips are to their own prompts than to those that are wrong in one word alone."""
    every = all_scenes()
    apart = []
    for row, index in zip(alignment, scenes.tolist(), strict=True):
        own = vars(every[index])
        apart += [
            row[index] - row[other]
            for other, scene in enumerate(every)
            if [name for name, value in vars(scene).items() if value != own[name]] == [word]
        ]
    return torch.stack(apart)


def _share(x: Tensor) -> float:
    return round(x.float().mean().item(), 3)


def _mean(x: Tensor) -> float:
    return round(x.mean().item(), 3)
