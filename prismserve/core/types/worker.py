"""A worker as the cluster sees it: registration and statistics."""

from __future__ import annotations

from dataclasses import dataclass

from prismserve.core.types.layout import KVLayout
from prismserve.core.types.names import Role, WorkerState


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the registry lists it.

    Attributes:
        worker_id: unique name, stable for the life of the process.
        epoch: grows with every registration in the cluster; an older epoch of the same worker is fenced.
        control_address: ``host:port`` of its data-plane gRPC server.
        transports: what can write into its arena, best first.
        endpoint: opaque bytes by which a transport connects (from ``TransportHub.endpoint()``).
    """

    worker_id: str
    role: Role
    epoch: int
    pid: int
    node: str
    control_address: str
    model_fingerprint: bytes
    layout: KVLayout
    transports: tuple[str, ...]
    endpoint: bytes
    state: WorkerState = WorkerState.READY


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The one stats record every worker reports, for status, routing and autoscaling.

    ``link_bytes_per_s`` are the measured rates of its links, by the worker they lead to.
    """

    worker_id: str = ""
    threads: int = 0
    waiting: int = 0
    running: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    image_queries: int = 0
    image_hits: int = 0
    encoded_images: int = 0
    derived_images: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    transfers: int = 0
    transfer_bytes: int = 0
    transfer_raw_bytes: int = 0
    transfer_seconds: float = 0.0
    transfer_failures: int = 0
    prefill_tokens_per_s: float = 0.0
    step_ms: float = 0.0
    tier_host_bytes_per_s: float = 0.0
    tier_disk_bytes_per_s: float = 0.0
    tier_host_blocks: int = 0
    tier_disk_blocks: int = 0
    tier_restored_images: int = 0
    tier_restored_tokens: int = 0
    tier_corrupt_blocks: int = 0
    tier_errors: int = 0
    link_bytes_per_s: tuple[tuple[str, float], ...] = ()
