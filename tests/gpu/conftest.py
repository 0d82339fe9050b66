"""Makes this folder's cases importable under pytest's importlib mode.

Everything here needs torch and pytest alone: `benchmarks.gpu_check` runs it where little else is installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
