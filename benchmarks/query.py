"""Asking ten million detections one question: bytes and seconds of Parquet against COCO JSON.

    python benchmarks/query.py [--rows 10000000] [--json FILE]

The question is "where are dogs with a score of at least 0.5": which images, and which with their boxes. The
table is synthetic: 50 boxes an image from a score of 0.05 on, classes about as frequent as in COCO, scores as
the bundled detector gives them. Bytes are counted where the file system is read. Each way runs in a process
of its own, three times in turn (JSON once: it takes a minute and gigabytes).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs

from pipeline import schema, storage
from pipeline.inference import ledger
from pipeline.inference.lock import Lock

BOXES_PER_IMAGE = 50
IMAGES_PER_PART = 20_000  # a million boxes a part, as compaction leaves them
IMAGES = ["image_id", "score"]
BOXES = ["image_id", "score", "xmin", "ymin", "xmax", "ymax"]
DOG = 18


def main() -> None:
    """Write the table, ask it in every way, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--json", default="")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(WAYS[options.step[0]](options.step[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_output(folder, options.rows)
        table_bytes = sum(path.stat().st_size for path in Path(folder, "detections").iterdir())
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
        for turn in range(3):
            for name in WAYS:
                if turn == 0 or name != "COCO JSON":
                    runs[name].append(step(name, folder))
    report(runs, table_bytes, options.rows, options.json)


def step(name: str, folder: str) -> dict[str, Any]:
    """One way in a fresh process."""
    command = [sys.executable, __file__, "--step", name, folder]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(runs: dict[str, list[dict[str, Any]]], table_bytes: int, rows: int, path: str) -> None:
    """Print one table and write one JSON file."""
    found = []
    for name, of_way in runs.items():
        seconds = statistics.median(run["seconds"] for run in of_way)
        found.append({"way": name, **of_way[0], "seconds": round(seconds, 3)})
    slow = found[-1]["seconds"]
    print(f"{rows:,} detections, {table_bytes / 1e6:,.0f} MB of Parquet, {found[0]['rows']:,} are the answer")
    print(f"{'':<34}{'seconds':>9}{'faster than JSON':>18}{'MB read':>9}{'of table':>10}{'peak MB':>9}")
    for row in found:
        share = f"{row['bytes'] / table_bytes:.1%}" if row["bytes"] else ""
        read = f"{row['bytes'] / 1e6:,.0f}" if row["bytes"] else ""
        faster = f"{slow / row['seconds']:.0f}x"
        print(f"{row['way']:<34}{row['seconds']:9.2f}{faster:>18}{read:>9}{share:>10}{row['peak_mb']:9,.0f}")
    if path:
        Path(path).write_text(json.dumps({"rows": rows, "table_bytes": table_bytes, "ways": found}, indent=1))


# ---- the ways ----------------------------------------------------------------------------------------


def by_results(output: str, columns: list[str]) -> dict[str, Any]:
    """Our reader on the plain file system; bytes are counted in a second reading."""
    from pipeline.results import load_detections

    start = time.perf_counter()
    frame = load_detections(output, min_score=0.5, class_names=["dog"], columns=columns)
    seconds = time.perf_counter() - start
    peak = outcome(len(frame), seconds, 0)
    counter = CountingFiles()
    plain = storage.arrow_filesystem
    storage.arrow_filesystem = lambda uri: (pyarrow.fs.PyFileSystem(counter), plain(uri)[1])
    load_detections(output, min_score=0.5, class_names=["dog"], columns=columns)
    return peak | {"bytes": counter.num_bytes}


def by_pandas(output: str) -> dict[str, Any]:
    """All of the table, then the question."""
    import pandas as pd

    start = time.perf_counter()
    frame = pd.read_parquet(f"{output}/detections")
    frame = frame.loc[(frame["score"] >= 0.5) & (frame["class_name"] == "dog"), BOXES]
    return outcome(len(frame), time.perf_counter() - start, 0)


def by_duckdb(output: str) -> dict[str, Any]:
    """The same question in SQL."""
    import duckdb

    question = f"""
        SELECT {", ".join(BOXES)} FROM '{output}/detections/*.parquet'
        WHERE score >= 0.5 AND class_name = 'dog'
    """
    start = time.perf_counter()
    frame = duckdb.connect().execute(question).df()
    return outcome(len(frame), time.perf_counter() - start, 0)


def by_json(output: str) -> dict[str, Any]:
    """A COCO results file: all of it is read and parsed."""
    import pandas as pd

    start = time.perf_counter()
    with open(f"{output}/results.json") as file:
        rows = json.load(file)
    frame = pd.DataFrame([row for row in rows if row["score"] >= 0.5 and row["category_id"] == DOG])
    seconds = time.perf_counter() - start
    return outcome(len(frame), seconds, Path(output, "results.json").stat().st_size)


WAYS = {
    "load_detections, images": partial(by_results, columns=IMAGES),
    "load_detections, boxes": partial(by_results, columns=BOXES),
    "DuckDB, boxes": by_duckdb,
    "pandas.read_parquet, then filter": by_pandas,
    "COCO JSON": by_json,
}


def outcome(rows: int, seconds: float, num_bytes: int) -> dict[str, Any]:
    """What one way took."""
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's
    peak_kb = int(status.split("VmHWM:", 1)[1].split()[0])
    return {"rows": rows, "seconds": seconds, "bytes": num_bytes, "peak_mb": round(peak_kb / 1024)}


class CountingFiles(pyarrow.fs.FSSpecHandler):
    """Local files whose every read is counted."""

    def __init__(self) -> None:
        import fsspec

        super().__init__(fsspec.filesystem("file"))
        self.num_bytes = 0

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file that counts."""
        counter = self

        class File:
            def __init__(self) -> None:
                self._file = open(path, "rb")  # noqa: SIM115

            def read(self, size: int = -1) -> bytes:
                data = self._file.read(size)
                counter.num_bytes += len(data)
                return data

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        return pa.PythonFile(File(), mode="r")


# ---- the table ---------------------------------------------------------------------------------------


def write_output(output: str, rows: int) -> None:
    """An output folder as a run leaves it, and the same detections as a COCO results file."""
    rng = np.random.default_rng(0)
    names, shares = class_shares()
    metadata = ledger.part_metadata(
        fingerprint="f", model=json.dumps({"class_names": names}), run="r1", round=0
    )
    with open(f"{output}/results.json", "wb") as file, Lock(output) as lock:
        file.write(b"[")
        for part, first in enumerate(range(0, rows // BOXES_PER_IMAGE, IMAGES_PER_PART)):
            count = min(IMAGES_PER_PART, rows // BOXES_PER_IMAGE - first)
            images, boxes = make_part(rng, first, count, names, shares)
            ledger.commit(output, f"part-r1-{part:06d}.parquet", images, boxes, metadata, lock=lock.ref)
            file.write(b"," * bool(first) + coco_text(boxes, first))
        file.write(b"]")


def class_shares() -> tuple[list[str], np.ndarray]:
    """80 classes from a third of all boxes (person) down; the dog is the 30th with about one in a hundred."""
    names = [f"class {k:02d}" for k in range(1, 81)]
    names[0], names[29] = "person", "dog"
    shares = 1 / np.arange(1, 81) ** 0.9
    shares[0] *= 3
    return names, shares / shares.sum()


def make_part(
    rng: np.random.Generator, first: int, count: int, names: list[str], shares: np.ndarray
) -> tuple[pa.Table, pa.Table]:
    """Images `first` to `first + count` and their boxes."""
    num_boxes = count * BOXES_PER_IMAGE
    scores = np.minimum(0.05 - np.log1p(-rng.random((count, BOXES_PER_IMAGE)) * 0.9999) * 0.155, 0.999)
    scores = -np.sort(-scores, axis=1).ravel()
    centres = rng.uniform((0, 0), (640, 480), (num_boxes, 2))
    sizes = np.exp(rng.normal(4, 0.9, (num_boxes, 2)))
    low, high = np.clip(centres - sizes / 2, 0, (639, 479)), np.clip(centres + sizes / 2, 1, (640, 480))
    labels = rng.choice(80, num_boxes, p=shares).astype(np.int32)
    ids = pa.array([f"shard-{i // 1000:05d}.tar/{i:012d}.jpg" for i in range(first, first + count)])
    owners = np.repeat(np.arange(count, dtype=np.int32), BOXES_PER_IMAGE)
    columns = {
        "image_id": pa.DictionaryArray.from_arrays(owners, ids),
        "detection_id": np.tile(np.arange(BOXES_PER_IMAGE, dtype=np.int32), count),
        "label": np.where(labels == 29, DOG, labels + 100).astype(np.int32),
        "class_name": pa.DictionaryArray.from_arrays(labels, pa.array(names)),
        "score": scores.astype(np.float32),
        "xmin": low[:, 0].astype(np.float32), "ymin": low[:, 1].astype(np.float32),
        "xmax": high[:, 0].astype(np.float32), "ymax": high[:, 1].astype(np.float32),
        "image_width": np.full(num_boxes, 640, np.int32), "image_height": np.full(num_boxes, 480, np.int32),
    }  # fmt: skip
    boxes = pa.Table.from_arrays(
        [pa.array(columns[name]) for name in schema.DETECTIONS.names], schema=schema.DETECTIONS
    )
    text, none = pa.array([""] * count), np.zeros(count, np.int32)
    shards = pa.array([f"shard-{i // 1000:05d}.tar" for i in range(first, first + count)])
    rows = {
        "image_id": ids, "uri": ids, "shard": shards,
        "shard_index": none, "shard_size": none + 1000, "width": none + 640, "height": none + 480,
        "num_bytes": np.full(count, 100_000), "num_detections": none + BOXES_PER_IMAGE,
        "status": pa.array(["ok"] * count), "error_stage": text, "error_type": text, "error_message": text,
    }  # fmt: skip
    return pa.table(rows).cast(schema.IMAGES), boxes


def coco_text(boxes: pa.Table, first: int) -> bytes:
    """The boxes as the inside of a COCO results list, two decimals a coordinate as in COCO's files."""
    image = np.repeat(np.arange(first, first + len(boxes) // BOXES_PER_IMAGE), BOXES_PER_IMAGE)
    corners = [boxes[name].to_numpy().astype(np.float64) for name in ("xmin", "ymin", "xmax", "ymax")]
    sides = [corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]]
    numbers = [
        image,
        boxes["label"].to_numpy(),
        *(side.round(2) for side in sides),
        boxes["score"].to_numpy(),
    ]
    texts = [pa.array(values).cast(pa.string()) for values in numbers]
    between = ('{"image_id":', ',"category_id":', ',"bbox":[', ",", ",", ",", '],"score":', "}")
    pieces = [piece for pair in zip(between, texts, strict=False) for piece in pair] + [between[-1]]
    rows = pc.binary_join_element_wise(*pieces, "")  # type: ignore[attr-defined]
    return ",".join(rows.to_pylist()).encode()


if __name__ == "__main__":
    main()
