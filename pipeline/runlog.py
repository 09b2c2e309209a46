"""What a run says while it runs: counts, progress lines, and the clock of its stages."""

import logging
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

logger = logging.getLogger("shardshot")

STEADY_S = 5.0  # from the first part on; before that a line tells the speed since the start
MOST_MOMENTS = 256  # kept of a run, however many parts it publishes


def setup_logging() -> None:
    """Lines with a clock on standard output, from the driver; safe to call twice."""
    if not logger.handlers:
        handler = _Output()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(os.environ.get("SHARDSHOT_LOG", "INFO"))
        logger.propagate = False


class _Output(logging.Handler):
    """Prints to what standard output is at the moment: it may be another one than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        print(self.format(record), flush=True)


@dataclass
class Counts:
    """What some parts hold, and the seconds that their images took in each stage."""

    images: int = 0
    failed: int = 0
    failed_shards: int = 0
    """Those of the failed images that stand for a whole shard."""
    detections: int = 0
    bytes: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    """Failed images by "stage: type"."""
    shard_sizes: Mapping[str, int] = field(default_factory=dict)
    """Images in each packed shard (.tar, .parquet) seen."""
    num_retries: float = 0.0
    """Storage calls that were repeated."""
    num_empty_boxes: float = 0.0
    """Boxes without area that were dropped."""
    detectors: frozenset[str] = frozenset()
    """The actors that published them."""
    read_s: float = 0.0
    decode_s: float = 0.0
    detect_s: float = 0.0
    write_s: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            images=self.images + other.images,
            failed=self.failed + other.failed,
            failed_shards=self.failed_shards + other.failed_shards,
            detections=self.detections + other.detections,
            bytes=self.bytes + other.bytes,
            classes=Counter(self.classes) + Counter(other.classes),
            errors=Counter(self.errors) + Counter(other.errors),
            shard_sizes={**self.shard_sizes, **other.shard_sizes},
            num_retries=self.num_retries + other.num_retries,
            num_empty_boxes=self.num_empty_boxes + other.num_empty_boxes,
            detectors=self.detectors | other.detectors,
            read_s=self.read_s + other.read_s,
            decode_s=self.decode_s + other.decode_s,
            detect_s=self.detect_s + other.detect_s,
            write_s=self.write_s + other.write_s,
        )


class Progress:
    """Adds up counts and tells how far a run is.

    The total is exact for loose images; for packed shards it is the mean of the shards seen so far.
    """

    def __init__(
        self,
        *,
        done_before: int,
        done_of_packed: int,
        num_loose: int,
        num_packed: int,
        now: float | None = None,
    ) -> None:
        self.counts = Counts()
        self.done_before = done_before
        self._done_of_packed = done_of_packed  # images that this run skips inside shards that it opens
        self._loose = num_loose
        self._packed = num_packed
        self._started = time.monotonic() if now is None else now
        self._moments: list[tuple[float, int]] = []  # when parts were published, and the images by then
        self._last = self._started

    def add(self, counts: Counts, now: float | None = None) -> None:
        """Count one published part."""
        self.counts += counts
        self._last = time.monotonic() if now is None else now
        self._moments.append((self._last, self.counts.images))
        if len(self._moments) > MOST_MOMENTS:
            self._moments = self._moments[::2]

    @property
    def steady_rate(self) -> float:
        """Images per second of the last three quarters of the images; 0 before the second part.

        Not from the first part on: what readers had made ready while detectors started comes in a burst
        (1,100 images/s for seconds, then 450, with a detector that does nothing).
        """
        if len(self._moments) < 2:
            return 0.0
        quarter = bisect_left(self._moments, self.counts.images / 4, key=lambda moment: moment[1])
        began, images = self._moments[min(quarter, len(self._moments) - 2)]
        return (self.counts.images - images) / (self._last - began) if self._last > began else 0.0

    @property
    def seconds(self) -> float:
        """From the start to the last part."""
        return self._last - self._started

    @property
    def steady_seconds(self) -> float:
        """From the first part to the last."""
        return self._last - self._moments[0][0] if self._moments else 0.0

    @property
    def total(self) -> tuple[int, bool]:
        """Images of this run, and whether that is exact."""
        sizes = self.counts.shard_sizes
        seen = len(sizes)
        unseen = max(self._packed - seen, 0)
        mean = sum(sizes.values()) / seen if seen else 0
        guess = self._loose + sum(sizes.values()) + round(unseen * mean) - self._done_of_packed
        return max(guess, self.counts.images), unseen == 0

    def line(self, now: float | None = None) -> str:
        """One readable line: done/total, images per second, failed, time to go."""
        seconds = (time.monotonic() if now is None else now) - self._started
        total, exact = self.total
        early = self.steady_seconds < STEADY_S
        rate = self.counts.images / max(seconds, 1e-9) if early else self.steady_rate
        left_s = (total - self.counts.images) / rate if rate else 0
        known = total > self.counts.images or exact
        share = (
            f"/{'' if exact else '~'}{total:,} ({100 * self.counts.images / total:.0f} %)"
            if known and total
            else ""
        )
        eta = f"   ETA {duration(left_s)}" if self.counts.images and known else ""
        before = f"   (+{self.done_before:,} done before)" if self.done_before else ""
        return (
            f"{self.counts.images:,}{share} images   {rate:,.1f} images/s   "
            f"{self.counts.failed:,} failed   {self.counts.detections:,} detections{eta}{before}"
        )


def duration(seconds: float) -> str:
    """Seconds in the form that people read: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
