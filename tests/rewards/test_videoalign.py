"""VideoAlign's reward on small random weights in the published format."""

import pytest
import torch
from videoalign_folder import (
    NORMS,
    SPECIAL,
    TEMPLATE,
    change_weights,
    copy_of,
    open_reward,
    reference_patches,
    smooth_video,
    write_reward,
)

from stream_r1.distill.weighting import StreamR1Weights
from stream_r1.rewards import Reward
from stream_r1.rewards.videoalign import VideoAlignReward

PROMPTS = ["a rabbit", "a much longer prompt about a butterfly"]


def expected_ids(prompt, places):
    """The tokens of the chat: a byte each, in the order of byte-level BPE's letters, and the special ones."""
    text = TEMPLATE.replace("{text_prompt}", prompt)
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * places
        + f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: number for number, byte in enumerate([*printable, *others])}  # sorted by their letter
    names = [*SPECIAL, "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
    ids = []
    while chat:
        token = next((name for name in names if chat.startswith(name)), chat[0])
        ids.append(256 + names.index(token) if token in names else letters[ord(token)])
        chat = chat[len(token) :]
    return ids


def reference_scores(written, video, prompt):
    """Raw scores [3] of an even, already resized video, by transformers' model with explicit branches."""
    patches, grid = reference_patches(video)
    ids = torch.tensor([expected_ids(prompt, len(patches) // 4)])
    states = written.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1])[None],
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
    ).last_hidden_state[0]
    return torch.stack([(states[ids[0] == token] @ written.head[0]).squeeze() for token in (263, 264, 265)])


def normalised(raw):
    axes = ("VQ", "MQ", "TA")
    return torch.stack(
        [(raw[i] - NORMS[f"{axis}_mean"]) / NORMS[f"{axis}_std"] for i, axis in enumerate(axes)]
    )


class TestScores:
    def test_follows_the_protocol(self, videoalign):
        assert isinstance(videoalign, Reward)
        assert videoalign.axes == ("VQ", "MQ", "TA")
        assert not any(p.requires_grad for p in videoalign.parameters())

    def test_equals_transformers_with_explicit_low_rank_branches(self, written, videoalign):
        """Merged updates, patches, tokens, positions and head against a second formulation, whole batch."""
        video = smooth_video()
        with torch.no_grad():
            expected = torch.stack(
                [normalised(reference_scores(written, *pair)) for pair in zip(video, PROMPTS, strict=True)]
            )
            got = videoalign.score(video, PROMPTS)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert (expected[0] - expected[1]).abs().min() > 1e-2, "the samples differ by more than the tolerance"

    def test_the_updates_matter(self, written, videoalign):
        state = {
            name: torch.zeros_like(value) if "lora_B" in name else value
            for name, value in written.state.items()
        }
        changed = change_weights(written, state)
        with torch.no_grad():
            difference = changed.score(smooth_video(), PROMPTS) - videoalign.score(smooth_video(), PROMPTS)
        assert difference.abs().min() > 1e-2

    def test_sample_is_independent_of_its_batch(self, videoalign):
        video = smooth_video()
        with torch.no_grad():
            together = videoalign.score(video, PROMPTS)
            alone = torch.cat([videoalign.score(video[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
            swapped = videoalign.score(video.flip(0), PROMPTS[::-1])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together, swapped.flip(0), atol=1e-5, rtol=1e-5)

    def test_empty_batch(self, videoalign):
        assert videoalign.score(torch.zeros(0, 4, 3, 56, 84), []).shape == (0, 3)

    def test_three_rows_of_the_head_read_a_score_each(self, tmp_path):
        written = write_reward(tmp_path, outputs=3)
        reward = VideoAlignReward.from_pretrained(written.folder, template=TEMPLATE)
        rows = []
        for row in range(3):
            one = {**written.state, "base_model.model.rm_head.weight": written.head[row : row + 1]}
            rows.append(change_weights(written, one).score(smooth_video(1), ["x"])[0, row])
        torch.testing.assert_close(reward.score(smooth_video(1), ["x"])[0], torch.stack(rows))

    def test_instruction_is_read_from_its_file_to_the_letter(self, written, caplog):
        folder = copy_of(written)
        (folder / "instruction.txt").unlink()
        with pytest.raises(FileNotFoundError, match=r"instruction.*prompt_template\.py"):
            VideoAlignReward.from_pretrained(folder)
        (folder / "instruction.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=r"instruction\.txt: expected .*UTF-8"):
            VideoAlignReward.from_pretrained(folder)
        (folder / "instruction.txt").write_bytes(TEMPLATE.replace("\n", "\r\n").encode())
        reward = VideoAlignReward.from_pretrained(folder)
        assert reward.template == TEMPLATE.replace("\n", "\r\n")
        assert "not the instruction" in caplog.text
        with torch.no_grad():
            scores = reward.score(smooth_video(1), ["{text_prompt} and 100 % é"])
        assert scores.isfinite().all()

    def test_prompt_with_a_token_of_the_model_is_refused(self, videoalign):
        with pytest.raises(
            ValueError, match=r"prompts: expected none of the tokens .* got 'a <\|MQ_reward\|>'"
        ):
            videoalign.score(smooth_video(1), ["a <|MQ_reward|>"])

    def test_bfloat16_is_near_float32(self, written, videoalign):
        small = open_reward(written.folder, dtype="bfloat16")
        assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
        video = smooth_video().requires_grad_()
        scores = small.score(video, PROMPTS)
        assert scores.dtype == torch.float32
        (grad,) = torch.autograd.grad(scores.sum(), video)
        assert grad.isfinite().all()
        assert grad.abs().amax() > 0
        torch.testing.assert_close(scores, videoalign.score(video, PROMPTS), atol=0.2, rtol=0)


class TestGradient:
    def test_reaches_every_pixel_of_every_axis(self, videoalign):
        video = smooth_video().requires_grad_()
        scores = videoalign.score(video, PROMPTS)
        for axis in range(3):
            (grad,) = torch.autograd.grad(scores[:, axis].sum(), video, retain_graph=True)
            assert grad.isfinite().all()
            assert (grad != 0).float().mean() > 0.99

    def test_predicts_the_change_of_the_score(self, videoalign):
        """Central differences along the gradient, through a resize (64 x 90 -> 56 x 84)."""
        video = smooth_video(1, height=64, width=90).requires_grad_()
        for axis in range(3):
            (grad,) = torch.autograd.grad(videoalign.score(video, PROMPTS[:1])[0, axis], video)
            step = 0.05 * grad / grad.norm()
            with torch.no_grad():
                ahead, behind = (videoalign.score(video + k * step, PROMPTS[:1])[0, axis] for k in (1, -1))
            assert (ahead - behind).item() == pytest.approx(2 * (grad * step).sum().item(), rel=0.02)

    def test_recomputing_layers_changes_nothing_and_keeps_less(self, written, videoalign):
        keeping = open_reward(written.folder, gradient_checkpointing=False)
        video = smooth_video(1).requires_grad_()
        grads, kept = [], []
        for either in (videoalign, keeping):
            weights = {parameter.data_ptr() for parameter in either.parameters()}
            sizes = []

            def keep(tensor, weights=weights, sizes=sizes):
                sizes.append(0 if tensor.data_ptr() in weights else tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                score = either.score(video, PROMPTS[:1]).sum()
            grads.append(torch.autograd.grad(score, video)[0])
            kept.append(sum(sizes))
        torch.testing.assert_close(*grads)
        assert kept[0] < kept[1] / 2

    def test_saturated_white_keeps_its_gradient(self, videoalign):
        video = torch.ones(1, 4, 3, 64, 90, requires_grad=True)
        (grad,) = torch.autograd.grad(videoalign.score(video, ["white"]).sum(), video)
        assert (grad[..., 4:-4, 4:-4] != 0).float().mean() > 0.99

    def test_frames_that_are_not_shown_have_none(self, written):
        sampled = VideoAlignReward.from_pretrained(written.folder, template=TEMPLATE, video_fps=4.0)
        video = smooth_video(1, frames=9).requires_grad_()
        (grad,) = torch.autograd.grad(sampled.score(video, ["x"]).sum(), video)
        seen = grad.abs().amax((0, 2, 3, 4)) > 0
        # 9 frames at 4 a second, 2 a second shown: 4 of them, evenly from the first to the last.
        assert seen.nonzero().flatten().tolist() == [0, 3, 5, 8]

    def test_weights_of_stream_r1(self, written):
        """One backward an axis; memory bounded by samples_at_once in the weighting and in the reward."""
        video = smooth_video(2, frames=5)
        results = []
        for at_once in (None, 1):
            reward = open_reward(written.folder, samples_at_once=at_once)
            results.append(StreamR1Weights(reward, samples_at_once=at_once)(video, PROMPTS, (2, 7, 12)))
        assert results[0].intra.shape == (2, 2, 1, 7, 12)
        assert results[0].intra.std() > 0
        for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class TestCompat:
    @pytest.fixture(scope="class")
    @staticmethod
    def official(written):
        return open_reward(written.folder, compat="official")

    def test_same_scores(self, videoalign, official):
        with torch.no_grad():
            torch.testing.assert_close(
                official.score(smooth_video(), PROMPTS),
                videoalign.score(smooth_video(), PROMPTS),
                atol=0,
                rtol=0,
            )

    def test_gradients_go_where_the_public_code_puts_them(self, videoalign, official):
        """Patch i of the model's order is drawn as the i-th of the row-major grid."""
        grads = []
        for either in (videoalign, official):
            video = smooth_video(1).requires_grad_()
            (grad,) = torch.autograd.grad(either.score(video, PROMPTS[:1])[0, 0], video)
            grads.append(grad[0])
        right, wrong = (
            grad.reshape(2, 2, 3, 4, 14, 6, 14).permute(0, 3, 5, 2, 1, 4, 6).flatten(0, 2).flatten(1)
            for grad in grads
        )  # [48 patches in row-major order, 1176]
        place = [(f, top + r, left + c) for f in (0, 1) for top in (0, 2) for left in (0, 2, 4)
                 for r in (0, 1) for c in (0, 1)]  # fmt: skip
        for index, (f, row, column) in enumerate(place):
            torch.testing.assert_close(wrong[index], right[f * 24 + row * 6 + column])


class TestSaliency:
    @pytest.mark.parametrize(("compat", "in_place"), [(None, True), ("official", False)])
    def test_lands_on_the_bright_patches(self, written, compat, in_place):
        """A tower whose tokens tell brightness above a threshold and nothing else: where the picture is grey
        the gradient is zero, so that all of it must be at the bright square."""
        state = {name: value.clone() for name, value in written.state.items()}
        tower = {name.removeprefix("base_model.model.visual."): value for name, value in state.items()}
        tower["patch_embed.proj.weight"].zero_()[0] = 1 / 1176  # channel 0: mean brightness of the patch
        for block in (0, 1):
            for name in ("attn.proj", "mlp.fc2"):
                tower[f"blocks.{block}.{name}.weight"].zero_()
                tower[f"blocks.{block}.{name}.bias"].zero_()
        tower["blocks.0.attn.proj.bias"][1] = (
            1.0  # channel 1: one, so that the norm leaves brightness visible
        )
        tower["merger.ln_q.weight"].fill_(1.0)
        tower["merger.ln_q.bias"].zero_()
        tower["merger.mlp.0.weight"].zero_()
        tower["merger.mlp.0.bias"].fill_(-60.0)
        for unit in range(128):
            tower["merger.mlp.0.weight"][unit, 32 * (unit % 4)] = 20.0  # each reads one of the four patches
        reward = change_weights(written, state, max_pixels=112 * 112, compat=compat)
        video = torch.full((1, 4, 3, 112, 112), 0.5)
        video[:, 2:, :, 70:98, 14:42] = 1.0  # second temporal patch, rows 5 and 6, columns 1 and 2
        video.requires_grad_()
        (grad,) = torch.autograd.grad(reward.score(video, ["x"])[0, 1], video)
        felt = grad.abs().amax((0, 2)).reshape(2, 2, 8, 14, 8, 14).amax((1, 3, 5)) > 0  # [2, 8, 8] patches
        bright = [(1, row, column) for row in (5, 6) for column in (1, 2)]
        assert (felt.nonzero().tolist() == [list(place) for place in bright]) is in_place
        assert felt.sum() == 4
