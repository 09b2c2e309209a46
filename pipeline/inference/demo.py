"""The built-in demo: photographs that ship with scikit-image and scikit-learn, packed into tar shards."""

import dataclasses
import importlib.util
import io
import tarfile
from pathlib import Path

from pipeline.config import InferConfig
from pipeline.errors import ConfigError

FOLDER = Path("demo-output")

_PHOTOGRAPHS = {
    "skimage": (
        "data",
        [
            "astronaut.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "horse.png",
            "motorcycle_left.png",
            "rocket.jpg",
        ],
    ),
    "sklearn": ("datasets/images", ["china.jpg", "flower.jpg"]),
}
_IMAGES_PER_SHARD = 4


def prepare(config: InferConfig) -> InferConfig:
    """Write the demo's shards and return `config` with its input and output.

    One file is damaged on purpose: half of a JPEG.

    Raises:
        ConfigError: the packages with the photographs are not installed.
    """
    photographs = {path.name: path.read_bytes() for path in _photographs()}
    broken = photographs["rocket.jpg"]
    images = [*photographs.items(), ("broken.jpg", broken[: len(broken) // 2])]
    shards = FOLDER / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    for number in range(0, len(images), _IMAGES_PER_SHARD):
        _write_tar(
            shards / f"demo-{number // _IMAGES_PER_SHARD:05d}.tar",
            images[number : number + _IMAGES_PER_SHARD],
        )
    return dataclasses.replace(
        config, input=str(shards), output=str(FOLDER / "results"), max_failed_fraction=0.5, overwrite=True
    )


def _photographs() -> list[Path]:
    paths = []
    for package, (folder, names) in _PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)  # found, not imported: that takes seconds
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"the demo's photographs ship in the package {package}, which is missing: "
                "pip install 'shardshot[demo]', or give --input and --output"
            )
        paths += [Path(spec.submodule_search_locations[0]) / folder / name for name in names]
    return paths


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
