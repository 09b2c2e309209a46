"""Real S3 servers on the loopback address: moto (conditional writes), rclone (files on disk, signatures)."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
# rclone answers checksummed range requests with the checksum of the whole object.
CHECKSUMS = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def moto() -> Iterator[dict[str, str]]:
    """An S3 server in memory; yields the environment of its clients."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/moto-api/", process)
        yield {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def rclone(folder: Path, port: int | None = None) -> Iterator[dict[str, str]]:
    """An S3 server over `folder`, whose sub-folders are buckets; files survive a kill and a restart."""
    port = port or free_port()
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent))
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    command = [str(binary), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", keys, str(folder)]
    environment = {**os.environ, "RCLONE_CONFIG": os.devnull}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/", process)
        yield {**KEYS, **CHECKSUMS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, seconds: float = 60) -> None:
    """Until the server answers anything at all."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as answer:
            answer.close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(url)


def clean_text(text: str) -> str:
    """Terminal output without colours, for comparisons."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
