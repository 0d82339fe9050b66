"""The page in a browser, as people use it: on a desk and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from serve_browser import ARGUMENTS

STAGES = {"typing", "wait", "text", "model", "decode", "encode", "transport", "display", "total"}


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def problems() -> list[str]:
    """Errors of scripts, and what was asked of other servers."""
    return []


def visit(browser: Browser, served: str, problems: list[str], **window: object) -> Page:
    page = browser.new_page(**window)  # type: ignore[arg-type]
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda sent: sent.url.startswith((served, "data:", "blob:")) or problems.append(sent.url)
    )
    page.goto(served)
    wait_for_frame(page, 3)
    return page


def wait_for_frame(page: Page, number: int) -> None:
    page.wait_for_function(f"Number(document.getElementById('view').dataset.frame) >= {number}")


def frame(page: Page) -> int:
    return int(page.evaluate("document.getElementById('view').dataset.frame"))


def wait_for_change(page: Page, prompt: int) -> None:
    page.wait_for_function(f"Number(document.getElementById('view').dataset.prompt) >= {prompt}")


def test_typing_switching_pausing_and_coming_back(
    browser: Browser, served: str, problems: list[str], tmp_path: Path
) -> None:
    page = visit(browser, served, problems, viewport={"width": 1280, "height": 800})
    assert page.input_value("#prompt") == "a fat rabbit"
    page.fill("#prompt", "")
    page.type("#prompt", "a tree in snow")  # and no key more: it is sent by itself
    wait_for_change(page, 1)
    page.wait_for_function("document.getElementById('view').dataset.latency")
    latency = json.loads(page.evaluate("document.getElementById('view').dataset.latency"))
    assert latency.keys() == STAGES
    assert sum(latency[stage] for stage in STAGES - {"total"}) == pytest.approx(latency["total"], rel=0.2)

    page.check("#recache")
    page.fill("#prompt", "a butterfly")
    page.press("#prompt", "Enter")
    wait_for_change(page, 2)

    page.click("#pause")
    page.wait_for_function("document.getElementById('pause').textContent === 'Go on'")
    page.wait_for_timeout(500)
    stopped = frame(page)
    page.wait_for_timeout(500)
    assert frame(page) == stopped
    page.click("#pause")
    wait_for_frame(page, stopped + 12)

    page.fill("#seed", "9")
    page.click("#restart")
    wait_for_change(page, 3)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (300, 200), (200, 30, 30)).save(picture)
    page.set_input_files("#file", picture)
    wait_for_change(page, 4)

    stream = page.evaluate("hello.stream")
    page.evaluate("socket.close()")  # as a network does
    page.wait_for_function("hello === null")
    page.wait_for_function("hello !== null && document.getElementById('veil').hidden")
    assert page.evaluate("hello.stream") == stream
    assert page.is_enabled("#prompt")
    now = frame(page)
    wait_for_frame(page, now + 12)
    page.wait_for_function(
        "/of 24 frames a second.*chunks late/.test(document.getElementById('figures').innerText)"
    )
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).stat().st_size > 1000
    assert problems == []
    page.close()


def test_on_a_phone_everything_is_in_reach_and_others_can_watch(
    browser: Browser, served: str, problems: list[str]
) -> None:
    phone = {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    }
    page = visit(browser, served, problems, **phone)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in (
        "#view",
        "#prompt",
        "#go",
        "#pause",
        "#restart",
        "#recache",
        "#begin",
        "#download",
        "#share",
    ):
        box = page.locator(control).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844, control
    page.fill("#prompt", "snow on the meadow")
    page.tap("#go")
    wait_for_change(page, 1)

    guest = browser.new_page()
    guest.set_default_timeout(60_000)
    guest.goto(f"{served}/#watch={page.evaluate('hello.stream')}")
    wait_for_frame(guest, 1)
    assert guest.input_value("#prompt") == "snow on the meadow"
    assert guest.is_disabled("#pause")
    guest.close()
    assert problems == []
    page.close()
