"""On PYTHONPATH of a run's processes: they die, or wait, at chosen moments of the product's own functions.

`DEATHS` names a folder: processes kill themselves with SIGKILL at moments drawn from `SEED`, readers once
for each shard, detectors three times a run, while they detect or publish; a file there for each death.
`HOLD` is "images:8" or the like: the first part of this node waits 8 s before that file of it is written;
"taken:8" waits after the images part. `HELD` names the folder that says so.
"""

import functools
import importlib.machinery
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

DEATHS = os.environ.get("SHARDSHOT_TEST_DEATHS", "")
SEED = os.environ.get("SHARDSHOT_TEST_SEED", "0")
HOLD = os.environ.get("SHARDSHOT_TEST_HOLD", "")
HELD = os.environ.get("SHARDSHOT_TEST_HELD", "")

PART_MOMENTS = ("before-detections", "after-detections", "before-images", "after-images")
DETECTOR_DEATHS = 3  # as often as Ray starts a detector again


def die_once(moment, key):
    """Kill this process, unless one died for `key` before."""
    try:
        Path(DEATHS, f"{moment}@{key.replace('/', '_')}").touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def die_once_if_restarted(moment, key):
    """Kill this detector, unless one died for `key` before or Ray wouldn't start it again."""
    deaths = [path for path in Path(DEATHS).iterdir() if not path.name.startswith("reader@")]
    if len(deaths) < DETECTOR_DEATHS:
        die_once(moment, key)


def draw(key):
    return random.Random(f"{SEED} {key}")


def part_moment(moment, uri):
    """A detector's process is before or after one of the two files of a part."""
    name = uri.rpartition("/")[2]
    if not name.startswith("part-") or ".c" in name:
        return
    task = "-".join(name.removesuffix(".parquet").split("-")[:3])  # without the detections part's nonce
    if DEATHS and draw(task).choice(PART_MOMENTS) == moment:
        die_once_if_restarted(moment, task)
    if HOLD:
        where, _, seconds = HOLD.partition(":")
        if moment == {"taken": "after-images"}.get(where, f"before-{where}"):
            hold(task, float(seconds))


held = False


def hold(task, seconds):
    global held
    try:
        Path(HELD, "held").touch(exist_ok=False)
    except FileExistsError:
        return
    held = True
    Path(HELD, "pid").write_text(f"{os.getpid()}")
    time.sleep(seconds)


def hook_storage(module):
    for function, table in (("write_atomic", "detections"), ("create_exclusive", "images")):
        setattr(module, function, around(getattr(module, function), table))


def around(function, table):
    @functools.wraps(function)
    def write(uri, data):
        part_moment(f"before-{table}", uri)
        result = function(uri, data)
        part_moment(f"after-{table}", uri)
        return result

    return write


def hook_ledger(module):
    function = module.commit

    @functools.wraps(function)
    def commit(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        finally:
            if held:
                Path(HELD, "over").touch()

    module.commit = commit


def hook_blocks(module):
    function = module.read_blocks

    @functools.wraps(function)
    def read_blocks(work, settings):
        key = work[0].shard.name
        last = draw(key).randrange(2)  # of the blocks of a shard
        for number, block in enumerate(function(work, settings)):
            if DEATHS and number == last:
                die_once("reader", key)
            yield block

    module.read_blocks = read_blocks


def hook_fakes(module):
    function = module.FakeDetector.__call__

    def call(self, block):
        key = block["image_id"][0].as_py()
        chance = draw(key).random()
        if DEATHS and chance < 0.1:
            die_once_if_restarted("detector", key)
        result = function(self, block)
        if DEATHS and 0.1 <= chance < 0.2:
            die_once_if_restarted("detector", key)
        return result

    module.FakeDetector.__call__ = call


HOOKS = {
    "pipeline.storage": hook_storage,
    "pipeline.inference.ledger": hook_ledger,
    "pipeline.inference.blocks": hook_blocks,
    "tests.fakes": hook_fakes,
}


class Finder:
    """Runs a hook right after the import of its module."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader: Any = spec and spec.loader
        load = loader.exec_module

        def exec_module(module):
            load(module)
            HOOKS[name](module)

        loader.exec_module = exec_module
        return spec


if any("default_worker.py" in argument for argument in sys.orig_argv):  # not in the driver
    sys.meta_path.insert(0, Finder)
