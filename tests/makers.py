"""Small images and shards made in code, for every test that needs input."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def make_image(width: int = 64, height: int = 48, *, seed: int = 0) -> np.ndarray:
    """A uint8 [height, width, 3] picture: smooth colours with a bright rectangle."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    x, y = int(rng.integers(0, max(width // 2, 1))), int(rng.integers(0, max(height // 2, 1)))
    pixels[y : y + height // 3, x : x + width // 3] = rng.integers(200, 256, 3)
    return pixels


def make_jpeg(
    width: int = 64, height: int = 48, *, seed: int = 0, quality: int = 90, orientation: int | None = None
) -> bytes:
    """A JPEG file of `make_image`; width and height are those stored, before the EXIF orientation."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    return encode(make_image(width, height, seed=seed), "JPEG", quality=quality, exif=exif)


def encode(pixels: np.ndarray | Image.Image, image_format: str, **options: object) -> bytes:
    """`pixels` as the bytes of an image file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def make_tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """The bytes of a tar file with these members, in this order; names may repeat."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def make_tar_shard(
    path: Path,
    images: Mapping[str, bytes] | int = 3,
    *,
    annotations: Mapping[str, dict] | None = None,
    seed: int = 0,
) -> Path:
    """Write a tar shard: `images` are files by member name, or a number of made JPEGs 000.jpg, 001.jpg, ...

    `annotations` maps a member name to the dict that travels beside it as `<key>.json`.
    """
    if isinstance(images, int):
        images = {f"{i:03}.jpg": make_jpeg(seed=seed + i) for i in range(images)}
    members: list[tuple[str, bytes]] = []
    for name, data in images.items():
        members.append((name, data))
        if annotations and name in annotations:
            members.append((str(Path(name).with_suffix(".json")), json.dumps(annotations[name]).encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_tar(members))
    return path


def make_parquet_shard(
    path: Path,
    images: Mapping[str, bytes | None] | int = 3,
    *,
    image_column: str = "image",
    id_column: str | None = "image_id",
    annotations: Mapping[str, dict] | None = None,
    row_group_size: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a Parquet shard with a binary image column and, unless None, an id column."""
    if isinstance(images, int):
        images = {f"{i:03}.jpg": make_jpeg(seed=seed + i) for i in range(images)}
    columns: dict[str, pa.Array] = {image_column: pa.array(list(images.values()), pa.binary())}
    if id_column is not None:
        columns[id_column] = pa.array(list(images), pa.string())
    if annotations is not None:
        texts = [json.dumps(annotations[name]) if name in annotations else None for name in images]
        columns["annotation"] = pa.array(texts, pa.string())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path
