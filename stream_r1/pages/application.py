"""What the project's web applications share: who is answered, and headers that keep a page out of caches."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

LOCAL = ("127.0.0.1", "localhost", "::1")
NO_TOKEN = "expected the token of the link that you were given"


def has_token(token: str, headers: Mapping[str, str], query: Mapping[str, str]) -> bool:
    """Whether a request has the token, as `?token=` of its address or as the header x-token."""
    given = query.get("token") or headers.get("x-token") or ""
    return secrets.compare_digest(given.encode(), token.encode())


def page_address(host: str, port: int, token: str | None) -> str:
    """What a person opens."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def create(title: str, refusal: Callable[[Request], tuple[int, str] | None], lifespan: Any = None) -> FastAPI:
    """An application without generated pages.

    Args:
        refusal: status and reason for a request that is not answered, else None.
        lifespan: as of FastAPI.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.middleware("http")
    async def guarded(request: Request, call_next):  # type: ignore[no-untyped-def]
        if (refused := refusal(request)) is not None:
            status, reason = refused
            return JSONResponse({"detail": reason}, status)
        response: Response = await call_next(request)
        response.headers["cache-control"] = "no-store"
        response.headers["referrer-policy"] = "no-referrer"
        return response

    return app
