"""The Ray Serve application: router, prefill pool, decode pool, mixed pool, each a deployment of its own."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from prismserve.cluster.routers import Router, RouterFacts
from prismserve.cluster.settings import Settings, load_settings, read_tenants
from prismserve.cluster.share import WorkerShare, worker_share
from prismserve.cluster.workers import Worker
from prismserve.core.errors import ConfigurationError
from prismserve.core.hashing import digest
from prismserve.core.types import Role
from prismserve.worker_runtime.config import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.serve import Application

HEALTH_PERIOD_S = 2.0
STOP_MARGIN_S = 10.0
ROUTER_RESOURCE = "prismserve_router"
"""Custom Ray resource of nodes whose ports are reachable by clients; routers go there where it exists."""


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What is true of the Ray cluster the application runs on.

    Attributes:
        data_host: address data planes bind to; "" takes each node's own.
        cpus: CPU cores to share among workers.
        gpus: GPUs in the cluster.
        router_slots: whether nodes offer the custom resource that routers are pinned to.
    """

    cluster_id: str
    cluster_secret: str
    index_url: str
    data_host: str
    cpus: float
    gpus: float
    router_slots: bool


def require_gpus(settings: Settings, facts: ClusterFacts) -> None:
    """ConfigurationError if workers are to have GPUs and there are none; not asked where nodes may still join."""
    if settings.num_gpus_per_worker and not facts.gpus:
        message = (
            f"num_gpus_per_worker is {settings.num_gpus_per_worker:g} but Ray has no GPU: "
            "unset it or start Ray on a GPU node"
        )
        raise ConfigurationError(message, field="num_gpus_per_worker")


def resources() -> dict[str, Any]:
    """What the connected Ray cluster offers, as fields of :class:`ClusterFacts`."""
    found = ray.cluster_resources()
    return {
        "cpus": found.get("CPU", 1.0),
        "gpus": found.get("GPU", 0.0),
        "router_slots": ROUTER_RESOURCE in found,
    }


def worker_config(settings: Settings, facts: ClusterFacts, share: WorkerShare, role: Role) -> WorkerConfig:
    """What a worker of this role is told."""
    return WorkerConfig(
        role=role,
        model_directory=settings.model,
        dtype=settings.dtype,
        device=share.device,
        threads=share.threads,
        host=facts.data_host,
        cluster_id=facts.cluster_id,
        cluster_secret=facts.cluster_secret,
        index_url=facts.index_url,
        engine=settings.engine,
        transfer=settings.transfer,
        tiers=settings.tiers,
        drain_timeout_s=settings.drain_timeout_s,
    )


def application(settings: Settings, facts: ClusterFacts, board: Any = None) -> Application:
    """Bind every deployment.

    Args:
        settings: the cluster's settings.
        facts: see :class:`ClusterFacts`.
        board: a start-up board, or None.
    """
    share = worker_share(settings, facts.cpus, facts.gpus)
    pools: list[Application] = []
    counts = {
        Role.PREFILL: settings.prefill_replicas,
        Role.DECODE: settings.decode_replicas,
        Role.MIXED: settings.mixed_replicas,
    }
    for role, replicas in counts.items():
        if replicas == 0:
            continue
        deployment = serve.deployment(
            Worker,
            name=role.value,
            num_replicas=replicas,
            health_check_period_s=HEALTH_PERIOD_S,
            graceful_shutdown_timeout_s=settings.drain_timeout_s + STOP_MARGIN_S,
            graceful_shutdown_wait_loop_s=0.1,
            **share.options(),
        )
        config = worker_config(settings, facts, share, role)
        pools.append(deployment.bind(config, share, board, settings.startup_timeout_s, settings.log_level))
    router = serve.deployment(
        Router,
        name="router",
        num_replicas=settings.router_replicas,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + STOP_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": 0, "resources": {ROUTER_RESOURCE: 1} if facts.router_slots else {}},
    )
    router_facts = RouterFacts(
        cluster_id=facts.cluster_id,
        cluster_secret=facts.cluster_secret,
        index_url=facts.index_url,
        device=share.device,
        tenants=read_tenants(settings),
    )
    return router.bind(settings, router_facts, board, *pools)


def build(args: Mapping[str, Any]) -> Application:
    """Application builder for ``serve deploy`` and KubeRay: ``args`` is the tree of the configuration file.

    ConfigurationError if a setting is wrong or no Redis is configured: workers on several nodes need a shared index.
    """
    settings = load_settings(args, os.environ, origin="args")
    if settings.redis_url is None:
        message = "redis_url must be set (PRISMSERVE_REDIS_URL): workers on several nodes share one index"
        raise ConfigurationError(message, field="redis_url")
    facts = ClusterFacts(
        cluster_id=f"{settings.cluster_name}-{_ray_cluster()}",
        cluster_secret=secrets.token_urlsafe(32),
        index_url=settings.redis_url,
        data_host="",
        **resources(),
    )
    return application(settings, facts)


def _ray_cluster() -> str:
    """Eight characters that tell this Ray cluster from another one with the same name and Redis, during an upgrade."""
    return digest("ray-cluster", ray.get_runtime_context().gcs_address.encode()).hex()[:8]
