"""Stream-R1: streaming video diffusion students, distilled with a reward that says where to look.

    from stream_r1 import StreamR1Pipeline, StreamR1Weights

The kernels live in `stream_r1_kernels`; here are the models (`stream_r1.models`), the sampler
(`stream_r1.sampling`), the distillation (`stream_r1.distill`) and what surrounds them. Importing this package
imports nothing heavy: a name is loaded when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_r1.distill.weighting import StreamR1Weights
    from stream_r1.sampling.pipeline import StreamR1Pipeline

__version__ = "0.1.0"
__all__ = ["StreamR1Pipeline", "StreamR1Weights", "__version__"]

_HOMES = {"StreamR1Pipeline": "stream_r1.sampling.pipeline", "StreamR1Weights": "stream_r1.distill.weighting"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stream_r1' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
