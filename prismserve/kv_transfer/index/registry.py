"""Key names, and reading the registry out of Redis."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from prismserve.core.errors import ConfigurationError
from prismserve.core.types import Tier, WorkerInfo
from prismserve.kv_transfer.index.client import Connection, RedisClient
from prismserve.kv_transfer.index.records import decode_worker

_LOG = logging.getLogger(__name__)
_WORKERS_MAX: Final = 4096


class Names:
    """Key names of one cluster; the hash tag keeps them in one slot of a Redis Cluster."""

    def __init__(self, cluster: str) -> None:
        prefix = f"prismserve:{{{cluster}}}:"
        self.prefix = prefix
        self.incarnation = prefix + "incarnation"
        self.epoch = prefix + "epoch"
        self.workers = prefix + "workers"
        self.events = prefix + "events"

    def lease(self, worker_id: str, epoch: int) -> str:
        """The record of one registration."""
        return f"{self.prefix}lease:{worker_id}:{epoch}"

    def held(self, worker_id: str, epoch: int, tier: Tier) -> str:
        """The keys one registration holds in one tier."""
        return f"{self.prefix}held:{tier.name.lower()}:{worker_id}:{epoch}"

    def all_held(self, worker_id: str, epoch: int) -> list[str]:
        """The keys one registration holds, tier by tier."""
        return [self.held(worker_id, epoch, tier) for tier in Tier]


async def read_scores(connection: Connection, names: Names) -> dict[str, float]:
    """Worker ids with their newest epoch; epoch + 0.5 for a dropped one. The newest 4,096 are read."""
    async with connection.call("reading the registry") as client:
        return _scores(await ask_scores(client, names))


def ask_scores(client: RedisClient, names: Names) -> Any:
    """Ask a client, or a pipeline, for what :func:`read_registry` takes as ``pairs``."""
    return client.zrange(names.workers, -_WORKERS_MAX, -1, withscores=True)


async def read_registry(
    connection: Connection, names: Names, pairs: Sequence[tuple[bytes, float]] | None = None
) -> list[WorkerInfo]:
    """The workers whose lease runs, by id. A record of another release is left out and logged.

    Args:
        connection: to the server.
        names: of the cluster.
        pairs: the answer to :func:`ask_scores`, if that was just asked.
    """
    scores = await read_scores(connection, names) if pairs is None else _scores(pairs)
    running = sorted((name, int(score)) for name, score in scores.items() if score == int(score))
    if not running:
        return []
    async with connection.call("reading the registry") as client:
        records = await client.mget([names.lease(name, epoch) for name, epoch in running])
    found = []
    for (name, epoch), record in zip(running, records, strict=True):
        if record is None:
            continue
        try:
            info = decode_worker(record)
        except ConfigurationError as error:
            _LOG.warning("worker %s is left out of the registry: %s", name, error.message)
            continue
        if info.worker_id == name and info.epoch == epoch:
            found.append(info)
        else:
            _LOG.warning("worker %s is left out of the registry: its record names another registration", name)
    return found


def _scores(pairs: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    return {worker_id.decode(): score for worker_id, score in pairs}
