"""Frames, sizes and patches of Qwen2-VL, against its own processor, Pillow and a loop."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from videoalign_folder import reference_patches, smooth_video

from stream_r1.rewards import qwen_pixels


class TestPixels:
    @pytest.mark.parametrize(
        ("total", "video_fps", "fps", "expected"),
        [
            (81, 16.0, 2.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 5.06 s: 10 frames
            (121, 24.0, 2.0, [0, 13, 27, 40, 53, 67, 80, 93, 107, 120]),
            (21, 24.0, 2.0, [0, 7, 13, 20]),  # never fewer than 4
            (3, 16.0, 2.0, [0, 2]),
            (1, 16.0, 2.0, [0, 0]),
            (5, 16.0, None, [0, 1, 2, 3]),
            (1, 16.0, None, [0, 0]),
        ],
    )
    def test_choose_frames(self, total, video_fps, fps, expected):
        assert qwen_pixels.choose_frames(total, video_fps=video_fps, fps=fps) == expected

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((480, 832), (336, 588)),
            ((832, 480), (588, 336)),
            ((64, 112), (252, 420)),
            ((336, 588), (336, 588)),
        ],
    )
    def test_fit_size(self, size, expected):
        assert qwen_pixels.fit_size(*size, min_pixels=128 * 784, max_pixels=448 * 448) == expected

    @given(
        height=st.integers(1, 2000),
        width=st.integers(1, 2000),
        most=st.integers(28 * 28, 500_000),
    )
    def test_fit_size_is_in_bounds_and_transformers_own(self, height, width, most):
        assume(max(height, width) <= 20 * min(height, width))
        rows, columns = qwen_pixels.fit_size(height, width, min_pixels=28 * 28, max_pixels=most)
        assert rows % 28 == columns % 28 == 0
        # A narrow video is at least one patch wide, whatever the limit.
        assert rows * columns <= most or min(rows, columns) == 28
        if min(height, width) >= 28:
            assert (rows, columns) == smart_resize(height, width, min_pixels=28 * 28, max_pixels=most)

    def test_too_narrow(self):
        with pytest.raises(ValueError, match="got 10 x 2001"):
            qwen_pixels.fit_size(10, 2001, min_pixels=784, max_pixels=200_000)

    def test_resize_is_pillows_bicubic(self):
        video = smooth_video(1, frames=2, height=70, width=130)
        got = qwen_pixels.resize(video, (28, 56))
        for frame, channel in ((0, 0), (1, 2)):
            picture = Image.fromarray(video[0, frame, channel].numpy()).resize(
                (56, 28), Image.Resampling.BICUBIC
            )
            np.testing.assert_allclose(got[0, frame, channel], np.asarray(picture), atol=1e-5)

    def test_still_picture_equals_transformers_processor(self):
        """Order, normalisation and temporal patch of Qwen2-VL's processor: a picture is two equal frames."""
        pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        expected = Qwen2VLImageProcessorPil()(images=[pixels], do_resize=False, return_tensors="pt")
        still = torch.from_numpy(pixels).permute(2, 0, 1).div(255).expand(1, 2, 3, 56, 84)
        got, grid = qwen_pixels.patchify(qwen_pixels.normalise(still))
        torch.testing.assert_close(got[0], expected["pixel_values"], atol=1e-5, rtol=1e-5)
        assert [list(grid)] == expected["image_grid_thw"].tolist()

    @pytest.mark.parametrize("misplaced", [False, True])
    def test_patch_order(self, misplaced):
        video = smooth_video(2, frames=4, height=56, width=84)
        got, grid = qwen_pixels.patchify(qwen_pixels.normalise(video), misplaced=misplaced)
        for sample in range(2):
            expected, expected_grid = reference_patches(video[sample])
            torch.testing.assert_close(got[sample], expected, atol=0, rtol=0)
            assert grid == expected_grid

    def test_sizes_that_do_not_divide(self):
        with pytest.raises(ValueError, match=r"multiples of 28, got \[1, 2, 3, 56, 42\]"):
            qwen_pixels.patchify(torch.zeros(1, 2, 3, 56, 42))
