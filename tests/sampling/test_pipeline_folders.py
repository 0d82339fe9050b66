"""What folders and repositories a pipeline is made of, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling_models import SIZE, WordEncoder

from stream_r1.files import FileError
from stream_r1.sampling.pipeline import StreamR1Pipeline


def test_bad_folders_are_refused(wan: Path, tmp_path: Path) -> None:
    load = StreamR1Pipeline.from_pretrained
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"lacks vae/config\.json, transformer/config\.json, text_encoder"
    ):
        load(tmp_path)
    with pytest.raises(
        ValueError, match="preset must be one of stream-r1, reward-forcing, self-forcing, got 'x'"
    ):
        load(wan, preset="x")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(wan, tmp_path / "student.pt")
    with pytest.raises(ValueError, match=r"size must be positive multiples of \(16, 16\), got \(24, 32\)"):
        load(wan, size=(24, 32), text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="fps must be positive"):
        load(wan, size=SIZE, fps=-1, text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="no such setting: windows"):
        load(wan, size=SIZE, text_encoder=WordEncoder(), windows=3)
    index = {"transformer_2": [None, None], "image_encoder": ["transformers", "CLIPVisionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(NotImplementedError, match=r"image_encoder/: image conditioning"):
        load(tmp_path)
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(NotImplementedError, match=r"transformer_2/: a second expert transformer"):
        load(tmp_path)
    pipeline = load(wan, size=SIZE, text_encoder=WordEncoder())
    with pytest.raises(ValueError, match="seconds must be at least"):
        pipeline("a", 0)
    with pytest.raises(TypeError, match="seconds must be a number, got '2'"):
        pipeline("a", "2")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="prompts must be a str, a sequence of them or embeddings, got NoneType"
    ):
        pipeline(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, as torch\.bfloat16, got 'bfloat16'"):
        load(wan, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"size must be \(height, width\), got '16x32'"):
        load(wan, size="16x32")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("transformer/config.json", "{"),
        ("transformer/config.json", "[]"),
        ("transformer/config.json", b"\xff\xfe"),
        ("vae/config.json", "{"),
        ("text_encoder/config.json", "{"),
        ("text_encoder/config.json", "{}"),
        ("tokenizer/tokenizer.json", "{"),
        ("model_index.json", "{"),
        ("transformer/diffusion_pytorch_model.safetensors", 0.5),
        ("vae/diffusion_pytorch_model.safetensors", 0.5),
        ("text_encoder/model.safetensors", 0.5),
        ("vae/diffusion_pytorch_model.safetensors", None),
        ("text_encoder/model.safetensors", None),
    ],
)
def test_a_broken_off_download_is_named(
    wan: Path, tmp_path: Path, file: str, content: str | bytes | float | None
) -> None:
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, float):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: int(content * len(whole))])
    else:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((FileError, FileNotFoundError)) as error:
        StreamR1Pipeline.from_pretrained(folder, size=SIZE).text_encoder.encode(["a"])
    assert str(folder / file.partition("/")[0]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "name"),
    [("vae", "decoder.conv_out.weight"), ("text_encoder", "block.0.layer.0.SelfAttention.q.weight")],
)
def test_weights_that_a_file_lacks_are_not_random(wan: Path, tmp_path: Path, part: str, name: str) -> None:
    folder = tmp_path / "wan"
    shutil.copytree(wan, folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    stored = next(key for key in state if key.endswith(name))
    save_file({key if key != stored else f"x.{key}": t for key, t in state.items()}, file, {"format": "pt"})
    with pytest.raises(FileError, match=rf"{part}: the weights do not fit.* 1 missing: .*{name}"):
        StreamR1Pipeline.from_pretrained(folder, size=SIZE).text_encoder.encode(["a"])


def test_a_hub_repository_streams(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's own cache on disk, without a network: what is not in the cache can't be reached."""
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / "0123abc"
    shutil.copytree(wan, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = StreamR1Pipeline.from_pretrained("somebody/tiny", size=SIZE)
    expected = StreamR1Pipeline.from_pretrained(wan, size=SIZE)
    assert torch.equal(pipeline("a fat rabbit", 0.5).frames, expected("a fat rabbit", 0.5).frames)
    with pytest.raises(FileNotFoundError, match=r"hub that can be reached, got somebody/other"):
        StreamR1Pipeline.from_pretrained("somebody/other", size=SIZE)
