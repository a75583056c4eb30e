"""An explanation as the API gives it: a document and a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from prismserve.compression.overlay import ROWS_MAX, draw
from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import MediaKind
from prismserve.router.usage import plan_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.explanation import Explanation
    from prismserve.core.types import CompressionPlan, MediaInput


def document(plan: CompressionPlan, explanation: Explanation, preset_asked: str = "") -> dict[str, Any]:
    """Plain data for JSON: the plan that was applied, the grids, and the fate of every token in each stage."""
    return {"compression": plan_json(plan, preset_asked), **explanation.document()}


def overlay(media: Sequence[MediaInput], explanation: Explanation) -> bytes:
    """The picture as a PNG file.

    Args:
        media: of the request, as the explanation has them.
        explanation: what is drawn.

    Raises:
        InvalidRequestError: an image cannot be decoded.
    """
    pictures: list[list[Image.Image]] = []
    blank = Image.new("RGB", (1, 1))
    for index, item in enumerate(media):
        # What lies behind the last row that is drawn need not be decoded.
        pictures.append(_frames(item, index) if index < ROWS_MAX else [blank])
    out = io.BytesIO()
    draw(explanation, pictures).save(out, format="PNG", optimize=True)
    return out.getvalue()


def _frames(item: MediaInput, index: int) -> list[Image.Image]:
    if item.kind is MediaKind.VIDEO:
        samples = np.frombuffer(item.data, np.uint8).reshape(item.frames, item.height_px, item.width_px, 3)
        return [Image.fromarray(frame) for frame in samples]
    try:
        with Image.open(io.BytesIO(item.data)) as image:
            return [image.convert("RGB")]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"image {index} cannot be decoded: {error}"
        raise InvalidRequestError(message, field="messages") from None
