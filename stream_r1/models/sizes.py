"""What a model's `config.json` may ask for: checked before a model of that size is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stream_r1.files import FileError, read_json
from stream_r1.messages import shown

_LARGEST = 2**31  # of numbers that are not named here

_Check = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int, *, none: bool = False) -> _Check:
    told = f"a whole number from {low} to {high}" + (" or null" if none else "")
    return lambda value: (none and value is None) or (type(value) is int and low <= value <= high), told


def _number(good: Callable[[float], bool], told: str, *, none: bool = False) -> _Check:
    return lambda value: (none and value is None) or (type(value) in (int, float) and good(value)), told


def _listed(each: _Check, lengths: range, *, none: bool = False) -> _Check:
    def good(value: Any) -> bool:
        listed = isinstance(value, list) and len(value) in lengths and all(each[0](item) for item in value)
        return listed or (none and value is None)

    count = lengths[0] if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return good, f"a list of {count}, each {each[1]}" + (" or null" if none else "")


_FINITE = _number(math.isfinite, "a finite number")
_CHANNELS = _whole(1, 65536)
_CHECKS: dict[str, _Check] = {
    # Wan's transformers and our student
    "num_attention_heads": _whole(1, 1024),
    "attention_head_dim": _whole(2, 1024),
    "in_channels": _CHANNELS,
    "out_channels": _whole(1, 65536, none=True),
    "text_dim": _CHANNELS,
    "freq_dim": _whole(2, 65536),
    "ffn_dim": _whole(1, 2**20),
    "rope_max_seq_len": _whole(1, 65536),
    "text_len": _whole(1, 4096),
    "eps": _number(lambda x: 0 < x < 1, "a number between 0 and 1"),
    "cross_attn_norm": (lambda value: isinstance(value, bool), "true or false"),
    "frames_per_chunk": _whole(1, 1024),
    "first_chunk_frames": _whole(1, 1024, none=True),
    "window_frames": _whole(1, 16384, none=True),
    "sink_frames": _whole(0, 16384),
    "sink_ema": _number(lambda x: 0 < x < 1, "a number between 0 and 1", none=True),
    # their autoencoder
    "base_dim": _CHANNELS,
    "decoder_base_dim": _whole(1, 65536, none=True),
    "z_dim": _whole(1, 4096),
    "dim_mult": _listed(_whole(1, 1024), range(1, 17)),
    "num_res_blocks": _whole(1, 64),
    "attn_scales": _listed(_FINITE, range(17)),
    "temperal_downsample": _listed((lambda value: isinstance(value, bool), "true or false"), range(1, 17)),
    "latents_mean": _listed(_FINITE, range(1, 4097), none=True),
    "latents_std": _listed(_number(lambda x: x > 0, "a positive number"), range(1, 4097), none=True),
    # our own
    "channels": _whole(1, 4096),
    "width": _CHANNELS,
    "fine_width": _CHANNELS,
    # text and vision models of transformers
    "num_layers": _whole(1, 1024),
    "num_hidden_layers": _whole(1, 1024),
    "depth": _whole(1, 1024),
    "num_decoder_layers": _whole(0, 1024, none=True),
    "num_heads": _whole(1, 1024),
    "d_model": _CHANNELS,
    "d_kv": _CHANNELS,
    "d_ff": _whole(1, 2**20),
    "hidden_size": _CHANNELS,
    "intermediate_size": _whole(1, 2**20),
    "vocab_size": _whole(1, 2**22),
    "embed_dim": _CHANNELS,
}
_PATCH = _listed(_whole(1, 64), range(3, 4))
_SQUARE = _whole(1, 64, none=True)


def read_sizes(path: str | Path) -> dict[str, Any]:
    """A model's `config.json`, none of whose sizes is beyond what models have.

    Raises:
        OSError, FileError: see `read_json`; a size of another type or beyond its limit, by its key.
    """
    config = read_json(path)
    require_sizes(config, str(path))
    return config


def require_sizes(config: dict[str, Any], source: str) -> None:
    """Raises FileError for a size of another type or beyond its limit, by its key."""
    _require({k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}, source, "")


def _require(value: Any, path: str, key: str) -> None:
    name = key.rpartition(".")[2]
    good, told = _CHECKS.get(name, (None, ""))
    if name == "patch_size":
        good, told = _PATCH if isinstance(value, list) else _SQUARE
    if good is not None and not good(value):
        raise FileError(f"{path}: {key}: expected {told}, got {shown(value)}")
    if type(value) is int and abs(value) > _LARGEST:
        raise FileError(f"{path}: {key}: expected at most {_LARGEST}, got {shown(value)}")
    if isinstance(value, dict):
        for inner, item in value.items():
            _require(item, path, f"{key}.{inner}" if key else inner)
