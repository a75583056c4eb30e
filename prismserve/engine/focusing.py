"""Which visual tokens the deeper layers read while a sequence decodes: what its visual method says, and how far it is.

The prompt is computed as ever, and shared as ever. Tokens behind it are computed one by one, recomputed and resumed ones
too, so that each step has the choice of its own; their KV depends on those choices and is shared with nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prismserve.compression import loader
from prismserve.compression.focus import Focuses
from prismserve.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.focus import Glance
    from prismserve.core.types import Request
    from prismserve.engine.sequence import ImageSpan
    from prismserve.models.config import DecoderConfig

_FIELD = "compression.visual"


@dataclass(slots=True, eq=False)
class Focusing:
    """The decoding of one sequence under a method that :class:`Focuses`.

    Attributes:
        method: what chooses.
        config: its configuration.
        layer: first layer that reads a choice.
        visual: [N] int64 cache slots of the visual tokens, on the CPU.
        text: the other cache slots of the prompt.
        last: of the step before; None before the first.
    """

    method: Focuses
    config: Any
    layer: int
    visual: torch.Tensor
    text: tuple[int, ...]
    last: Glance | None = None

    def look(self, received: torch.Tensor) -> None:
        """A step has come to the layer: ``received`` [n] float32 is its attention to all cache slots."""
        scores = received[self.visual.to(received.device)].cpu()
        self.last = self.method.glance(scores, self.last, self.config)

    def slots(self, length: int) -> list[int]:
        """Cache slots that layers from ``layer`` on read in the step that computes slot ``length - 1``."""
        read = None if self.last is None else self.last.read
        visual = self.visual if read is None else self.visual[read]
        prompt = len(self.text) + self.visual.shape[0]
        return [*self.text, *visual.tolist(), *range(prompt, length)]

    def restart(self) -> None:
        """All KV was given up: the sequence is computed again."""
        self.last = None


def plan_focusing(request: Request, spans: Sequence[ImageSpan], decoder: DecoderConfig) -> Focusing | None:
    """How a request's visual method reads while decoding; None if it reads everything, or there is nothing to see.

    Raises:
        InvalidRequestError: the model, or the request's prefill method, does not allow it.
    """
    spec = request.compression.visual
    method = loader.visual_method(spec.name)
    if not spans or not isinstance(method, Focuses):
        return None
    config = loader.config_of(spec, "visual")
    layer = method.focus_layer(config, decoder.layers)
    if layer is None:
        return None
    if decoder.windows or decoder.bidirectional_images:
        what = "a model with sliding windows or bidirectional images"
    elif request.compression.prefill.name != "none":
        what = f"the prefill method {request.compression.prefill.name!r}, which leaves each layer other visual tokens"
    else:
        visual = [slot for span in spans for slot in range(span.start, span.end)]
        among = set(visual)
        text = tuple(slot for slot in range(request.prompt.tokens) if slot not in among)
        return Focusing(method, config, layer, torch.tensor(visual, dtype=torch.int64), text)
    message = f"{_FIELD}: {spec.name!r} cannot choose what decoding reads under {what}"
    raise InvalidRequestError(message, field=_FIELD)
