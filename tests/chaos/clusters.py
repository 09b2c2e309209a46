"""Two Ray nodes on this machine, to be killed one by one."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.runs import kill_family, wait_until
from tests.servers import free_port

RAY = str(Path(sys.executable).with_name("ray"))
# A dead node is noticed after 2 s rather than 20 s.
NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


@dataclass(frozen=True)
class Cluster:
    """A head and a second node, each `ray start --block` with its children."""

    address: str
    head: subprocess.Popen
    second: subprocess.Popen

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver that runs on it."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}


@contextlib.contextmanager
def two_nodes(
    *,
    head_cpus: int = 1,
    second_cpus: int = 1,
    head_env: Mapping[str, str] | None = None,
    second_env: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """Both nodes are up when the block begins, and dead when it ends."""
    address = f"127.0.0.1:{free_port()}"
    as_head = ["--head", f"--port={address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"]
    with (
        node([*as_head, "--include-dashboard=false", f"--num-cpus={head_cpus}"], head_env or {}) as head,
        node([f"--address={address}", f"--num-cpus={second_cpus}"], second_env or {}) as second,
    ):
        yield Cluster(address, head, second)


@contextlib.contextmanager
def node(flags: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """`ray start` with ports of its own; up when the block begins, dead when it ends."""
    own = ["--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--min-worker-port=0",
           "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            [RAY, "start", *flags, *own],
            env={**clean, **NOTICE, "RAY_AUTH_MODE": "disabled", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: "Ray runtime started" in Path(log.name).read_text(errors="replace"))
            yield process
        finally:
            kill_family(process.pid)
            process.wait()


def raylet(process: subprocess.Popen) -> psutil.Process:
    """The raylet of a node."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in children if child.name() == "raylet")
