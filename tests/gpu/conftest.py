"""Makes this folder's cases, and the sampler's small models, importable under pytest's importlib mode."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "sampling")]
