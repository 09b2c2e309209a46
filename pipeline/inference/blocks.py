"""What runs inside the tasks of the inference chain, without Ray: shards to image blocks to detections.

A block is a `pa.Table` of a fixed number of images, with the same rows in the same order at every attempt:
Ray resumes a retried reader by counting the blocks it had yielded, so anything else would lose rows silently.
A failed image is a row with a blank image.
"""

import multiprocessing
import os
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline import schema, storage
from pipeline.data.images import ResizeRule, decode_image, resize_image
from pipeline.data.shards import RawImage, Shard, read_shard
from pipeline.errors import ImageError, ShardError, StorageError

if TYPE_CHECKING:
    from pipeline.model.postprocess import Detections

    Found = Detections[np.ndarray]

SHARDS_AHEAD = 1  # opened while the current one is decoded: hides the store's latency
IMAGES_AHEAD = 32  # the same for loose image files, a request each

# Columns that travel beside schema.IMAGES from the reader to the sink, one value a row.
STATS = ("num_retries", "num_empty_boxes", "read_s", "decode_s", "detect_s")
_IMAGES = {field.name: field.type for field in schema.IMAGES}
_LISTS = {
    "boxes": pa.list_(pa.list_(pa.float32(), 4)),
    "scores": pa.list_(pa.float32()),
    "labels": pa.list_(pa.int32()),
}


@dataclass(frozen=True, slots=True)
class Work:
    """One shard to read and the indices in it that are done already."""

    shard: Shard
    skip: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How readers make images of bytes."""

    height: int
    width: int
    resize_rule: ResizeRule
    images_per_block: int
    images_per_chunk: int
    max_pixels: int
    max_image_bytes: int
    max_decode_s: float
    reduced_decode: bool
    image_column: str | None = None
    id_column: str | None = None
    isolated: bool = False
    """Decode each image in a child process: one that kills it becomes a failed row."""

    @property
    def image_bytes(self) -> int:
        """Of one resized image."""
        return self.height * self.width * 3


# ---- reader ------------------------------------------------------------------------------------------


def read_blocks(work: Sequence[Work], settings: ReadSettings) -> Iterator[pa.Table]:
    """Read shards, decode and resize their images; yields blocks of `images_per_block` images.

    Each block has the columns of `schema.IMAGES`, `STATS` and `image`: uint8 [height, width, 3] RGB, in
    chunks of `images_per_chunk`.
    """
    rows: list[dict[str, object]] = []
    chunks: list[np.ndarray] = []
    retries = storage.num_retries()
    before = time.perf_counter()
    decode = ChildDecoder(settings) if settings.isolated else WatchedDecoder(settings)
    for raw in _read_ahead(work, settings):
        read_s = time.perf_counter() - before
        row, pixels = decode(raw)
        row["num_retries"], retries = storage.num_retries() - retries, storage.num_retries()
        row["read_s"] = read_s
        place = len(rows) % settings.images_per_chunk
        if place == 0:
            count = min(settings.images_per_chunk, settings.images_per_block - len(rows))
            chunks.append(np.empty((count, settings.height, settings.width, 3), np.uint8))
        chunks[-1][place] = 0 if pixels is None else pixels
        rows.append(row)
        if len(rows) == settings.images_per_block:
            yield _block(rows, chunks)
            rows, chunks = [], []
        before = time.perf_counter()
    if rows:
        chunks[-1] = chunks[-1][: place + 1]
        yield _block(rows, chunks)


def _block(rows: list[dict[str, object]], chunks: list[np.ndarray]) -> pa.Table:
    columns = {name: pa.array([row[name] for row in rows]).cast(kind) for name, kind in _IMAGES.items()}
    stats = {name: pa.array([row[name] for row in rows], pa.float64()) for name in STATS}
    images = pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(chunk) for chunk in chunks])
    return pa.table({**columns, **stats, "image": images})


def _decode(raw: RawImage, settings: ReadSettings) -> tuple[dict[str, object], np.ndarray | None]:
    """The row of one image and its resized pixels; None where it failed."""
    start = time.perf_counter()
    row: dict[str, object] = {
        "image_id": raw.image_id, "uri": raw.uri, "shard": raw.shard, "shard_index": raw.shard_index,
        "shard_size": raw.shard_size, "width": 0, "height": 0, "num_bytes": raw.num_bytes,
        "num_detections": 0, "status": "ok", "error_stage": "", "error_type": "", "error_message": "",
        "decode_s": 0.0, "detect_s": 0.0, "num_empty_boxes": 0,
    }  # fmt: skip
    try:
        if raw.error:
            raise raw.error
        # Twice the input leaves the resize enough to work on: benchmarks/reduced_decode.py, AP .374 against
        # .372 at full size. The usual 640x480 are never reduced.
        enough = (2 * settings.width, 2 * settings.height) if settings.reduced_decode else None
        decoded = decode_image(raw.data or b"", max_pixels=settings.max_pixels, min_size=enough)
        pixels = resize_image(
            decoded.pixels, height=settings.height, width=settings.width, rule=settings.resize_rule
        )
    except ImageError as error:
        row.update(_failure(error.stage, error.kind, str(error)))
        return row, None
    except Exception as error:  # the per-image boundary: a decoder's own bug costs one image
        row.update(_failure("decode", type(error).__name__, str(error)))
        return row, None
    row.update(width=decoded.width, height=decoded.height, decode_s=time.perf_counter() - start)
    return row, pixels


class WatchedDecoder:
    """`_decode` under a watch: where one image takes over `max_decode_s`, this process ends itself.

    A decoder that is stuck in C can't be interrupted, and would hold the run for ever. Ray runs the reader
    again as after any crash; when that has happened too often, `ChildDecoder` finds the image.
    """

    def __init__(self, settings: ReadSettings) -> None:
        self._settings = settings
        self._current: tuple[float, str] | None = None
        threading.Thread(target=_watch, args=(weakref.ref(self),), name="decode-watch", daemon=True).start()

    def __call__(self, raw: RawImage) -> tuple[dict[str, object], np.ndarray | None]:
        """The row of one image and its pixels, as `_decode`."""
        self._current = (time.monotonic(), raw.image_id)
        try:
            return _decode(raw, self._settings)
        finally:
            self._current = None

    def stuck_in(self) -> str | None:
        """The image that takes too long."""
        current = self._current
        too_long = current and time.monotonic() - current[0] > self._settings.max_decode_s
        return current[1] if current and too_long else None


def _watch(decoder: "weakref.ref[WatchedDecoder]") -> None:
    """Look every second, until the decoder is gone."""
    while (alive := decoder()) is not None:
        if image := alive.stuck_in():
            print(f"decoding {image} takes too long; the reader ends itself", flush=True)
            os._exit(1)
        del alive
        time.sleep(1)


class ChildDecoder:
    """`_decode` in a child process: an image that kills it, or never ends, becomes a failed row.

    Only for shards whose reader died again and again: an image takes a message to another process and back.
    """

    def __init__(self, settings: ReadSettings) -> None:
        self._settings = settings
        self._child: ProcessPoolExecutor | None = None

    def __call__(self, raw: RawImage) -> tuple[dict[str, object], np.ndarray | None]:
        """The row of one image and its pixels, as `_decode`."""
        limit_s = self._settings.max_decode_s
        if self._child is None:
            self._child = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self._child.submit(os.getpid).result()  # its start doesn't count
        try:
            return self._child.submit(_decode, raw, self._settings).result(limit_s)
        except (BrokenProcessPool, TimeoutError) as error:
            self._stop()
            killed = isinstance(error, BrokenProcessPool)
            what = "the process that decoded it died" if killed else f"decoding took over {limit_s:g} s"
            lost = replace(raw, error=ImageError(what, kind="ProcessDied" if killed else "TimedOut"))
            return _decode(lost, self._settings)

    def _stop(self) -> None:
        if self._child is not None:
            for process in list((self._child._processes or {}).values()):  # no public way to stop a stuck one
                process.kill()
            self._child.shutdown(wait=True)
        self._child = None


def _failure(stage: str, kind: str, message: str) -> dict[str, str]:
    text = " ".join(message.split())[:500].encode("utf-8", "replace").decode()
    return {"status": "failed", "error_stage": stage, "error_type": kind, "error_message": text}


def _read_ahead(work: Sequence[Work], settings: ReadSettings) -> Iterator[RawImage]:
    """The images of all shards, in order; the next shards are opened in the background meanwhile."""
    with ThreadPoolExecutor(IMAGES_AHEAD) as pool:
        opened: deque[Future[Iterator[RawImage]]] = deque()
        waiting = iter(work)
        for current in work:
            depth = IMAGES_AHEAD if current.shard.kind == "image" else SHARDS_AHEAD
            while len(opened) <= depth and (item := next(waiting, None)):
                opened.append(pool.submit(_open, item, settings))
            yield from _or_failed_row(opened.popleft(), current)


def _open(work: Work, settings: ReadSettings) -> Iterator[RawImage]:
    """Fetch and index the shard: done by `read_shard` before its first row."""
    rows = read_shard(
        work.shard,
        image_column=settings.image_column,
        id_column=settings.id_column,
        skip=work.skip,
        max_image_bytes=settings.max_image_bytes,
    )
    first = next(rows, None)
    return iter(()) if first is None else _chain(first, rows)


def _chain(first: RawImage, rest: Iterator[RawImage]) -> Iterator[RawImage]:
    yield first
    yield from rest


def _or_failed_row(opened: Future[Iterator[RawImage]], work: Work) -> Iterator[RawImage]:
    """The shard's images, or one failed row for a shard that is empty, or can't be opened or counted."""
    try:
        rows = opened.result()
        first = next(rows, None)
        if first is None and not work.skip:
            raise ShardError("the shard holds no images")
    except (ShardError, StorageError) as error:
        yield _failed_shard(work.shard, error)
        return
    if first is not None:
        yield first
    yield from rows


def _failed_shard(shard: Shard, error: Exception) -> RawImage:
    loose = shard.kind == "image"  # a shard of one is counted, whatever happens to it
    return RawImage(
        image_id=shard.name,
        uri=shard.uri,
        shard=shard.name,
        shard_index=0 if loose else -1,
        shard_size=1 if loose else 0,
        data=None,
        error=ImageError(str(error), stage="read", kind=type(error).__name__),
        annotation=None,
    )


# ---- detector ----------------------------------------------------------------------------------------


class DetectImages:
    """The detector as a callable on blocks: replaces `image` by `boxes`, `scores` and `labels`.

    Rows in = rows out: failed images pass through untouched.
    """

    def __init__(
        self, weights: bytes, device: str, thresholds: Mapping[int, float], batch_size: int, threads: int
    ) -> None:
        import torch  # seconds to import, and readers of PNG files don't need it

        from pipeline.model.detector import Detector

        if threads:
            torch.set_num_threads(threads)
        self.batch_size = batch_size
        with tempfile.NamedTemporaryFile(suffix=".weights") as file:
            file.write(weights)
            file.flush()
            self.detector = Detector(file.name, device=device, score_threshold=_lowest(thresholds))
        self._thresholds = np.zeros(max(self.detector.spec.label_ids, default=0) + 1)
        if len(set(thresholds.values())) > 1:
            self._thresholds[list(thresholds)] = list(thresholds.values())

    def __call__(self, block: pa.Table) -> pa.Table:
        """Detect in the good images of `block`, `batch_size` at a time."""
        sizes_N2 = np.stack([block["width"].to_numpy(), block["height"].to_numpy()], axis=1)
        good = np.flatnonzero(sizes_N2[:, 0] > 0)
        start = time.perf_counter()
        found = []
        num_empty = 0
        for images, rows in _batches(block["image"], good, self.batch_size):
            batch = self.detector(images, sizes_N2[rows])
            num_empty += int((~batch.has_area).sum())
            batch = replace(batch, image_index=rows[batch.image_index])
            found.append(_only(batch, batch.has_area & (batch.scores >= self._thresholds[batch.labels])))
        seconds = (time.perf_counter() - start) / max(len(good), 1)
        return with_detections(block, found, seconds, good, num_empty=num_empty)


def _batches(
    column: pa.ChunkedArray, rows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images at `rows` (ascending), at most `batch_size` of one chunk at a time, and their rows."""
    first = 0
    for chunk in column.chunks:
        here = rows[(rows >= first) & (rows < first + len(chunk))]
        for batch in np.split(here, range(batch_size, len(here), batch_size)):
            if len(batch):
                images = chunk.to_numpy_ndarray()
                # A whole chunk isn't copied: of 96, 26 MB.
                yield images if len(batch) == len(images) else images[batch - first], batch
        first += len(chunk)


def _lowest(thresholds: Mapping[int, float]) -> float:
    """The score threshold of the detector; a little lower where classes differ, for those that equal it."""
    values = set(thresholds.values())
    return min(values) if len(values) == 1 else max(min(values) - 1e-6, 0.0)


def _only(found: "Found", keep: np.ndarray) -> "Found":
    return replace(
        found,
        image_index=found.image_index[keep],
        boxes=found.boxes[keep],
        scores=found.scores[keep],
        labels=found.labels[keep],
    )


def with_detections(
    block: pa.Table, found: list["Found"], seconds: float, good: np.ndarray, *, num_empty: int = 0
) -> pa.Table:
    """`block` with the batches `found` in the place of its images; `good` rows took `seconds` each.

    `num_empty` boxes without area were dropped.
    """
    index = np.concatenate([batch.image_index for batch in found] or [np.zeros(0, np.int64)])
    counts = np.bincount(index, minlength=len(block)).astype(np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    boxes = np.concatenate([batch.boxes for batch in found] or [np.zeros((0, 4))]).astype(np.float32)
    scores = np.concatenate([batch.scores for batch in found] or [np.zeros(0)]).astype(np.float32)
    labels = np.concatenate([batch.labels for batch in found] or [np.zeros(0)]).astype(np.int32)
    detect_s = np.zeros(len(block))
    detect_s[good] = seconds
    flat_boxes = pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4)
    values = {"boxes": flat_boxes, "scores": pa.array(scores), "labels": pa.array(labels)}
    empty = np.zeros(len(block))
    empty[:1] = num_empty
    changed = {"num_detections": counts, "detect_s": detect_s, "num_empty_boxes": empty}
    for name, column in changed.items():
        block = block.set_column(block.schema.get_field_index(name), name, pa.array(column))
    block = block.drop_columns(["image"])
    for name, column in values.items():
        block = block.append_column(name, pa.ListArray.from_arrays(offsets, column).cast(_LISTS[name]))
    return block


# ---- tables ------------------------------------------------------------------------------------------


def to_tables(block: pa.Table, class_names: dict[int, str]) -> tuple[pa.Table, pa.Table]:
    """Split a detected block into the two tables of the output contract: images and detections.

    Args:
        block: what `DetectImages` returns.
        class_names: class name by data-set id.
    """
    counts = block["num_detections"].to_numpy()
    row = np.repeat(np.arange(len(block)), counts)
    rank = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    boxes = _flat(block, "boxes", np.float32).reshape(-1, 4)
    labels = _flat(block, "labels", np.int32)
    ids, codes = np.unique(labels, return_inverse=True)
    names = pa.array([class_names[label] for label in ids.tolist()], pa.string())
    of_image = block.select(["image_id", "width", "height"]).take(row)
    columns = {
        "image_id": of_image["image_id"].combine_chunks().dictionary_encode(),
        "detection_id": pa.array(rank.astype(np.int32)),
        "label": pa.array(labels),
        "class_name": pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), names),
        "score": pa.array(_flat(block, "scores", np.float32)),
        "xmin": pa.array(boxes[:, 0]),
        "ymin": pa.array(boxes[:, 1]),
        "xmax": pa.array(boxes[:, 2]),
        "ymax": pa.array(boxes[:, 3]),
        "image_width": of_image["width"],
        "image_height": of_image["height"],
    }
    detections = pa.table(columns).cast(schema.DETECTIONS)
    return block.select(schema.IMAGES.names).cast(schema.IMAGES), detections


def _flat(block: pa.Table, name: str, dtype: type) -> np.ndarray:
    """All values of a list column, end to end."""
    values = block[name].combine_chunks().flatten()
    if name == "boxes":
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
