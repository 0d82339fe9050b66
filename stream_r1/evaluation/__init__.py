"""Measures of generated video that no part of training ever sees."""

from stream_r1.evaluation.reference import Reference
from stream_r1.evaluation.report import MEASURES, Measure, evaluate_videos

__all__ = ["MEASURES", "Measure", "Reference", "evaluate_videos"]
