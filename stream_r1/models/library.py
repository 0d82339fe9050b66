"""Models of diffusers and transformers from local folders: whole, or refused with the file's name.

The libraries themselves continue when weights are missing, with random numbers or none, and their errors
often do not name the damaged file: interrupted downloads look like that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stream_r1.files import FileError
from stream_r1.messages import first_line, some
from stream_r1.models.sizes import read_sizes
from stream_r1.models.tensor_files import require_finite
from stream_r1.models.weight_files import require_readable_weights


def read_library_model(kind: Any, folder: str | Path, **arguments: Any) -> Any:
    """`kind.from_pretrained(folder)` on the CPU, every weight from its files.

    Args:
        kind: a model class of diffusers or transformers.
        folder: has the `config.json` and weights of one.
        arguments: for `from_pretrained`.

    Raises:
        FileNotFoundError: no `config.json`.
        FileError: files that can't be read, or weights that are missing or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: expected a folder with the config.json of a {kind.__name__}")
    _require_held(kind, read_sizes(folder / "config.json"), folder)
    model = read_whole(kind, folder, **arguments)
    require_finite(model.named_parameters(), str(folder))
    return model


def _require_held(kind: Any, config: dict[str, Any], folder: Path) -> None:
    """Refuses a configuration that asks for more numbers than the weights beside it have bytes."""
    held = require_readable_weights(folder)
    try:
        with torch.device("meta"):
            of_transformers = hasattr(kind, "config_class")
            made = kind(kind.config_class.from_dict(config)) if of_transformers else kind.from_config(config)
    except Exception as error:  # of any kind: see below
        raise FileError(
            f"{folder / 'config.json'}: expected the settings of a {kind.__name__}; {first_line(error)}"
        ) from None
    asked = sum(p.numel() for p in made.parameters())
    if asked > held:
        raise FileError(
            f"{folder / 'config.json'}: asks for {asked} numbers, but the weights beside it have {held} bytes"
        )


def read_whole(kind: Any, source: str | Path, **arguments: Any) -> Any:
    """The same from a folder or a repository of the hub. Raises FileError alone."""
    try:
        model, told = kind.from_pretrained(source, output_loading_info=True, **arguments)
    except Exception as error:  # of any kind: they are the libraries' and their parsers' own
        raise FileError(f"{source}: not a readable {kind.__name__}: {_without_advice(error)}") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise FileError(
            f"{source}: the weights do not fit the {kind.__name__}; {len(missing)} missing: {some(missing)}"
        )
    return model


def read_tokenizer(folder: Path) -> Any:
    """A local folder's tokenizer. Raises FileError if it can't be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # see above
        raise FileError(f"{folder}: not a readable tokenizer: {_without_advice(error)}") from error


def _without_advice(error: Exception) -> str:
    """The first line of a library's error, unless it advises to read the file in a way that runs code."""
    line = first_line(error)
    unsafe = any(word in line for word in ("weights_only", "trust_remote_code", "allow_pickle", "unsafe"))
    return "damaged, or holds more than tensors" if unsafe else line
