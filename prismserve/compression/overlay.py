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
PANEL_PX: Final = 392
GAP_PX: Final = 12
TEXT_PX: Final = 34
"""Two lines: the stage, and what it did."""
_LINE_PX: Final = 16
_SWATCH_PX: Final = 14
_LINES_MAX: Final = 1024
_PAPER: Final = (250, 250, 250)
_INK: Final = (20, 20, 20)
_KEPT: Final = (0, 150, 60)
_EDGE: Final = (255, 255, 255)
_MERGED: Final = (40, 110, 235)
_DROPPED: Final = (190, 30, 30)
_GONE: Final = (96, 96, 96)
_MERGED_VEIL: Final = 0.5
_DROPPED_VEIL: Final = 0.55
_GONE_VEIL: Final = 0.85


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
    width = (PANEL_PX + GAP_PX) * (1 + len(stages)) + GAP_PX
    height = sum(panel.height + TEXT_PX + GAP_PX for panel in seen) + 2 * GAP_PX + _SWATCH_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = GAP_PX
    for (medium, _, place), panel in zip(rows, seen, strict=True):
        tokens = f"{medium.grid.rows} x {medium.grid.columns} tokens, {explanation.places} in all"
        _paste(sheet, pen, panel, (GAP_PX, top), ("as the model sees it", tokens))
        for number, stage in enumerate(stages, 1):
            left = GAP_PX + number * (PANEL_PX + GAP_PX)
            _paste(sheet, pen, _panel(panel, medium, stage, place), (left, top), (stage.title, _counts(stage)))
        top += panel.height + TEXT_PX + GAP_PX
    _legend(pen, top, stages)
    return sheet


def _counts(stage: Stage) -> str:
    parts = [f"{stage.kept} kept"]
    parts += [f"{stage.merged} merged"] if stage.merged else []
    parts += [f"{stage.dropped} dropped"] if stage.dropped else []
    return ", ".join(parts)


def _seen(picture: Image.Image, medium: Medium) -> Image.Image:
    """The part of a picture that the grid covers, as wide as a panel; black where the model pads."""
    left, top, right, bottom = medium.box
    cropped = picture.convert("RGB").crop((round(left), round(top), round(right), round(bottom)))
    height = max(1, min(2 * PANEL_PX, round(PANEL_PX * cropped.height / cropped.width)))
    return cropped.resize((PANEL_PX, height), Image.Resampling.LANCZOS)


def _panel(panel: Image.Image, medium: Medium, stage: Stage, first: int) -> Image.Image:
    """One frame behind a stage; ``first`` is the place of its first token."""
    grid = medium.grid
    area = grid.rows * grid.columns
    edges_x = [round(column * panel.width / grid.columns) for column in range(grid.columns + 1)]
    edges_y = [round(row * panel.height / grid.rows) for row in range(grid.rows + 1)]

    def cell(place: int) -> tuple[int, int, int, int]:
        row, column = divmod(place - first, grid.columns)
        return edges_x[column], edges_y[row], edges_x[column + 1] - 1, edges_y[row + 1] - 1

    # What left has no colour of its own any more, so that what is kept stands out.
    grey = panel.convert("L").convert("RGB")
    drawn = panel.copy()
    for place in range(first, first + area):
        fate = stage.fates[place]
        if fate != place:
            box = (*cell(place)[:2], cell(place)[2] + 1, cell(place)[3] + 1)
            drawn.paste(_veiled((panel if fate >= 0 else grey).crop(box), fate), box[:2])
    veil = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(veil)
    lines = 0
    heads: set[int] = set()
    for place in range(first, first + area):
        fate = stage.fates[place]
        # What merges into another frame or image has no line.
        if fate not in (place, DROPPED, GONE) and first <= fate < first + area and lines < _LINES_MAX:
            pen.line((*_centre(cell(place)), *_centre(cell(fate))), fill=(*_EDGE, 150))
            lines += 1
            heads.add(fate)
    for place in range(first, first + area):
        if stage.fates[place] == DROPPED:
            pen.line(cell(place), fill=(*_DROPPED, 160))
        elif stage.fates[place] == place:
            _frame(pen, cell(place))
    for head in heads:
        across, down = _centre(cell(head))
        pen.ellipse((across - 4, down - 4, across + 4, down + 4), fill=(*_MERGED, 255), outline=(*_EDGE, 255))
    return Image.alpha_composite(drawn.convert("RGBA"), veil).convert("RGB")


def _veiled(patch: Image.Image, fate: int) -> Image.Image:
    """A patch that does not go on: blue where it is merged, red where it is dropped here, grey where it had left."""
    colour, share = {DROPPED: (_DROPPED, _DROPPED_VEIL), GONE: (_GONE, _GONE_VEIL)}.get(fate, (_MERGED, _MERGED_VEIL))
    return Image.blend(patch, Image.new("RGB", patch.size, colour), share)


def _frame(pen: ImageDraw.ImageDraw, cell: tuple[int, int, int, int]) -> None:
    """Around a patch that goes on: green with white inside, which shows on light and on dark pictures."""
    left, top, right, bottom = cell
    pen.rectangle(cell, outline=(*_KEPT, 255), width=2)
    if right - left > 12 and bottom - top > 12:
        pen.rectangle((left + 2, top + 2, right - 2, bottom - 2), outline=(*_EDGE, 150))


def _centre(cell: tuple[int, int, int, int]) -> tuple[float, float]:
    return (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2


def _paste(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, panel: Image.Image, corner: tuple[int, int], lines: tuple[str, str]
) -> None:
    left, top = corner
    for number, text in enumerate(lines):
        pen.text((left, top + number * _LINE_PX), _fitting(text), fill=_INK, font=_font())
    sheet.paste(panel, (left, top + TEXT_PX))


def _legend(pen: ImageDraw.ImageDraw, top: int, stages: Sequence[Stage]) -> None:
    """Only of what is in the picture, as it looks there."""
    entries = (
        ("goes on", any(stage.kept for stage in stages), _PAPER, _KEPT),
        ("merged into the token with the dot", any(stage.merged for stage in stages), _MERGED, _MERGED),
        ("dropped in this stage", any(stage.dropped for stage in stages), _DROPPED, _DROPPED),
        ("had left before", any(GONE in stage.fates for stage in stages), _GONE, _GONE),
    )
    left = GAP_PX
    for text, there, colour, edge in entries:
        if there:
            pen.rectangle((left, top, left + _SWATCH_PX, top + _SWATCH_PX), fill=colour, outline=edge, width=2)
            pen.text((left + 20, top), text, fill=_INK, font=_font())
            left += 20 + round(_font().getlength(text)) + 2 * GAP_PX


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _fitting(text: str) -> str:
    """``text``, cut where it would be wider than a panel."""
    font = _font()
    if font.getlength(text) <= PANEL_PX:
        return text
    while text and font.getlength(text + "…") > PANEL_PX:
        text = text[:-1]
    return text + "…"
