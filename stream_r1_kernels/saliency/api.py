from collections.abc import Sequence

from torch import Tensor

from ..arguments import without_autocast
from ..backends import resolve
from ..registration import kernels
from .reference import intra_weights_reference, region_saliency_reference
from .validation import check_intra_weights, check_region_saliency


def region_saliency(pixel_grads: Tensor, latent_shape: Sequence[int], *, backend: str = "auto") -> Tensor:
    """How strongly a reward depends on each latent cell (Stream-R1, arXiv 2605.03849: intra-perplexity).

    Each pixel's gradient is reduced by the L2 norm over its channels; a latent cell is the mean over its own
    pixels. In time the cells follow the causal VAE: latent frame 0 is pixel frame 0 alone, latent frame n is
    the k pixel frames k (n - 1) + 1 .. k n, with k = (T - 1) / (F - 1) (4 for Wan).

    Args:
        pixel_grads: [M, B, T, 3, H, W] or [B, T, 3, H, W]; d reward / d pixels, for M reward axes or one.
            float32, bfloat16, float16 or float64, any strides. Data: must not require grad.
        latent_shape: (F, h, w) with T = 1 + k (F - 1), h dividing H and w dividing W.
        backend: "auto", "cpu", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        [M, B, F, h, w] or [B, F, h, w], >= 0, float32 (float64 for float64 gradients).

    Raises:
        ValueError: a shape that does not fit, or a tensor that requires grad.
        TypeError: not a floating dtype named above.
    """
    check_region_saliency(pixel_grads, latent_shape)
    frames, rows, columns = latent_shape
    if resolve(backend, "region_saliency", pixel_grads) == "reference":
        return region_saliency_reference(pixel_grads, frames, rows, columns)
    op = kernels(pixel_grads).region_saliency.default
    if pixel_grads.dim() == 6:
        return op(pixel_grads, frames, rows, columns)
    return op(pixel_grads.unsqueeze(0), frames, rows, columns).squeeze(0)


def intra_weights(
    saliency: Tensor,
    scores: Tensor,
    *,
    temperature: float = 1.0,
    spatial_floor: float = 0.15,
    temporal_floor: float = 0.2,
    spatial_strength: float = 1.0,
    temporal_strength: float = 1.0,
    use_spatial: bool = True,
    use_temporal: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Weights of the latent cells in the DMD loss, mean 1 for each sample (Stream-R1, arXiv 2605.03849).

    The axes' saliencies are fused with softmax_m(-scores / temperature): a weaker axis gets more. The frame
    means of the result (temporal profile) and the cells of each frame (spatial map) are each min-max scaled
    to p in [0, 1], blended to (1 - strength) + strength * p, clamped to at least the floor, and divided by
    their mean. The weights are profile times map, divided by their mean over the sample. A constant profile
    or map (range at most 1e-6 of its maximum, or a single value) gives ones; with both parts off all weights
    are 1.

    Args:
        saliency: [M, B, F, h, w], >= 0, any scale and strides; from `region_saliency`. Must not require grad.
        scores: [B, M] rewards r_m of the samples, in their normalised units. Must not require grad.
        temperature: of the softmax over axes, > 0.
        spatial_floor, temporal_floor: least blended value before the division by the mean, in [0, 1].
        spatial_strength, temporal_strength: 1 is the published min-max, 0 gives ones.
        use_spatial, use_temporal: leave a part out (ablations "spatial only" and "temporal only").
        backend: "auto", "cpu", "cuda" or "reference"; an explicit choice never falls back.

    Returns:
        [B, F, 1, h, w], float32 (float64 for a float64 saliency). A sample whose fused saliency is not
        finite is NaN throughout.

    Raises:
        ValueError: a shape or number out of range, or a tensor that requires grad.
        TypeError: not a floating dtype (float32, bfloat16, float16, float64).
    """
    check_intra_weights(
        saliency,
        scores,
        temperature,
        {"spatial_floor": spatial_floor, "temporal_floor": temporal_floor},
        {"spatial_strength": spatial_strength, "temporal_strength": temporal_strength},
    )
    settings = (
        temperature,
        spatial_floor,
        temporal_floor,
        spatial_strength,
        temporal_strength,
        use_spatial,
        use_temporal,
    )
    if resolve(backend, "intra_weights", saliency) == "reference":
        with without_autocast(saliency):
            return intra_weights_reference(saliency, scores, *settings)
    return kernels(saliency, scores).intra_weights.default(saliency, scores, *settings)
