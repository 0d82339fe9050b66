"""The web application: pages, videos and votes. Any ASGI server runs it, with any number of workers."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from stream_r1.pages import LOOK, application
from stream_r1.votes.plan import Comparison, Side
from stream_r1.votes.store import OtherVoteError, UnknownRaterError, VoteStore

LARGEST_BODY = 16_384  # bytes of a request
_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

Rater = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{8,64}$")]


class Answers(BaseModel):
    """A vote: an answer to every question about a rater's pair of that number."""

    model_config = ConfigDict(extra="forbid")

    item: int = Field(ge=0)
    answers: dict[str, Literal["left", "right", "tie"]]
    seconds: float | None = Field(default=None, ge=0, le=86_400)


def create_app(comparison: Comparison, token: str | None = None) -> FastAPI:
    """The application of a comparison.

    Args:
        token: what raters have to know (`?token=...` of the page); None: nothing, and only this machine's own
            names are answered.

    Raises:
        SettingsError: the votes that are there are on other videos, models or prompts.
    """

    app = application.create("Votes", token, largest_body=LARGEST_BODY)
    comparison.begin()
    store = VoteStore(comparison.database)
    page = _PAGE.replace("/*LOOK*/", LOOK)

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post("/api/raters", status_code=201)
    def begin() -> dict[str, str]:
        rater = secrets.token_urlsafe(12)
        store.begin(rater)
        return {"rater": rater}

    @app.get("/api/raters/{rater}/next")
    def following(rater: Rater) -> dict[str, object]:
        items = comparison.items(rater)
        voted = _voted(store, rater)
        left = [number for number, item in enumerate(items) if item.key not in voted]
        found: dict[str, object] = {"done": len(items) - len(left), "of": len(items), "item": None}
        if left:
            questions = [{"name": name, "text": text} for name, text in comparison.settings.questions.items()]
            item = items[left[0]]
            found |= {"item": left[0], "prompt": comparison.prompts[item.index], "questions": questions}
        return found

    @app.get("/api/raters/{rater}/items/{number}/{side}.mp4")
    def video(rater: Rater, number: int, side: Side) -> FileResponse:
        items = comparison.items(rater)
        _voted(store, rater)
        if not 0 <= number < len(items):
            raise HTTPException(404, f"expected an item below {len(items)}, got {number}")
        item = items[number]
        return FileResponse(comparison.file(item.index, getattr(item, side)), media_type="video/mp4")

    @app.post("/api/raters/{rater}/votes")
    def vote(rater: Rater, sent: Answers) -> dict[str, bool]:
        items = comparison.items(rater)
        if sent.item >= len(items):
            raise HTTPException(422, f"item: expected one below {len(items)}, got {sent.item}")
        if set(sent.answers) != set(comparison.settings.questions):
            expected = ", ".join(comparison.settings.questions)
            raise HTTPException(422, f"answers: expected one to each of {expected}")
        try:
            store.add(rater, items[sent.item], sent.answers, sent.seconds)
        except UnknownRaterError as error:
            raise HTTPException(404, str(error)) from None
        except OtherVoteError as error:
            raise HTTPException(409, str(error)) from None
        return {"kept": True}

    return app


def _voted(store: VoteStore, rater: str) -> set[str]:
    try:
        return store.voted(rater)
    except UnknownRaterError as error:
        raise HTTPException(404, str(error)) from None
