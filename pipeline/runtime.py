"""Ray's start and settings: the only place that knows where the cluster is."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import (
    DataContext,
    Dataset,
    Datasource,
    ExecutionOptions,
    ExecutionResources,
    ReadTask,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from pipeline.errors import PipelineError

# glibc gives the large tensors of every forward pass back to the system and takes them again. With the first,
# which is torch's, torchvision's ssdlite went from 13-18 to 24-30 images/s on two cores in a trial. The other
# two are glibc's: it keeps the memory of a block of images (readers: 3.6 -> 1.7 s of system time in 20 s).
# A block for GPUs has 78 MB: 0.15 ms of system time an image where malloc keeps 128 MiB, 0.08 with 256.
WORKER_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "RAY_DATA_LOG_LEVEL": "ERROR",
}

# Of a cluster that this program starts for itself. With six actors that have nothing to do it takes 12.9 % of
# a core without the last three, and 10.6 with them.
LOCAL_CLUSTER_ENVIRONMENT = {
    # Where there are more processes than cores, Ray ends one that was idle for a second, and starts another
    # for the next task: 3 s of processor time each.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # Ray's own processes have 0 and its workers 15, a thirtieth of the weight: where any other process wants
    # a core, the threads of a training step wait for the one that runs there.
    "RAY_worker_niceness": "0",
    "RAY_event_stats": "0",  # times of each internal event, for a dump that is read when debugging Ray
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # looks for new logs twice a second, not ten times
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # use of the node, for a dashboard that such a cluster hasn't
}

# Assumed for work that is split before a cluster of others has its nodes.
GROWING_CORES = 64


def start_ray(**settings: Any) -> None:
    """Connect to the cluster of `RAY_ADDRESS` (set inside `ray job submit`), else start a local one.

    The address is never left to chance: a plain `ray.init()` hangs on the stale address of a dead cluster.

    Raises:
        PipelineError: a local one doesn't start in time, as other work has the cores.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a FutureWarning of 2.60
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        where: dict[str, Any] = {"address": address, "runtime_env": {"env_vars": WORKER_ENVIRONMENT}}
    else:
        # Workers inherit this. A runtime_env would leave those that Ray starts ahead unused: 31 processes
        # for a small run rather than 14.
        for name, value in (WORKER_ENVIRONMENT | LOCAL_CLUSTER_ENVIRONMENT).items():
            os.environ.setdefault(name, value)
        where = {"address": "local", "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.ERROR, **where, **settings)
    except Exception as error:  # of no class of its own (2.60)
        if "timed out during startup" not in str(error):
            raise
        raise PipelineError(
            "Ray did not start in time: other programs have the cores of this machine. "
            "Run the same command again when they have ended"
        ) from error
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's prints a C++ stack and aborts


def take_worker_environment() -> None:
    """Start this program anew with the workers' environment, which glibc and torch read at a process's start.

    For benchmarks: the side that isn't Ray's gets the same allocator settings.
    """
    if not WORKER_ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WORKER_ENVIRONMENT)


def cluster_resource(name: str) -> float:
    """How much of "CPU" or "GPU" the whole cluster has: never asked of the driver's machine."""
    return ray.cluster_resources().get(name, 0.0)


def where_cores_are() -> dict[str, str]:
    """A label selector for actors that ask for no CPU: not on nodes without any, often the head.

    Ray (2.60) puts an actor that asks for nothing on any node.
    """
    without = [node["NodeID"] for node in ray.nodes() if node["Alive"] and not node["Resources"].get("CPU")]
    return {"ray.io/node-id": f"!in({','.join(without)})"} if without else {}


def expected_cores() -> int:
    """Cores to make enough tasks for. A cluster that isn't this driver's may have few now and add nodes."""
    cores = int(cluster_resource("CPU"))
    return max(cores, GROWING_CORES) if os.environ.get("RAY_ADDRESS") else cores


def give_way() -> None:
    """From here on this task's thread, and those it starts, come after usual workers where cores are short.

    It has a tenth of a worker's weight on a cluster of our own, two fifths where workers have Ray's 15.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, 10 if niceness < 15 else 19))


def num_waiting() -> int:
    """How many tasks of one CPU wait at the nodes for a core: one for each 8 cores, at least one."""
    return max(1, int(cluster_resource("CPU")) // 8)


def let_wait(options: ExecutionOptions) -> None:
    """Have Ray Data submit `num_waiting` tasks more than there are cores.

    A task that waits starts 0.02 s after another one ends. Without, it takes Ray Data (2.60), which looks ten
    times a second for what is done, 0.11 s. To it the cluster is larger; the nodes run no more than they can.
    """
    with warnings.catch_warnings():  # there is no other way to submit a task before a core is free
        warnings.simplefilter("ignore", RayDeprecationWarning)
        options.exclude_resources = ExecutionResources(cpu=-num_waiting())


def configure_data(*, block_bytes: int) -> DataContext:
    """Ray Data's settings for this process.

    Args:
        block_bytes: size of a full block. Ray merges smaller blocks up to the target and cuts larger ones
            than 1.5 times the target, so 0.8 of a block passes each one on as it is.
    """
    context = DataContext.get_current()
    context.target_max_block_size = int(0.8 * block_bytes)
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.max_errored_blocks = 0  # a failed block is an error: it never vanishes
    context.raise_original_map_exception = True  # a wrapped one is pickled without its cause
    context.custom_execution_callback_classes = [ForgetBlocks]
    # An actor is full with as many blocks as it has threads: Ray Data's 1.75 would never start another one.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.print_on_execution_start = False
    let_wait(context.execution_options)
    # What it logs as an error it raises, too, and a reader that dies is run again.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # A few images need fewer detectors than there may be: nothing to warn of.
    warnings.filterwarnings("ignore", message="The m(in|ax)imum number of concurrent (actors|tasks)")
    return context


class ForgetBlocks(ExecutionCallback):
    """Drops the statistics that Ray Data (2.60) keeps of each block for `Dataset.stats()`.

    They are 4 KB a block in the driver, some 40 MB for a million tiny images (estimated from 1,000 blocks).
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray's scheduling loop."""
        for operator in executor._topology:
            for blocks in operator.get_stats().values():
                blocks.clear()


class TaskSource(Datasource):
    """Ray Data's view of functions that yield blocks: a task for each."""

    def __init__(self, name: str, readers: Sequence[Callable[[], Iterable[pa.Table]]]) -> None:
        super().__init__()
        self._name = name
        self._readers = readers

    def get_name(self) -> str:
        """The stage's name in Ray's plan and metrics."""
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: nothing is opened for planning."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a function, whatever `parallelism` Ray would like."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(reader, unknown) for reader in self._readers]


def map_blocks(dataset: Dataset, function: Callable[..., Any], **settings: Any) -> Dataset:
    """A lazy dataset of what `function` makes of each block of `dataset`, an Arrow table as it is.

    Ray's developer API: the public `map_batches` (2.60) refuses GPUs unless it may join and cut blocks, and
    calls retries deprecated that it has no other way to bound.
    """
    return dataset.map_batches_internal(
        function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, **settings
    )


def read_tasks(
    name: str, readers: Sequence[Callable[[], Iterable[pa.Table]]], *, num_cpus: float, max_retries: int
) -> Dataset:
    """A lazy dataset of the blocks that `readers` yield, in their order.

    Args:
        name: of the stage, after "Read".
        readers: one task for each; the same blocks in the same order at every attempt.
        num_cpus: logical CPUs of a task.
        max_retries: of a task whose process died; Ray's default is for ever.
    """
    with warnings.catch_warnings():  # 2.60 has no other way to bound retries
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.read_datasource(
            TaskSource(name, readers),
            override_num_blocks=len(readers),
            num_cpus=num_cpus,
            ray_remote_args={"max_retries": max_retries},
        )
