"""Bodies in, events out: size and time limits, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect

from prismserve.core.errors import RequestCancelledError
from prismserve.router.failures import BodyTimeoutError, BodyTooLargeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.requests import Request

    from prismserve.router.admission import BodyBudget
    from prismserve.router.config import RouterConfig

T = TypeVar("T")
_DRAIN_S = 1.0


def _too_large(config: RouterConfig) -> BodyTooLargeError:
    message = f"the body is larger than {config.max_body_bytes} bytes"
    return BodyTooLargeError(message, field="body")


async def drain(stream: AsyncIterator[bytes]) -> None:
    """Discard what is still arriving, for a moment, before a request is refused.

    Closing on unread data would reset the connection, and the client would not see the answer.
    """
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in stream:
                pass


async def read_body(request: Request, config: RouterConfig, budget: BodyBudget) -> bytes:
    """Read a request body within the limits.

    Raises:
        BodyTooLargeError: announced or found to exceed ``max_body_bytes``.
        BodyTimeoutError: it took longer than ``body_timeout_s``, or paused for ``body_idle_timeout_s``.
        OverloadedError: all bodies together exceed ``max_pending_body_bytes``.
        RequestCancelledError: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > config.max_body_bytes):
        if "expect" not in request.headers:
            await drain(request.stream())
        raise _too_large(config)
    deadline = time.monotonic() + config.body_timeout_s
    parts: list[bytes] = []
    total = 0
    stream = request.stream()
    while True:
        left_s = min(deadline - time.monotonic(), config.body_idle_timeout_s)
        try:
            async with asyncio.timeout(left_s):
                part = await anext(stream, None)
        except TimeoutError:
            message = "the body did not arrive in time"
            raise BodyTimeoutError(message, field="body") from None
        except ClientDisconnect:
            message = "the client went away"
            raise RequestCancelledError(message) from None
        if part is None:
            return b"".join(parts)
        total += len(part)
        if total > config.max_body_bytes:
            await drain(stream)
            raise _too_large(config)
        budget.take(len(part))
        parts.append(part)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(request: Request, work: Coroutine[None, None, T]) -> T:
    """Run ``work``; cancel it and raise RequestCancelledError when the client goes away first.

    The body must have been read, so that the next message of the connection is its end.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    message = "the client went away"
    raise RequestCancelledError(message)
