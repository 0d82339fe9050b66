"""What raters are shown: every pair, sides and order drawn, checks among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from votes_folder import PROMPTS, comparison, write_comparison

from stream_r1.config import SettingsError
from stream_r1.votes.plan import CHECK, load


def test_a_rater_sees_every_pair_once_and_the_same_after_a_reload(tmp_path: Path) -> None:
    compared = comparison(tmp_path, attention_checks=1)
    items = compared.items("rater-one")
    assert items == compared.items("rater-one")
    pairs = [item for item in items if not item.is_check]
    assert sorted(item.index for item in pairs) == [0, 1, 2]
    assert all({item.left, item.right} == {"plain", "weighted"} for item in pairs)
    checks = [place for place, item in enumerate(items) if item.is_check]
    assert len(checks) == 1
    assert checks != [0]


def test_sides_and_orders_are_drawn_anew_for_each_rater(tmp_path: Path) -> None:
    compared = comparison(tmp_path, attention_checks=0)
    raters = [compared.items(f"rater-{i}") for i in range(400)]
    left = Counter(item.left for items in raters for item in items)
    first = Counter(items[0].index for items in raters)
    # of 1200 draws of a half and 400 of a third: five standard deviations
    assert abs(left["plain"] - 600) < 5 * 17.4
    assert all(abs(first[index] - 400 / 3) < 5 * 9.5 for index in range(3))


def test_videos_belong_to_prompts_in_natural_order(tmp_path: Path) -> None:
    compared = comparison(tmp_path)
    assert compared.prompts == PROMPTS
    assert [path.stem for path in compared.videos["plain"]] == ["clip-8", "clip-9", "clip-10"]
    assert compared.file(1, CHECK) == tmp_path / "out/checks/1.mp4"


def test_fewer_pairs_if_asked(tmp_path: Path) -> None:
    compared = comparison(tmp_path, pairs_a_rater=2, attention_checks=0)
    assert len(compared.items("rater-one")) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pairs_a_rater": 0}, "pairs_a_rater"),
        ({"questions": "{}"}, "questions"),
        ({"question": "{a: b}"}, "question"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"models": "{one: out}"}, "models"),
        ({"models": "{one: out, 'a|b': out}"}, "a|b"),
        ({"models": "{check: out, two: out}"}, "models"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, object], said: str, tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0] not in settings]
    path.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in settings.items())]))
    with pytest.raises((SettingsError, FileNotFoundError)) as error:
        load(path, [])
    assert said in str(error.value)


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    path = write_comparison(tmp_path)
    (tmp_path / "weighted/clip-9.mp4").unlink()
    with pytest.raises(SettingsError, match=r"models\.weighted: expected 3 mp4 files.*got 2"):
        load(path, [])
