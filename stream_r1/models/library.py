"""Models of diffusers and transformers from local folders: whole, or refused with the file's name.

The libraries themselves go on where weights are missing, with random numbers or none, and their errors often
do not say which file is damaged: broken-off downloads look like that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stream_r1.models.weight_files import CheckpointError, read_json, some


def read_library_model(kind: Any, folder: str | Path, **arguments: Any) -> Any:
    """`kind.from_pretrained(folder)` on the CPU, every weight from its files.

    Args:
        kind: a model class of diffusers or transformers.
        folder: has the `config.json` and weights of one.
        arguments: for `from_pretrained`.

    Raises:
        FileNotFoundError: no `config.json`.
        CheckpointError: files that can't be read, or weights that are missing or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected a folder with the config.json of a {kind.__name__}")
    read_json(folder / "config.json")
    return read_whole(kind, folder, **arguments)


def read_whole(kind: Any, source: str | Path, **arguments: Any) -> Any:
    """The same from a folder or a repository of the hub. Raises CheckpointError alone."""
    try:
        model, told = kind.from_pretrained(source, output_loading_info=True, **arguments)
    except Exception as error:  # of any kind: they are the libraries' and their parsers' own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{source}: not a readable {kind.__name__}: {reason}") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source}: the weights do not fit the {kind.__name__}; {len(missing)} missing: {some(missing)}"
        )
    return model


def read_tokenizer(folder: Path) -> Any:
    """A local folder's tokenizer. Raises CheckpointError if it can't be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # see above
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{folder}: not a readable tokenizer: {reason}") from error
