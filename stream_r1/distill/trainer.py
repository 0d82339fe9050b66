"""The distillation trainer, top to bottom: what one step does. `loop.py` is the loop around it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stream_r1.clock import Clock
from stream_r1.distill.dmd import DistributionMatching, as_own
from stream_r1.distill.events import Preview, StepDone, summarise
from stream_r1.distill.guard import Guard, figures_of
from stream_r1.distill.long_rollout import RolloutClip, long_rollout
from stream_r1.distill.loop import TrainingLoop
from stream_r1.distill.noise import SampleNoise
from stream_r1.distill.optimizers import make_adamw
from stream_r1.distill.order import ShuffledOrder
from stream_r1.distill.ranks import Ranks
from stream_r1.distill.rollout import begin_rollout, self_rollout
from stream_r1.distill.run_state import Ema, RunState, trained
from stream_r1.distill.settings import DistillSettings
from stream_r1.distill.weighting import StreamR1Weights
from stream_r1.models.autoencoder import Decoder, VideoAutoencoder
from stream_r1.models.recompute import enable_checkpointing
from stream_r1.models.sequence import SampleShare
from stream_r1.models.text import TextEncoder
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.rewards.base import Reward
from stream_r1.schedule import FlowSchedule


@dataclass
class _Draw:
    """The random choices of one update: the same however it is split into micro-batches."""

    prompts: list[str]
    seeds: list[int]
    exit_step: int
    length: int

    def of_rank(self, ranks: Ranks) -> _Draw:
        return list(self.split(ranks.parts))[ranks.part]

    def split(self, parts: int) -> Iterator[_Draw]:
        size = len(self.prompts) // parts
        for start in range(0, len(self.prompts), size):
            stop = start + size
            yield _Draw(self.prompts[start:stop], self.seeds[start:stop], self.exit_step, self.length)


class DistillTrainer(TrainingLoop):
    """Distils a bidirectional teacher into a causal few-step student, weighted by a reward.

        for event in trainer.run():
            show(event)

    Args:
        settings: see `DistillSettings`.
        student: is trained in place.
        teacher: is frozen in place.
        prompts: the data.
        text_encoder: `encode(prompts) -> [B, L, D]`; it should remember prompts, they come again.
        folder: where checkpoints go and come from; None keeps none.
        critic: is trained in place; None starts from a copy of the teacher.
        vae, reward: needed by every weighting but "uniform", where a reward is only reported.
        negative: [1, L, D], the embedding that guidance moves away from; None encodes
            `matching.negative_text`.
        ranks: the processes that train together (see `join`): each makes the same trainer of the same models,
            which move to the ranks' devices, and sees its part of every batch. None: this process alone.
        origin: what else a resumed run must share with its beginning, as JSON has it, such as
            `Recipe.origin`: the trainer is given models and cannot know where they come from.

    Everything random comes from `settings.seed`; two runs with the same arguments on one machine are equal
    bit for bit, resumed or not. Random choices belong to samples and not to ranks, so other numbers of ranks
    give the same run up to the order of sums. On a GPU the last bits hang on `tuned_convolutions`, too.
    """

    def __init__(
        self,
        settings: DistillSettings,
        *,
        student: CausalWanTransformer,
        teacher: nn.Module,
        prompts: Sequence[str],
        text_encoder: TextEncoder,
        folder: Path | str | None = None,
        critic: nn.Module | None = None,
        vae: Decoder | None = None,
        reward: Reward | None = None,
        negative: Tensor | None = None,
        ranks: Ranks | None = None,
        origin: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(settings, folder, ranks)
        self.settings = settings
        self.student = student.train()
        critic = critic if critic is not None else deepcopy(teacher)
        if self.ranks.sequence > 1:
            teacher, critic = (as_own(model, text_encoder.text_len) for model in (teacher, critic))
        self.teacher = teacher.eval().requires_grad_(False)
        self.critic = critic.train().requires_grad_(True)
        self.prompts = list(prompts)
        self._adapt("student", self.student, settings.student.lora)
        self._adapt("critic", self.critic, settings.critic.lora)
        models = [self.student, self.critic, self.teacher]
        self._shard_models(models, settings.batch, settings.accumulation, hashed(self.prompts))
        self.device = next(student.parameters()).device
        if settings.rollout.gradient_checkpointing:
            for model in (self.student, self.critic):
                enable_checkpointing(model, keep_attention=settings.rollout.keep_attention)

        self.text_encoder = text_encoder
        self.vae = vae
        self.weights = self._make_weights(reward)
        self.lengths = self._check_rollout()
        self.schedule = FlowSchedule(settings.rollout.shift)
        self.steps = self.schedule.denoising_steps(settings.rollout.steps)
        self.matching = DistributionMatching(
            self.teacher,
            self.critic,
            negative if negative is not None else self._embed([settings.matching.negative_text]),
            schedule=self.schedule,
            guidance_scale=settings.matching.guidance_scale,
        )
        student_optimizer = make_adamw(self.student, settings.student)
        critic_optimizer = make_adamw(self.critic, settings.critic)
        state = RunState(
            {"student": self.student, "critic": self.critic},
            {
                "student_optimizer": ("student", student_optimizer),
                "critic_optimizer": ("critic", critic_optimizer),
            },
            Ema(self.student, settings.ema.decay, settings.ema.start),
            ShuffledOrder(len(self.prompts), settings.seed),
            torch.Generator().manual_seed(settings.seed),
            self.weights,
            None if settings.guard is None else Guard(settings.guard),
        )
        self._begin(state, **origin or {}, prompts=hashed(self.prompts))
        self.step_student = self._optimizer_step("student", student_optimizer, settings.student.clip)
        self.step_critic = self._optimizer_step("critic", critic_optimizer, settings.critic.clip)

    def _step(self) -> StepDone:
        """One step: the generator if it is its turn, then the critic."""
        clock = Clock(self.device)
        scalars: dict[str, float] = {}
        preview = None
        updates, rest = divmod(self.step - self.settings.critic_warmup, self.settings.critic_updates)
        guard = self.state.guard
        if updates >= 0 and rest == 0:
            if guard is not None and updates % guard.settings.every == 0:
                self._look(guard, clock, scalars)
            preview = self._update_student(clock, scalars)
        self._update_critic(clock, scalars)
        if guard is not None and preview is not None:
            guard.update(scalars["student/grad_norm"], scalars["critic/loss"])
        self.state.step += 1
        if guard is not None and self.step == self.settings.steps:
            self._look(guard, clock, scalars)
        return StepDone(self.step, self.settings.steps, scalars, clock.all_parts(), preview)

    def _sample(self, prompts: list[str], seeds: list[int]) -> Tensor:
        draw = _Draw(prompts, seeds, len(self.steps) - 1, self.settings.rollout.frames)
        return self._rollout(self._embed(prompts), SampleNoise(seeds, self.device), draw, grad=False).x

    def _update_student(self, clock: Clock, scalars: dict[str, float]) -> Preview | None:
        draw, parts = self._draw(), self.settings.accumulation
        self._set_train_mode(self.student)
        preview, losses, seen, logs = None, [], [], []
        for micro in draw.of_rank(self.ranks).split(parts):
            noise = SampleNoise(micro.seeds, self.device)
            text = self._embed(micro.prompts)
            self._seed_dropout(micro.seeds)
            with clock.part("rollout"), self._precision():
                x, loss_mask = self._rollout(text, noise, micro, grad=True)
            self._count(x, micro.length, scalars)
            with clock.part("reward"):
                preview = self._score_rollout(x.detach(), micro.prompts)
            weights = preview.weights if preview else None
            with clock.part("scores"), self._precision():
                t, eps = self._dmd_noise(x, noise)
                loss = self.matching.loss(x, text, t, eps, weights, loss_mask)
            with clock.part("backward"):
                (loss / parts).backward()
            losses.append(loss.detach())
            if weights is not None:
                seen.append(torch.cat([weights.inter[:, None], weights.scores], dim=1))
                logs.append(weights.log)
        if seen and self.weights is not None:
            batch = self.ranks.gather(torch.cat(seen))  # [batch, 1 + axes]
            self.weights.history.observe(batch[:, 1:])
            scalars |= self.ranks.summary(summarise(logs))
            scalars["inter/std"] = batch[:, 0].std(correction=0).item()  # not the mean of the parts'
        with clock.part("optimizer"):
            if self.step_student(self.step + 1, losses, scalars):
                self.ema.update(self.step)
        scalars["student/exit_step"] = draw.exit_step
        if len(self.lengths) > 1:
            scalars["student/length"] = draw.length
        return preview

    @torch.no_grad()
    def _look(self, guard: Guard, clock: Clock, scalars: dict[str, float]) -> None:
        """Shows the guard videos of fixed prompts and noise by the student as it would be exported now."""
        if self.vae is None:
            raise ValueError("DistillTrainer: vae must be given with a guard: it needs pixels")
        count = guard.settings.videos
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        part = max(1, self.settings.batch // (self.ranks.parts * self.settings.accumulation))
        checks: list[tuple[int, dict[str, float]]] = []
        with clock.part("guard"):
            for start in range(0, count, part):
                some = prompts[start : start + part]
                x = self.sample(some, list(range(start, start + len(some))))
                if not self.ranks.is_main:  # which tells the others
                    continue
                video = self.vae.decode(x)
                figures = figures_of(video)
                if self.weights is not None:
                    figures["reward"] = float(self.weights.reward.score(video, some).mean())
                checks.append((len(some), figures))
            names = checks[0][1] if checks else ()
            figures = {key: sum(n * figures[key] for n, figures in checks) / count for key in names}
            figures = self.ranks.broadcast(figures)
            fault = guard.check(figures)
        scalars |= {f"guard/{key}": value for key, value in figures.items()}
        scalars["guard/fault"] = float(fault is not None)
        if fault is None:
            guard.keep(self.ema.average or dict(trained(self.student)), self.step)

    def _update_critic(self, clock: Clock, scalars: dict[str, float]) -> None:
        draw, parts = self._draw(), self.settings.accumulation
        self._set_train_mode(self.critic)
        losses = []
        for micro in draw.of_rank(self.ranks).split(parts):
            noise = SampleNoise(micro.seeds, self.device)
            text = self._embed(micro.prompts)
            self._seed_dropout(micro.seeds)
            with clock.part("critic rollout"), self._precision():
                x = self._rollout(text, noise, micro, grad=False).x
            self._count(x, micro.length, scalars)
            with clock.part("critic"):
                t, eps = self._dmd_noise(x, noise)
                with self._precision():
                    loss = self.matching.critic_loss(x, text, t, eps)
                (loss / parts).backward()
            losses.append(loss.detach())
        with clock.part("optimizer"):
            self.step_critic(self.step + 1, losses, scalars)

    def _set_train_mode(self, model: nn.Module) -> None:
        """Only what learns has dropout, where there is any."""
        for each in (self.student, self.critic) if self._has_dropout else ():
            each.train(each is model)

    def _count(self, x: Tensor, length: int, scalars: dict[str, float]) -> None:
        """Adds the tokens of a rollout of so many frames, on all ranks, to the step's."""
        config: Any = self.student.config
        frame = x[:, 0].numel() // (x.shape[2] * math.prod(config.patch_size))
        tokens = length * frame * self.ranks.parts
        scalars["tokens"] = scalars.get("tokens", 0.0) + tokens

    def _embed(self, prompts: list[str]) -> Tensor:
        return self.text_encoder.encode(prompts).to(self.device, torch.float32)

    def _draw(self) -> _Draw:
        batch = self.settings.batch
        prompts = [self.prompts[i] for i in self.state.order.draw(batch)]
        seeds = torch.randint(2**62, (batch,), generator=self.state.random).tolist()
        exit_step = int(torch.randint(len(self.steps), (), generator=self.state.random))
        length = self.lengths[0]
        if len(self.lengths) > 1:
            length = self.lengths[int(torch.randint(len(self.lengths), (), generator=self.state.random))]
        return _Draw(prompts, seeds, exit_step, length)

    def _rollout(self, text: Tensor, noise: SampleNoise, draw: _Draw, *, grad: bool) -> RolloutClip:
        shape = self.settings.rollout
        channels: int = self.student.config.in_channels  # type: ignore[attr-defined]

        def latents(frames: int) -> Tensor:
            return noise.randn(frames, channels, shape.height, shape.width)

        with torch.set_grad_enabled(grad):
            rollout = begin_rollout(
                self.student,
                self.student.encode_text(text),
                (len(noise), shape.height, shape.width),
                max_frames=draw.length,
                schedule=self.schedule,
                steps=self.steps,
                exit_step=draw.exit_step,
                renoise=noise.randn_like,
                context_noise=shape.context_noise,
            )
            if draw.length == shape.frames:
                return RolloutClip(self_rollout(rollout, latents(shape.frames), grad=grad))
            assert isinstance(self.vae, VideoAutoencoder)
            return long_rollout(
                rollout,
                latents,
                length=draw.length,
                frames=shape.frames,
                codec=self.vae,
                grad=grad,
                sequence=self.student.sequence,
            )

    def _dmd_noise(self, x: Tensor, noise: SampleNoise) -> tuple[Tensor, Tensor]:
        matching = self.settings.matching
        t = noise.dmd_timestep(self.schedule, matching.timestep_low, matching.timestep_high)
        return t, noise.randn_like(x)

    def _score_rollout(self, x: Tensor, prompts: list[str]) -> Preview | None:
        """Decodes the rollout and weighs it; None without a reward. Ranks of a sequence share the samples."""
        if self.weights is None or self.vae is None:
            return None
        batch, frames, _, height, width = x.shape
        shape, axes = (frames, height, width), len(self.weights.axes)
        share = SampleShare(batch, self.student.sequence)
        video = scores = saliency = None
        if not share.idle:
            with torch.no_grad():
                video = self.vae.decode(x[share.own])
            scores, saliency = self.weights.look(video, prompts[share.own], shape)
        scores = share.gathered(scores, x.float(), batch, axes)
        if self.weights.uses_saliency:
            saliency = share.gathered(saliency, x.float(), axes, batch, *shape, dim=1)
        # The history learns of all micro-batches' scores at once, when the update is done.
        return Preview(prompts, video, self.weights.weigh(scores, saliency, shape, observe=False))

    def _make_weights(self, reward: Reward | None) -> StreamR1Weights | None:
        chosen = self.settings.weighting
        if reward is not None and self.vae is None:
            raise ValueError("DistillTrainer: vae must be given with a reward: rewards need pixels")
        if reward is None:
            if chosen.mode != "uniform":
                raise ValueError(f"DistillTrainer: reward must be given for weighting.mode {chosen.mode!r}")
            return None
        return StreamR1Weights(reward, **chosen.model_dump())

    def _check_rollout(self) -> list[int]:
        """The lengths that rollouts may have."""
        config: Any = self.student.config
        try:
            lengths = self.settings.rollout.lengths(config.frames_per_chunk, config.first_chunk_frames)
        except ValueError as error:
            raise ValueError(f"DistillTrainer: {error}") from None
        if lengths[-1] > self.settings.rollout.frames:
            if config.window_frames is None:
                raise ValueError("DistillTrainer: rollout.length beyond frames needs a student with a window")
            if not isinstance(self.vae, VideoAutoencoder):
                expected = "rollout.length beyond frames needs a vae that is a VideoAutoencoder"
                raise ValueError(f"DistillTrainer: {expected}, got {type(self.vae).__name__}")
        return lengths


def hashed(prompts: list[str]) -> str:
    """Tells other prompts from these."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
