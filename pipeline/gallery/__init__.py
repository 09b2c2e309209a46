"""Pictures of detections and the HTML report."""

from pipeline.gallery.draw import class_color, contact_sheet, draw_boxes

__all__ = ["class_color", "contact_sheet", "draw_boxes"]
