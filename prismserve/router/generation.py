"""The life of one request at the router: place, follow, detokenize, stop, migrate, report.

A request that loses a worker, or whose prefill or transfer fails in a way worth another try, is placed again as its
next attempt with the tokens already emitted; the caller sees one unbroken stream. Late output of an earlier attempt
finds no mailbox and is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from prismserve.core.errors import (
    INVALID_PREFIX,
    OVERLOADED_PREFIX,
    RETRYABLE_PREFIX,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    WorkerUnavailableError,
)
from prismserve.core.types import FinishReason
from prismserve.models.processing import IncrementalDetokenizer
from prismserve.router.mailbox import WorkerLost
from prismserve.router.text import StopMatcher
from prismserve.router.usage import Served, Usage, make_usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from prismserve.core.types import PrefillReport, RouteDecision, TokenLogprobs, TokenOutput
    from prismserve.models.processing import Processor
    from prismserve.router.config import RouterConfig
    from prismserve.router.metrics import RouterMetrics
    from prismserve.router.placement import Attempt, Placer
    from prismserve.router.requests import Prepared
    from prismserve.router.sessions import WorkerPool

logger = logging.getLogger(__name__)

_RETRY_PAUSE_S: Final = 0.01
_PLACE_POLL_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text and the tokens behind it; text may lag behind tokens, so either may be empty.

    Attributes:
        logprobs: of the tokens, one each, if they were asked for.
        decode_worker: who generated them.
        index: which of the request's answers this is.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    decode_worker: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer that ended well; of several answers to one request, the last one has the usage."""

    reason: FinishReason
    usage: Usage | None
    index: int = 0


GenerationEvent: TypeAlias = TextDelta | Finished


class _AttemptFailedError(Exception):
    """This attempt is over and another one makes sense.

    Args:
        worker_id: who failed, to be avoided.
        overloaded: whether it was only too busy.
        beside: another worker that may be at fault as well.
    """

    def __init__(self, worker_id: str, *, overloaded: bool = False, beside: str | None = None) -> None:
        super().__init__(worker_id)
        self.worker_id = worker_id
        self.overloaded = overloaded
        self.suspects = {worker_id} if beside is None or overloaded else {worker_id, beside}


@dataclass(slots=True)
class _Progress:
    """What one request has got so far, over all its attempts."""

    prepared: Prepared
    detokenizer: IncrementalDetokenizer
    matcher: StopMatcher
    started_at: float
    deadline: float
    tokens: list[int] = field(default_factory=list)
    first: RouteDecision | None = None
    last: RouteDecision | None = None
    report: PrefillReport | None = None
    ttft_s: float = 0.0
    token_at: float = 0.0
    attempts: int = 0
    avoid: frozenset[str] = frozenset()
    near: str | None = None
    worker_done: bool = False

    @property
    def full(self) -> bool:
        """Whether every token asked for has been emitted."""
        return len(self.tokens) >= self.prepared.request.sampling.max_tokens

    def remaining_s(self) -> float:
        """Time left; DeadlineExceededError when there is none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            message = "the request did not finish within its time limit"
            raise DeadlineExceededError(message, request_id=self.prepared.request.request_id)
        return left

    def text(self, piece: str) -> str:
        """What may be shown of newly generated text."""
        return self.matcher.push(piece, armed=len(self.tokens) >= self.prepared.request.sampling.min_tokens)


class Generator:
    """Runs requests against the pool.

    Args:
        processor: detokenizes.
        pool: the connected workers.
        placer: places attempts.
        metrics: told about tokens, ends and retries.
        config: attempts and timing.
        token_bytes: KV bytes of one token over all layers.
    """

    def __init__(
        self,
        processor: Processor,
        pool: WorkerPool,
        placer: Placer,
        metrics: RouterMetrics,
        config: RouterConfig,
        token_bytes: int,
    ) -> None:
        self._processor = processor
        self._pool = pool
        self._placer = placer
        self._metrics = metrics
        self._config = config
        self._token_bytes = token_bytes

    async def run(
        self, prepared: Prepared, *, arrived_at: float, timeout_s: float | None = None, near: str | None = None
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the answer; the last event is ``Finished``. Closing the iterator cancels the request everywhere.

        Args:
            prepared: the request.
            arrived_at: ``time.monotonic()`` when it reached the router; TTFT counts from here.
            timeout_s: the caller's limit, if less than the server's.
            near: the decode worker to be preferred, because it holds the prompt's KV.

        Raises:
            WorkerUnavailableError: no worker can serve it, also after waiting and trying again.
            OverloadedError: every worker that was tried is full.
            DeadlineExceededError: it did not finish in time.
            InvalidRequestError: a worker found that it cannot be served as written.
            EngineError: a worker failed in a way that another attempt would not mend.
        """
        limit_s = (
            self._config.request_timeout_s if timeout_s is None else min(timeout_s, self._config.request_timeout_s)
        )
        progress = _Progress(
            prepared,
            IncrementalDetokenizer(self._processor),
            StopMatcher(prepared.request.sampling.stop),
            arrived_at,
            arrived_at + limit_s,
            near=near,
        )
        while True:
            attempt = await self._place(progress)
            try:
                async with contextlib.aclosing(self._follow(progress, attempt)) as events:
                    async for event in events:
                        if isinstance(event, Finished):
                            self._withdraw(progress, attempt)
                        yield event
            except _AttemptFailedError as failure:
                self._prepare_retry(progress, failure)
            else:
                return
            finally:
                self._withdraw(progress, attempt)
            if progress.full:
                for event in self._end(progress, FinishReason.LENGTH):
                    yield event
                return
            await asyncio.sleep(min(_RETRY_PAUSE_S * 2**progress.attempts, progress.remaining_s()))

    def _withdraw(self, progress: _Progress, attempt: Attempt) -> None:
        done = attempt.decision.decode_worker if progress.worker_done else None
        self._placer.withdraw(attempt, finished=done)

    async def _place(self, progress: _Progress) -> Attempt:
        """Submit the next attempt; later ones wait a while for a worker, the first one does not."""
        wait_until = time.monotonic() + (self._config.replace_wait_s if progress.attempts else 0.0)
        while True:
            request = dataclasses.replace(
                progress.prepared.request,
                attempt=progress.attempts,
                resume_token_ids=tuple(progress.tokens),
                timeout_s=progress.remaining_s(),
            )
            try:
                attempt = self._placer.submit(progress.prepared, request, progress.avoid, progress.near)
            except (WorkerUnavailableError, OverloadedError):
                left_s = min(wait_until - time.monotonic(), progress.remaining_s())
                if left_s <= 0:
                    raise
                await self._pool.wait_change(min(left_s, _PLACE_POLL_S))
                continue
            progress.attempts += 1
            progress.prepared, progress.last = attempt.prepared, attempt.decision
            self._metrics.routed(attempt.decision)
            return attempt

    async def _follow(self, progress: _Progress, attempt: Attempt) -> AsyncGenerator[GenerationEvent, None]:
        """Events of one attempt, until the request ends or the attempt fails."""
        decode, prefill = attempt.decision.decode_worker, attempt.decision.prefill_worker
        # Until KV has arrived, what fails a decode worker may be its prefill worker, or the line between the two.
        sender = prefill
        while True:
            try:
                event = await attempt.mailbox.get(progress.remaining_s())
            except TimeoutError:
                continue  # the deadline has passed: remaining_s() raises
            if isinstance(event, WorkerLost):
                raise _AttemptFailedError(event.worker_id)
            output = event.output
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise _failure(event.worker_id, output, sender)
            if event.worker_id != decode:
                continue
            if output.token_ids and prefill is not None:
                # The KV has arrived: what becomes of the prefill worker does not matter any more.
                self._placer.release(attempt, prefill)
                sender = None
            if output.report is not None and output.token_ids:
                self._metrics.predicted(self._placer.learn(attempt, output.report))
            shown = self._take(progress, output)
            if shown or output.token_ids:
                yield TextDelta(shown, output.token_ids, output.logprobs, decode)
            if progress.matcher.hit or output.finish_reason is not None:
                progress.worker_done = output.finish_reason is not None
                reason = FinishReason.STOP if progress.matcher.hit else output.finish_reason
                for last in self._end(progress, reason or FinishReason.STOP):
                    yield last
                return

    def _take(self, progress: _Progress, output: TokenOutput) -> str:
        """Count tokens and return the text that may be shown."""
        progress.report = progress.report or output.report
        if not output.token_ids:
            return ""
        now = time.monotonic()
        if not progress.tokens:
            progress.first = progress.last
            progress.ttft_s = now - progress.started_at
            self._metrics.first_token(progress.ttft_s)
        else:
            self._metrics.next_tokens((now - progress.token_at) / len(output.token_ids), len(output.token_ids))
        progress.token_at = now
        progress.tokens.extend(output.token_ids)
        return progress.text(progress.detokenizer.push(output.token_ids))

    def _end(self, progress: _Progress, reason: FinishReason) -> Iterator[GenerationEvent]:
        """The last events: text that was held back, then the report."""
        if not progress.matcher.hit:
            rest = progress.text(progress.detokenizer.flush())
            rest += progress.matcher.flush()
            if rest:
                yield TextDelta(rest, ())
        if progress.last is None:
            message = "a request ended before it was placed"
            raise EngineError(message, request_id=progress.prepared.request.request_id)
        served = Served(
            progress.first or progress.last,
            progress.last,
            progress.report,
            progress.ttft_s,
            len(progress.tokens),
            progress.attempts,
        )
        usage = make_usage(progress.prepared, served, self._token_bytes)
        reason = FinishReason.STOP if progress.matcher.hit else reason
        self._metrics.finished(reason.value, usage, time.monotonic() - progress.started_at)
        yield Finished(reason, usage)

    def _prepare_retry(self, progress: _Progress, failure: _AttemptFailedError) -> None:
        """Note who failed; raise when this was the last attempt."""
        request_id = progress.prepared.request.request_id
        self._metrics.retried()
        logger.warning("request %s: attempt %d failed at %s", request_id, progress.attempts, failure.worker_id)
        progress.avoid |= failure.suspects
        if progress.full or progress.attempts < self._config.max_attempts:
            return
        if failure.overloaded:
            message = "every worker that was tried is full; try again shortly"
            raise OverloadedError(message, retry_after_s=self._config.retry_after_s, request_id=request_id) from None
        message = f"the request failed on {progress.attempts} placements; try again"
        raise WorkerUnavailableError(message, request_id=request_id) from None


def _failure(worker_id: str, output: TokenOutput, sender: str | None) -> Exception:
    """What an output that reports an error means. Texts of workers reach the caller only behind ``INVALID_PREFIX``."""
    if output.finish_reason is FinishReason.ABORT or output.error.startswith(RETRYABLE_PREFIX):
        return _AttemptFailedError(worker_id, overloaded=output.error.startswith(OVERLOADED_PREFIX), beside=sender)
    if output.error.startswith(INVALID_PREFIX):
        return InvalidRequestError(output.error.removeprefix(INVALID_PREFIX), request_id=output.request_id)
    logger.error("request %s failed at worker %s: %s", output.request_id, worker_id, output.error)
    message = "the engine could not run this request"
    return EngineError(message, request_id=output.request_id)
