"""Images that kill their decoder, or keep it busy for ever, through the whole run on a Ray of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.inference.verify import verify
from pipeline.results import load_images
from tests.makers import make_jpeg, make_tar_shard

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from pipeline.config import InferConfig
from pipeline.inference.run import infer
from tests.fakes import FakeDetector
infer(InferConfig(input=sys.argv[1], output=sys.argv[2], max_decode_s=2), detector=FakeDetector)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_images_that_kill_or_hold_their_decoder_become_failed_rows_and_the_run_ends_by_itself(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        images = {f"{i:03}.jpg": make_jpeg(seed=100 * number + i) for i in range(150)}
        if number == 1:
            images["120-killer.jpg"] = b"POISON"
        if number == 2:
            images["005-stuck.jpg"] = b"STUCK"
        make_tar_shard(source / f"s{number}.tar", images)
    path = f"{Path(__file__).parent / 'poison'}:{ROOT}"
    subprocess.run(
        [sys.executable, "-c", RUN, str(source), str(target)],
        env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=True, timeout=240,
    )  # fmt: skip
    failed = load_images(target, status="failed")
    assert dict(zip(failed.image_id, failed.error_type, strict=True)) == {
        "s1.tar/120-killer.jpg": "ProcessDied",
        "s2.tar/005-stuck.jpg": "TimedOut",
    }
    assert len(load_images(target)) == 4 * 150 + 2
    assert verify(str(source), str(target)).problems == []
