"""Applies the policy to what the router knows now, and hands an attempt to the chosen workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import RouteDecision, WorkerState
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.convert import request_to_proto
from prismserve.router.mailbox import Mailbox
from prismserve.router.policy import DECODES, CacheView, LoadView, RequestView, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import Request, WorkerInfo
    from prismserve.kv_transfer.index.mirror import Mirror
    from prismserve.router.config import RouterConfig
    from prismserve.router.requests import Prepared
    from prismserve.router.sessions import WorkerPool

# An engine may emit the end-of-sequence token beyond what was asked for.
_ROOM_SPARE_TOKENS = 8
_SHARING = (WorkerState.READY, WorkerState.DRAINING)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A placed request: where its events arrive, and which workers must hear of its end."""

    decision: RouteDecision
    mailbox: Mailbox
    workers: tuple[str, ...]


class Placer:
    """Places attempts and takes them back.

    Args:
        pool: the connected workers.
        mirror: who holds which prefix and which image.
        config: weights of the policy.
        block_tokens: tokens per block.
    """

    def __init__(self, pool: WorkerPool, mirror: Mirror, config: RouterConfig, block_tokens: int) -> None:
        self._pool = pool
        self._mirror = mirror
        self._config = config
        self._block_tokens = block_tokens

    def ready(self) -> bool:
        """Whether some worker could decode now."""
        view = RequestView(1, 0, self._block_tokens, 0)
        try:
            place(view, self._workers(frozenset()), CacheView(), LoadView(), self._config)
        except WorkerUnavailableError:
            return False
        return True

    def submit(self, prepared: Prepared, request: Request, avoid: frozenset[str], near: str | None = None) -> Attempt:
        """Choose workers and send them the attempt.

        Args:
            prepared: keys of the prompt.
            request: this attempt, with the tokens that were already emitted.
            avoid: workers that failed this request; used only when there are no others.
            near: a decode worker that holds the prompt's KV; taken as long as it is ready.

        Raises:
            WorkerUnavailableError: no worker can decode now.
            OverloadedError: the session to a worker is congested.
        """
        decision = self._near(near, avoid) or self._decide(prepared, request, avoid)
        names = [decision.decode_worker]
        if decision.prefill_worker is not None:
            names.append(decision.prefill_worker)
        room = request.sampling.max_tokens - len(request.resume_token_ids)
        attempt = Attempt(
            decision, Mailbox(request.request_id, request.attempt, room + _ROOM_SPARE_TOKENS), tuple(names)
        )
        try:
            for name in names:
                self._pool.session(name).attach(attempt.mailbox)
            for name, message in self._messages(decision, request):
                self._pool.session(name).send(pb.RouterMessage(submit=message))
        except BaseException:
            self.withdraw(attempt)
            raise
        return attempt

    def release(self, attempt: Attempt, worker_id: str) -> None:
        """Stop listening to one worker of an attempt, whose part is done."""
        for session in self._pool.sessions:
            if session.info.worker_id == worker_id:
                session.detach(attempt.mailbox)

    def withdraw(self, attempt: Attempt, finished: str | None = None) -> None:
        """End an attempt: nothing is delivered any more, and every worker but ``finished`` is told to cancel.

        A worker whose session is congested or gone is left to the request's own deadline and to its epoch.
        """
        box = attempt.mailbox
        cancel = pb.RouterMessage(cancel=pb.Cancel(request_id=box.request_id, attempt=box.attempt))
        for session in self._pool.sessions:
            name = session.info.worker_id
            if name in attempt.workers and session.detach(box) and name != finished:
                session.send_if_room(cancel)

    def _workers(self, avoid: frozenset[str]) -> list[WorkerInfo]:
        """Candidates. Where nobody else decodes, a worker that failed may, but not with a prefill worker that did."""
        known = [session.current for session in self._pool.sessions if session.state in _SHARING]
        rest = [info for info in known if info.worker_id not in avoid]
        if any(info.role in DECODES and info.state is WorkerState.READY for info in rest):
            return rest
        return [info for info in known if info.role in DECODES or info.worker_id not in avoid]

    def _near(self, near: str | None, avoid: frozenset[str]) -> RouteDecision | None:
        ready = (session.info.worker_id for session in self._pool.sessions if session.state is WorkerState.READY)
        if near is None or near in avoid or near not in ready:
            return None
        return RouteDecision(near, None, "beside the first choice")

    def _decide(self, prepared: Prepared, request: Request, avoid: frozenset[str]) -> RouteDecision:
        sessions = self._pool.sessions
        load = LoadView(
            {s.info.worker_id: s.stats for s in sessions}, {s.info.worker_id: s.in_flight for s in sessions}
        )
        view = RequestView(
            prompt_tokens=request.prompt.tokens + len(request.resume_token_ids),
            media_end_tokens=prepared.media_end_tokens,
            block_tokens=self._block_tokens,
            images=len(request.media),
        )
        keys, wire_keys = prepared.keys, prepared.wire_keys
        if request.resume_token_ids:
            slots = elements(request.prompt, request.resume_token_ids)
            keys = tuple(block_keys(request.namespace, slots, self._block_tokens))
            wire_keys = tuple(block_keys(request.wire_namespace, slots, self._block_tokens))
        exact = self._mirror.longest(keys)
        wire = exact if wire_keys == keys else self._mirror.longest(wire_keys)
        images = tuple(self._mirror.holders(key) for key in prepared.image_keys)
        cache = CacheView(exact, wire, images)
        return place(view, self._workers(avoid), cache, load, self._config)

    def _messages(self, decision: RouteDecision, request: Request) -> Sequence[tuple[str, pb.Submit]]:
        message = request_to_proto(request)
        decode = decision.decode_worker
        main = pb.Submit(
            request=message,
            job=pb.JOB_LOCAL,
            pull_from=decision.pull_from or "",
            pull_blocks=decision.pull_blocks,
            embedding_holders=decision.embedding_holders,
        )
        if decision.prefill_worker is None:
            return [(decode, main)]
        main.job = pb.JOB_PREFILL
        main.target_worker = decode
        main.target_epoch = self._pool.session(decode).info.epoch
        # The decode side gets the images too: it recomputes a request that it had to preempt.
        waiting = pb.Submit(request=message, job=pb.JOB_DECODE)
        return [(decode, waiting), (decision.prefill_worker, main)]
