"""Who is answered: a token, and no page of another origin."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from stream_r1.pages.application import LOCAL, NO_TOKEN, has_token
from stream_r1.serve.settings import Settings


def refusal(settings: Settings, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
    """Why a request is not answered; None: it is.

    A browser says which page's script a request is from (Origin): another page than this server's could
    otherwise use the reader's access to it. Without a token only this machine's names are answered, so that
    a name that an attacker lets point here gets nothing.
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if settings.token is None and urlsplit(f"//{host}").hostname not in LOCAL:
        return "expected a host name of this machine"
    if origin is not None and origin not in settings.origins and urlsplit(origin).netloc != host:
        return "expected this server's own page (Origin)"
    if settings.token is not None and not has_token(settings.token, headers, query):
        return NO_TOKEN
    return None
