"""The compiled ops have no gradients: weights are data."""

from ..registration import register_no_derivative

register_no_derivative("region_saliency", "intra_weights")
