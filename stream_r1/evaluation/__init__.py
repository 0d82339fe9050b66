"""Measures of generated video that no part of training ever sees."""

from stream_r1.evaluation.reference import Reference
from stream_r1.evaluation.report import MEASURES, Measure
from stream_r1.evaluation.sets import evaluate_videos
from stream_r1.evaluation.spread import Figure

__all__ = ["MEASURES", "Figure", "Measure", "Reference", "evaluate_videos"]
