"""Stream-R1: streaming video diffusion students, distilled with a reward that says where to look.

The kernels live in `stream_r1_kernels`; here are the models (`stream_r1.models`), the sampler
(`stream_r1.sampling`), the distillation (`stream_r1.distill`) and what surrounds them. Importing this package
imports nothing heavy.
"""

__version__ = "0.1.0"
