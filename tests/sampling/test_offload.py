"""Models that take turns: a poisoned rest for the numbers, "meta" as the other device for the places."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_models import SIZE, WordEncoder, tiny_student, tiny_vae
from torch import Tensor, nn

from stream_r1.cli import main
from stream_r1.models.offload import ModelOffload
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.sampling.sampler import Sampler, Stream


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class Poisoned(ModelOffload):
    """A copy on the same device is at work; what waits is not numbers, so that using it would show."""

    def __init__(self, *models: nn.Module) -> None:
        self.right = {model: [t.clone() for t in tensors(model)] for model in models}
        self.turns: list[nn.Module] = []
        super().__init__("cpu", *models)
        for model in models:
            poison(tensors(model))

    def use(self, model: nn.Module) -> None:
        if model is self._here:
            return
        self.turns.append(model)
        waiting = tensors(model)
        for tensor, right in zip(waiting, self.right[model], strict=True):
            tensor.copy_(right)
        super().use(model)
        poison(waiting)


def poison(weights: list[Tensor]) -> None:
    for tensor in weights:
        tensor.fill_(torch.nan)


def whole_life(sampler: Sampler) -> list[Tensor]:
    """Continues from frames, makes chunks, is told another prompt."""
    given = torch.rand(1, 3 * 4 - 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    stream = sampler.stream(["a fat rabbit", "a tree"], seed=3, first_frames=given)
    made = list(itertools.islice(stream, 3))
    stream.switch(["snow", "a butterfly"])
    made += itertools.islice(stream, 2)
    return [part for chunk in made for part in (chunk.latents, chunk.frames)]


@pytest.mark.parametrize("settings", [{}, {"fuse_cache_update": False, "context_noise": 100.0}])
def test_turns_give_the_same_bits(settings: dict[str, Any]) -> None:
    def sampler() -> Sampler:
        encoder = WordEncoder()
        return Sampler(tiny_student(), tiny_vae(), text_encoder=encoder, latent_size=(2, 4), **settings)

    expected = whole_life(sampler())
    turning = sampler()
    student, vae = turning.student, turning.vae
    turning.offload = offload = Poisoned(student, vae)
    made = whole_life(turning)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
    # to encode what is given; to see it; for each of five chunks
    assert offload.turns == [vae, *[student, vae] * 6]


def places(pipeline: StreamR1Pipeline) -> dict[str, set[str]]:
    models = {"student": pipeline.student, "vae": pipeline.vae, "decoder": pipeline.sampler.decoder}
    if getattr(pipeline.text_encoder, "loaded", False):
        models["text"] = pipeline.text_encoder._model
    return {name: {t.device.type for t in tensors(model)} for name, model in models.items()}


def test_one_model_is_on_the_device(wan: Path) -> None:
    """On "meta" nothing is computed, but an op refuses to have tensors there and on the CPU."""
    cpu, meta = {"cpu"}, {"meta"}
    pipeline = StreamR1Pipeline.from_pretrained(wan, size=SIZE, device="meta", offload=True)
    assert set(map(frozenset, places(pipeline).values())) == {frozenset(cpu)}
    pipeline.text_encoder.encode(["a"])
    assert places(pipeline) == {"student": cpu, "vae": cpu, "decoder": cpu, "text": meta}
    stream: Stream = pipeline.stream("a fat rabbit", first_frames=torch.rand(1, 9, 3, *SIZE))
    for _ in range(4):
        chunk = next(stream)
        assert (chunk.frames.device.type, chunk.frames.shape[1:]) == ("meta", (12, 3, *SIZE))
        assert places(pipeline) == {"student": cpu, "vae": meta, "decoder": meta, "text": cpu}
    stream.switch("a fat rabbit")  # is known
    assert places(pipeline) == {"student": meta, "vae": cpu, "decoder": cpu, "text": cpu}
    with pytest.raises((RuntimeError, NotImplementedError)):
        pipeline.vae.decode(chunk.latents)  # not in its turn
    pipeline.text_encoder.free()
    assert pipeline.text_encoder._model is None
    assert len(pipeline.sampler.offload._waiting) == 2
    stream.switch("a tree")
    assert next(stream).frames.device.type == "meta"


def test_a_decoder_of_its_own_takes_turns_too() -> None:
    pipeline = StreamR1Pipeline(
        tiny_student(), tiny_vae(), WordEncoder(), size=SIZE, fps=16, decoder=tiny_vae()
    )
    pipeline.enable_model_cpu_offload("meta")
    next(pipeline.stream("a"))
    assert places(pipeline) == {"student": {"cpu"}, "vae": {"cpu"}, "decoder": {"meta"}}


def test_shared_weights_stay_shared_and_a_model_can_leave() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    model[1].weight = model[0].weight
    names = list(model.state_dict())
    offload = ModelOffload("meta", model)
    for there in ("meta", "cpu"):
        (offload.use if there == "meta" else offload.remove)(model)
        assert {t.device.type for t in tensors(model)} == {there}
        assert model[0].weight is model[1].weight
        assert isinstance(model[0].weight, nn.Parameter)
        assert list(model.state_dict()) == names
        assert not any(p.requires_grad for p in model.parameters())
    offload.use(model)  # does not take turns any more
    assert model[0].weight.device.type == "cpu"


def test_a_model_that_does_not_fit_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = nn.Linear(2, 2), nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    offload = ModelOffload("meta", small, large)
    offload.use(small)
    copied, to = [], Tensor.to

    def limited(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
        if len(copied) == 5:
            raise torch.OutOfMemoryError
        copied.append(tensor)
        return to(tensor, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", limited)
        with pytest.raises(torch.OutOfMemoryError):
            offload.use(large)
    assert {t.device.type for t in (*tensors(small), *tensors(large))} == {"cpu"}
    offload.use(large)
    assert {t.device.type for t in tensors(large)} == {"meta"}


def test_mistakes(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def load(**settings: Any) -> StreamR1Pipeline:
        return StreamR1Pipeline.from_pretrained(wan, size=SIZE, offload=True, **settings)

    with pytest.raises(ValueError, match="device must not be the CPU, where idle models wait, got cpu"):
        load()
    with pytest.raises(ValueError, match=r"vae_device must be None with offload, .* got cpu"):
        load(device="meta", vae_device="cpu")
    with pytest.raises(ValueError, match=r"text_device must be None with offload, .* got cpu"):
        load(device="meta", text_device="cpu")
    with pytest.raises(ValueError, match="cuda_graph must be False with offload"):
        load(device="meta", cuda_graph=True)
    with pytest.raises(SystemExit):
        main(["sample", "a", "--models", str(wan), "--device", "cpu", "--offload", "--size", "16x32"])
    assert "device must not be the CPU" in " ".join(capsys.readouterr().err.split())
