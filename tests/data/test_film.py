"""The film's captions and its fetching: what cannot be had is said, what came is checked."""

import itertools

import pytest

from stream_r1.data.film import FRAMES, FilmError, fetch_film, load_shots, spread_clip_starts
from stream_r1.recipe import read_prompts


def test_shots_lie_within_the_film_in_order_and_do_not_overlap():
    shots = load_shots()
    assert len(shots) > 100
    assert [shot.index for shot in shots] == list(range(len(shots)))
    assert all(0 <= shot.start < shot.end <= FRAMES for shot in shots)
    assert all(a.end <= b.start for a, b in itertools.pairwise(shots))
    assert all(shot.caption == shot.caption.strip().lower() for shot in shots)


def test_some_shots_are_held_out_and_every_prompt_of_the_tiny_world_has_a_training_shot():
    shots = load_shots()
    assert 0.1 < sum(shot.held_out for shot in shots) / len(shots) < 0.3
    training = {shot.caption for shot in shots if not shot.held_out and spread_clip_starts(shot, 33, 12)}
    assert set(read_prompts("recipes/tiny/prompts.txt")) <= training


@pytest.mark.parametrize("most", [1, 3, 12])
def test_clips_lie_within_their_shot(most):
    for shot in load_shots():
        starts = spread_clip_starts(shot, 33, most)
        assert len(starts) <= most
        assert all(shot.start <= start and start + 33 <= shot.end for start in starts)
        assert len(set(starts)) == len(starts)


def test_a_damaged_distribution_is_refused(tmp_path):
    (tmp_path / "moviepy-2.2.1.tar.gz").write_bytes(b"not the film")
    with pytest.raises(FilmError, match=r"SHA-256 c80cb568.*got "):
        fetch_film(tmp_path)
    assert not (tmp_path / "bbb.mp4").exists()


def test_a_film_that_cannot_be_had_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip runs, and finds nothing
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(FilmError, match="could not be fetched"):
        fetch_film(tmp_path)
