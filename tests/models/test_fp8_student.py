"""A student that multiplies in FP8: against the formula, loaded, saved and refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stream_r1.files import FileError
from stream_r1.models import fp8
from stream_r1.models.checkpoints import load_student
from stream_r1.models.fp8 import Fp8Linear, layers_in_fp8, quantize_student
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1_kernels import quantize_rows

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "text_len": 6,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
    "frames_per_chunk": 2,
    "window_frames": 6,
    "sink_frames": 2,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def student() -> CausalWanTransformer:
    torch.manual_seed(0)
    model = CausalWanTransformer(**SIZES).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape))
    return model


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    student().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def velocity(model: CausalWanTransformer) -> Tensor:
    torch.manual_seed(1)
    x, text = torch.randn(1, 2, 4, 4, 6), torch.randn(1, 6, 8)
    cache = model.new_cache(1, 4, 6)
    with torch.no_grad():
        return model.forward_chunk(x, torch.tensor([500.0]), text.to(model.dtype), cache)


class ByFormula(nn.Module):
    """A linear layer whose weights and inputs are rounded to FP8, written out."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(x) @ self.rounded(self.layer.weight).t() + self.layer.bias


def test_which_layers_are_quantised() -> None:
    model = student()
    quantize_student(model, "fp8-emulated")
    held = {name for name, part in model.named_modules() if isinstance(part, Fp8Linear)}
    names = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"}
    names |= {"ffn.net.0.proj", "ffn.net.2"}
    assert held == {f"blocks.{i}.{name}" for i in range(2) for name in names}
    assert model.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())


def test_a_pass_is_that_of_the_formula() -> None:
    model, formula = student(), student()
    quantize_student(model, "fp8-emulated")
    for owner, name in list(layers_in_fp8(formula)):
        setattr(owner, name, ByFormula(getattr(owner, name)))
    ours, theirs, whole = velocity(model), velocity(formula), velocity(student())
    off = (whole - theirs).norm()
    assert 0.002 < off / whole.norm() < 0.1
    # a number next to the middle of two of FP8's may go either way
    assert (ours - theirs).norm() < 0.1 * off


def test_the_product_of_fp8_is_the_emulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "refuse_quantization", lambda *_: None)  # torch's product runs on a CPU, too
    emulated, real = student().bfloat16(), student().bfloat16()
    quantize_student(emulated, "fp8-emulated")
    quantize_student(real, "fp8")
    whole, a, b = (velocity(model).float() for model in (student().bfloat16(), emulated, real))
    assert (a - b).norm() < 0.6 * (a - whole).norm()
    layer: Fp8Linear = real.blocks[0].attn1.to_q  # type: ignore[assignment]
    x = torch.randn(1, 5, 32).bfloat16()
    rows = quantize_rows(x)
    exact = rows.dequantize(torch.float64) @ (layer.weight.double() * layer.weight_scale).t()
    torch.testing.assert_close(layer(x).double(), exact + layer.bias.double(), rtol=2**-7, atol=2**-8)
    assert torch.equal(layer(rows), layer(x))


@pytest.mark.parametrize("mode", ["fp8-emulated", "fp8"])
def test_saved_and_loaded_bit_for_bit(
    folder: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fp8, "stream_r1.models.checkpoints"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.refuse_quantization", lambda *_: None)
    model = load_student(folder, quantize=mode)
    model.save_pretrained(tmp_path / "fp8")
    assert json.loads((tmp_path / "fp8/config.json").read_text())["quantization"] == "fp8"
    again = load_student(tmp_path / "fp8", quantize=mode)
    state, other = model.state_dict(), again.state_dict()
    assert list(state) == list(other)
    for name, value in state.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name
    assert torch.equal(velocity(model), velocity(again))
    assert again.blocks[0].attn1.to_q.emulated is (mode == "fp8-emulated")
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).iterdir()) for name in ("whole", "fp8")]
    assert sizes[1] < 0.75 * sizes[0]


def damaged(folder: Path, change) -> Path:
    """The folder with a change to its tensors or its config."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NAME = "blocks.1.ffn.net.2.weight"
DAMAGES = {
    "no word of it": (lambda t, c: c.pop("quantization"), "expected a config.json with quantization 'fp8'"),
    "another word": (lambda t, c: c.update(quantization="int4"), "quantization: expected null or 'fp8'"),
    "another dtype": (lambda t, c: t.update({NAME: t[NAME].float()}), f"another dtype or no scale: {NAME}"),
    "no scale": (lambda t, c: t.pop(f"{NAME}_scale"), f"another dtype or no scale: {NAME}"),
    "negative scale": (lambda t, c: t[f"{NAME}_scale"].neg_(), f"{NAME}_scale: expected positive finite"),
    "scale of another shape": (
        lambda t, c: t.update({f"{NAME}_scale": t[f"{NAME}_scale"].flatten()}),
        r"_scale: expected torch.float32 \[32, 1\], got torch.float32 \[32\]",
    ),
    "another shape": (
        lambda t, c: t.update({NAME: t[NAME][:, :16].contiguous()}),
        r"ffn.net.2.weight \(expected \[32, 48\], got \[32, 16\]\)",
    ),
    "nan": (lambda t, c: t[NAME].view(torch.uint8).fill_(0x7F), "expected finite numbers, got nan"),
    "nothing in FP8": (
        lambda t, c: [
            t.update({n: x.float()}) or t.pop(f"{n}_scale")
            for n, x in list(t.items())
            if "scale" not in n and f"{n}_scale" in t
        ],
        "each with its scale, got none",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    load_student(folder, quantize="fp8-emulated").save_pretrained(tmp_path / "fp8")
    change, message = DAMAGES[name]
    with pytest.raises(FileError, match=message) as caught:
        load_student(damaged(tmp_path / "fp8", change), quantize="fp8-emulated")
    assert "\n" not in str(caught.value)


def test_fp8_weights_are_not_read_as_others(folder: Path, tmp_path: Path) -> None:
    load_student(folder, quantize="fp8-emulated").save_pretrained(tmp_path / "fp8")
    with pytest.raises(FileError, match="holds FP8 weights: expected quantize 'fp8' or 'fp8-emulated'"):
        load_student(tmp_path / "fp8")
    with pytest.raises(ValueError, match="quantization must be None"):
        CausalWanTransformer.from_pretrained(tmp_path / "fp8")
    with pytest.raises(FileError, match="no adapter can be merged"):
        load_student(tmp_path / "fp8", quantize="fp8-emulated", adapter=tmp_path)


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^load_student: quantize 'fp8' needs a GPU with FP8.*got cpu; 'fp8-"
    ):
        load_student(folder, quantize="fp8")
    with pytest.raises(
        ValueError, match=r"^load_student: quantize: expected fp8 or fp8-emulated, got 'int8'$"
    ):
        load_student(folder, quantize="int8")
    model = student()
    quantize_student(model, "fp8-emulated")
    with pytest.raises(ValueError, match="expected linear layers with nothing added to them, got Fp8Linear"):
        quantize_student(model, "fp8-emulated")
    with pytest.raises(TypeError, match=r"can be moved, but not cast.*got torch.bfloat16"):
        velocity(model.bfloat16())


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 6), torch.bfloat16, "got compute capability 8.6"),
        ((8, 9), torch.float16, "needs a student in bfloat16.*got torch.float16"),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_what_a_gpu_must_have(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, message: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if message is None:
        fp8.refuse_quantization("f", "fp8", dtype, "cuda:1")
    else:
        with pytest.raises(ValueError, match=message):
            fp8.refuse_quantization("f", "fp8", dtype, "cuda:1")
