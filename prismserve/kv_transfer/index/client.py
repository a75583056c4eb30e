"""Connections to Redis: building a client from a URL, deadlines, and translating every foreign error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import hiredis
import redis.asyncio
from redis import exceptions as redis_errors
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff
from redis.maint_notifications import MaintNotificationsConfig

from prismserve.core.errors import IndexUnavailableError
from prismserve.kv_transfer.index.url import IndexUrl

RedisClient: TypeAlias = Any
"""``redis.asyncio.Redis`` or ``RedisCluster``: one command surface, no common base class."""

_RETRIES = 2
_BACKOFF_BASE_S = 0.02
_BACKOFF_CAP_S = 0.2
_LONG_COMMAND = 64


class Connection:
    """A Redis client under one deadline policy.

    Args:
        url: where to connect.
        timeout_s: deadline of one call, connecting included, in seconds.
        wait_max_s: longest a command may block at the server beyond that, in seconds.
    """

    def __init__(self, url: IndexUrl, timeout_s: float, wait_max_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._sentinel: Sentinel | None = None
        self.client: RedisClient = self._build(timeout_s + wait_max_s)

    @asynccontextmanager
    async def call(self, doing: str, wait_s: float = 0.0) -> AsyncIterator[RedisClient]:
        """Give the client for one call under its deadline; foreign errors leave as IndexUnavailableError.

        Args:
            doing: what is being done, for the message.
            wait_s: how long the server may block, on top of the deadline.
        """
        try:
            async with asyncio.timeout(self._timeout_s + wait_s):
                yield self.client
        except (redis_errors.RedisError, OSError, UnicodeError) as error:
            raise translate(error, self.url, doing, self._timeout_s) from error

    async def close(self) -> None:
        """Close every connection."""
        async with self.call("closing"):
            await self.client.aclose()
            if self._sentinel is not None:
                await self._sentinel.aclose()

    def _build(self, socket_timeout_s: float) -> RedisClient:
        url = self.url
        # Protocol 2 without client names keeps the handshake to AUTH and SELECT, which a narrow ACL can permit.
        common: dict[str, Any] = {
            "protocol": 2,
            "username": url.username,
            "password": url.password,
            "driver_info": None,
            "socket_timeout": socket_timeout_s,
            "socket_connect_timeout": self._timeout_s,
            "socket_keepalive": True,
            "retry": Retry(ExponentialBackoff(_BACKOFF_CAP_S, _BACKOFF_BASE_S), _RETRIES),
        }
        tls = self._tls()
        if url.mode == "cluster":
            nodes = [ClusterNode(host, port) for host, port in url.hosts]
            return RedisCluster(startup_nodes=nodes, **common, **tls)
        common["db"] = url.database
        if url.mode == "unix":
            del common["socket_keepalive"]
            return _packing_fast(redis.asyncio.Redis(unix_socket_path=url.path, **common))
        common["maint_notifications_config"] = MaintNotificationsConfig(enabled=False)
        if url.mode == "sentinel":
            self._sentinel = Sentinel(
                url.hosts,
                sentinel_kwargs={
                    "protocol": 2,
                    "username": url.sentinel_username,
                    "password": url.sentinel_password,
                    "driver_info": None,
                    "socket_timeout": self._timeout_s / 2,
                    "socket_connect_timeout": self._timeout_s / 2,
                    **tls,
                },
            )
            del common["maint_notifications_config"]
            return _packing_fast(self._sentinel.master_for(url.service, **common, **tls))
        host, port = url.hosts[0]
        return _packing_fast(redis.asyncio.Redis(host=host, port=port, **common, **tls))

    def _tls(self) -> dict[str, Any]:
        if not self.url.tls:
            return {}
        return {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_ca_certs": self.url.ca,
            "ssl_certfile": self.url.cert,
            "ssl_keyfile": self.url.key,
            "ssl_check_hostname": self.url.check_hostname,
        }


class _FastPacking:
    """Packs long commands in C: redis-py's asyncio connections do it in Python, 1 ms for a thousand keys."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """The command as it is sent."""
        if len(args) < _LONG_COMMAND:
            packed: list[bytes] = super().pack_command(*args)  # type: ignore[misc] # mixed into a connection
            return packed
        return [hiredis.pack_command(args)]


def _packing_fast(client: RedisClient) -> RedisClient:
    """Let the connections of a client that has a pool pack with hiredis."""
    pool = client.connection_pool
    kind = pool.connection_class
    pool.connection_class = type(f"FastPacking{kind.__name__}", (_FastPacking, kind), {})
    return client


def translate(error: Exception, url: IndexUrl, doing: str, timeout_s: float) -> IndexUnavailableError:
    """Turn an error of redis-py or of the socket into ours; no message carries credentials."""
    if isinstance(error, redis_errors.NoPermissionError):
        why = "its user may not run a command the index needs (see the ACL line in the index's documentation)"
    elif isinstance(error, (redis_errors.AuthenticationError, redis_errors.AuthorizationError)) or _refused(error):
        why = "it refused the user name or password"
    elif isinstance(error, redis_errors.OutOfMemoryError):
        why = "it has reached its memory limit; raise maxmemory"
    elif isinstance(error, redis_errors.ReadOnlyError):
        why = "it is a read-only replica; give the address of the master"
    elif isinstance(error, redis_errors.BusyLoadingError):
        why = "it is still loading its data set"
    elif isinstance(error, (redis_errors.TimeoutError, TimeoutError)):
        why = f"no answer within {timeout_s:g} s"
    elif isinstance(error, (redis_errors.ConnectionError, OSError, UnicodeError)):
        why = f"cannot connect ({_short(error)})"
    else:
        why = _short(error)
    return IndexUnavailableError(f"the index at {url} failed while {doing}: {why}")


def _refused(error: Exception) -> bool:
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(("NOAUTH", "WRONGPASS"))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
