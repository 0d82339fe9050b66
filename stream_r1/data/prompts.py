"""Prompts from files: text or parquet."""

from __future__ import annotations

from pathlib import Path

from stream_r1.config import SettingsError

_COLUMNS = ("prompt", "caption", "text")


def read_prompt_file(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line, or of a .parquet file; empty ones are left out.

    Of a .parquet file, those of its column "prompt", else "caption", else "text".

    Raises:
        SettingsError: a file that can't be read, or no prompt in it.
    """
    if path.suffix == ".parquet":
        lines = _read_parquet(path)
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise SettingsError(f"prompts: {path}: expected a text file in UTF-8: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SettingsError(f"prompts: {path}: expected at least one prompt, got an empty file")
    return prompts


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise SettingsError(
            f"prompts: {path}: a .parquet file needs the package pyarrow: pip install stream-r1[parquet]"
        ) from None
    try:
        names = parquet.read_schema(path).names
        column = next((name for name in _COLUMNS if name in names), None)
        if column is None:
            raise SettingsError(
                f"prompts: {path}: expected a column {', '.join(_COLUMNS)}, got {', '.join(names)}"
            )
        values = parquet.read_table(path, columns=[column])[column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"prompts: {path}: not a readable .parquet file: {error}") from None
    other = next((value for value in values if not isinstance(value, str | None)), None)
    if other is not None:
        raise SettingsError(f"prompts: {path}: {column}: expected text, got {other!r}")
    return [value or "" for value in values]
