"""What the project's web applications share: who is answered, and headers that keep a page out of caches."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

LOCAL = ("127.0.0.1", "localhost", "::1")


def refusal(
    headers: Mapping[str, str], query: Mapping[str, str], token: str | None, origins: Collection[str] = ()
) -> str | None:
    """Why a request is not answered; None: it is.

    A browser says which page's script a request is from (Origin): another page than this server's could
    otherwise use the reader's access to it. Without a token only this machine's names are answered, so that
    a name that an attacker lets point here gets nothing.

    Args:
        headers, query: of the request.
        token: that it has to have, as `?token=` of its address or as the header x-token; None: none.
        origins: pages of these may ask too.
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if token is None and urlsplit(f"//{host}").hostname not in LOCAL:
        return "expected a host name of this machine"
    if origin is not None and origin not in origins and urlsplit(origin).netloc != host:
        return "expected this server's own page (Origin)"
    given = query.get("token") or headers.get("x-token") or ""
    if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
        return "expected the token of the link that you were given"
    return None


def page_address(host: str, port: int, token: str | None) -> str:
    """What a person opens."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def create(
    title: str,
    token: str | None,
    origins: Collection[str] = (),
    *,
    largest_body: int | None = None,
    lifespan: Any = None,
) -> FastAPI:
    """An application without generated pages, which answers as `refusal` says.

    Args:
        token, origins: as of `refusal`.
        largest_body: bytes of a request; None: any.
        lifespan: as of FastAPI.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.middleware("http")
    async def guarded(request: Request, call_next):  # type: ignore[no-untyped-def]
        if (reason := refusal(request.headers, request.query_params, token, origins)) is not None:
            return JSONResponse({"detail": reason}, 403)
        length = request.headers.get("content-length", "0")
        if largest_body is not None and (not length.isdigit() or int(length) > largest_body):
            return JSONResponse({"detail": f"expected a body of at most {largest_body} bytes"}, 413)
        response: Response = await call_next(request)
        response.headers["cache-control"] = "no-store"
        response.headers["referrer-policy"] = "no-referrer"
        return response

    return app
