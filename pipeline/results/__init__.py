"""Query, compare and export what a run wrote."""

from pipeline.results.compare import compare_runs
from pipeline.results.export import export_coco, export_yolo, to_supervision
from pipeline.results.read import iter_detections, load_detections, load_images
from pipeline.results.summary import Summary, summarise

__all__ = [
    "Summary",
    "compare_runs",
    "export_coco",
    "export_yolo",
    "iter_detections",
    "load_detections",
    "load_images",
    "summarise",
    "to_supervision",
]
