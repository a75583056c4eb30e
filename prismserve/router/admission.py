"""Bounds on what is in progress: requests, the bytes of their bodies and of their videos. Refusal is immediate, nothing queues."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from prismserve.core.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from prismserve.router.config import RouterConfig
    from prismserve.router.tenants import Tenant


class Admission:
    """Counts requests and body bytes in progress against the limits of ``config``."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.running = 0
        self.body_bytes = 0
        self._by_tenant: dict[str, int] = {}
        self.video_bytes = 0

    def check(self, tenant: Tenant) -> None:
        """OverloadedError when a request of this tenant could not be admitted now; asked before its body is read."""
        if self.running >= self._config.max_concurrent_requests:
            message = f"{self.running} requests are in progress, which is the limit; try again shortly"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s)
        limit, running = tenant.max_concurrent_requests, self._by_tenant.get(tenant.name, 0)
        if limit is not None and running >= limit:
            message = f"{running} requests of this tenant are in progress, which is its limit; try again shortly"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s)

    @contextlib.contextmanager
    def slot(self, tenant: Tenant, places: int = 1) -> Iterator[None]:
        """Hold a place for every answer of a request; OverloadedError when there are not enough.

        A request for more answers than the limit itself is let in alone.
        """
        self.check(tenant)
        if self.running and self.running + places > self._config.max_concurrent_requests:
            message = f"{self.running} requests are in progress and {places} places are needed; try again shortly"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s)
        running = self._by_tenant.get(tenant.name, 0)
        limit = tenant.max_concurrent_requests
        if limit is not None and running and running + places > limit:
            message = f"{running} requests of this tenant are in progress, {places} more exceed its limit of {limit}"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s)
        self.running += places
        self._by_tenant[tenant.name] = running + places
        try:
            yield
        finally:
            self.running -= places
            self._by_tenant[tenant.name] -= places
            if not self._by_tenant[tenant.name]:
                del self._by_tenant[tenant.name]

    @contextlib.contextmanager
    def videos(self, nbytes: int) -> Iterator[None]:
        """Hold the samples of a request's videos; OverloadedError when all together exceed the limit."""
        if nbytes and self.video_bytes + nbytes > self._config.max_pending_video_bytes:
            message = "the videos of the requests in progress fill the router's memory; try again shortly"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s)
        self.video_bytes += nbytes
        try:
            yield
        finally:
            self.video_bytes -= nbytes


class BodyBudget:
    """The bytes of one body, given back on exit."""

    def __init__(self, admission: Admission, config: RouterConfig) -> None:
        self._admission = admission
        self._config = config
        self._bytes = 0

    def take(self, nbytes: int) -> None:
        """Count bytes that arrived; OverloadedError when all bodies together exceed the limit."""
        if self._admission.body_bytes + nbytes > self._config.max_pending_body_bytes:
            message = "the bodies of the requests in progress fill the router's memory; try again shortly"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s)
        self._admission.body_bytes += nbytes
        self._bytes += nbytes

    def __enter__(self) -> Self:
        """Start empty."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Give everything back."""
        self._admission.body_bytes -= self._bytes
        self._bytes = 0
