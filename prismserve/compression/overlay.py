"""A picture of an explanation: one panel for each stage, patches kept, merged and dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from PIL import Image, ImageDraw, ImageFont

from prismserve.compression.explanation import DROPPED, GONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.explanation import Explanation, Medium, Stage

ROWS_MAX: Final = 8
"""Most images and frames that are drawn; those after them are left out."""
STAGES_MAX: Final = 8
"""Most stages that are drawn, the last ones."""
_PANEL_PX: Final = 392
_GAP_PX: Final = 12
_TEXT_PX: Final = 18
_LINES_MAX: Final = 1024
_PAPER: Final = (250, 250, 250)
_INK: Final = (20, 20, 20)
_KEPT: Final = (46, 160, 67)
_MERGED: Final = (40, 110, 235)
_DROPPED: Final = (60, 10, 10)
_GONE: Final = (0, 0, 0)
_LEGEND: Final = (("kept", _KEPT), ("merged into another", _MERGED), ("dropped", _DROPPED), ("left earlier", _GONE))


def draw(explanation: Explanation, frames: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Draw it: a row for each image or frame, first as the model sees it, then behind each stage.

    Args:
        explanation: what is to be shown.
        frames: of each medium, its picture, or the frames of a video, which are spread over the grid's frames.

    Returns:
        RGB, at most ``ROWS_MAX`` rows and ``1 + STAGES_MAX`` columns of panels with a line of text above each.
    """
    stages = explanation.stages[-STAGES_MAX:]
    rows: list[tuple[Medium, Image.Image, int]] = []
    first = 0
    for medium, pictures in zip(explanation.media, frames, strict=True):
        for frame in range(medium.grid.frames):
            if len(rows) < ROWS_MAX:
                picture = pictures[frame * len(pictures) // medium.grid.frames]
                rows.append((medium, picture, first + frame * medium.grid.rows * medium.grid.columns))
        first += medium.grid.tokens
    seen = [_seen(picture, medium) for medium, picture, _ in rows]
    width = (_PANEL_PX + _GAP_PX) * (1 + len(stages)) + _GAP_PX
    height = sum(panel.height + _TEXT_PX + _GAP_PX for panel in seen) + 2 * _GAP_PX + _TEXT_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _GAP_PX
    for (medium, _, place), panel in zip(rows, seen, strict=True):
        _paste(sheet, pen, panel, (_GAP_PX, top), f"as seen, {medium.grid.rows} x {medium.grid.columns} tokens")
        for number, stage in enumerate(stages, 1):
            left = _GAP_PX + number * (_PANEL_PX + _GAP_PX)
            _paste(sheet, pen, _panel(panel, medium, stage, place), (left, top), _caption(stage))
        top += panel.height + _TEXT_PX + _GAP_PX
    _legend(pen, top)
    return sheet


def _caption(stage: Stage) -> str:
    parts = [f"{stage.kept} kept"]
    parts += [f"{stage.merged} merged"] if stage.merged else []
    parts += [f"{stage.dropped} dropped"] if stage.dropped else []
    return f"{stage.title}: {', '.join(parts)}"


def _seen(picture: Image.Image, medium: Medium) -> Image.Image:
    """The part of a picture that the grid covers, as wide as a panel; black where the model pads."""
    left, top, right, bottom = medium.box
    cropped = picture.convert("RGB").crop((round(left), round(top), round(right), round(bottom)))
    height = max(1, min(2 * _PANEL_PX, round(_PANEL_PX * cropped.height / cropped.width)))
    return cropped.resize((_PANEL_PX, height), Image.Resampling.LANCZOS)


def _panel(panel: Image.Image, medium: Medium, stage: Stage, first: int) -> Image.Image:
    """One frame behind a stage; ``first`` is the place of its first token."""
    grid = medium.grid
    area = grid.rows * grid.columns
    edges_x = [round(column * panel.width / grid.columns) for column in range(grid.columns + 1)]
    edges_y = [round(row * panel.height / grid.rows) for row in range(grid.rows + 1)]

    def cell(place: int) -> tuple[int, int, int, int]:
        row, column = divmod(place - first, grid.columns)
        return edges_x[column], edges_y[row], edges_x[column + 1] - 1, edges_y[row + 1] - 1

    veil = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(veil)
    lines = 0
    for place in range(first, first + area):
        fate = stage.fates[place]
        if fate == place:
            pen.rectangle(cell(place), outline=(*_KEPT, 255))
        elif fate == DROPPED:
            pen.rectangle(cell(place), fill=(*_DROPPED, 205))
        elif fate == GONE:
            pen.rectangle(cell(place), fill=(*_GONE, 245))
        else:
            pen.rectangle(cell(place), fill=(*_MERGED, 120))
    for place in range(first, first + area):
        fate = stage.fates[place]
        # What merges into another frame or image has no line.
        if fate not in (place, DROPPED, GONE) and first <= fate < first + area and lines < _LINES_MAX:
            pen.line((*_centre(cell(place)), *_centre(cell(fate))), fill=(255, 255, 255, 110))
            lines += 1
    return Image.alpha_composite(panel.convert("RGBA"), veil).convert("RGB")


def _centre(cell: tuple[int, int, int, int]) -> tuple[float, float]:
    return (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2


def _paste(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, panel: Image.Image, corner: tuple[int, int], text: str
) -> None:
    left, top = corner
    pen.text((left, top), _fitting(text), fill=_INK, font=_font())
    sheet.paste(panel, (left, top + _TEXT_PX))


def _legend(pen: ImageDraw.ImageDraw, top: int) -> None:
    left = _GAP_PX
    for text, colour in _LEGEND:
        pen.rectangle((left, top, left + 12, top + 12), fill=colour)
        pen.text((left + 18, top), text, fill=_INK, font=_font())
        left += 18 + round(_font().getlength(text)) + 2 * _GAP_PX


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _fitting(text: str) -> str:
    """``text``, cut where it would be wider than a panel."""
    font = _font()
    if font.getlength(text) <= _PANEL_PX:
        return text
    while text and font.getlength(text + "…") > _PANEL_PX:
        text = text[:-1]
    return text + "…"
