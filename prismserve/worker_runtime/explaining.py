"""Explanations for routers: one at a time beside the requests that are served."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from prismserve.compression.cuts import Grid
from prismserve.compression.explanation import GONE, Explanation, Medium, Stage
from prismserve.core.errors import (
    DeadlineExceededError,
    EngineError,
    OverloadedError,
    PrismServeError,
    TransferError,
    outcome_text,
)
from prismserve.engine.explaining import Explaining, check_output
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from prismserve.core.types import Request, TokenOutput
    from prismserve.worker_runtime.runtime import WorkerRuntime

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 60.0
PLACES_MAX: Final = 1 << 20
_BOX_EDGES: Final = 4


class Explainer:
    """Explains requests with the worker's own engine.

    Args:
        runtime: the worker.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime
        self._busy = False

    async def serve(self, message: pb.ExplainRequest) -> pb.ExplainReply:
        """Explain a request, or say why not."""
        try:
            return reply_of(await self.explain(convert.request_from_proto(message.request)))
        except PrismServeError as error:
            return pb.ExplainReply(refusal=outcome_text(error))
        except Exception:  # the call's outermost frame: whatever went wrong, its caller must hear of it
            logger.exception("an explanation failed unexpectedly")
            return pb.ExplainReply(refusal=outcome_text(EngineError("internal error in the worker")))

    async def explain(self, request: Request) -> Explanation:
        """Explain a request.

        Raises:
            OverloadedError: another one is being explained, or the engine's queue is full.
            DeadlineExceededError: the prompt was not computed in time.
            InvalidRequestError: nothing of it can be explained.
        """
        if self._busy:
            message = "another request is being explained; try again shortly"
            raise OverloadedError(message, request_id=request.request_id)
        runtime, job = self._runtime, Explaining(request)
        self._busy = True
        ref = (request.request_id, request.attempt)
        ended: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()

        def receive(output: TokenOutput) -> None:
            if not ended.done() and (output.error or output.finish_reason is not None):
                ended.set_result(output)

        runtime.tap(ref, receive)
        try:
            await runtime.on_engine(job.begin)
            if job.waits:
                check_output(await asyncio.wait_for(ended, min(TIMEOUT_S, request.timeout_s)))
            return await runtime.on_engine(lambda _: job.finish())
        except TimeoutError:
            message = "the prompt was not computed in time"
            raise DeadlineExceededError(message, request_id=request.request_id) from None
        finally:
            self._busy = False
            runtime.untap(ref)
            await runtime.on_engine(lambda engine: engine.cancel(*ref))


def reply_of(explanation: Explanation) -> pb.ExplainReply:
    """An explanation on the wire."""
    return pb.ExplainReply(
        media=[
            pb.ExplainedMedium(
                frames=medium.grid.frames, rows=medium.grid.rows, columns=medium.grid.columns, box_px=medium.box
            )
            for medium in explanation.media
        ],
        stages=[
            pb.ExplainedStage(stage=stage.stage, method=stage.method, layer=stage.layer, fates=stage.fates)
            for stage in explanation.stages
        ],
    )


def explanation_of(reply: pb.ExplainReply) -> Explanation:
    """Read a reply; TransferError if its parts do not fit each other."""
    media: list[Medium] = []
    for item in reply.media:
        if len(item.box_px) != _BOX_EDGES or not item.frames * item.rows * item.columns:
            message = "an explanation holds an image without a grid or a box"
            raise TransferError(message)
        left, top, right, bottom = item.box_px
        media.append(Medium(Grid(item.frames, item.rows, item.columns), (left, top, right, bottom)))
    explanation = Explanation(
        tuple(media),
        tuple(
            Stage(item.stage, item.method, item.layer if item.HasField("layer") else None, tuple(item.fates))
            for item in reply.stages
        ),
    )
    places = explanation.places
    for stage in explanation.stages:
        if places > PLACES_MAX or len(stage.fates) != places or not all(GONE <= fate < places for fate in stage.fates):
            message = f"an explanation's fates do not fit its {places} places"
            raise TransferError(message)
    return explanation
