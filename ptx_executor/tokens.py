"""PTX as tokens, with a cursor over them."""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import ParseError

_TOKEN = re.compile(
    r"""(?P<string>"[^"]*")
    |(?P<name>[A-Za-z_$%][\w$]*(?:(?:\.|::)[\w$]+)*|\.[A-Za-z_]\w*(?:::\w+)?)
    |(?P<number>\d[\w.]*)
    |(?P<mark>[-+!|@{}()\[\],;:<>=])
    |(?P<space>\s+)
    |(?P<bad>.)""",
    re.X,
)
_LINE_DIRECTIVES = re.compile(r"^[ \t]*\.(loc|file)\b[^\n]*", re.M)
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


class _Token(NamedTuple):
    text: str
    line: int
    start: int


def integer(text: str) -> int:
    """The value of an integer literal: decimal, 0x, 0b or octal with a leading 0, with or without U."""
    text = text.rstrip("uU")
    if len(text) > 1 and text[0] == "0" and text[1].isdigit():
        return int(text, 8)
    return int(text, 0)


class Cursor:
    """The tokens of a text and a place among them."""

    def __init__(self, text: str) -> None:
        clean = _LINE_DIRECTIVES.sub("", _COMMENTS.sub(lambda m: "\n" * m[0].count("\n") or " ", text))
        self._text, self._at = clean, 0
        self._tokens: list[_Token] = []
        line = 1
        for match in _TOKEN.finditer(clean):
            if match.lastgroup == "bad":
                raise ParseError(f"line {line}: unexpected character {match[0]!r}")
            if match.lastgroup != "space":
                self._tokens.append(_Token(match[0], line, match.start()))
            line += match[0].count("\n")
        self._tokens.append(_Token("", line, len(clean)))

    def _peek(self) -> str:
        return self._tokens[self._at].text

    def _next(self) -> str:
        if not self._peek():
            raise self._error("the text ends too early")
        self._at += 1
        return self._tokens[self._at - 1].text

    def _accept(self, text: str) -> bool:
        if self._peek() == text:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._error(f"expected {text!r}, got {self._peek()!r}")

    def _error(self, message: str) -> ParseError:
        return ParseError(f"line {self._tokens[self._at].line}: {message}")

    def _integer(self) -> int:
        sign = -1 if self._accept("-") else 1
        try:
            return sign * integer(self._next())
        except ValueError:
            self._at -= 1
            raise self._error(f"expected an integer, got {self._peek()!r}") from None

    def _skip_braces(self) -> None:
        self._expect("{")
        depth = 1
        while depth:
            token = self._next()
            if not token:
                raise self._error("a brace is not closed")
            depth += (token == "{") - (token == "}")
