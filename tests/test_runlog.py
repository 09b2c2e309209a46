"""What a run says of its speed and of how far it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runlog import MOST_MOMENTS, Counts, Progress, duration


def begun(**changes):
    none = {"done_before": 0, "done_of_packed": 0, "num_loose": 0, "num_packed": 0}
    return Progress(**none | changes, now=100.0)


def test_the_steady_rate_leaves_out_the_burst_of_what_was_ready_before_detectors_were():
    progress = begun()
    for _ in range(100):
        progress.add(Counts(images=10), now=120.0)  # 1,000 images at once
    for second in range(1, 301):
        progress.add(Counts(images=10), now=120.0 + second)
    assert progress.steady_rate == pytest.approx(10.0)
    assert progress.seconds == 320.0
    assert progress.steady_seconds == 300.0


def test_there_is_no_steady_rate_before_the_second_part():
    progress = begun()
    assert progress.steady_rate == 0.0
    progress.add(Counts(images=64), now=120.0)
    assert progress.steady_rate == 0.0
    progress.add(Counts(images=64), now=122.0)
    assert progress.steady_rate == 32.0


def test_a_last_part_of_nearly_all_images_has_a_speed():
    progress = begun(num_loose=1000)
    progress.add(Counts(images=26), now=110.0)
    progress.add(Counts(images=104), now=120.0)
    assert progress.steady_rate == 10.4
    assert "10.4 images/s" in progress.line(now=120.0)


@given(st.integers(1, 20 * MOST_MOMENTS), st.integers(1, 100))
def test_a_constant_speed_is_the_steady_rate_of_any_number_of_parts(num_parts, size):
    progress = begun()
    for number in range(num_parts + 1):
        progress.add(Counts(images=size), now=120.0 + number)
    assert progress.steady_rate == pytest.approx(size)
    assert len(progress._moments) <= MOST_MOMENTS


def test_the_total_is_exact_for_loose_images_and_guessed_from_the_shards_seen():
    loose = begun(num_loose=30)
    assert loose.total == (30, True)
    packed = begun(num_packed=4, done_of_packed=5)
    packed.add(Counts(images=10, shard_sizes={"a.tar": 20, "b.tar": 40}), now=101.0)
    assert packed.total == (20 + 40 + 2 * 30 - 5, False)
    packed.add(Counts(images=10, shard_sizes={"c.tar": 30, "d.tar": 10}), now=102.0)
    assert packed.total == (100 - 5, True)


def test_the_line_says_how_far_how_fast_and_how_long_still():
    progress = begun(num_loose=100, done_before=7)
    progress.add(Counts(images=10, failed=1, detections=3), now=110.0)
    progress.add(Counts(images=10, failed=1, detections=3), now=120.0)
    assert progress.line(now=120.0) == (
        "20/100 (20 %) images   1.0 images/s   2 failed   6 detections   ETA 80 s   (+7 done before)"
    )


def test_two_parts_at_nearly_the_same_moment_are_no_speed():
    progress = begun(num_loose=100)
    for now in (110.0, 110.01):
        progress.add(Counts(images=10), now=now)
    assert "2.0 images/s" in progress.line(now=110.01)
    assert "ETA 40 s" in progress.line(now=110.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (89.4, "89 s"), (90, "2 min"), (720, "12 min"), (11100, "3 h 05 min")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
