"""A cluster from start to end on one machine or on a Ray cluster that is already there.

``start`` checks the machine and brings up, in this order, the index (unless a URL is given), Ray, and the Serve application; ``stop`` takes
them down in reverse and removes everything they made. A failure on the way stops what was started.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismserve.cluster.checks import preflight
from prismserve.cluster.footprint import end_processes_naming
from prismserve.cluster.ray_head import head_answers, pace_error_listener
from prismserve.core.cores import visible_cores
from prismserve.core.errors import ConfigurationError, DeadlineExceededError
from prismserve.core.types import WorkerState
from prismserve.kv_transfer.index.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prismserve.cluster.settings import Settings
    from prismserve.cluster.startup import Stage

logger = logging.getLogger(__name__)

POLL_S = 0.1
CALL_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 2.0
OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Ray's object store is not on the data path; this is near the smallest it accepts."""

RAY_NAMESPACE = "prismserve"
APP_NAME = "prismserve"
TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the variable that holds it

_REMOVE_S = 3.0
_END_S = 3.0
LOCAL_RAY_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a single-machine cluster binds to loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # Ray lowers the priority of workers by default; ours are the service
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_ENABLE_CPU_PROFILING": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
}


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a started cluster answers, ``host:port`` each."""

    http: str
    grpc: str


class Cluster:
    """Owns everything one ``serve`` starts.

    Args:
        settings: the cluster's settings.
        progress: called about ten times a second while starting, with the latest stage of every process.
    """

    def __init__(self, settings: Settings, progress: Callable[[Mapping[str, Stage]], None]) -> None:
        self._settings = settings
        self._progress = progress
        self._directory: Path | None = None
        self._embedded: EmbeddedServer | None = None
        self._ray_up = False
        self._owns_ray = settings.ray_address is None
        self._serve_up = False
        self._index_lost = False
        self._head = ""
        self._board: Any = None

    def start(self) -> Addresses:
        """Start all; returns when the front doors answer. Raises a PrismServeError with one sentence otherwise."""
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> Addresses:
        settings = self._settings
        self._directory = Path(tempfile.mkdtemp(prefix="prismserve-"))
        # torch creates its compile cache when some of its modules are imported; it must go when we go.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self._directory / "inductor"))
        preflight(settings)
        index_url = settings.redis_url
        if index_url is None:
            self._embedded = EmbeddedServer()
            self._embedded.start()
            index_url = self._embedded.url
        self._start_ray()
        from prismserve.cluster import app

        facts = app.ClusterFacts(
            cluster_id=f"{settings.cluster_name}-{secrets.token_hex(4)}",
            cluster_secret=secrets.token_urlsafe(32),
            index_url=index_url,
            data_host="127.0.0.1" if self._owns_ray else "",
            **app.resources(),
        )
        app.require_gpus(settings, facts)
        return self._run(app.application(settings, facts, self._board), APP_NAME)

    def _start_ray(self) -> None:
        if self._owns_ray:
            for name, value in LOCAL_RAY_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            os.environ.setdefault(TOKEN, secrets.token_hex(32))
        import ray

        # From here on there may be processes of Ray, even where its start is interrupted or fails.
        self._ray_up = True
        try:
            if self._owns_ray:
                ray.init(
                    num_cpus=max(2, visible_cores()),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    namespace=RAY_NAMESPACE,
                    log_to_driver=self._settings.log_level == "debug",
                    logging_level="WARNING",
                    _temp_dir=str(self._directory),
                )
            else:
                ray.init(address=self._settings.ray_address, namespace=RAY_NAMESPACE, logging_level="WARNING")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            message = f"Ray could not be started: {error}"
            raise ConfigurationError(message, field="ray_address") from error
        pace_error_listener()
        self._head = ray.get_runtime_context().gcs_address
        from prismserve.cluster.startup import StartupBoard

        self._board = StartupBoard.remote()  # type: ignore[attr-defined]

    def _run(self, application: Any, name: str) -> Addresses:
        """Deploy, and follow the start until the front doors answer or something has failed for good."""
        from ray import serve
        from ray.serve.api import RunTarget
        from ray.serve.config import HTTPOptions

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options=HTTPOptions(location="NoServer"))
        self._serve_up = True
        serve.run_many(
            [RunTarget(application, name, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        deadline = time.monotonic() + self._settings.startup_timeout_s
        while time.monotonic() < deadline:
            stages = self._stages()
            self._progress(stages)
            failed = next((stage.error for stage in stages.values() if stage.stage == "failed"), None)
            if failed is not None:
                raise ConfigurationError(failed)
            if self._all_ready(stages):
                http, grpc = next(stage.addresses for stage in stages.values() if stage.addresses)
                if connected_workers(http) >= self._settings.workers:
                    return Addresses(http, grpc)
            time.sleep(POLL_S)
        waiting = (
            ", ".join(f"{who}: {stage.stage}" for who, stage in self._stages().items()) or "no process has started"
        )
        message = (
            f"the cluster was not ready within startup_timeout_s = {self._settings.startup_timeout_s:g} s ({waiting})"
        )
        raise DeadlineExceededError(message, field="startup_timeout_s")

    def _stages(self) -> dict[str, Stage]:
        import ray

        stages: dict[str, Stage] = ray.get(self._board.read.remote(), timeout=CALL_TIMEOUT_S)
        return stages

    def _all_ready(self, stages: Mapping[str, Stage]) -> bool:
        settings = self._settings
        wanted = {
            "router": settings.router_replicas,
            "prefill worker": settings.prefill_replicas,
            "decode worker": settings.decode_replicas,
            "mixed worker": settings.mixed_replicas,
        }
        ready = [who for who, stage in stages.items() if stage.stage == "ready"]
        return all(sum(who.startswith(kind) for who in ready) >= count for kind, count in wanted.items())

    def _delete_application(self) -> None:
        """Drain and end the application; what Ray cannot end in time ends with Ray itself."""
        import ray
        from ray import serve
        from ray.exceptions import RayError

        try:
            serve.delete(APP_NAME)
            ray.kill(self._board)
        except (RayError, TimeoutError, RuntimeError) as error:
            logger.warning("the application did not stop in order: %s", error)

    def watch(self) -> None:
        """Look after the embedded index; call about once a second while serving.

        Losing it costs cache hits, never requests, so the cluster goes on; the loss is logged once.
        """
        if self._embedded is not None and not self._index_lost and not self._embedded.alive():
            self._index_lost = True
            logger.error("the embedded index has ended; serving goes on without sharing caches between workers")

    def stop(self) -> None:
        """Take everything down; safe to call twice and after a failed start."""
        if self._ray_up:
            self._ray_up = False
            import ray

            if self._serve_up and head_answers(self._head):
                self._delete_application()
            elif self._serve_up:
                # Asking a dead head to delete takes until Ray gives it up, a minute; the workers end with Ray.
                logger.warning("the Ray head at %s does not answer: the workers end without draining", self._head)
            ray.shutdown()
            if self._owns_ray and self._directory is not None:
                left = end_processes_naming(self._directory, (TOKEN, os.environ[TOKEN]), _END_S)
                if left:
                    logger.info("%d processes of Ray were left and have been ended", left)
        if self._embedded is not None:
            self._embedded.stop()
            self._embedded = None
        if self._directory is not None:
            _remove(self._directory)
            self._directory = None


def _remove(directory: Path) -> None:
    """Delete a folder, again as long as processes that are ending still write to it."""
    deadline = time.monotonic() + _REMOVE_S
    while directory.exists():
        shutil.rmtree(directory, ignore_errors=True)
        if time.monotonic() > deadline:
            logger.warning("the folder %s could not be deleted", directory)
            return
        time.sleep(POLL_S)


def connected_workers(address: str) -> int:
    """How many workers the router at ``host:port`` can place requests on; 0 while it cannot serve."""
    try:
        with urllib.request.urlopen(f"http://{address}/status", timeout=HEALTH_TIMEOUT_S) as reply:
            document = json.load(reply)
    except (urllib.error.URLError, OSError, ValueError):
        return 0
    if not document["ready"]:
        return 0
    return sum(worker["state"] == WorkerState.READY for worker in document["workers"])
