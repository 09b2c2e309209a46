"""The output contract: the columns of the two tables and the keys of their file metadata.

Bump `VERSION` with any change of a column; readers refuse a version that they don't know.
"""

import pyarrow as pa

VERSION = "1"

_TEXT = pa.dictionary(pa.int32(), pa.string())

DETECTIONS = pa.schema(
    [
        pa.field("image_id", _TEXT, nullable=False),
        pa.field("detection_id", pa.int32(), nullable=False),  # rank by score in the image, 0 = best
        pa.field("label", pa.int32(), nullable=False),  # the data set's id: COCO 1..90, else 1..K
        pa.field("class_name", _TEXT, nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        # Pixels of the original, EXIF-oriented image: 0 <= xmin < xmax <= image_width.
        pa.field("xmin", pa.float32(), nullable=False),
        pa.field("ymin", pa.float32(), nullable=False),
        pa.field("xmax", pa.float32(), nullable=False),
        pa.field("ymax", pa.float32(), nullable=False),
        pa.field("image_width", pa.int32(), nullable=False),
        pa.field("image_height", pa.int32(), nullable=False),
    ]
)

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("shard", _TEXT, nullable=False),
        pa.field("shard_index", pa.int32(), nullable=False),  # position in the shard; -1: the shard itself
        pa.field("shard_size", pa.int32(), nullable=False),  # images in the shard; 0: could not be counted
        pa.field("width", pa.int32(), nullable=False),  # 0 where it is not known
        pa.field("height", pa.int32(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("num_detections", pa.int32(), nullable=False),
        pa.field("status", _TEXT, nullable=False),  # "ok" | "failed"
        pa.field("error_stage", _TEXT, nullable=False),  # "" | "read" | "decode" | "infer"
        pa.field("error_type", _TEXT, nullable=False),
        pa.field("error_message", pa.string(), nullable=False),
    ]
)

# File metadata keys.
META_VERSION = b"shardshot.schema_version"
META_FINGERPRINT = b"shardshot.fingerprint"
META_MODEL = b"shardshot.model"  # JSON: architecture, classes, input size, thresholds, weights sha256
META_DETECTIONS_PART = b"shardshot.detections_part"  # in an images/ part: the detections/ part it commits
META_NUM_DETECTIONS = b"shardshot.num_detections"  # in an images/ part: rows of its detections/ part
META_REPLACES = b"shardshot.replaces"  # JSON list of images/ parts whose rows this part took over
META_RUN = b"shardshot.run"  # id of the run that wrote the part
META_ROUND = b"shardshot.round"  # int: 0 at first; rows of a higher round supersede those of the same image
