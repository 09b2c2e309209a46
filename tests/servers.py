"""Real S3 servers on the loopback address: moto (conditional writes), rclone (files on disk, signatures)."""

import contextlib
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@dataclass
class Proxy:
    """What a proxy saw and did."""

    environment: dict[str, str]
    """Of the clients."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path, in order."""
    faults: Counter[str] = field(default_factory=Counter)
    busy: set[int] = field(default_factory=set)
    """Threads that are at a request."""


DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
MANY_DENIED = (
    b"<DeleteResult><Error><Key>a</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    b"</DeleteResult>"
)
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@contextlib.contextmanager
def proxy(
    upstream: dict[str, str], *, faults: float = 0, deletes: bool = True, seed: int = 0
) -> Iterator[Proxy]:
    """An S3 server in front of `upstream` that writes down every request.

    It answers a share `faults` of them with 503 SlowDown, a reset connection (before the request is passed on
    or after, so that only its answer is lost) or, where there is one, half a body. Without `deletes` it
    refuses them as S3 does where a role has no right to: with 403, or among the results of many.
    """
    rng = random.Random(seed)
    host, _, port = upstream["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            seen.busy.add(threading.get_ident())
            try:
                self.pass_on()
            finally:
                seen.busy.discard(threading.get_ident())

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.requests.append((self.command, self.path))
            kinds = ["slow down", "reset", "lost answer", *["cut"] * 2 * (self.command == "GET")]
            fault = rng.choice(kinds) if rng.random() < faults else ""
            if not deletes and (self.command == "DELETE" or self.path.endswith("?delete")):
                status, text = (403, DENIED) if self.command == "DELETE" else (200, MANY_DENIED)
                self.answer(status, [("Content-Type", "application/xml")], text, len(text))
                return
            if fault:
                seen.faults[fault] += 1
            if fault == "slow down":
                self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN, len(SLOW_DOWN))
                return
            if fault == "reset":
                self.reset()
                return
            # The signature covers the Host header: the client's goes through as it is.
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection = HTTPConnection(host, int(port), timeout=60)
            connection.request(self.command, self.path, body, headers)
            reply = connection.getresponse()
            data = reply.read()
            connection.close()
            if fault == "lost answer":
                self.reset()
                return
            size = int(reply.getheader("Content-Length", len(data)))
            whole = fault != "cut"
            self.answer(reply.status, reply.getheaders(), data if whole else data[: size // 2], size)
            if not whole:
                self.reset()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, size: int) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def reset(self) -> None:
            self.wfile.flush()
            linger = struct.pack("ii", 1, 0)  # closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that were killed

        def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
            request.close()  # a shutdown first would turn a reset into an orderly end

    server = Server(("127.0.0.1", 0), Handler)
    seen = Proxy({**upstream, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
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
