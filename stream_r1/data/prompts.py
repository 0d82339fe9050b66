"""Prompts from files: text or parquet."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stream_r1.config import SettingsError
from stream_r1.models.text import check_prompt

MAX_BYTES = 1 << 28
"""Of a file of prompts, and of the text in it: more are refused."""

_COLUMNS = ("prompt", "caption", "text")
# Longer marks first: that of UTF-32 begins as that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_prompt_file(path: Path, *, max_bytes: int = MAX_BYTES) -> list[str]:
    """Prompts of a text file, one a line, or of a .parquet file; empty ones are left out.

    Text is UTF-8, or UTF-16 or UTF-32 with their byte order mark; lines end with LF, CR LF or CR. What else
    Unicode calls the end of a line is white space in a prompt. Of a .parquet file, those of its column
    "prompt", else "caption", else "text".

    Args:
        path: the file.
        max_bytes: of the file and of its text; more are refused.

    Raises:
        SettingsError: a file that can't be read or is too large, no prompt in it, or one that is no text or
            too long.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise SettingsError(f"prompts: {path}: expected at most {max_bytes} bytes (max_bytes), got {size}")
    lines = _parquet(path, max_bytes) if path.suffix.lower() == ".parquet" else _text(path)
    prompts = []
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        try:
            check_prompt(prompt, f"prompts: {path}, line {number}")
        except ValueError as error:
            raise SettingsError(str(error)) from None
        if "\0" in prompt:
            told = "expected text, got a NUL (UTF-16 without a byte order mark?)"
            raise SettingsError(f"prompts: {path}, line {number}: {told}")
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise SettingsError(f"prompts: {path}: expected at least one prompt, got an empty file")
    return prompts


def _text(path: Path) -> Iterator[str]:
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        told = f"expected a text file in UTF-8 (or with a byte order mark): {error}"
        raise SettingsError(f"prompts: {path}: {told}") from None
    return io.StringIO(text, newline=None)


def _parquet(path: Path, max_bytes: int) -> Iterator[str]:
    """Row by row; a file may unpack to any size."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise SettingsError(
            f"prompts: {path}: a .parquet file needs the package pyarrow: pip install stream-r1[parquet]"
        ) from None
    too_much = f"prompts: {path}: expected at most {max_bytes} bytes of text (max_bytes), got"
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((name for name in _COLUMNS if name in names), None)
            if column is None:
                told = f"expected a column {', '.join(_COLUMNS)}, got {_cut(', '.join(names))}"
                raise SettingsError(f"prompts: {path}: {told}")
            stated = _unpacked(file.metadata, column)
            if stated > max_bytes:
                raise SettingsError(f"{too_much} {stated}")
            taken = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    text = value.as_py()
                    if not isinstance(text, str | None):
                        raise SettingsError(
                            f"prompts: {path}: {column}: expected text, got {_cut(repr(text))}"
                        )
                    taken += 1 if text is None else 1 + len(text)
                    if taken > max_bytes:
                        raise SettingsError(f"{too_much} more")
                    yield text or ""
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"prompts: {path}: not a readable .parquet file: {_cut(str(error))}") from None


def _unpacked(metadata: Any, column: str) -> int:
    """Bytes of a column, by what the file says."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:80]}..."
