"""From a reward's pixel gradients to the weights of the latent cells."""

from ..backends import EXTENSION_PROBLEM
from .api import intra_weights, region_saliency

if EXTENSION_PROBLEM is None:
    from . import fake  # noqa: F401

__all__ = ["intra_weights", "region_saliency"]
