"""The cluster of the router's tests: real front doors on loopback, workers that speak the real protocol."""

from __future__ import annotations

from tests.router.conftest import answer_ids, facts, processor, start_cluster
from tests.worker_runtime.conftest import open_world

__all__ = ["answer_ids", "facts", "open_world", "processor", "start_cluster"]
