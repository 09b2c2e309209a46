"""The driver that the chaos tests kill: `python -m tests.chaos.driver INPUT OUTPUT`.

`jobs/infer.py` with the deterministic detector of `tests/fakes.py`, so that two runs must agree exactly.
"""

import signal
import sys

from pipeline.config import InferConfig
from pipeline.inference.run import infer
from pipeline.runlog import setup_logging
from tests.fakes import FakeDetector

if __name__ == "__main__":
    setup_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    infer(InferConfig(input=sys.argv[1], output=sys.argv[2], max_failed_fraction=1), detector=FakeDetector)
