"""LoRA adapters as peft writes them: merged by the formula, under either family of names, or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stream_r1.models.adapters import merge_adapter
from stream_r1.models.checkpoints import load_student
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.weight_files import CheckpointError

SIZES = {"num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 2, "out_channels": 2}
SIZES |= {"text_dim": 6, "freq_dim": 4, "ffn_dim": 10, "num_layers": 1}
LAYERS = {"self_attn.q": "attn1.to_q", "ffn.2": "ffn.net.2"}  # of a block, original and diffusers' names


@pytest.fixture(scope="module")
def student() -> CausalWanTransformer:
    torch.manual_seed(0)
    return CausalWanTransformer(**SIZES)


def save_adapter(folder, layers, *, rank=3, changed=None, **config):
    """A random adapter for layers {name in the file: weight [out, in]}; returns its tensors."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    tensors = {}
    for name, weight in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1])
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank)
    tensors |= changed or {}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none", "use_dora": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged(student, tmp_path, names, rslora):
    state = student.state_dict()
    named = {
        f"blocks.0.{original if names == 'original' else ours}": state[f"blocks.0.{ours}.weight"]
        for original, ours in LAYERS.items()
    }
    tensors = save_adapter(tmp_path / "lora", named, use_rslora=rslora)
    student.save_pretrained(tmp_path / "student")
    loaded = load_student(tmp_path / "student", adapter=tmp_path / "lora").state_dict()
    scale = 6 / 3**0.5 if rslora else 6 / 3
    expected = {name: value.double() for name, value in state.items()}
    for name, ours in zip(named, LAYERS.values(), strict=True):
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
        expected[f"blocks.0.{ours}.weight"] = expected[f"blocks.0.{ours}.weight"] + scale * (b @ a)
    for name, value in loaded.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-6)
    assert not torch.equal(loaded["blocks.0.attn1.to_q.weight"], state["blocks.0.attn1.to_q.weight"])


def test_the_given_weights_stay_as_they_are(student, tmp_path):
    state = {"blocks.0.attn1.to_q.weight": torch.ones(8, 8, dtype=torch.bfloat16)}
    save_adapter(tmp_path, {"blocks.0.attn1.to_q": state["blocks.0.attn1.to_q.weight"]})
    merged = merge_adapter(state, tmp_path)
    assert merged["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert torch.equal(state["blocks.0.attn1.to_q.weight"], torch.ones(8, 8, dtype=torch.bfloat16))


def test_other_adapters_are_refused(student, tmp_path):
    state = student.state_dict()
    q = {"blocks.0.attn1.to_q": state["blocks.0.attn1.to_q.weight"]}
    with pytest.raises(FileNotFoundError, match=r"found no adapter_config\.json"):
        merge_adapter(state, tmp_path)
    lead = "base_model.model."
    for told, config in (
        ("expected peft_type LORA, got IA3", {"peft_type": "IA3"}),
        ("expected use_dora False, got True", {"use_dora": True}),
        ("expected bias none, got all", {"bias": "all"}),
        (
            r"expected lora_A and lora_B of linear layers, found blocks\.0\.x\.lora_magnitude_vector",
            {"changed": {f"{lead}blocks.0.x.lora_magnitude_vector": torch.zeros(1)}},
        ),
        (
            r"found only one half of blocks\.0\.x\.weight",
            {"changed": {f"{lead}blocks.0.x.lora_A.weight": torch.zeros(3, 8)}},
        ),
        (
            r"for blocks\.0\.attn1\.to_q\.weight \[8, 8\], got \[3, 7\] and \[8, 3\]",
            {"changed": {f"{lead}blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, 7)}},
        ),
    ):
        save_adapter(tmp_path, q, **config)
        with pytest.raises(CheckpointError, match=told):
            merge_adapter(state, tmp_path)
    save_adapter(tmp_path, {"blocks.7.attn1.to_q": q["blocks.0.attn1.to_q"]})
    with pytest.raises(CheckpointError, match=r"found blocks\.7\.attn1\.to_q\.weight"):
        merge_adapter(state, tmp_path)
