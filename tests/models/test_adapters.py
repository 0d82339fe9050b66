"""LoRA adapters as peft writes them: merged by the formula, under either family of names, or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stream_r1.files import FileError
from stream_r1.models.adapters import merge_adapter
from stream_r1.models.checkpoints import load_student
from stream_r1.models.transformer import CausalWanTransformer

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
        ("expected use_dora false, got True", {"use_dora": True}),
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
        with pytest.raises(FileError, match=told):
            merge_adapter(state, tmp_path)
    save_adapter(tmp_path, {"blocks.7.attn1.to_q": q["blocks.0.attn1.to_q"]})
    with pytest.raises(FileError, match=r"found blocks\.7\.attn1\.to_q\.weight"):
        merge_adapter(state, tmp_path)


# What peft can be asked for, and what of it is no plain sum: by setting, whether it is applied.
KINDS = {
    "plain": ({}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "random": ({"init_lora_weights": False}, True),
    "rslora": ({"use_rslora": True}, True),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, False),
    "olora": ({"init_lora_weights": "olora"}, False),
    "dora": ({"use_dora": True}, False),
    "rank_pattern": ({"rank_pattern": {"to_q": 2}}, False),
    "alpha_pattern": ({"alpha_pattern": {"to_q": 2}}, False),
    "bias": ({"bias": "lora_only"}, False),
    "lora_bias": ({"lora_bias": True}, False),
    "modules_to_save": ({"modules_to_save": ["proj_out"]}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters_are_applied_right_or_refused(tmp_path, kind):
    """Against peft itself: its model with the adapter merged is the model that comes out."""
    peft = pytest.importorskip("peft", reason="peft is one of the test dependencies")
    settings, applied = KINDS[kind]
    torch.manual_seed(0)
    model = CausalWanTransformer(**SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], **settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value += 0.1 * torch.randn_like(value)
    adapted.save_pretrained(tmp_path)
    if not applied:
        with pytest.raises(FileError, match=next(iter(settings))) as error:
            merge_adapter(before, tmp_path)
        assert str(tmp_path) in str(error.value)
        return
    merged = merge_adapter(before, tmp_path)
    for name, value in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("told", "config"),
    [
        ("init_lora_weights.*loftq", {"init_lora_weights": "loftq"}),
        ("init_lora_weights.*corda", {"init_lora_weights": "corda"}),
        ("alora_invocation_tokens", {"alora_invocation_tokens": [1]}),
        ("layer_replication", {"layer_replication": [[0, 1]]}),
        ("some_later_setting", {"some_later_setting": {"a": 1}}),
        ("rank r", {"r": None}),
        ("expected rank 4 .* got 3", {"r": 4}),
        ("lora_alpha", {"lora_alpha": "6"}),
        ("NaN", {"lora_alpha": float("nan")}),
        ("use_rslora", {"use_rslora": "no"}),
    ],
)
def test_settings_that_are_not_known_to_be_plain_are_refused(student, tmp_path, told, config):
    state = student.state_dict()
    save_adapter(tmp_path, {"blocks.0.attn1.to_q": state["blocks.0.attn1.to_q.weight"]}, **config)
    with pytest.raises(FileError, match=told):
        merge_adapter(state, tmp_path)
