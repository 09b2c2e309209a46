"""Query and export what a run wrote."""

from pipeline.results.compare import compare_runs
from pipeline.results.read import Summary, iter_detections, load_detections, load_images, summarise

__all__ = ["Summary", "compare_runs", "iter_detections", "load_detections", "load_images", "summarise"]
