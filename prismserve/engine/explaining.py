"""Find out what became of each visual token of one request, beside the requests an engine serves.

The visual method is asked again on freshly encoded images; the prefill method is observed in a request that ends with its
first token. Both see what they would see when serving: the choice does not depend on the batch or the caches.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from prismserve.compression.cuts import Grid
from prismserve.compression.explanation import Explanation, Medium, Stage, cut_stages, visual_stage
from prismserve.core.errors import EngineError, InvalidRequestError
from prismserve.core.types import SamplingParams

if TYPE_CHECKING:
    from prismserve.core.types import Request, TokenOutput
    from prismserve.engine.engine import Engine
    from prismserve.engine.pruning import Pruning

_FIELD = "compression"
_STEPS_MAX = 10_000


class Explaining:
    """One request on its way to being explained; all calls from the engine's thread.

    Life: construct, :meth:`begin`, let the engine step until the request has ended unless :attr:`waits` is False, then
    :meth:`finish`.

    Args:
        request: what would be served; its answer is not written.

    Raises:
        InvalidRequestError: it holds no image or video, or nothing of it is reduced.
    """

    def __init__(self, request: Request) -> None:
        self.request = dataclasses.replace(request, sampling=SamplingParams(max_tokens=1, ignore_eos=True))
        plan = request.compression
        if not request.media:
            message = "there is no image or video whose tokens could be reduced"
            raise InvalidRequestError(message, field="messages", request_id=request.request_id)
        if plan.visual.name == "none" and plan.prefill.name == "none":
            message = f"{_FIELD}: every visual token is kept; name a visual or prefill method"
            raise InvalidRequestError(message, field=_FIELD, request_id=request.request_id)
        self._media: tuple[Medium, ...] = ()
        self._visual: Stage | None = None
        self._pruning: Pruning | None = None

    @property
    def waits(self) -> bool:
        """Whether the engine must step before :meth:`finish`."""
        return self._pruning is not None

    def begin(self, engine: Engine) -> None:
        """Ask the visual method, and queue the request if there is a prefill method.

        Raises:
            InvalidRequestError: a method cannot act on this model.
            OverloadedError: the engine's queue is full.
        """
        request, vision = self.request, engine.vision
        inputs = [vision.inputs(request.media, index) for index in range(len(request.media))]
        grids = [Grid(item.layout.frames, *item.layout.grid) for item in inputs]
        for item, grid in zip(inputs, grids, strict=True):
            if item.layout.raster_tokens != grid.tokens:
                message = f"{_FIELD}: the tokens of this image do not stand in one raster, so there is nothing to draw"
                raise InvalidRequestError(message, field=_FIELD, request_id=request.request_id)
        self._media = tuple(
            Medium(grid, vision.seen_box(media)) for grid, media in zip(grids, request.media, strict=True)
        )
        spec = request.compression.visual
        if spec.name != "none":
            with torch.inference_mode():
                plans = vision.plans(request.media, inputs, spec, request.scoring_token_ids)
            self._visual = visual_stage(spec.name, plans, [grid.tokens for grid in grids])
        if request.compression.prefill.name != "none":
            engine.submit(request, worker="local")
            self._pruning = engine.pruning(request.request_id, request.attempt)

    def finish(self) -> Explanation:
        """What became of the tokens; EngineError if the prompt was not computed."""
        stages = () if self._visual is None else (self._visual,)
        explanation = Explanation(self._media, stages)
        if self._pruning is None:
            return explanation
        pruning = self._pruning
        if len(pruning.plans) != len(pruning.cuts):
            message = "the prompt ended before its last cut"
            raise EngineError(message, request_id=self.request.request_id)
        before = stages[-1].fates if stages else tuple(range(explanation.places))
        plans = [pruning.plans[number] for number in range(len(pruning.cuts))]
        cuts = cut_stages(pruning.method.name, pruning.cuts, plans, before)
        return Explanation(self._media, (*stages, *cuts))


def explain(engine: Engine, request: Request) -> Explanation:
    """Explain a request with an engine that serves nothing else.

    Raises:
        InvalidRequestError: see :class:`Explaining`.
        EngineError: the prompt could not be computed.
    """
    job = Explaining(request)
    job.begin(engine)
    for _ in range(_STEPS_MAX if job.waits else 0):
        outputs = engine.step()
        if any(check_output(output) for output in outputs):
            break
    return job.finish()


def check_output(output: TokenOutput) -> bool:
    """Whether this output ends its request; EngineError if it failed."""
    if output.error:
        raise EngineError(output.error, request_id=output.request_id)
    return output.finish_reason is not None
