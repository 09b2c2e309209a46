"""Train a detector on annotated shards; the result is a checkpoint for jobs/infer.py.

  python jobs/make_shards.py --format voc --images VOC2007 --split train --output shards/train   # and val
  python jobs/train.py --train shards/train --val shards/val --output out --max-minutes 25
  python jobs/infer.py --weights out/model.safetensors --input photographs --output detections

Run the same command again after a crash: it goes on from the last checkpoint. model.safetensors holds the
averaged weights of the highest AP on --val. Exit codes: 0 done; 1 crash; 2 refused or broken off, and one
line says why (wrong flags, a store that is away, a loss that is not finite).
"""

import sys

from pipeline.config import TrainConfig, run_job


def main(config: TrainConfig) -> int:
    """Run the job; returns the exit code."""
    from pipeline.runlog import setup_logging
    from pipeline.training.run import dry_run, train

    setup_logging()
    print(dry_run(config) if config.dry_run else train(config).text())
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main, TrainConfig, __doc__, resumes=True))
