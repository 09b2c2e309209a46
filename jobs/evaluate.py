"""Measure detections against annotations: AP of COCO or VOC, precision and recall in use, thresholds.

  python jobs/evaluate.py --detections out --annotations instances_val2017.json --output numbers.json
  python jobs/evaluate.py --detections out --annotations VOC2007 --split test --metric voc07
  python jobs/evaluate.py --detections new --baseline old --annotations shards/val --plots pictures

Images are matched by id, or by file name without folder and extension. Exit codes: 0 done; 2 refused or
broken off, and one line says why.
"""

import json
import sys

from pipeline.config import EvaluateConfig, run_job


def main(config: EvaluateConfig) -> int:
    """Run the job; returns the exit code."""
    from pipeline import storage
    from pipeline.evaluation.numbers import thresholds_by_class
    from pipeline.evaluation.report import measure_run

    report = measure_run(config)
    print(report.text())
    if config.output:
        storage.write_atomic(config.output, json.dumps(report.numbers, indent=1, ensure_ascii=False).encode())
    if config.thresholds:
        values = thresholds_by_class(report.evaluation)
        storage.write_atomic(config.thresholds, json.dumps(values, indent=1, ensure_ascii=False).encode())
    if config.plots:
        from pipeline.evaluation.plots import write_plots

        print("\n".join(write_plots(report.evaluation, config.plots)))
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main, EvaluateConfig, __doc__))
