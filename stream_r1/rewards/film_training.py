"""Trains the film reward's heads.

    python -m stream_r1.rewards.film_training --film-cache DIR --out assets/tiny/reward

Pairs teach the order: a clip above its spoilt version, a little spoilt above much spoilt, its own caption
above another shot's. Each axis is taught to ignore what belongs to another one. Features are computed once;
the heads then train in seconds. The report compares on shots that were held out, with corruptions seen and
never seen in training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stream_r1.data.film import Shot, clip_starts, load_film, load_shots
from stream_r1.disk.whole import write_text
from stream_r1.models.text import MiniLMEncoder, TextEncoder
from stream_r1.rewards import corruptions
from stream_r1.rewards.base import ScoreNormalizer
from stream_r1.rewards.corruptions import Corruption
from stream_r1.rewards.film import AXES, FilmHeads, FilmReward, sentence_vectors
from stream_r1.rewards.film_features import FilmFeatureExtractor, FilmFeatures

Progress = Callable[[str], None]
Sentences = Callable[[list[str]], Tensor]  # N prompts -> unit vectors [N, 384]
_OTHER_CAPTION = 0.8  # captions at least this close in meaning are not called wrong


@dataclass(frozen=True)
class FilmTrainingSettings:
    """How the heads are trained; the defaults made the committed ones."""

    seed: int = 0
    clip_frames: int = 21
    clip_stride: int = 36
    clips_per_shot: int = 4
    kinds_per_clip: int = 3  # corruptions an axis that each training clip is spoilt by
    held_out_clips: int = 24
    weak: tuple[float, float] = (0.25, 0.5)  # range of the strength of "a little"; "much" is twice as strong
    least_change: float = 1 / 255  # a corruption that changes the clip less (mean absolute) proves nothing
    steps: int = 800
    batch: int = 48
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    neutrality: float = 0.3


class SpoiltClips(NamedTuple):
    """Features of N clips; version 0 of each is clean, then come K x (weak, strong) spoilt ones."""

    features: (
        FilmFeatures  # appearance [N, 1+2K, T, 392] float16, motion [N, 1+2K, 335], content [N, 1+2K, 432]
    )
    kinds: np.ndarray  # [N, K] names
    changed: Tensor  # [N, K] bool: the strong version differs visibly
    shots: list[Shot]  # N


def train_film_reward(
    frames: np.ndarray,
    shots: Sequence[Shot],
    out: str | Path,
    *,
    settings: FilmTrainingSettings | None = None,
    text_encoder: TextEncoder | None = None,
    extra_kinds: Mapping[str, Corruption] | None = None,
    progress: Progress = lambda message: None,
) -> dict:
    """Trains the heads and writes `config.json`, `heads.safetensors` and `metrics.json` into `out`.

    Args:
        frames: uint8 [N, 64, 112, 3], the film.
        shots: captioned shots; those with `held_out` are for the report and the normalisation only.
        settings: sizes and the seed: the same ones on the same machine give the same heads.
        text_encoder: gives MiniLM token states; loaded from its package if not given.
        extra_kinds: more visual corruptions to report on, never trained on (a VAE's round trip, for example).
        progress: called with a line about what is being done.

    Returns:
        The metrics, as written.
    """
    settings = settings or FilmTrainingSettings()
    clip_rng, batch_rng = (np.random.default_rng([settings.seed, part]) for part in range(2))
    extract = FilmFeatureExtractor()
    encoder = text_encoder or MiniLMEncoder()
    sentences = partial(sentence_vectors, encoder)
    seen = {**corruptions.VISUAL, **corruptions.MOTION}
    every = {**seen, **corruptions.VISUAL_UNSEEN, **corruptions.MOTION_UNSEEN, **(extra_kinds or {})}

    def spoil(clips: list[tuple[Shot, int]], draw: Callable[[], list[str]], label: str) -> SpoiltClips:
        return _spoilt_clips(
            frames, clips, draw, every, extract, settings, clip_rng, lambda at: progress(f"{label} {at}")
        )

    def draw_training() -> list[str]:
        groups = (corruptions.VISUAL, corruptions.MOTION)
        return [
            str(kind)
            for group in groups
            for kind in clip_rng.permutation(list(group))[: settings.kinds_per_clip]
        ]

    train = spoil(_choose(shots, False, settings), draw_training, "training clips")
    held_out = _choose(shots, True, settings)
    held_out = [
        held_out[i]
        for i in np.linspace(0, len(held_out) - 1, min(len(held_out), settings.held_out_clips)).astype(int)
    ]
    test = spoil(held_out, lambda: list(every), "held-out clips")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        heads = _fit(train, sentences, settings, batch_rng, progress)
    normalizer, metrics = _report(heads, test, train, shots, sentences, seen)
    metrics["settings"] = asdict(settings)
    metrics["clips"] = {"training": len(train.shots), "held_out": len(test.shots)}
    FilmReward(heads, normalizer).save_pretrained(out)
    write_text(Path(out) / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _choose(shots: Sequence[Shot], held_out: bool, settings: FilmTrainingSettings) -> list[tuple[Shot, int]]:
    """(shot, first frame) of evenly spread clips, at most `clips_per_shot` a shot."""
    chosen = []
    for shot in shots:
        if shot.held_out == held_out:
            starts = clip_starts(shot, settings.clip_frames, settings.clip_stride)
            keep = np.linspace(0, len(starts) - 1, min(len(starts), settings.clips_per_shot)).astype(int)
            chosen += [(shot, starts[i]) for i in keep]
    if not chosen:
        raise ValueError(
            f"train_film_reward: shots: expected {'held-out' if held_out else 'training'} shots of at least "
            f"{settings.clip_frames} frames, got none"
        )
    return chosen


@torch.no_grad()
def _spoilt_clips(
    frames: np.ndarray,
    clips: list[tuple[Shot, int]],
    draw_kinds: Callable[[], list[str]],
    every: Mapping[str, Corruption],
    extract: FilmFeatureExtractor,
    settings: FilmTrainingSettings,
    rng: np.random.Generator,
    progress: Progress,
) -> SpoiltClips:
    appearance, motion, content, kinds, changed = [], [], [], [], []
    for number, (_, start) in enumerate(clips):
        pixels = torch.from_numpy(np.array(frames[start : start + settings.clip_frames]))
        clip = pixels.permute(0, 3, 1, 2).float() / 255  # [T, 3, H, W]
        chosen = draw_kinds()
        versions = [clip]
        for kind in chosen:
            weak, seed = rng.uniform(*settings.weak), int(rng.integers(2**31))
            versions += [
                every[kind](clip, strength, np.random.default_rng(seed)) for strength in (weak, 2 * weak)
            ]
        video = (torch.stack(versions) * 255).round() / 255  # what a file would hold
        # One version at a time: what a pass touches then fits the caches.
        features = FilmFeatures(*map(torch.cat, zip(*(extract(v[None]) for v in video), strict=True)))
        appearance.append(features.appearance.half())
        motion.append(features.motion)
        content.append(features.content)
        kinds.append(chosen)
        changed.append((video[2::2] - clip).abs().mean((1, 2, 3, 4)) >= settings.least_change)
        if number % 20 == 0:
            progress(f"{number}/{len(clips)}")
    features = FilmFeatures(torch.stack(appearance), torch.stack(motion), torch.stack(content))
    return SpoiltClips(features, np.array(kinds), torch.stack(changed), [shot for shot, _ in clips])


def _fit(
    train: SpoiltClips,
    sentences: Sentences,
    settings: FilmTrainingSettings,
    rng: np.random.Generator,
    progress: Progress,
) -> FilmHeads:
    """Trains new heads on precomputed features."""
    heads = FilmHeads()
    heads.appearance_scale.fit(train.features.appearance.float())
    heads.motion_scale.fit(train.features.motion)
    heads.content_scale.fit(train.features.content)
    heads.train()
    captions = sentences([shot.caption for shot in train.shots])  # [N, 384]
    visual = torch.from_numpy(np.isin(train.kinds, list(corruptions.VISUAL)))  # [N, K]
    neutral = torch.from_numpy(~np.isin(train.kinds, list(corruptions.NOT_NEUTRAL)))
    log_scale = torch.nn.Parameter(torch.tensor(2.5))  # of the caption softmax
    optimizer = torch.optim.AdamW(
        [*heads.parameters(), log_scale], settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    # Every shot counts alike, however many clips it has.
    shot_ids = [shot.index for shot in train.shots]
    chance = np.array([1 / shot_ids.count(index) for index in shot_ids])
    chance /= chance.sum()
    clip_count = len(train.shots)
    for step in range(settings.steps):
        b = torch.from_numpy(rng.choice(clip_count, settings.batch, p=chance))
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
        version = torch.from_numpy(rng.integers(0, 5, len(b))).unsqueeze(0)
        loss = loss + _caption_loss(
            heads, train.features.content[b], v.gather(0, version)[0], captions[b], log_scale
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress(f"training step {step}/{settings.steps}, loss {loss.item():.3f}")
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


def _caption_loss(
    heads: FilmHeads, content: Tensor, version: Tensor, captions: Tensor, log_scale: Tensor
) -> Tensor:
    """Contrastive loss over the batch (Radford et al., arXiv 2103.00020), on one version of each clip.

    content [N, 1+2K, 432], version [N], captions [N, 384]. Captions that mean nearly the same are nobody's
    negatives.
    """
    rows = torch.arange(len(version))
    clean, text = heads.meet(content[:, 0], captions)
    spoilt, _ = heads.meet(content[rows, version], captions)
    same = (captions @ captions.T > _OTHER_CAPTION) & ~torch.eye(len(rows), dtype=torch.bool)
    logits = (spoilt @ text.T * log_scale.exp()).masked_fill(same, -torch.inf)
    steady = ((clean - spoilt) * text).sum(1).square().mean()
    return F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows) + steady


@torch.no_grad()
def _report(
    heads: FilmHeads,
    test: SpoiltClips,
    train: SpoiltClips,
    shots: Sequence[Shot],
    sentences: Sentences,
    seen: Mapping[str, Corruption],
) -> tuple[ScoreNormalizer, dict]:
    """Constants of the normalisation and the held-out figures."""
    vq = torch.stack([heads.visual_score(a.float()) for a in test.features.appearance])  # [N, 1+2K]
    mq = heads.motion_score(test.features.motion)
    kinds = list(test.kinds[0])
    is_motion = np.isin(kinds, [*corruptions.MOTION, *corruptions.MOTION_UNSEEN])
    alignment = {
        "held_out": _alignment(heads, test, shots, sentences),
        "training": _alignment(heads, train, shots, sentences),
    }

    normal_mean, normal_std = [], []
    for clean, spoilt in (
        (vq[:, 0], _columns(vq, [k for k, kind in enumerate(kinds) if kind in corruptions.VISUAL])),
        (mq[:, 0], _columns(mq, [k for k, kind in enumerate(kinds) if kind in corruptions.MOTION])),
        (alignment["held_out"].right, alignment["held_out"].wrong),
    ):
        mean = (clean.mean() + spoilt.mean()) / 2
        normal_mean.append(mean.item())
        normal_std.append(
            (((clean - mean).square().mean() + (spoilt - mean).square().mean()) / 2).sqrt().item()
        )
    vq, mq = ((raw - normal_mean[axis]) / normal_std[axis] for axis, raw in ((0, vq), (1, mq)))

    by_kind = {}
    for k, kind in enumerate(kinds):
        own, other = (mq, vq) if is_motion[k] else (vq, mq)
        rows = test.changed[:, k]
        clean, weak, strong = own[rows, 0], own[rows, 1 + 2 * k], own[rows, 2 + 2 * k]
        by_kind[kind] = {
            "axis": "MQ" if is_motion[k] else "VQ",
            "seen": kind in seen,
            "pairs": int(rows.sum()),
            "clean_above_weak": _share(clean > weak),
            "clean_above_strong": _share(clean > strong),
            "weak_above_strong": _share(weak > strong),
            "any_clean_above_strong": _share(own[:, :1] > strong),
            "score_weak": _mean(weak),
            "score_strong": _mean(strong),
            "other_axis_moves_by": _mean((other[rows, 2 + 2 * k] - other[rows, 0]).abs()),
        }
    summary = {}
    for axis in AXES[:2]:
        for name, was_seen in (("seen", True), ("unseen", False)):
            kinds = [row for row in by_kind.values() if row["axis"] == axis and row["seen"] == was_seen]
            for figure in (
                "clean_above_weak",
                "clean_above_strong",
                "weak_above_strong",
                "any_clean_above_strong",
            ):
                summary[f"{axis}_{name}_{figure}"] = round(float(np.mean([row[figure] for row in kinds])), 3)
    for name, aligned in alignment.items():
        summary[f"TA_{name}_right_above_wrong"] = _share(aligned.right_of_wrong > aligned.wrong)
    right, wrong = ((side - normal_mean[2]) / normal_std[2] for side in alignment["held_out"][:2])
    scores = {"clean": {"VQ": vq[:, 0], "MQ": mq[:, 0], "TA": right}, "wrong caption": {"TA": wrong}}
    metrics = {
        "pair_accuracy": summary,
        "held_out_scores": {
            name: {axis: [_mean(x), round(x.std().item(), 3)] for axis, x in row.items()}
            for name, row in scores.items()
        },
        "corruptions": by_kind,
    }
    return ScoreNormalizer(normal_mean, normal_std), metrics


class _Alignment(NamedTuple):
    right: Tensor  # [N] cosine with the clip's own caption
    wrong: Tensor  # [P] cosine with captions of other shots that mean something else
    right_of_wrong: Tensor  # [P] the clip's own caption's cosine, for each wrong one


def _alignment(
    heads: FilmHeads, clips: SpoiltClips, shots: Sequence[Shot], sentences: Sentences
) -> _Alignment:
    every = sentences(sorted({shot.caption for shot in shots}))
    own = sentences([shot.caption for shot in clips.shots])
    content, texts = heads.meet(clips.features.content[:, 0], every)
    right = (content * heads.meet(clips.features.content[:, 0], own)[1]).sum(1)
    other = own @ every.T < _OTHER_CAPTION  # [N, captions]
    return _Alignment(right, (content @ texts.T)[other], right[:, None].expand_as(other)[other])


def _columns(scores: Tensor, ks: list[int]) -> Tensor:
    return torch.cat([scores[:, 1 + 2 * k : 3 + 2 * k] for k in ks], 1).flatten()


def _share(x: Tensor) -> float:
    return round(x.float().mean().item(), 3)


def _mean(x: Tensor) -> float:
    return round(x.mean().item(), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the film reward's heads.")
    parser.add_argument("--film-cache", type=Path, help="where the film is kept or fetched to")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/reward"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    metrics = train_film_reward(
        load_film(arguments.film_cache),
        load_shots(),
        arguments.out,
        settings=FilmTrainingSettings(seed=arguments.seed),
        progress=lambda message: print(message, flush=True),
    )
    print(json.dumps(metrics["pair_accuracy"], indent=2))


if __name__ == "__main__":
    main()
