"""Applies the policy to what the router knows now, and hands an attempt to the chosen workers."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prismserve.compression.wire import Slots, runs, table
from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import MediaSegment, RouteDecision, WorkerState
from prismserve.kv_transfer.costs import ImageNeed
from prismserve.kv_transfer.plan import encoded_bytes
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.convert import request_to_proto
from prismserve.router.estimates import CostBook, Outcome
from prismserve.router.mailbox import Mailbox
from prismserve.router.policy import DECODES, CacheView, LoadView, RequestView, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.core.types import KVLayout, PrefillReport, Prompt, Request, WorkerInfo
    from prismserve.kv_transfer.index.mirror import Mirror
    from prismserve.router.config import RouterConfig
    from prismserve.router.estimates import Miss
    from prismserve.router.requests import ModelFacts, Prepared
    from prismserve.router.sessions import WorkerPool

# An engine may emit the end-of-sequence token beyond what was asked for.
_ROOM_SPARE_TOKENS: Final = 8
_SHARING: Final = (WorkerState.READY, WorkerState.DRAINING)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A placed request: where its events arrive, and which workers must hear of its end.

    Attributes:
        prepared: the request as it was sent, which is another one if it was compressed harder.
        placed_at: by the placer's clock.
    """

    prepared: Prepared
    placed_at: float
    decision: RouteDecision
    mailbox: Mailbox
    workers: tuple[str, ...]


class Placer:
    """Places attempts and takes them back.

    Args:
        pool: the connected workers.
        mirror: who holds which prefix and which image.
        config: weights of the policy.
        facts: of the served model.

    Attributes:
        book: what was learnt of the workers' speed.
    """

    def __init__(self, pool: WorkerPool, mirror: Mirror, config: RouterConfig, facts: ModelFacts) -> None:
        self._pool = pool
        self._mirror = mirror
        self._config = config
        self._facts = facts
        self._layout = facts.layout
        self.book = CostBook(config, time.monotonic)

    def ready(self) -> bool:
        """Whether some worker could decode now."""
        view = RequestView(1, self._layout.block_tokens)
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
        if decision.compress_harder and prepared.harder is not None:
            prepared = prepared.harder
            request = dataclasses.replace(
                request, compression=prepared.request.compression, wire_namespace=prepared.request.wire_namespace
            )
        names = [decision.decode_worker]
        if decision.prefill_worker is not None:
            names.append(decision.prefill_worker)
        room = request.sampling.max_tokens - len(request.resume_token_ids)
        box = Mailbox(request.request_id, request.attempt, room + _ROOM_SPARE_TOKENS)
        attempt = Attempt(prepared, time.monotonic(), decision, box, tuple(names))
        try:
            for name in names:
                self._pool.session(name).attach(attempt.mailbox)
            for name, message in self._messages(decision, request):
                self._pool.session(name).submit(message)
        except BaseException:
            self.withdraw(attempt)
            raise
        return attempt

    def learn(self, attempt: Attempt, report: PrefillReport) -> list[Miss]:
        """Compare what was predicted for an attempt whose first token has just come with what its report says."""
        prompt = attempt.prepared.request.prompt
        media = sum(1 for _ in prompt.media_segments())
        outcome = Outcome(
            latency_s=time.monotonic() - attempt.placed_at,
            raw_tokens_per_image=prompt.visual_tokens_raw / media if media else 0.0,
            block_bytes=self._layout.token_bytes * self._layout.block_tokens,
            block_tokens=self._layout.block_tokens,
        )
        return self.book.learn(attempt.decision, report, outcome)

    def release(self, attempt: Attempt, worker_id: str) -> None:
        """Stop listening to one worker of an attempt, whose part is done."""
        for session in self._pool.sessions:
            if session.info.worker_id == worker_id:
                session.detach(attempt.mailbox)

    def withdraw(self, attempt: Attempt, finished: str | None = None) -> None:
        """End an attempt: nothing is delivered any more, and every worker but ``finished`` is told to cancel.

        A worker whose session is gone has cancelled everything of it by itself.
        """
        for session in self._pool.sessions:
            name = session.info.worker_id
            if name in attempt.workers and name != finished:
                session.cancel(attempt.mailbox)
            elif name == finished:
                session.detach(attempt.mailbox)

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
        keys, wire_keys = prepared.keys, prepared.wire_keys
        if request.resume_token_ids:
            slots = elements(request.prompt, request.resume_token_ids)
            keys = tuple(block_keys(request.namespace, slots, self._layout.block_tokens))
            wire_keys = tuple(block_keys(request.wire_namespace, slots, self._layout.block_tokens))
        exact = self._mirror.match(keys)
        wire = exact if wire_keys == keys else self._mirror.match(wire_keys)
        cache = CacheView(exact, wire, tuple(self._mirror.holders(key) for key in prepared.image_keys))
        view = self._view(prepared, request)
        rates = self.book.rates(load.stats) if self._config.measured_costs else None
        decision = place(view, self._workers(avoid), cache, load, self._config, rates)
        _log_decision(request, decision)
        return decision

    def _view(self, prepared: Prepared, request: Request) -> RequestView:
        tokens = request.prompt.tokens + len(request.resume_token_ids)
        harder = None if prepared.harder is None else prepared.harder.request
        return RequestView(
            prompt_tokens=tokens,
            block_tokens=self._layout.block_tokens,
            images=_images(request.prompt, self._facts.embedding_token_bytes),
            block_bytes=self._layout.token_bytes * self._layout.block_tokens,
            wire_bytes=wire_bytes(request, tokens, self._layout),
            harder_wire_bytes=None if harder is None else wire_bytes(harder, tokens, self._layout),
            layers=self._layout.layers,
        )

    def _messages(self, decision: RouteDecision, request: Request) -> Sequence[tuple[str, pb.Submit]]:
        message = request_to_proto(request)
        decode = decision.decode_worker
        main = pb.Submit(
            request=message,
            job=pb.JOB_LOCAL,
            pull_from=decision.pull_from or "",
            pull_blocks=decision.pull_blocks,
            embedding_holders=decision.embedding_holders,
            skip_restore=not decision.restore,
        )
        if decision.prefill_worker is None:
            return [(decode, main)]
        main.job = pb.JOB_PREFILL
        main.target_worker = decode
        main.target_epoch = self._pool.session(decode).info.epoch
        # The decode side gets the images too: it recomputes a request that it had to preempt.
        waiting = pb.Submit(request=message, job=pb.JOB_DECODE)
        return [(decode, waiting), (decision.prefill_worker, main)]


def wire_bytes(request: Request, tokens: int, layout: KVLayout) -> int:
    """Bytes that ``tokens`` slots of a prompt take on the wire as the request's codec encodes them."""
    codec = request.compression.wire
    codecs = table(codec)
    parts = runs(codec, Slots.of(request.prompt, tokens), 0, tokens)
    return layout.layers * sum(encoded_bytes(count, codecs[place], layout) for _, count, place in parts)


def _images(prompt: Prompt, token_bytes: int) -> tuple[ImageNeed, ...]:
    ends = itertools.accumulate(segment.tokens for segment in prompt.segments)
    return tuple(
        ImageNeed(end, segment.raw_tokens, segment.tokens * token_bytes)
        for segment, end in zip(prompt.segments, ends, strict=True)
        if isinstance(segment, MediaSegment)
    )


def _log_decision(request: Request, decision: RouteDecision) -> None:
    prediction = decision.prediction
    if prediction is None or not logger.isEnabledFor(logging.DEBUG):
        return
    logger.debug(
        "request %s attempt %d: %s; decode %s, prefill %s, ways %s; predicted ms: total %.2f, other kind %.2f, queue %.2f, "
        "fetch %.2f, encode %.2f, prefill %.2f, transfer %.2f, handoff %.2f",
        request.request_id,
        request.attempt,
        decision.reason,
        decision.decode_worker,
        decision.prefill_worker or "-",
        "+".join(prediction.ways),
        *(
            1e3 * seconds
            for seconds in (
                prediction.total_s,
                prediction.other_s,
                prediction.queue_s,
                prediction.fetch_s,
                prediction.encode_s,
                prediction.prefill_s,
                prediction.transfer_s,
                prediction.handoff_s,
            )
        ),
    )
