"""The student over whole clips: golden outputs, diffusers' own model, masks against streaming, errors."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.replay import RecordingError, read_recording, relative_error, replay
from stream_r1_kernels import ChunkMask

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}


def make_student(**settings) -> CausalWanTransformer:
    torch.manual_seed(0)
    return CausalWanTransformer(**(SIZES | {"text_len": 6} | settings)).eval()


def make_inputs(
    frames: int, batch: int = 2, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, 4, 4, 6, generator=generator)
    t = 1000 * torch.rand(batch, generator=generator)
    return x, t, torch.randn(batch, 6, 12, generator=generator)


def test_five_recordings_are_there():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reproduces_the_public_implementations(path):
    result = replay(path)
    assert result.worst < 1e-5, f"{result.worst_name}: {result.worst}"


def test_replay_reports_a_wrong_model(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(GOLDEN[0], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    tensors["model.head.head.bias"] += 0.1
    save_file(tensors, tmp_path / "wrong.safetensors", meta)
    assert replay(tmp_path / "wrong.safetensors").worst > 1e-3
    del tensors["call.t"]
    save_file(tensors, tmp_path / "incomplete.safetensors", meta)
    with pytest.raises(RecordingError, match=r"call\.t"):
        read_recording(tmp_path / "incomplete.safetensors")
    with pytest.raises(FileNotFoundError, match="no such recording"):
        read_recording(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no recording at all")
    with pytest.raises(RecordingError, match=r"text\.safetensors: .*safetensors"):
        read_recording(tmp_path / "text.safetensors")


def test_equals_diffusers_with_one_chunk_over_all_frames(tmp_path):
    torch.manual_seed(3)
    theirs = WanTransformer3DModel(**SIZES).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CausalWanTransformer.from_pretrained(tmp_path / "theirs", text_len=6).eval()
    x, t, embeds = make_inputs(5)
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), t, embeds, return_dict=False)[0].transpose(1, 2)
        assert relative_error(ours(x, t, embeds), expected) < 1e-5
        mask = ChunkMask(tokens_per_frame=6, frames_per_chunk=5)
        assert relative_error(ours(x, t, embeds, mask=mask), expected) < 1e-5

    ours.save_pretrained(tmp_path / "ours")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert [(n, p.shape) for n, p in again.named_parameters()] == [
        (n, p.shape) for n, p in theirs.named_parameters()
    ]
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), theirs.parameters(), strict=True))
    assert CausalWanTransformer.from_pretrained(tmp_path / "ours").config["text_len"] == 6


def test_half_precision_keeps_what_diffusers_keeps(tmp_path):
    make_student().save_pretrained(tmp_path)
    student = CausalWanTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    wide = {name for name, value in student.named_parameters() if value.dtype == torch.float32}
    assert any("time_embedder" in name for name in wide)
    assert any("scale_shift_table" in name for name in wide)
    assert not any("attn" in name or "ffn" in name for name in wide)
    x, t, embeds = make_inputs(6)
    with torch.no_grad():
        exact = make_student()(x, t, embeds, mask="causal")
        half = student(x.bfloat16(), t, embeds, mask="causal")
    assert half.dtype == torch.bfloat16
    assert relative_error(half, exact) < 0.05


def test_autocast_computes_in_half_precision_and_trains_float32_weights():
    student = make_student(window_frames=6)
    x, t, embeds = make_inputs(6)
    with torch.no_grad():
        exact = student(x, t, embeds, mask="causal")
    with torch.autocast("cpu", torch.bfloat16):
        # Without grad first: what autocast keeps from there must not cost the weights their gradient.
        cache = student.new_cache(2, 4, 6)
        with torch.no_grad():
            student.forward_chunk(x[:, :3], t, embeds, cache)
        cache.commit()
        text = student.encode_text(embeds)
        chunk = student.forward_chunk(x[:, 3:], t, text, cache, write=False)
        whole = student(x, t, text, mask="causal")
    assert cache.storage.dtype == torch.bfloat16
    assert relative_error(whole, exact) < 0.05
    assert relative_error(chunk, exact[:, 3:]) < 0.05
    (whole.square().mean() + chunk.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())


def test_one_timestep_for_all_frames_is_the_same_timestep_for_each():
    student = make_student()
    x, t, embeds = make_inputs(6)
    torch.testing.assert_close(student(x, t, embeds), student(x, t[:, None].expand(2, 6), embeds))


def test_a_frame_follows_its_own_timestep():
    student = make_student(frames_per_chunk=1)
    x, t, embeds = make_inputs(3)
    t = t[:, None].repeat(1, 3)
    changed = t.clone()
    changed[:, 2] = 10.0
    before, after = (student(x, times, embeds, mask="causal") for times in (t, changed))
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-3


def test_text_is_padded_with_zeros_and_encoded_once():
    student = make_student()
    x, t, embeds = make_inputs(3)
    short = embeds[:, :4]
    padded = torch.cat((short, torch.zeros(2, 2, 12)), 1)
    expected = student(x, t, padded)
    torch.testing.assert_close(student(x, t, short), expected)
    torch.testing.assert_close(student(x, t, student.encode_text(short)), expected)
    one = student.encode_text(short[:1])
    torch.testing.assert_close(student(x, t, one), student(x, t, short[:1].expand(2, -1, -1)))
    assert all(not k.requires_grad for k in one.detach().k)
    assert one.k[0].requires_grad


STREAMS = {
    "whole past": {},
    "window": {"window_frames": 6},
    "sink": {"window_frames": 9, "sink_frames": 3},
    "first frame alone": {"first_chunk_frames": 1},
    "first frame alone, window": {"first_chunk_frames": 1, "window_frames": 6},
    "first frame alone, sink": {"first_chunk_frames": 1, "window_frames": 7, "sink_frames": 1},
    "chunks of two": {"frames_per_chunk": 2, "window_frames": 4},
    "sizes in frames": {"window_frames": 8, "sink_frames": 1},
    "sizes in frames, first frame alone": {"window_frames": 7, "sink_frames": 2, "first_chunk_frames": 1},
}


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS.keys())
@torch.no_grad()
def test_streaming_equals_the_causal_mask(settings):
    student = make_student(**settings)
    chunk, first = student.config["frames_per_chunk"], student.config["first_chunk_frames"] or 0
    x, t, embeds = make_inputs(4 * chunk + first)
    text = student.encode_text(embeds)
    whole = student(x, t, text, mask="causal")
    cache = student.new_cache(2, 4, 6, max_frames=x.shape[1])
    start = 0
    while start < x.shape[1]:
        stop = start + cache.frames
        v = student.forward_chunk(x[:, start:stop], t, text, cache)
        torch.testing.assert_close(v, whole[:, start:stop], rtol=1e-4, atol=1e-5)
        cache.commit()
        start = stop


@torch.no_grad()
def test_streaming_equals_teacher_forcing():
    student = make_student(window_frames=6)
    clean, t, embeds = make_inputs(9)
    noisy = make_inputs(9, seed=2)[0]
    text = student.encode_text(embeds)
    whole = student(noisy, t, text, mask="causal", clean_x=clean)
    cache = student.new_cache(2, 4, 6)
    for start in range(0, 9, 3):
        v = student.forward_chunk(noisy[:, start : start + 3], t, text, cache)
        torch.testing.assert_close(v, whole[:, start : start + 3], rtol=1e-4, atol=1e-5)
        student.forward_chunk(clean[:, start : start + 3], torch.zeros(2), text, cache)
        cache.commit()


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        student = make_student().train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        x, t, embeds = make_inputs(6)
        student(x, t, student.encode_text(embeds), mask="causal").square().mean().backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_empty_batch():
    student = make_student()
    x, t, embeds = make_inputs(3, batch=0)
    assert student(x, t, embeds, mask="causal").shape == x.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk_norm": None}, "qk_norm"),
        ({"added_kv_proj_dim": 32}, "added_kv_proj_dim must be None"),
        ({"image_dim": 32}, "image_dim must be None"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
        ({"window_frames": 5, "sink_frames": 3}, "window_frames must have room"),
        ({"positions": "relative"}, "positions must be one of absolute, window"),
        ({"frames_per_chunk": 0}, "frames_per_chunk must be at least 1"),
    ],
)
def test_settings_it_has_no_use_for_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_student(**settings)


def test_wrong_inputs_are_refused():
    student = make_student(window_frames=6)
    x, t, embeds = make_inputs(6)
    text = student.encode_text(embeds)
    with pytest.raises(ValueError, match=r"x must be \[B, F, 4, h, w\]"):
        student(x.transpose(1, 2), t, text)
    with pytest.raises(ValueError, match="multiples of the patch 2 x 2, got 4 x 5"):
        student(x[..., :5], t, text)
    with pytest.raises(ValueError, match=r"t must be \[2\] or \[2, 6\], got \[2, 3\]"):
        student(x, t[:, None].expand(2, 3), text)
    with pytest.raises(ValueError, match=r"embeds must be \[B, L <= 6, 12\]"):
        student.encode_text(torch.zeros(2, 7, 12))
    with pytest.raises(ValueError, match="batch 1 or 3"):
        student(x[:1].expand(3, -1, -1, -1, -1), t[:1].expand(3), text)
    with pytest.raises(ValueError, match="clean_x and a mask"):
        student(x, t, text, clean_x=x)
    with pytest.raises(ValueError, match="mask must be"):
        student(x, t, text, mask="block")
    with pytest.raises(ValueError, match="the cache expects"):
        student.forward_chunk(x, t, text, student.new_cache(2, 4, 6))
    with pytest.raises(ValueError, match="max_frames"):
        make_student().new_cache(2, 4, 6)
