"""The report from a record alone: everything inside, nothing fetched, and whole when half is missing."""

import base64
import io
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stream_r1 import maps
from stream_r1.demo import figures, measures
from stream_r1.demo.record import Clip, Number, Record, StepPoint, Timing
from stream_r1.demo.report import write_report
from stream_r1.drawn_world.measures import MEASURES as EXACT
from stream_r1.evaluation import Figure
from stream_r1.sampling.video import VideoWriter

PROMPT = 'a <rabbit> & an "apple"'
SIZE = (32, 48)


def number(*values) -> Number:
    return Number.of(Figure.mean(values))


def record(**changes) -> Record:
    return Record(
        **{
            "fingerprint": "f",
            "started": "today",
            "recipe": "a recipe",
            "seed": 0,
            "budget": 60.0,
            "prompts": [PROMPT],
            "size": SIZE,
            "axes": ["VQ", "MQ", "TA"],
            "judge_axes": ["VQ", "MQ"],
            **changes,
        }
    )


@pytest.fixture
def full(tmp_path):
    generator = np.random.default_rng(0)
    clips = {}
    for name in ("before", "after", "teacher"):
        with VideoWriter(tmp_path / f"{name}.mp4") as writer:
            writer.write(torch.rand(13, 3, *SIZE))
        (tmp_path / f"{name}.png").write_bytes(maps.png(np.zeros((4, 4, 3), np.uint8)))
        clips[name] = [Clip(prompt=PROMPT, video=f"{name}.mp4", sheet=f"{name}.png")]
    np.savez(
        tmp_path / "maps.npz",
        frames=generator.integers(0, 255, (6, *SIZE, 3)).astype(np.uint8),
        saliency=generator.random((3, 6, 4, 6)),
        weights=generator.random((6, 4, 6)) * 2,
        scores=np.zeros(3),
        prompt=np.array(PROMPT),
    )
    steps = [
        StepPoint(
            step=i, elapsed=i, generator_loss=1 / i, critic_loss=1.0, scores={"VQ": i, "MQ": 0.0, "TA": 1.0}
        )
        for i in range(1, 9)
    ]
    evaluations = {
        "before": {
            **{name: number(0.2, 0.4) for name in EXACT},
            "kid": number(0.4, 0.6),
            "sharpness": number(3.0, 3.2),
            "judge/VQ": number(-1.0, 1.0),
            "judge/MQ": number(0.0, 1.0),
        },
        "after": {
            **{name: number(0.4, 0.6) for name in EXACT},
            "kid": number(0.1, 0.4),
            "sharpness": number(1.5, 1.6),
            "judge/VQ": number(1.0, -1.0),
            "judge/MQ": number(-0.5, 0.5),
        },
        "drawings": {"sharpness": Number(value=1.0, spread=0.1)},
    }
    timing = Timing(
        text=0.1, denoise=1.0, cache=0.2, decode=0.5, first_frame=0.25, total=2.0, chunks=4, frames=45
    )
    made = record(
        clips=clips, steps=steps, evaluations=evaluations, timing=timing, maps="maps.npz", finished=True
    )
    made.stages["distilling"] = 12.0
    made.save(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """Every source and address in the page, and that tags close."""

    VOID = frozenset({"meta", "img", "input", "br", "link", "path", "use", "rect", "stop"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "poster", "srcset")]
        assert tag not in ("link", "iframe", "object")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def test_a_full_page_holds_everything_itself(full):
    text = write_report(Record.load(full), full).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    kinds = [re.match(r"data:([\w/]+);base64,", source).group(1) for source in page.sources]
    assert kinds.count("video/mp4") == 3
    assert kinds.count("image/png") == 3 + 5  # contact sheets; frames, three axes, weights
    for kind, source in zip(kinds, page.sources, strict=True):
        data = io.BytesIO(base64.b64decode(source.split(",", 1)[1]))
        if kind == "image/png":
            Image.open(data).verify()
        else:
            with av.open(data) as container:
                assert sum(1 for _ in container.decode(video=0)) == 13
    assert PROMPT in page.text  # escaped in the source, whole to a reader
    assert "<rabbit>" not in text
    assert text.count("<svg") == 4  # rewards, two losses, the temporal profile
    assert "22" in page.text  # 45 frames in 2 s
    assert "0.30 → 0.50" in page.text
    assert "Not moved by more than twice the spread: VQ." in page.text


def test_videos_in_the_page_have_an_index(full):
    """A fragmented file has no duration in front; the page's have, so that a browser can seek."""
    from stream_r1.demo.report import playable

    with av.open(io.BytesIO(playable(full / "before.mp4"))) as container:
        assert float(container.duration) / av.time_base == pytest.approx(13 / 24, abs=0.01)
    assert b"moof" not in playable(full / "before.mp4")


def test_verdicts_follow_what_is_better_and_how_sure_it_is(full):
    made = Record.load(full)
    rows = {row.name: row for group in measures.groups(made).values() for row in group}
    wanted = dict.fromkeys((name.capitalize() for name in EXACT), "better")
    wanted |= {"KID": "better", "Sharpness": "better", "VQ": "unsure", "MQ": "worse"}
    assert {name: row.verdict for name, row in rows.items()} == wanted
    # of the pairs: deviation of -0.3 and -0.2 over the root of 2
    assert rows["KID"].change == pytest.approx((-0.25, 0.05))
    assert rows["VQ"].change == pytest.approx((0.0, 2.0))


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_that_has_hardly_begun_gets_a_page(tmp_path, stopped):
    made = record(stopped=stopped)
    made.save(tmp_path)
    text = write_report(made, tmp_path).read_text(encoding="utf-8")
    assert Page(text).sources == []
    assert ("stopped" if stopped else "not finished") in text


def test_files_that_went_missing_are_left_out(full):
    (full / "after.mp4").unlink()
    (full / "maps.npz").unlink()
    text = write_report(Record.load(full), full).read_text(encoding="utf-8")
    assert sum(source.startswith("data:video") for source in Page(text).sources) == 2


def test_a_running_mean():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(5)]
    np.testing.assert_allclose(figures.smooth(values, 3), expected)


def test_heat_lies_where_it_belongs():
    """The only hot cell changes its own pixels most."""
    frames = np.full((1, 8, 12, 3), 128, np.uint8)
    heat = np.zeros((1, 4, 6))
    heat[0, 1, 4] = 1.0
    strip = maps.heat_strip(frames, heat, scale=2).astype(int)
    changed = np.abs(strip[..., :3] - strip[0, 0, :3]).sum(-1)
    hot = np.argwhere(changed > 0)
    assert hot.min(0).tolist() == [4, 16]
    assert hot.max(0).tolist() == [7, 19]
