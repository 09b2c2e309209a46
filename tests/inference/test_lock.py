"""The lock of an output: one run at a time, dead owners are taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.inference.lock import SILENCE_S, Lock


@pytest.fixture
def output(tmp_path):
    return str(tmp_path)


def rewrite(output, number, **changes):
    """Change what a lock file says."""
    uri = storage.join(output, "_run", f"lock-{number:06d}")
    record = json.loads(storage.read_bytes(uri))
    storage.write_atomic(uri, json.dumps({**record, **changes}).encode())


def test_a_second_run_is_refused_while_the_first_lives(output):
    with Lock(output), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        Lock(output)


def test_a_released_lock_can_be_taken_and_runs_are_numbered(output):
    with Lock(output) as first:
        pass
    with Lock(output) as second:
        assert (first.number, second.number) == (1, 2)


def test_a_dead_process_of_this_host_is_taken_over_at_once(output):
    code = f"import os; from pipeline.inference.lock import Lock; Lock({output!r}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    with Lock(output) as lock:
        assert lock.number == 2


@pytest.mark.parametrize("left", [b"", b'{"host": "here", "pi'])
def test_a_lock_that_a_power_cut_damaged_is_taken_over(output, left):
    storage.write_atomic(storage.join(output, "_run", "lock-000001"), left)
    with Lock(output) as lock:
        assert lock.number == 2


def test_another_host_is_taken_over_only_after_silence(output):
    with Lock(output):
        rewrite(output, 1, host="elsewhere", heartbeat=time.time() - SILENCE_S + 10)
        with pytest.raises(ConfigError, match="elsewhere"):
            Lock(output)
        rewrite(output, 1, host="elsewhere", heartbeat=time.time() - SILENCE_S - 1)
        with Lock(output) as lock:
            assert lock.number == 2


def test_the_old_owner_sees_that_it_was_taken_over(output):
    with Lock(output) as old:
        rewrite(output, 1, host="elsewhere", heartbeat=0)
        assert old.ref.is_held()
        with Lock(output) as new:
            assert not old.ref.is_held()
            assert new.ref.is_held()


def test_a_writer_of_a_run_that_many_others_followed_still_sees_it(output):
    with Lock(output) as first:
        pass
    for _ in range(5):
        Lock(output).release()
    assert not first.ref.is_held()


def test_of_many_contenders_exactly_one_wins(output):
    with Lock(output):
        rewrite(output, 1, host="elsewhere", heartbeat=0)
        code = (
            "import time; from pipeline.errors import ConfigError\n"
            "from pipeline.inference.lock import Lock\n"
            f"try: Lock({output!r}); print('won', flush=True); time.sleep(3600)\n"
            "except ConfigError: print('refused', flush=True)"
        )
        contenders = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(6)
        ]
        try:
            answers = [(p.stdout or sys.exit()).readline().strip() for p in contenders]
        finally:
            for process in contenders:
                process.kill()
                process.communicate()
    assert sorted(answers) == [b"refused"] * 5 + [b"won"]
