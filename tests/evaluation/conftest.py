"""The local Ray of the tests of the chain, here too."""

from tests.inference.conftest import ray_cluster

__all__ = ["ray_cluster"]
