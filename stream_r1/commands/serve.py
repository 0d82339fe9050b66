"""``stream-r1 serve``: the live page."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

from stream_r1.commands.console import make_console
from stream_r1.models.text import check_prompt
from stream_r1.recipe import locate
from stream_r1.sampling.folders import find_parts
from stream_r1.serve.protocol import MAX_UPLOAD
from stream_r1.serve.settings import Settings


def run(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve the page until Ctrl-C."""
    try:
        import uvicorn
        import websockets  # noqa: F401  what uvicorn serves sockets with

        from stream_r1.pages.application import LOCAL, page_address
        from stream_r1.serve.app import create_app
    except ImportError as error:
        needed = "fastapi, uvicorn and websockets: pip install 'stream-r1[serve]'"
        raise RuntimeError(f"serve: needs {needed} ({error})") from None
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise ValueError(
            f"serve: expected one process, got {started} by a launcher as torchrun: several GPUs can't share "
            "the passes of a live page's student (those of stream-r1 sample can: --sequence-parallel)"
        )
    check_prompt(settings.prompt, "--prompt")
    pixels = settings.pixels
    _check_free(host, port)
    if host not in LOCAL and settings.token is None:
        settings = replace(settings, token=secrets.token_urlsafe(12))
    console = make_console()
    console.print(page_address(host, port, settings.token), soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="stream-r1-") as folder:
        if settings.recordings is None:
            settings = replace(settings, recordings=Path(folder))
        options = {"host": host, "port": port, "log_level": "warning"}
        # JPEG does not get smaller; a connection that answers no ping is closed after 40 s
        options |= {"ws_max_size": MAX_UPLOAD + 1024, "ws_per_message_deflate": False}
        if workers == 1:
            with console.status("loading the models"):
                pipeline = settings.models.load(pixels, True)
            uvicorn.run(create_app(settings, pipeline), **options)  # type: ignore[arg-type]
        else:
            find_parts(locate(settings.models.folder), settings.models.checkpoint, with_text=True)
            settings.to_environment()
            factory = "stream_r1.serve.app:create_app"
            uvicorn.run(factory, factory=True, workers=workers, **options)  # type: ignore[arg-type]


def _check_free(host: str, port: int) -> None:
    """Before models are loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        expected = "an address of this machine that nothing listens on"
        raise ValueError(f"--host, --port: expected {expected}, got {host}:{port} ({error})") from None
