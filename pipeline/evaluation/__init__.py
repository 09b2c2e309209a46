"""Measure detections against annotations: AP of COCO and VOC, and what it takes to use a detector."""

from pipeline.evaluation.numbers import numbers
from pipeline.evaluation.run import Evaluation, Metric, evaluate

__all__ = ["Evaluation", "Metric", "evaluate", "numbers"]
