"""The worker roles as Ray Serve deployment classes: a worker host, its role's jobs, and Serve's health check."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray

from prismserve.cluster.share import WorkerShare
from prismserve.cluster.startup import Reporter, configure_logging
from prismserve.core.errors import PrismServeError
from prismserve.core.heap import settle
from prismserve.core.types import Role
from prismserve.decode_workers.role import attach as attach_decode
from prismserve.prefill_workers.role import attach as attach_prefill
from prismserve.worker_runtime.host import WorkerHost

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismserve.worker_runtime.config import WorkerConfig
    from prismserve.worker_runtime.runtime import WorkerRuntime


def _attach_mixed(runtime: WorkerRuntime) -> None:
    attach_prefill(runtime)
    attach_decode(runtime)


ATTACH: dict[Role, Callable[[WorkerRuntime], None]] = {
    Role.PREFILL: attach_prefill,
    Role.DECODE: attach_decode,
    Role.MIXED: _attach_mixed,
}


def node_resources() -> dict[str, float]:
    """What Ray may give away on this node."""
    here = ray.get_runtime_context().get_node_id()
    return next((dict(node["Resources"]) for node in ray.nodes() if node["NodeID"] == here), {})


class Worker:
    """One worker process.

    Args:
        config: the worker's configuration; an empty ``host`` takes this node's address.
        share: what it has of the cluster; says how many workers may compute beside it on this node.
        board: start-up board, or None.
        start_timeout_s: how long loading and registering may take.
        log_level: least severe message that is logged.
    """

    def __init__(
        self, config: WorkerConfig, share: WorkerShare, board: Any, start_timeout_s: float, log_level: str
    ) -> None:
        configure_logging(log_level)
        report = Reporter(board, f"{config.role.value} worker {os.getpid()}")
        report("starting")
        here: dict[str, Any] = {"node_workers": share.on_node(node_resources())}
        if not config.host:
            here["host"] = ray.util.get_node_ip_address()
        config = config.model_copy(update=here)
        try:
            self._host = WorkerHost(config, ATTACH[config.role], report, start_timeout_s)
        except PrismServeError as error:
            report.failed(error.message)
            raise
        settle()
        report.ready()

    def check_health(self) -> None:
        """Called by Serve; raises when the worker cannot serve any more."""
        self._host.check()

    def worker_id(self) -> str:
        """The id this worker registered under."""
        return self._host.runtime.info.worker_id

    def __del__(self) -> None:
        """Called by Serve when the replica is asked to stop: drain, then leave the cluster."""
        host = getattr(self, "_host", None)
        if host is not None:
            host.stop(drain=True)
