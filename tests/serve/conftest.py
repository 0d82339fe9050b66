"""A running server with the smallest models, and a browser."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

for _folder in ("gpu", "serve", "sampling"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _folder))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of random weights: 12 frames of 16 x 32 pixels a chunk, 24 a second."""
    import torch
    import uvicorn
    from sampling_models import SIZE, WordEncoder, tiny_student, tiny_vae

    from stream_r1.sampling.pipeline import StreamR1Pipeline
    from stream_r1.serve.app import create_app
    from stream_r1.serve.protocol import MAX_UPLOAD
    from stream_r1.serve.settings import Settings

    torch.set_num_threads(1)
    pipeline = StreamR1Pipeline(tiny_student(), tiny_vae(), WordEncoder(), size=SIZE, fps=24)
    folder = tmp_path_factory.mktemp("recordings")
    settings = Settings(prompt="a fat rabbit", streams=3, viewers=60, lag=2.0, recordings=folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(
        create_app(settings, pipeline),
        port=port,
        log_level="error",
        ws_max_size=MAX_UPLOAD + 1024,
        ws_per_message_deflate=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    """Nobody of an earlier test watches any more."""
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        while json.load(urllib.request.urlopen(f"{served}/health", timeout=10))["viewers"]:
            time.sleep(0.05)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where it is; .ci/run installs it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here (on Debian: apt-get install chromium)")
    return found
