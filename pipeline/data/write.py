"""Write a data set as tar shards: images byte for byte as they are, checked annotations beside them.

The same data set always gives the same bytes.
"""

import io
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline import storage
from pipeline.data.annotations import CLASSES_FILE, Classes
from pipeline.data.check import CheckedImage, check_image
from pipeline.data.images import image_size
from pipeline.data.sources import Source, SourceImage
from pipeline.errors import ConfigError

MAX_SHARD_BYTES = 256 * 1024 * 1024  # what readers hold in memory: shards.MAX_BYTES_IN_MEMORY
_NUM_READERS = 16  # images at a time: hides the latency of object stores
_NUM_AHEAD = 64


@dataclass(frozen=True)
class ShardSet:
    """What was written.

    Attributes:
        num_images: packed images.
        num_shards: tar files.
        num_bytes: of the tar files.
        boxes: number of boxes by class name, also where it is 0; empty without annotations.
        num_empty: packed images without boxes.
        num_clipped: boxes that reached out of their image.
        num_duplicates: boxes left out because the same one was there already.
        dropped: what was left out, and why.
    """

    num_images: int
    num_shards: int
    num_bytes: int
    boxes: dict[str, int] = field(default_factory=dict)
    num_empty: int = 0
    num_clipped: int = 0
    num_duplicates: int = 0
    dropped: tuple[str, ...] = ()


def write_shards(
    source: Source,
    output: str,
    *,
    images_per_shard: int,
    skip_bad_boxes: bool = False,
    overwrite: bool = False,
) -> ShardSet:
    """Write `shard-00000.tar`, ... and, with annotations, `classes.json`, which comes last.

    Args:
        source: the data set.
        output: folder, empty or not there.
        images_per_shard: a shard ends after this many images or `MAX_SHARD_BYTES`.
        skip_bad_boxes: leave out bad boxes, and images that don't fit their annotation, instead of refusing.
        overwrite: delete an older shard set in `output` first.

    Raises:
        ConfigError: no images, bad boxes, or the output is not empty.
        StorageError: an image can't be read or a shard not written.
    """
    if not source.images:
        raise ConfigError("no images to pack")
    if source.classes and not skip_bad_boxes:
        # Before anything is read or written; what only the image file can tell is looked at again later.
        _refuse([p for image in source.images for p in _check_as_annotated(image, source.classes).problems])
    _clear_output(output, overwrite=overwrite)
    packer = _Packer(output, images_per_shard)
    try:
        if source.classes:
            made = _pack_annotated(source.images, source.classes, packer, skip_bad_boxes)
            storage.write_atomic(storage.join(output, CLASSES_FILE), source.classes.to_json())
            return made
        for image, data in _read_images(source.images):
            packer.add(image.name, data)
        packer.end_shard()
        return ShardSet(len(source.images), len(packer.written), packer.num_bytes)
    except BaseException:
        storage.delete(packer.written)  # half a shard set looks like a whole one
        raise


def summary_text(source: Source, made: ShardSet, output: str) -> str:
    """What was written, in a few lines for a person."""
    lines = [
        f"Packed {made.num_images:,} images into {made.num_shards:,} shard{'s' * (made.num_shards != 1)} "
        f"({made.num_bytes / 1e6:,.2f} MB) in {output}"
    ]
    if source.classes:
        lines += _box_lines(made)
    if made.dropped:
        lines.append(f"Left out, {len(made.dropped):,} in all:")
        lines += [f"  {text}" for text in made.dropped[:20]]
        lines += [f"  and {len(made.dropped) - 20:,} more"] if len(made.dropped) > 20 else []
    if source.num_left_out:
        lines.append(f"Image files that the annotations don't name, not packed: {source.num_left_out:,}")
    lines += [f"Note: {note}" for note in source.notes]
    lines.append(f"Next: python jobs/infer.py --input {output} --output {output.rstrip('/')}-detections")
    return "\n".join(lines)


def _box_lines(made: ShardSet) -> list[str]:
    common = sorted((name for name in made.boxes if made.boxes[name]), key=lambda name: -made.boxes[name])
    absent = [name for name, count in made.boxes.items() if not count]
    counts = _some([f"{name} {made.boxes[name]:,}" for name in common])
    return [
        f"Boxes: {sum(made.boxes.values()):,} of {len(common)} classes: {counts}",
        *([f"Classes without any box: {len(absent)}: {_some(absent)}"] if absent else []),
        f"Images without boxes: {made.num_empty:,}; boxes clipped: {made.num_clipped:,}; "
        f"repeated boxes left out: {made.num_duplicates:,}",
    ]


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:20]) + (", ..." if len(texts) > 20 else "")


def _clear_output(output: str, *, overwrite: bool) -> None:
    """Make sure that the output folder is empty; deletes an older shard set where that is wanted.

    Raises:
        ConfigError: it is not empty, or holds something else than a shard set.
    """
    names = storage.list_names(output)
    ours = {name for name in names if name == CLASSES_FILE or re.fullmatch(r"shard-\d{5,}\.tar", name)}
    if names - ours:
        raise ConfigError(f"--output {output} holds other files, such as {min(names - ours)}")
    if ours and not overwrite:
        raise ConfigError(f"--output {output} holds a shard set already; --overwrite replaces it")
    storage.delete([storage.join(output, name) for name in sorted(ours)])


def _check_as_annotated(image: SourceImage, classes: Classes) -> CheckedImage:
    return check_image(image, classes, width=image.width, height=image.height)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        what_to_do = "Correct the annotations, or give --skip-bad-boxes to leave them out"
        raise ConfigError(f"{'; '.join(problems[:5])}{more}. {what_to_do}")


def _pack_annotated(
    images: Sequence[SourceImage], classes: Classes, packer: "_Packer", skip_bad_boxes: bool
) -> ShardSet:
    counts: Counter[str] = Counter()
    boxes = Counter(dict.fromkeys(classes.names, 0))
    dropped: list[str] = []
    for image, data in _read_images(images):
        # A corrupt image is packed as it is: whoever reads it makes a failed row of it.
        width, height = image_size(data) or (image.width, image.height)
        checked = check_image(image, classes, width=width, height=height)
        if not skip_bad_boxes:
            _refuse(checked.problems)
        dropped.extend(checked.problems)
        if checked.usable:
            packer.add(image.name, data, _annotation(checked, classes, width, height, image.image_id))
            counts.update(images=1, empty=not checked.boxes)
            counts.update(clipped=checked.num_clipped, duplicates=checked.num_duplicates)
            boxes.update(box.class_name for box, _ in checked.boxes)
    packer.end_shard()
    return ShardSet(
        num_images=counts["images"],
        num_shards=len(packer.written),
        num_bytes=packer.num_bytes,
        boxes=dict(boxes),
        num_empty=counts["empty"],
        num_clipped=counts["clipped"],
        num_duplicates=counts["duplicates"],
        dropped=tuple(dropped),
    )


def _annotation(
    checked: CheckedImage, classes: Classes, width: int, height: int, image_id: int | None
) -> dict[str, object]:
    """The form that travels in a shard: see `annotations`."""
    ids = dict(zip(classes.names, classes.ids, strict=True))
    names = [box.class_name for box, _ in checked.boxes]
    annotation: dict[str, object] = {
        "width": width,
        "height": height,
        "boxes": [list(corners) for _, corners in checked.boxes],
        "labels": [ids[name] for name in names],
        "class_names": names,
        "difficult": [int(box.difficult) for box, _ in checked.boxes],
        "crowd": [int(box.crowd) for box, _ in checked.boxes],
    }
    return annotation if image_id is None else {**annotation, "image_id": image_id}


def _read_images(images: Sequence[SourceImage]) -> Iterator[tuple[SourceImage, bytes]]:
    """The images in order, read some at a time."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(images), _NUM_AHEAD):
            batch = images[start : start + _NUM_AHEAD]
            yield from zip(batch, pool.map(lambda image: storage.read_bytes(image.uri), batch), strict=True)


class _Packer:
    """Fills one tar after the other and writes each when it is full."""

    def __init__(self, output: str, images_per_shard: int) -> None:
        self.output = output
        self.images_per_shard = images_per_shard
        self.written: list[str] = []
        self.num_bytes = 0
        self._start_shard()

    def add(self, name: str, data: bytes, annotation: dict[str, object] | None = None) -> None:
        """Add an image and, beside it, its annotation."""
        if self._num_images == self.images_per_shard or (
            self._num_images and self._buffer.tell() + len(data) > MAX_SHARD_BYTES
        ):
            self.end_shard()
        self._add_member(name, data)
        self._num_images += 1
        if annotation is not None:
            key = posixpath.splitext(name)[0]
            # cat.jpg and cat.png can't both have cat.json; readers look for cat.png.json, too.
            self._add_member(f"{name if key in self._keys else key}.json", json.dumps(annotation).encode())
            self._keys.add(key)

    def end_shard(self) -> None:
        """Write what there is."""
        if not self._num_images:
            return
        self._tar.close()
        uri = storage.join(self.output, f"shard-{len(self.written):05}.tar")
        data = self._buffer.getvalue()
        storage.write_atomic(uri, data)
        self.written.append(uri)
        self.num_bytes += len(data)
        self._start_shard()

    def _start_shard(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)
        self._num_images = 0
        self._keys: set[str] = set()

    def _add_member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # owner, mode and time (0) are the same everywhere
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
