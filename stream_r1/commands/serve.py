"""``stream-r1 serve``: the live page."""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import replace
from pathlib import Path

from stream_r1.commands.console import make_console
from stream_r1.models.text import check_prompt
from stream_r1.serve.protocol import MAX_UPLOAD
from stream_r1.serve.settings import Settings


def run(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve the page until Ctrl-C."""
    try:
        import uvicorn
        import websockets  # noqa: F401  what uvicorn serves sockets with

        from stream_r1.serve.access import LOCAL
        from stream_r1.serve.app import create_app
    except ImportError as error:
        needed = "fastapi, uvicorn and websockets: pip install 'stream-r1[serve]'"
        raise RuntimeError(f"serve: needs {needed} ({error})") from None
    check_prompt(settings.prompt, "--prompt")
    _ = settings.pixels  # a size that is none is refused here
    if host not in LOCAL and settings.token is None:
        settings = replace(settings, token=secrets.token_urlsafe(12))
    console = make_console()
    shown = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    token = f"?token={settings.token}" if settings.token else ""
    console.print(f"{shown}{token}", soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="stream-r1-") as folder:
        if settings.recordings is None:
            settings = replace(settings, recordings=Path(folder))
        options = {"host": host, "port": port, "log_level": "warning"}
        # JPEG does not get smaller; a connection that answers no ping is closed after 40 s
        options |= {"ws_max_size": MAX_UPLOAD + 1024, "ws_per_message_deflate": False}
        if workers == 1:
            uvicorn.run(create_app(settings), **options)  # type: ignore[arg-type]
        else:
            settings.to_environment()
            factory = "stream_r1.serve.app:create_app"
            uvicorn.run(factory, factory=True, workers=workers, **options)  # type: ignore[arg-type]
