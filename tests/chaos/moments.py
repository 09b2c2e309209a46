"""Kill -9 at exact moments of reading, detecting and publishing: `python -m tests.chaos.moments --kills 20`.

The processes kill themselves (`hooks/sitecustomize.py`), many in one run, until each moment had its kills.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

from tests.chaos.runs import HOOKS, Setting, check_same, finish, make_input, tables

MOMENTS = ("reader", "detector", "before-detections", "after-detections", "before-images", "after-images")


def deadly_run(source: str, folder: Path, seed: int, whole: dict[str, pd.DataFrame]) -> Counter[str]:
    """One run in which processes die at many moments; the kills by moment.

    Raises:
        AssertionError: a row was lost, repeated or changed, or the run did not survive by itself.
    """
    deaths = folder / f"deaths-{seed}"
    deaths.mkdir()
    environment = {
        "PYTHONPATH": HOOKS,
        "SHARDSHOT_TEST_DEATHS": str(deaths),
        "SHARDSHOT_TEST_SEED": str(seed),
    }
    setting = Setting(source, str(folder / f"out-{seed}"), environment=environment)
    starts = finish(setting)
    assert starts == 1, f"took {starts} starts"
    check_same(setting, whole)
    return Counter(path.name.partition("@")[0] for path in deaths.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each moment")
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    args = parser.parse_args()
    done = Counter[str]()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_input(folder / "in")
        undisturbed = Setting(str(folder / "in"), str(folder / "whole"))
        finish(undisturbed)
        whole = tables(undisturbed)
        for seed in range(args.first, args.first + 10 * args.kills):
            start = time.monotonic()
            try:
                kills = deadly_run(str(folder / "in"), folder, seed, whole)
            except AssertionError as error:
                wrong += 1
                print(f"run {seed}: WRONG: {error}", flush=True)
                continue
            done += kills
            print(f"run {seed}: {time.monotonic() - start:.0f} s, kills {dict(kills)}", flush=True)
            if min(done[moment] for moment in MOMENTS) >= args.kills:
                break
    print(f"kills {dict(done)}, {wrong} runs wrong")
    return 1 if wrong or min(done[moment] for moment in MOMENTS) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
