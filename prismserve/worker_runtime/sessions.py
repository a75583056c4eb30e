"""Streams to routers: one message per engine step and router, bounded, with every request owned by one stream."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismserve.core.types import TokenOutput

logger = logging.getLogger(__name__)

OUTBOX_MESSAGES = 4096
"""A router that has not read this many steps is gone for all purposes; its stream is closed."""

RequestRef = tuple[str, int]


@dataclass(eq=False)
class Session:
    """One router's stream.

    ``outbox`` holds messages not yet written; None ends the stream. ``requests`` are what it submitted and has not
    seen finished.
    """

    router_id: str
    outbox: asyncio.Queue[pb.WorkerMessage | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=OUTBOX_MESSAGES)
    )
    requests: set[RequestRef] = field(default_factory=set)
    closed: bool = False

    def put(self, message: pb.WorkerMessage) -> None:
        """Queue a message; a full outbox closes the session."""
        if self.closed:
            return
        try:
            self.outbox.put_nowait(message)
        except asyncio.QueueFull:
            logger.warning("router %s reads too slowly: closing its session", self.router_id)
            self.close()

    def close(self) -> None:
        """End the stream after what is queued; drop what does not fit."""
        if self.closed:
            return
        self.closed = True
        while self.outbox.full():
            self.outbox.get_nowait()
        self.outbox.put_nowait(None)


class SessionTable:
    """All sessions of a worker. Used on the runtime's event loop only."""

    def __init__(self) -> None:
        self._sessions: set[Session] = set()
        self._owner: dict[RequestRef, Session] = {}

    def open(self, router_id: str) -> Session:
        """A new session."""
        session = Session(router_id)
        self._sessions.add(session)
        return session

    def close(self, session: Session) -> list[RequestRef]:
        """Forget a session; returns the requests it leaves behind, to be cancelled."""
        session.close()
        self._sessions.discard(session)
        orphans = [ref for ref in session.requests if self._owner.get(ref) is session]
        for ref in orphans:
            del self._owner[ref]
        session.requests.clear()
        return orphans

    def adopt(self, session: Session, ref: RequestRef) -> None:
        """Record that this session asked for the request."""
        session.requests.add(ref)
        self._owner[ref] = session

    def release(self, ref: RequestRef) -> None:
        """The request is over."""
        session = self._owner.pop(ref, None)
        if session is not None:
            session.requests.discard(ref)

    def deliver(self, outputs: Iterable[TokenOutput]) -> None:
        """Send a step's outputs, one message per session."""
        grouped: defaultdict[Session, list[pb.TokenOutput]] = defaultdict(list)
        for output in outputs:
            ref = (output.request_id, output.attempt)
            session = self._owner.get(ref)
            if session is None:
                continue
            grouped[session].append(convert.token_output_to_proto(output))
            if output.finish_reason is not None:
                self.release(ref)
        for session, messages in grouped.items():
            session.put(pb.WorkerMessage(outputs=pb.StepOutputs(outputs=messages)))

    def broadcast(self, message: pb.WorkerMessage) -> None:
        """Send to every router."""
        for session in tuple(self._sessions):
            session.put(message)

    def close_all(self) -> None:
        """End every stream."""
        for session in tuple(self._sessions):
            session.close()

    @property
    def requests(self) -> int:
        """Requests some router waits for."""
        return len(self._owner)
