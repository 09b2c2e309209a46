"""Detect objects in every image of --input and write them as two Parquet tables to --output.

Without flags: the built-in demo, on real photographs, into ./demo-output/.

  python jobs/infer.py --input s3://bucket/shards --output s3://bucket/detections
  ray job submit --working-dir . -- python jobs/infer.py --input s3://bucket/shards --output s3://bucket/detections

Run the same command again after a crash, or when new shards have arrived: finished shards are not opened.
Exit codes: 0 done; 1 crash; 2 refused or broken off, and one line says why (wrong flags, a store that is
away, images still missing); 3 more images failed, or more shards can't be read, than --max-failed-fraction.
"""

import sys

from pipeline.config import InferConfig, run_job


def main(config: InferConfig) -> int:
    """Run the job; returns the exit code."""
    from pipeline.inference import demo
    from pipeline.inference.dryrun import dry_run
    from pipeline.inference.report import over_budget_text, summary_text
    from pipeline.inference.run import infer
    from pipeline.runlog import setup_logging

    setup_logging()
    is_demo = not config.input
    if is_demo:
        config = demo.prepare(config)
    if config.dry_run:
        print(dry_run(config))
        return 0
    report = infer(config)
    print(summary_text(report))
    if is_demo:
        from pipeline.gallery import sheet_of_run

        path = demo.FOLDER / "contact-sheet.jpg"
        sheet_of_run(config.output, config.input).save(path, quality=90)
        print(f"Photographs with their boxes: {path}")
    if report.over_budget:
        print(over_budget_text(report, config), file=sys.stderr)
    return 3 if report.over_budget else 0


if __name__ == "__main__":
    sys.exit(run_job(main, InferConfig, __doc__, resumes=True))
