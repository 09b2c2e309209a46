"""Pictures of detections and the HTML report."""

from pipeline.gallery.draw import class_color, contact_sheet, draw_boxes
from pipeline.gallery.sheet import sheet_of_run

__all__ = ["class_color", "contact_sheet", "draw_boxes", "sheet_of_run"]
