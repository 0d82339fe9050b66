"""Encoded clips: the right frames under the right caption, and kept only as long as they are the same."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from stream_r1.config import SettingsError
from stream_r1.data.film import load_shots
from stream_r1.models.vae import VideoVAE
from stream_r1.tiny_world import clips

SHOTS = [shot for shot in load_shots() if not shot.held_out and 40 <= shot.frames < 60][:3]


def save_vae(folder, seed):
    torch.manual_seed(seed)
    AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def film(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (max(s.end for s in SHOTS), 16, 24, 3), np.uint8)
    monkeypatch.setattr(clips, "load_film", lambda cache: frames)
    return frames


def test_clips_hold_the_frames_of_their_captions_shots(film, tmp_path):
    folder = save_vae(tmp_path / "vae", 0)
    prompts = [shot.caption for shot in SHOTS[:2]]
    found = clips.encode_clips(folder, prompts, 5, 2, tmp_path / "work")
    assert found.latents.shape == (4, 2, 4, 2, 3)
    assert found.caption.tolist() == [0, 0, 1, 1]
    start = SHOTS[1].start
    pixels = torch.from_numpy(film[start : start + 5]).movedim(-1, 1).float()[None] / 255
    with torch.no_grad():
        expected = VideoVAE.from_pretrained(folder).encode(pixels)[0]
    assert torch.allclose(found.latents[2].float(), expected, atol=2e-3)


def test_what_is_kept_serves_the_same_call_and_no_other(film, tmp_path, monkeypatch):
    vaes = [save_vae(tmp_path / f"vae{seed}", seed) for seed in range(2)]
    work = tmp_path / "work"
    first, second = ([shot.caption] for shot in SHOTS[:2])
    made = clips.encode_clips(vaes[0], first, 5, 2, work)
    others = [clips.encode_clips(vaes[0], second, 5, 2, work), clips.encode_clips(vaes[1], first, 5, 2, work)]
    assert all(not torch.equal(made.latents, other.latents) for other in others)

    monkeypatch.delattr(clips, "load_film")  # the same call again needs no film
    assert torch.equal(clips.encode_clips(vaes[0], first, 5, 2, work).latents, made.latents)


def test_a_caption_of_no_shot_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="a red apple"):
        clips.encode_clips(tmp_path, ["a red apple"], 5, 2, tmp_path)
