"""VideoReward folders: both layouts, names, merged updates, and refusals that name what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from videoalign_folder import (
    ALPHA,
    NORMS,
    RANK,
    TEMPLATE,
    change_weights,
    copy_of,
    model_config,
    open_reward,
    smooth_video,
)

from stream_r1.config import SettingsError
from stream_r1.files import FileError
from stream_r1.rewards import load_reward
from stream_r1.rewards.videoalign import VideoAlignReward
from stream_r1.rewards.videoalign_checkpoint import load_network, read_config, to_transformers_name


class TestFiles:
    def test_load_reward_knows_both_layouts(self, written, tmp_path):
        """The published folder as it is, and a config.json that points to it and says how to run it."""
        assert isinstance(load_reward(written.folder), VideoAlignReward)
        (tmp_path / "config.json").write_text(
            json.dumps(
                {
                    "type": "videoalign",
                    "checkpoint": str(written.folder),
                    "fps": "all",
                    "video_fps": 24,
                    "samples_at_once": 1,
                }
            )
        )
        reward = load_reward(tmp_path)
        assert reward.fps is None
        assert reward.settings.samples_at_once == 1

    def test_the_base_models_configuration_beside_it_is_no_setting(self, written):
        """VideoAlign's training saves it there."""
        changed = copy_of(written)
        (changed / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
        assert isinstance(load_reward(changed), VideoAlignReward)

    def test_unknown_setting(self, written):
        with pytest.raises(SettingsError, match="fpss"):
            VideoAlignReward.from_pretrained(written.folder, fpss=2)

    def test_safetensors_give_the_same(self, written, videoalign):
        changed = copy_of(written)
        (changed / "checkpoint-20" / "model.pth").unlink()
        save_file(written.state, changed / "checkpoint-20" / "model.safetensors")
        same = open_reward(
            changed,
        )
        video = smooth_video(1)
        torch.testing.assert_close(same.score(video, ["x"]), videoalign.score(video, ["x"]), atol=0, rtol=0)

    def test_adapter_beside_a_base_model(self, written, videoalign):
        """The layout of save_full_model=False: low-rank factors, trained weights, and the base model's."""
        lora, rest, base = {}, {}, {}
        for name, value in written.state.items():
            bare = name.removeprefix("base_model.model.")
            if "lora_" in name:
                lora[name.replace(".default", "")] = value
            elif bare.startswith(("visual.", "rm_head.", "model.embed_tokens.")):
                rest[name] = value
            if "lora_" not in name and not bare.startswith("rm_head."):
                base[bare.replace(".base_layer", "")] = value
        # As on the hub: the embedding has more rows than there are tokens, and none for the reward tokens.
        base["model.embed_tokens.weight"] = torch.zeros(320, 32)
        del base["lm_head.weight"]
        changed = copy_of(written)
        (changed / "checkpoint-20" / "model.pth").unlink()
        save_file(lora, changed / "checkpoint-20" / "adapter_model.safetensors")
        torch.save(rest, changed / "checkpoint-20" / "non_lora_state_dict.pth")
        folder = changed / "with-weights"
        shutil.copytree(written.base, folder)
        save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
        same = open_reward(
            changed,
            base_model="with-weights",
        )
        video = smooth_video(1)
        torch.testing.assert_close(
            same.score(video, ["x"]), videoalign.score(video, ["x"]), atol=1e-6, rtol=1e-6
        )
        del base["model.norm.weight"]
        save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FileError, match=r"with-weights: the weights .* 1 missing: .*norm\.weight"):
            open_reward(changed, base_model="with-weights")
        (changed / "checkpoint-20" / "adapter_config.json").write_text('{"init_lora_weights": "pissa"}')
        with pytest.raises(FileError, match=r"adapter_config\.json: expected init_lora_weights .* 'pissa'"):
            open_reward(changed, base_model="with-weights")

    def test_last_checkpoint_or_the_one_that_is_named(self, written):
        with pytest.raises(FileNotFoundError, match=r"checkpoint-5: expected model\.pth"):
            load_network(written.folder, step=5)
        with pytest.raises(
            FileNotFoundError, match="expected a folder checkpoint-7, found checkpoint-5, checkpoint-20"
        ):
            load_network(written.folder, step=7)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("visual.blocks.1.mlp.fc1.bias", None, r"1 missing: visual\.blocks\.1\.mlp\.fc1\.bias"),
            (
                "model.norm.weight",
                torch.zeros(7),
                r"language_model\.norm\.weight \(expected \[32\], got \[7\]\)",
            ),
            ("model.norm.bias", torch.zeros(7), r"1 unexpected: language_model\.norm\.bias"),
            ("rm_head.weight", None, r"rm_head\.weight: expected \[1, 32\] or \[3, 32\], got none"),
            ("rm_head.weight", torch.zeros(2, 32), r"got \[2, 32\]"),
            ("model.embed_tokens.weight", torch.zeros(265, 32), r"266 tokens, .* got \[265, 32\]"),
            ("model.layers.0.mlp.up_proj.lora_A.default.weight", None, r"up_proj\.weight: .* only \{'B'\}"),
            ("model.layers.0.mlp.up_proj.base_layer.weight", None, r"up_proj\.weight: expected it beside"),
            (
                "model.layers.1.self_attn.k_proj.lora_B.default.weight",
                torch.zeros(16, 5),
                r"k_proj\.weight: expected lora_A \[4, 32\] and lora_B \[16, 4\], got \[4, 32\] and",
            ),
        ],
    )
    def test_weights_that_do_not_fit(self, written, name, value, message):
        state = {**written.state, f"base_model.model.{name}": value}
        with pytest.raises(FileError, match=message):
            change_weights(written, {key: kept for key, kept in state.items() if kept is not None})

    def test_weights_that_are_code(self, written):
        changed = copy_of(written)
        torch.save({"a": print}, changed / "checkpoint-20" / "model.pth")
        with pytest.raises(FileError, match="without running code"):
            load_network(changed)

    def test_base_model_that_is_not_there(self, written, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"base_model: expected .* got \S*/nothing"):
            load_network(written.folder, base_model=tmp_path / "nothing")

    @pytest.mark.parametrize(
        ("section", "key", "value"),
        [
            ("model_config", "use_special_tokens", False),
            ("data_config", "prompt_template_type", "simple"),
            ("data_config", "num_frames", 8),
        ],
    )
    def test_a_reward_of_another_kind(self, written, tmp_path, section, key, value):
        content = model_config(written.base, NORMS)
        content[section][key] = value
        (tmp_path / "model_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{section}\.{key}: expected .* got {value!r}"):
            read_config(tmp_path)

    def test_scores_without_constants_take_the_published_ones(self, written, tmp_path):
        (tmp_path / "model_config.json").write_text(json.dumps(model_config(written.base, None)))
        config = read_config(tmp_path)
        assert config.mean == (3.6757, 1.1646, 2.8105)
        assert config.std == (2.2476, 1.3811, 2.5121)
        assert config.lora_scale == ALPHA / RANK

    @pytest.mark.parametrize(
        ("stored", "ours"),
        [
            ("base_model.model.visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
            ("base_model.model.model.embed_tokens.weight", "language_model.embed_tokens.weight"),
            (
                "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
                "language_model.layers.0.mlp.up_proj.weight",
            ),
            (
                "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight",
                "language_model.layers.0.mlp.up_proj.lora_A.default.weight",
            ),
            ("base_model.model.model.visual.merger.ln_q.bias", "visual.merger.ln_q.bias"),
            ("model.norm.weight", "language_model.norm.weight"),
            ("rm_head.weight", "rm_head.weight"),
            ("base_model.model.lm_head.weight", None),
        ],
    )
    def test_names(self, stored, ours):
        assert to_transformers_name(stored) == ours

    @pytest.mark.parametrize("template", ["no tokens {text_prompt}", TEMPLATE + "<|VQ_reward|>"])
    def test_template_without_each_token_once(self, written, template):
        with pytest.raises(ValueError, match=r"template: expected <\|VQ_reward\|> once"):
            VideoAlignReward.from_pretrained(written.folder, template=template)
