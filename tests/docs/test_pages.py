"""The code in the documentation runs: every python block of a page, in order, in one namespace.

A block that can't run here says so, and why, in a comment above it: <!-- not run: reason -->.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from stream_r1_kernels import ChunkCache, RotaryGrid

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    line: int  # of the page, where the code begins
    code: str
    reason: str | None  # why it is not run


def blocks_of(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Block(line, match["code"], match["reason"])


class Enough(Exception):
    """A stream without an end has shown enough."""


def readme() -> dict[str, Any]:
    """What README's fragments take for granted."""
    torch.manual_seed(0)
    shown: list[torch.Tensor] = []

    def show(frames: torch.Tensor) -> None:
        shown.append(frames)
        if len(shown) == 2:
            raise Enough

    class Reward:
        axes = ("VQ", "MQ", "TA")

        def score(self, video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return video.mean(dim=(1, 3, 4))

    cache = ChunkCache(1, 2, 2, RotaryGrid(16), 2, 3, 3, window_frames=9)
    video = {"reward": Reward(), "video": torch.rand(2, 9, 3, 16, 24), "prompts": ["a", "b"]}
    latents = ("x", "fake", "real_cond", "real_uncond")
    attention = {"q": torch.randn(2, 18, 32), "k": torch.randn(2, 18, 32), "v": torch.randn(2, 18, 2, 16)}
    weights = {"wq": torch.ones(32), "wk": torch.ones(32), "cache": cache, "layer": 0, "H": 2}
    return (
        {"show": show, "latent_shape": (3, 2, 3)}
        | video
        | dict(zip(latents, torch.randn(4, 2, 3, 4, 2, 3), strict=True))
        | attention
        | weights
    )


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {"README.md": readme}


def run(path: Path, text: str) -> int:
    """Run a page's blocks; lines of a traceback are the page's. Returns how many there were."""
    namespace = GIVEN.get(path.name, dict)() | {"__name__": "page"}
    count = 0
    for block in blocks_of(text):
        if block.reason is None:
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            with contextlib.suppress(Enough):
                exec(code, namespace)
            count += 1
    return count


WITH_CODE = [page for page in PAGES if any(blocks_of(page.read_text()))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(page, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_is_found(page):
    """None is indented, misspelt or cut off, so that none escapes the runner."""
    text = page.read_text()
    assert len(re.findall(r"^\s*(?:```|~~~)\s*py", text, re.M)) == sum(1 for _ in blocks_of(text))


def test_a_wrong_page_fails_where_it_is_wrong():
    text = "# Page\n\n```python\na = 1\n```\n\nand then\n\n```python\nassert a == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run(Path("page.md"), text)
    assert caught.traceback[-1].lineno == 9  # counted from 0
