"""The head dies while a write on another node is held: `python -m tests.chaos.held --seconds 30`.

The run is resumed at once on a Ray of its own. The held write goes on later, lands or is refused, and its
process takes back what nobody counts on. It is held before its images part, before its boxes, or right
after its images part ("taken": the resumed run finds the part, and it must not be taken back).
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import psutil

from tests import fakes
from tests.chaos.clusters import two_nodes
from tests.chaos.runs import (
    HOOKS,
    Setting,
    check_no_repeats,
    check_same,
    finish,
    kill_family,
    make_input,
    running,
    tables,
    wait_until,
)

Where = Literal["images", "detections", "taken"]


def held_write(
    source: str, folder: Path, whole: dict[str, pd.DataFrame], where: Where, seconds: float
) -> str:
    """One run with a held write; says what became of it.

    Raises:
        AssertionError: a row was lost, repeated or changed.
    """
    output, signs = folder / f"out-{where}", folder / f"signs-{where}"
    signs.mkdir()
    hooks = {"PYTHONPATH": HOOKS, fakes.SLEEP: "0.3"}
    hold = {"SHARDSHOT_TEST_HOLD": f"{where}:{seconds}", "SHARDSHOT_TEST_HELD": str(signs)}
    # All work goes to the second node; the head only keeps the cluster.
    with two_nodes(head_cpus=0, second_cpus=2, head_env=hooks, second_env={**hooks, **hold}) as cluster:
        first = Setting(source, str(output), environment={**cluster.environment, **hooks})
        with running(first) as run:
            wait_until(lambda: (signs / "pid").exists() or run.driver.poll() is not None)
            writer = psutil.Process(int((signs / "pid").read_text()))
            kill_family(cluster.head.pid)
            run.driver.kill()
        start = time.monotonic()
        resumed = Setting(source, str(output))
        assert finish(resumed) == 1
        resumed_s = time.monotonic() - start
        over = signs / "over"
        wait_until(lambda: over.exists() or not alive(writer), seconds + 70)
        outcome = f"{'ended' if over.exists() else 'was killed'} within {time.monotonic() - start:.0f} s"
        check_no_repeats(resumed)
        check_same(resumed, whole)
        assert finish(resumed) == 1
        check_same(resumed, whole)
    return f"resumed run done in {resumed_s:.0f} s, the held write {outcome}"


def alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie doesn't."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--where", choices=get_args(Where), nargs="*", default=get_args(Where))
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_input(folder / "in")
        undisturbed = Setting(str(folder / "in"), str(folder / "whole"))
        finish(undisturbed)
        whole = tables(undisturbed)
        for where in args.where:
            try:
                said = held_write(str(folder / "in"), folder, whole, where, args.seconds)
            except (AssertionError, TimeoutError) as error:
                wrong += 1
                said = f"WRONG: {error}"
            print(f"held at {where}: {said}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
