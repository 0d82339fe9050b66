"""Lets these tests import the distillation tests' models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "distill"))
