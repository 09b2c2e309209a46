"""Query and export what a run wrote."""

from pipeline.results.read import Summary, iter_detections, load_detections, load_images, summarise

__all__ = ["Summary", "iter_detections", "load_detections", "load_images", "summarise"]
