"""One local Ray for all tests of training."""

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """Two CPUs, whatever the machine has."""
    import ray

    from pipeline import runtime

    runtime.start_ray(num_cpus=2)
    yield
    ray.shutdown()
