"""One run at a time on one output folder: a lock with a heartbeat, taken over from dead owners.

`_run/lock-<n>` is created only if absent, and the highest `n` is the lock, so two contenders can't both take
it over. The owner rewrites its file every few seconds. `n` also numbers the runs of an output.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from types import TracebackType

from pipeline import storage
from pipeline.errors import ConfigError, StorageError

HEARTBEAT_S = 15.0
KEPT = 100  # older lock files: a late writer of run n knows by the file of run n + 1 that it is late
SILENCE_S = 90.0  # an owner that was silent for so long is taken for dead


@dataclass(frozen=True)
class LockRef:
    """What another process needs to see whether its run still owns the output."""

    folder: str
    number: int

    @property
    def run(self) -> str:
        """The name of this run in its parts; runs of one output are numbered."""
        return f"r{self.number:04d}"

    def is_held(self) -> bool:
        """Whether nobody has taken the output over."""
        return not storage.exists(_lock_uri(self.folder, self.number + 1))


class Lock:
    """The lock of `output`, held from creation to `release`; also a context manager.

    Raises:
        ConfigError: another run is alive there.
    """

    def __init__(self, output: str) -> None:
        self._folder = storage.join(output, "_run")
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._nonce = uuid.uuid4().hex
        self.number = self._acquire()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)
        self._thread.start()

    @property
    def ref(self) -> LockRef:
        """The lock as other processes see it."""
        return LockRef(self._folder, self.number)

    def release(self) -> None:
        """Give the output free. The file stays: it numbers the next run."""
        self._stop.set()
        self._thread.join()
        self._write(released=True)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self) -> int:
        numbers = sorted(_numbers(self._folder))
        number = numbers[-1] if numbers else 0
        if number:
            _refuse_if_alive(self._folder, number)
        if not storage.create_exclusive(_lock_uri(self._folder, number + 1), self._content(released=False)):
            raise ConfigError(f"another run took {self._folder} in this moment; wait for it or stop it")
        storage.delete(_lock_uri(self._folder, old) for old in numbers[:-KEPT])
        return number + 1

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(StorageError):  # a store that is away: the next beat may reach it
                self._write(released=False)

    def _write(self, *, released: bool) -> None:
        storage.write_atomic(_lock_uri(self._folder, self.number), self._content(released=released))

    def _content(self, *, released: bool) -> bytes:
        record = {**self._owner, "nonce": self._nonce, "heartbeat": time.time(), "released": released}
        return json.dumps(record).encode()


def check_free(output: str) -> None:
    """Raises: ConfigError: another run is alive on this output."""
    folder = storage.join(output, "_run")
    if numbers := _numbers(folder):
        _refuse_if_alive(folder, max(numbers))


def _refuse_if_alive(folder: str, number: int) -> None:
    try:
        lock = json.loads(storage.read_bytes(_lock_uri(folder, number)))
    except ValueError:
        return  # cut short by a power cut or a full disk, and no beat has repaired it
    age_s = time.time() - lock["heartbeat"]
    if lock["released"] or age_s > SILENCE_S:
        return
    if lock["host"] == socket.gethostname() and lock["started"] != _started(lock["pid"]):
        return  # the process is gone, or its number belongs to another one now
    owner = f"process {lock['pid']} on {lock['host']}, last sign of life {max(age_s, 0):.0f} s ago"
    raise ConfigError(
        f"another run is writing to this output ({owner}): wait for it or stop it; "
        f"a dead one is taken over after {SILENCE_S:.0f} s of silence"
    )


def _lock_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"lock-{number:06d}")


def _numbers(folder: str) -> set[int]:
    return {
        int(name[5:])
        for name in storage.list_names(folder)
        if name.startswith("lock-") and name[5:].isdigit()
    }


def _started(pid: int) -> str:
    """Start time of a process of this machine, "" where there is none: tells a reused number."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            return "" if fields[0] in "ZX" else fields[19]  # a zombie is dead; field 22: ticks since boot
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "alive"  # no /proc on this system
