"""Figures of a live stream: ``python -m stream_r1.serve.measure switch | viewers | page``.

What a prompt switch does to the video, how many viewers a running server holds, and the latencies that its
page shows.
"""

from __future__ import annotations

import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from stream_r1.cli import run_app
from stream_r1.commands.console import make_console
from stream_r1.commands.sample import ModelChoice
from stream_r1.drawn_world.measures import measure
from stream_r1.drawn_world.scenes import Scene
from stream_r1.messages import shown
from stream_r1.recipe import locate
from stream_r1.rewards.loading import load_reward
from stream_r1.sampling.pipeline import StreamR1Pipeline
from stream_r1.serve.client import LiveClient
from stream_r1.serve.protocol import Frame

Match = Callable[[Tensor, str], float]
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@dataclass(frozen=True)
class SwitchFigures:
    """Of one switch: chunks until the new prompt matches better than the old one (None: it never did), what
    both match at the end, and the change of the picture at the border beside that between frames before.
    """

    chunks: int | None
    new_at_end: float
    old_at_end: float
    jump: float  # times the usual change from frame to frame
    usual_jump: float  # the same at the border before


def measure_switch(
    pipeline: StreamR1Pipeline,
    old: str,
    new: str,
    match: Match,
    *,
    recache: bool,
    seed: int = 0,
    before: int = 5,
    after: int = 10,
) -> SwitchFigures:
    """Switch a stream from one prompt to another after `before` chunks (2 or more) and watch `after` more.

    Args:
        match: of frames [T, 3, H, W] in [0, 1] and a prompt; higher is better.
    """
    stream = pipeline.stream(old, seed)
    chunks: list[Tensor] = []
    for index in range(before + after):
        if index == before:
            stream.switch(new, recache=recache)
        frames = next(stream).frames
        assert frames is not None
        chunks.append(frames[0].float().cpu())
    needed = None
    for number, frames in enumerate(chunks[before:], 1):
        scores = match(frames, new), match(frames, old)
        if needed is None and scores[0] > scores[1]:
            needed = number
    video, border = torch.cat(chunks), sum(len(frames) for frames in chunks[:before])
    change = (video[1:] - video[:-1]).abs().mean((1, 2, 3))
    earlier = border - len(chunks[before - 1])
    usual = statistics.median(change[: border - 1].tolist()) or 1e-9
    jumps = (float(change[at - 1]) / usual for at in (border, earlier))
    return SwitchFigures(needed, *scores, *jumps)


def matcher(prompts: Sequence[str], reward: str) -> tuple[str, Match]:
    """What tells how well frames match a prompt, and its name: the drawn world's count of what the prompt
    says where all prompts are its own, else the reward's text alignment.
    """
    try:
        scenes = {prompt: Scene.of(prompt) for prompt in prompts}
    except ValueError:
        judge = load_reward(locate(reward))
        axis = judge.axes.index("TA")

        def aligned(frames: Tensor, prompt: str) -> float:
            with torch.no_grad():
                return float(judge.score(frames[None], [prompt])[0, axis])

        return "text alignment", aligned

    def counted(frames: Tensor, prompt: str) -> float:
        found = measure(frames, scenes[prompt])
        return (found["colour"] + found["shape"] + found["moves"]) / 3

    return "colour, shape and motion that are there", counted


@app.command()
def switch(
    prompts: Annotated[Path, typer.Argument(help="A prompt a line; each is switched to the next.")],
    models: Annotated[str, typer.Option(help="As for stream-r1 sample.")] = "assets/tiny",
    checkpoint: Annotated[Path | None, typer.Option(help="As for stream-r1 sample.")] = None,
    reward: Annotated[
        str, typer.Option(help="Folder of a reward with text alignment.")
    ] = "assets/tiny/reward",
    pairs: Annotated[int, typer.Option(min=1, help="How many switches, each both ways.")] = 12,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    after: Annotated[int, typer.Option(min=1, help="Chunks that are watched after it.")] = 10,
) -> None:
    """A prompt switch as it is and with the window recomputed."""
    texts = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(texts) < 2:
        raise ValueError(f"{shown(str(prompts))}: expected two prompts or more, got {len(texts)}")
    texts = (texts * (pairs // len(texts) + 2))[: pairs + 1]
    name, match = matcher(texts, reward)
    pipeline = ModelChoice(models, checkpoint).load(None, True)
    console = make_console()
    for recache in (False, True):
        found = [
            measure_switch(pipeline, old, new, match, recache=recache, seed=seed + number, after=after)
            for number, (old, new) in enumerate(pairwise(texts))
        ]
        made = sorted(after + 1 if one.chunks is None else one.chunks for one in found)
        figures = {
            "recache": recache,
            "measure": name,
            "switches": len(found),
            "never": sum(one.chunks is None for one in found),
            "chunks_median": statistics.median(made),
            "chunks_mean": statistics.mean(made),
        }
        for field in ("new_at_end", "old_at_end", "jump", "usual_jump"):
            figures[field] = round(statistics.mean(getattr(one, field) for one in found), 3)
        console.print_json(json.dumps(figures | {"each": [asdict(one) for one in found]}))


def held_viewers(url: str, counts: Sequence[int], frames: int = 48) -> Iterator[dict[str, float]]:
    """For each count: viewers of one stream at once, and what they lost of so many frames.

    Yields:
        viewers, lost (share of all frames), worst (of one viewer), fps (that the slowest saw).
    """
    with LiveClient(url) as live:
        stream = live.hello["stream"]
        reading = threading.Thread(target=_drain, args=(live,), daemon=True)
        reading.start()
        for count in counts:
            lost: list[float] = []
            rates: list[float] = []
            threads = [
                threading.Thread(target=_watch, args=(url, stream, frames, lost, rates)) for _ in range(count)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            figures = {"viewers": count, "lost": statistics.mean(lost), "worst": max(lost), "fps": min(rates)}
            yield {key: round(value, 4) for key, value in figures.items()}


def _drain(live: LiveClient) -> None:
    for _ in live:
        pass


def _watch(url: str, stream: str, frames: int, lost: list[float], rates: list[float]) -> None:
    with LiveClient(url, stream=stream) as live:
        numbers: list[int] = []
        began = 0.0
        for event in live:
            if isinstance(event, Frame):
                began = began or time.perf_counter()
                numbers.append(event.number)
                if len(numbers) == frames:
                    break
        asked = numbers[-1] - numbers[0] + 1
        lost.append(1 - len(numbers) / asked)
        rates.append((len(numbers) - 1) / (time.perf_counter() - began))


@app.command()
def viewers(
    url: Annotated[str, typer.Argument(help="Of a running server, with its token.")],
    counts: Annotated[str, typer.Option(help="Viewers at once, one after the other.")] = "1,5,10,20,40,60",
) -> None:
    """How many viewers of one stream a server holds: frames that they lose."""
    console = make_console()
    for figures in held_viewers(url, [int(count) for count in counts.split(",")]):
        console.print_json(json.dumps(figures))


def page_latencies(
    url: str, prompts: Sequence[str], *, recache: bool = False, picture: Path | None = None, **window: Any
) -> dict[str, Any]:
    """What the page shows in headless Chromium: milliseconds from its opening to the first frame, and from
    key to changed frame, by stage, for each prompt.

    Args:
        picture: a screenshot at the end.
        window: of Playwright's `new_page`.

    Raises:
        RuntimeError: no Chromium.
    """
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise RuntimeError("page_latencies: expected chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(**window)
        page.set_default_timeout(120_000)
        page.goto(url)
        view = "document.getElementById('view').dataset"
        page.wait_for_function(f"{view}.first !== undefined")
        first = float(page.evaluate(f"{view}.first"))
        if recache:
            page.check("#recache")
        changes = []
        for number, prompt in enumerate(prompts, 1):
            page.wait_for_timeout(1000)
            page.fill("#prompt", prompt)
            page.press("#prompt", "Enter")
            page.wait_for_function(f"Number({view}.prompt) >= {number} && {view}.latency")
            changes.append(json.loads(page.evaluate(f"{view}.latency")))
        page.wait_for_timeout(1500)
        if picture is not None:
            page.screenshot(path=str(picture))
        figures = page.inner_text("#figures")
        browser.close()
    stages = {stage: round(statistics.median(change[stage] for change in changes), 1) for stage in changes[0]}
    return {"first_frame": round(first, 1), "median": stages, "changes": changes, "page": figures}


@app.command()
def page(
    url: Annotated[str, typer.Argument(help="Of a running server, with its token.")],
    prompts: Annotated[Path, typer.Argument(help="A prompt a line.")],
    recache: Annotated[bool, typer.Option("--recache", help="Recompute the window at each switch.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Switches.")] = 5,
    phone: Annotated[bool, typer.Option("--phone", help="A phone's window.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Screenshot at the end, a PNG.")] = None,
) -> None:
    """The latencies that the page shows in headless Chromium."""
    texts = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    window: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
    if phone:
        size = {"width": 390, "height": 844}
        window = {"viewport": size, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    found = page_latencies(url, texts[1 : count + 1], recache=recache, picture=picture, **window)
    make_console().print_json(json.dumps(found))


if __name__ == "__main__":
    run_app(app)
