"""Opening an index by URL."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from prismserve.core.errors import ConfigurationError, IndexUnavailableError
from prismserve.kv_transfer.index.base import KVIndex, check_cluster
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.memory import MemoryIndex
from prismserve.kv_transfer.index.redis import RedisIndex
from prismserve.kv_transfer.index.url import parse_url

CHECK_TIMEOUT_S: Final = 2.0


async def open_index(
    url: str | None, cluster: str = "default", config: IndexConfig | None = None, *, check: bool = True
) -> KVIndex:
    """Open an index and prove that it serves.

    Args:
        url: see :mod:`prismserve.kv_transfer.index.url`; None is an index of this process alone.
        cluster: separates the clusters that share one server: 1 to 64 characters out of A-Z a-z 0-9 . _ -
        config: leases and limits.
        check: False skips the check, for a process that must start while the server is away.

    Raises:
        ConfigurationError: the URL is malformed, or within 2 s the server could not be reached, refused the
            credentials, or may not be used as an index. The message never contains credentials.
    """
    settings = config or IndexConfig()
    check_cluster(cluster)
    if url is None:
        return MemoryIndex(config=settings)
    parsed = parse_url(url)
    if check:
        quick = settings.model_copy(update={"call_timeout_s": min(settings.call_timeout_s, CHECK_TIMEOUT_S)})
        probe = RedisIndex(parsed, cluster, quick)
        try:
            await probe.check()
        except IndexUnavailableError as error:
            raise ConfigurationError(error.message, field="redis_url") from error
        finally:
            # What the check found out is the answer; a failure to hang up adds nothing to it.
            with suppress(IndexUnavailableError):
                await probe.close()
    return RedisIndex(parsed, cluster, settings)
