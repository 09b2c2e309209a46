"""Prove that an output of jobs/infer.py is complete: every image of every shard exactly once.

  python jobs/verify.py --input s3://bucket/shards --output s3://bucket/detections

Exit codes: 0 complete; 1 not complete (a list of what is wrong); 2 refused or broken off, and
one line says why.
"""

import sys

from pipeline.config import VerifyConfig, run_job


def main(config: VerifyConfig) -> int:
    """Run the job; returns the exit code."""
    from pipeline.inference.verify import proof_text, verify

    proof = verify(config.input, config.output)
    print(proof_text(proof))
    return 1 if proof.problems else 0


if __name__ == "__main__":
    sys.exit(run_job(main, VerifyConfig, __doc__))
