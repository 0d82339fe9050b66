"""From a reward's pixel gradients to the weights of the latent cells."""

from . import autograd, fake  # noqa: F401
from .api import intra_weights, region_saliency

__all__ = ["intra_weights", "region_saliency"]
