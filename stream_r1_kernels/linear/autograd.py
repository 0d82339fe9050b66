"""The compiled op has no gradient: the public function takes the reference where one is wanted."""

from ..registration import register_no_derivative

register_no_derivative("fused_linear")
