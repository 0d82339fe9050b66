"""Names and formats of student weights."""

import json
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from stream_r1.files import FileError
from stream_r1.models.checkpoints import infer_config, load_student, load_weights, read_weights
from stream_r1.models.transformer import CausalWanTransformer
from stream_r1.models.weight_names import (
    normalise,
    strip_prefixes,
    to_diffusers_name,
    to_original_name,
    to_original_names,
)

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 10,
    "ffn_dim": 20,
    "num_layers": 2,
}


@pytest.fixture(scope="module")
def student() -> CausalWanTransformer:
    torch.manual_seed(0)
    return CausalWanTransformer(**SIZES)


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("time_embedding.2.bias", "condition_embedder.time_embedder.linear_2.bias"),
        ("text_embedding.0.weight", "condition_embedder.text_embedder.linear_1.weight"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.bias", "proj_out.bias"),
        ("blocks.11.modulation", "blocks.11.scale_shift_table"),
        ("blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"),
        ("blocks.0.cross_attn.o.bias", "blocks.0.attn2.to_out.0.bias"),
        ("blocks.0.self_attn.norm_q.weight", "blocks.0.attn1.norm_q.weight"),
        ("blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight"),
        ("blocks.0.ffn.2.weight", "blocks.0.ffn.net.2.weight"),
        ("blocks.3.norm3.weight", "blocks.3.norm2.weight"),
        ("blocks.3.norm2.weight", "blocks.3.norm3.weight"),
        ("something.else", "something.else"),
    ],
)
def test_names_go_both_ways(original, diffusers):
    assert to_diffusers_name(original) == diffusers
    assert to_original_name(diffusers) == original


def test_every_parameter_has_an_original_name(student):
    state = student.state_dict()
    original = to_original_names(state)
    assert len(original) == len(state)
    assert not any(re.search(r"attn[12]|condition_embedder|ffn\.net|proj_out", name) for name in original)
    assert same(normalise(original), state)
    assert same(normalise(state), state)


def test_original_names_are_those_of_the_recordings():
    from pathlib import Path

    recording = load_file(next((Path(__file__).parents[1] / "golden").glob("*.safetensors")))
    names = {name.removeprefix("model.") for name in recording if name.startswith("model.")}
    wan = CausalWanTransformer(**(SIZES | {"num_layers": 2}))
    assert {to_original_name(name) for name in wan.state_dict()} == names


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.2.bias",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.2.bias",
        "_orig_mod.module.model.blocks.0._orig_mod.ffn.2.bias",
        "model.diffusion_model.blocks.0.ffn.2.bias",
    ],
)
def test_wrappers_leave_the_name(name):
    assert strip_prefixes(name) == "blocks.0.ffn.2.bias"


def wrapped(state, lead="model._fsdp_wrapped_module."):
    return {lead + name.replace("ffn", "_checkpoint_wrapped_module.ffn"): v for name, v in state.items()}


@pytest.mark.parametrize("names", ["original", "diffusers", "wrapped"])
@pytest.mark.parametrize("container", [None, "generator", "generator_ema", "flat", "state_dict"])
def test_pt_files_load(student, tmp_path, names, container):
    state = student.state_dict()
    stored = {"original": to_original_names(state), "diffusers": state}.get(names) or wrapped(
        to_original_names(state)
    )
    if container == "flat":
        stored = {f"generator.{name}": value for name, value in stored.items()}
    elif container is not None:
        stored = {container: stored, "step": 3}
    torch.save(stored, tmp_path / "student.pt")
    assert same(read_weights(tmp_path / "student.pt"), state)


def test_a_network_is_chosen(student, tmp_path):
    state = to_original_names(student.state_dict())
    networks = {
        name: {key: value + shift for key, value in state.items()}
        for shift, name in enumerate(("generator", "generator_ema", "critic"))
    }
    torch.save(networks, tmp_path / "all.pt")
    torch.save({"critic": networks["critic"]}, tmp_path / "critic.pt")
    for network, shift in ((None, 1), ("generator_ema", 1), ("generator", 0), ("critic", 2)):
        weights = read_weights(tmp_path / "all.pt", network)
        assert torch.equal(weights["proj_out.bias"], student.proj_out.bias + shift)
    with pytest.raises(FileError, match="expected generator or generator_ema, found critic"):
        read_weights(tmp_path / "critic.pt")
    with pytest.raises(FileError, match="generator_ema, generator, critic, got 'ema'"):
        read_weights(tmp_path / "all.pt", "ema")
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(FileError, match="found a bare state dict"):
        read_weights(tmp_path / "bare.pt", "critic")


def test_folders_load_whole_and_in_shards(tmp_path):
    torch.manual_seed(1)
    theirs = WanTransformer3DModel(**SIZES)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("pipeline", "pipeline/transformer", "shards"):
        student = load_student(tmp_path / folder, text_len=7, window_frames=9, sink_frames=3)
        assert same(student.state_dict(), theirs.state_dict())
        assert (student.config["text_len"], student.config["sink_frames"]) == (7, 3)
        assert student.config["ffn_dim"] == 20
    index = json.loads((tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / "shards" / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        load_student(tmp_path / "shards")


def split(state, count=3):
    names = sorted(state)
    return [{name: state[name] for name in names[part::count]} for part in range(count)]


@pytest.mark.parametrize("kind", ["pt", "nested pt", "bin with index", "safetensors", "one file"])
def test_folders_of_shards_without_a_configuration(student, tmp_path, kind):
    state = to_original_names(student.state_dict())
    shards = [state] if kind == "one file" else split(state)
    suffix = {"safetensors": "safetensors", "bin with index": "bin"}.get(kind, "pt")
    for index, shard in enumerate(shards):
        file = tmp_path / f"shard-{index}.{suffix}"
        if suffix == "safetensors":
            save_file(shard, file)
        else:
            torch.save({"generator_ema": shard, "step": 3} if kind == "nested pt" else shard, file)
    if kind == "bin with index":
        torch.save({"unrelated": torch.zeros(1)}, tmp_path / "optimizer.bin")
        weight_map = {name: f"shard-{index}.bin" for index, shard in enumerate(shards) for name in shard}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = load_student(tmp_path, head_dim=8)
    assert same(loaded.state_dict(), student.state_dict())


def test_shards_that_do_not_make_one_state_dict_are_refused(student, tmp_path):
    first, second, third = split(to_original_names(student.state_dict()))
    torch.save(first, tmp_path / "a.pt")
    torch.save(second, tmp_path / "b.pt")
    with pytest.raises(FileError, match=r"expected blocks\.0\.ffn\.net\.0\.proj\.weight, found .* more"):
        load_student(tmp_path, head_dim=8)
    torch.save({name: value for name, value in third.items() if "ffn.0" in name}, tmp_path / "d.pt")
    with pytest.raises(FileError, match=r"the weights do not fit the model; \d+ missing: .* and \d+ more"):
        load_student(tmp_path, head_dim=8)
    torch.save(third | {"patch_embedding.bias": first["patch_embedding.bias"]}, tmp_path / "c.pt")
    with pytest.raises(FileError, match=r"one state dict, found patch_embedding\.bias in c\.pt again"):
        load_student(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(FileError, match="a distributed checkpoint; make one file of it first"):
        load_student(tmp_path)


def test_a_file_takes_what_it_does_not_tell_from_a_configuration(student, tmp_path):
    torch.save(to_original_names(student.state_dict()), tmp_path / "student.pt")
    beside = {"attention_head_dim": 8, "text_len": 5, "window_frames": 9, "sink_frames": 3, "num_layers": 40}
    loaded = load_student(tmp_path / "student.pt", config=beside, sink_frames=6)
    assert same(loaded.state_dict(), student.state_dict())
    config = loaded.config
    assert (config["num_attention_heads"], config["num_layers"], config["text_len"]) == (2, 2, 5)
    assert (config["window_frames"], config["sink_frames"]) == (9, 6)


def test_a_folder_of_ours_comes_back_with_its_settings(student, tmp_path):
    ours = CausalWanTransformer(**SIZES, text_len=5, window_frames=9, sink_frames=3, positions="window")
    ours.save_pretrained(tmp_path)
    again = load_student(tmp_path, sink_ema=0.999)
    assert same(again.state_dict(), ours.state_dict())
    for name in ("text_len", "window_frames", "sink_frames", "positions", "ffn_dim"):
        assert again.config[name] == ours.config[name]
    assert again.config["sink_ema"] == 0.999
    assert all(p.requires_grad for p in again.parameters())


def test_sizes_are_read_off_the_weights(student, tmp_path):
    assert infer_config(student.state_dict(), head_dim=8) == SIZES | {
        "patch_size": (1, 2, 2),
        "cross_attn_norm": True,
    }
    save_file(to_original_names(student.state_dict()), tmp_path / "student.safetensors")
    loaded = load_student(tmp_path / "student.safetensors", head_dim=8, dtype=torch.bfloat16)
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert loaded.scale_shift_table.dtype == torch.float32
    with pytest.raises(FileError, match="head_dim must divide the width 16, got 128"):
        load_student(tmp_path / "student.safetensors")
    with pytest.raises(
        FileError, match=r"expected patch_embedding\.weight, proj_out\.weight, .*, found a, b"
    ):
        infer_config({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_published_weights_tell_their_sizes():
    sizes = {
        "num_attention_heads": 12,
        "ffn_dim": 8960,
        "num_layers": 30,
    }  # Wan 2.1 1.3B; the rest is default
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**sizes).state_dict()
        published = {f"model.{name}": value for name, value in to_original_names(theirs).items()}
        config = infer_config(normalise(published))
        ours = CausalWanTransformer(**config).state_dict()
    assert {name: config[name] for name in sizes} == sizes
    assert (config["text_dim"], config["in_channels"], config["freq_dim"]) == (4096, 16, 256)
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }
    assert sum(value.numel() for value in ours.values()) == 1_418_996_800


def test_weights_that_do_not_fit_are_named(student):
    state = dict(student.state_dict())
    state["image_embedder.weight"] = torch.zeros(1)
    del state["blocks.1.attn1.to_q.bias"]
    state["proj_out.bias"] = torch.zeros(3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state["patch_embedding.bias"] = state["patch_embedding.bias"] + 1
    with pytest.raises(FileError) as error:
        load_weights(student, state, source="student.pt")
    assert re.fullmatch(
        r"student\.pt: the weights do not fit the model; 1 missing: blocks\.1\.attn1\.to_q\.bias; "
        r"1 unexpected: image_embedder\.weight; "
        r"1 of another shape: proj_out\.bias \(expected \[16\], got \[3\]\)",
        str(error.value),
    )
    assert same(student.state_dict(), before)
    with pytest.raises(FileError, match=r"several entries are named proj_out\.bias"):
        normalise({"proj_out.bias": torch.zeros(1), "model.proj_out.bias": torch.zeros(1)})


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file was run')",)


def test_a_file_with_code_is_not_run(tmp_path):
    torch.save({"generator": {}, "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(FileError, match="without running code"):
        read_weights(tmp_path / "trap.pt")


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match=r"expected weights .* found none"):
        load_student(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load_student(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(FileError, match="expected a state dict, got list"):
        read_weights(tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "step.pt")
    with pytest.raises(FileError, match="expected a state dict of tensors, found step"):
        read_weights(tmp_path / "step.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(FileError, match=r"text\.pt"):
        read_weights(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(FileError, match=r"text\.safetensors"):
        read_weights(tmp_path / "text.safetensors")


def test_unknown_settings_are_refused(student, tmp_path):
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no such setting: window; .*window_frames"):
        load_student(tmp_path, window=9)


def test_what_is_no_file_of_tensors_is_named_without_advice_to_run_it(student, tmp_path):
    torch.save({"x": print}, tmp_path / "code.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint" * 10)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "prompts.txt").write_text("a rabbit\na fat rabbit\n")
    torch.save(student.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:20000])
    for name in ("code.pt", "noise.pt", "empty.pt", "prompts.txt", "half.pt"):
        told = (
            rf"{name}: expected tensors, readable without running code; damaged, or holds more than tensors$"
        )
        with pytest.raises(FileError, match=told):
            load_student(tmp_path / name)


def test_an_odd_time_embedding_is_refused(student, tmp_path):
    state = student.state_dict()
    name = "condition_embedder.time_embedder.linear_1.weight"
    torch.save(state | {name: state[name][:, 1:].clone()}, tmp_path / "odd.pt")
    with pytest.raises(FileError, match=r"odd.pt: expected condition_embedder.* with an even width"):
        load_student(tmp_path / "odd.pt", head_dim=8)
