"""The sentence that names what limited a run."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import InferConfig
from pipeline.inference.report import limited_by, over_budget_text
from pipeline.runlog import Counts, Progress


def run(*, start_s, steady_s, **seconds):
    """A run of 200 images: `start_s` to the first part, `steady_s` from there to the last."""
    progress = Progress(done_before=0, done_of_packed=0, num_loose=200, num_packed=0, now=0.0)
    progress.add(Counts(images=100), now=start_s)
    progress.add(Counts(images=100, **seconds), now=start_s + steady_s)
    return progress


def test_a_run_with_nothing_to_do_says_so():
    idle = Progress(done_before=200, done_of_packed=0, num_loose=0, num_packed=0, now=0.0)
    assert limited_by(idle, busy=0.0, publishing=0.1) == "Nothing was left to do."


def test_a_run_that_mostly_started_names_no_limit():
    assert "Start-up took most of the time" in limited_by(
        run(start_s=11.0, steady_s=10.0), busy=1.0, publishing=0.1
    )


def test_busy_detectors_are_the_limit():
    sentence = limited_by(run(start_s=5.0, steady_s=10.0, read_s=99.0), busy=0.8, publishing=0.1)
    assert sentence == "The detectors were busy 80 % of the time: more of them make it faster."


def test_with_waiting_detectors_the_longer_of_reading_and_decoding_is_the_limit():
    slow_store = limited_by(
        run(start_s=5.0, steady_s=10.0, read_s=30.0, decode_s=20.0), busy=0.3, publishing=0.1
    )
    assert "reading took 30 s against 20 s of decoding: the store or the network limits" in slow_store
    slow_decoding = limited_by(
        run(start_s=5.0, steady_s=10.0, read_s=20.0, decode_s=30.0), busy=0.3, publishing=0.1
    )
    assert slow_decoding == "Detectors were busy only 30 %: decoding limits, more CPU cores make it faster."


def test_with_parts_that_wait_for_the_store_the_output_is_the_limit():
    slow = run(start_s=5.0, steady_s=10.0, decode_s=9.0, write_s=35.0)
    sentence = limited_by(slow, busy=0.3, publishing=0.9)
    assert sentence.endswith("busy only 30 %, and waited for 35 s of writing: the output's store limits.")


@pytest.mark.parametrize(
    ("changes", "retry", "said"),
    [
        ({}, False, "too many images failed: 30 of 200, "),
        ({"stopped_early": True}, False, "too many images failed: 20 of the 100 of this run, "),
        ({"stopped_early": True}, True, "too many images failed: 30 of 200, "),
        ({"num_failed_shards": 2}, False, "too many shards can't be read: 2 of 10, "),
    ],
)
def test_a_run_over_its_budget_says_what_there_was_too_much_of(changes, retry, said):
    counts: dict[str, Any] = {
        "num_images": 200, "num_failed": 30, "num_images_this_run": 100, "num_failed_this_run": 20,
        "num_shards": 10, "num_failed_shards": 1, "stopped_early": False,
    }  # fmt: skip
    report: Any = SimpleNamespace(**counts | changes)
    early = "; stopped early" if report.stopped_early else ""
    config = InferConfig(input="in", output="out", retry_failed=retry)
    assert over_budget_text(report, config) == (
        f"{said}--max-failed-fraction allows 10.0%{early} (exit code 3)"
    )
