"""Make one HTML page of a run: counts, scores, classes, failed images, photographs with their boxes.

  python jobs/report.py --output s3://bucket/detections --html report.html
  python jobs/report.py --output new --baseline old --html changes.html

The page holds everything and needs no network. Exit codes: 0 done; 2 refused or broken
off, and one line says why.
"""

import sys

from pipeline.config import ReportConfig, run_job


def main(config: ReportConfig) -> int:
    """Run the job; returns the exit code."""
    from pipeline import storage
    from pipeline.gallery.page import report_page

    page = report_page(
        config.output,
        input_uri=config.input,
        baseline=config.baseline,
        min_score=config.min_score,
        max_images=config.max_images,
    )
    data = page.encode("utf-8", "replace")
    storage.write_atomic(config.html, data)
    print(f"{config.html}: {len(data) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main, ReportConfig, __doc__))
