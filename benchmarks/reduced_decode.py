"""What decoding large JPEGs at a reduced scale costs in AP and saves in time.

    python benchmarks/reduced_decode.py --images FOLDER --annotations JSON [--factor 4]

The annotated photographs are enlarged by `--factor` (Lanczos) and saved as JPEGs of quality 90, so that their
boxes stay known; then they are decoded at full size and at the reduced scale that `jobs/infer.py` uses, and
the bundled model runs on both.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import decode_image, resize_image
from pipeline.evaluation.numbers import numbers
from pipeline.evaluation.run import evaluate
from pipeline.model.checkpoint import DEFAULT_WEIGHTS
from pipeline.model.detector import Detector


def enlarged(path: Path, factor: int) -> bytes:
    """The photograph, `factor` times as wide and high, as a JPEG."""
    image = Image.open(path).convert("RGB")
    file = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO instances JSON")
    parser.add_argument("--factor", type=int, default=4)
    args = parser.parse_args()
    ids = {item["file_name"]: item["id"] for item in json.loads(args.annotations.read_text())["images"]}
    detector = Detector(DEFAULT_WEIGHTS, score_threshold=0.001)
    spec = detector.spec
    enough = (2 * spec.input_width, 2 * spec.input_height)
    for side, min_size in (("full size", None), ("reduced", enough)):
        results, decode_s = [], 0.0
        for name, image_id in ids.items():
            data = enlarged(args.images / name, args.factor)
            start = time.perf_counter()
            image = decode_image(data, min_size=min_size)
            pixels = resize_image(
                image.pixels, height=spec.input_height, width=spec.input_width, rule=spec.resize_rule
            )
            decode_s += time.perf_counter() - start
            found = detector(pixels[None], np.array([[image.width, image.height]], np.int32))
            boxes_xywh = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1)
            results += [
                {"image_id": image_id, "category_id": int(label), "bbox": box.tolist(), "score": float(score)}
                for label, box, score in zip(
                    found.labels, boxes_xywh / args.factor, found.scores, strict=True
                )
            ]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "results.json")
            file.write_text(json.dumps(results))
            found_ap = numbers(evaluate(str(file), str(args.annotations)))["AP"]
        print(f"{side:<10} AP {found_ap:.4f}   {1000 * decode_s / len(ids):.1f} ms an image", flush=True)


if __name__ == "__main__":
    main()
