"""The status document: workers, pools, counters, as plain JSON data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from prismserve.core.types import Role, WorkerState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.router.sessions import WorkerSession


def _ratio(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def worker_status(session: WorkerSession) -> dict[str, Any]:
    """One worker: identity, state, queues, KV use, cache hits, transfer rates."""
    info, stats = session.info, session.stats
    return {
        "id": info.worker_id,
        "role": info.role.value,
        "pid": info.pid,
        "node": info.node,
        "state": session.state.value,
        "epoch": info.epoch,
        "transports": list(info.transports),
        "queue": {"waiting": stats.waiting, "running": stats.running, "in_flight_here": session.in_flight},
        "kv": {
            "blocks_total": stats.kv_blocks_total,
            "blocks_used": stats.kv_blocks_used,
            "blocks_cached": stats.kv_blocks_cached,
            "usage": _ratio(stats.kv_blocks_used, stats.kv_blocks_total),
        },
        "cache": {
            "prefix_query_tokens": stats.prefix_query_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "prefix_hit_rate": _ratio(stats.prefix_hit_tokens, stats.prefix_query_tokens),
            "image_queries": stats.image_queries,
            "image_hits": stats.image_hits,
            "image_hit_rate": _ratio(stats.image_hits, stats.image_queries),
        },
        "transfer": {
            "count": stats.transfers,
            "bytes": stats.transfer_bytes,
            "raw_bytes": stats.transfer_raw_bytes,
            "seconds": round(stats.transfer_seconds, 6),
            "bytes_per_s": round(stats.transfer_bytes / stats.transfer_seconds) if stats.transfer_seconds else 0,
            "failures": stats.transfer_failures,
        },
        "stats": {name: value for name, value in dataclasses.asdict(stats).items() if name != "worker_id"},
    }


def pool_status(sessions: Sequence[WorkerSession]) -> dict[str, Any]:
    """Per role: workers, ready ones, queues and KV use."""
    pools: dict[str, Any] = {}
    for role in Role:
        members = [s for s in sessions if s.info.role is role]
        if not members:
            continue
        used = sum(s.stats.kv_blocks_used for s in members)
        pools[role.value] = {
            "workers": len(members),
            "ready": sum(s.state is WorkerState.READY for s in members),
            "waiting": sum(s.stats.waiting for s in members),
            "running": sum(s.stats.running for s in members),
            "kv_usage": _ratio(used, sum(s.stats.kv_blocks_total for s in members)),
        }
    return pools
