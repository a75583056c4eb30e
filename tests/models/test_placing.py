from __future__ import annotations

import pytest

from prismserve.core.errors import InvalidRequestError
from prismserve.models.placing import Framed, ImageSlot, VideoSlot, place, slotted

IMAGES = [Framed(ImageSlot(0), 7, "[7]"), Framed(ImageSlot(2), 7, "[7]")]
VIDEO = Framed(VideoSlot(1), 7, "two frames [7]\n")


def test_media_stand_where_their_placeholders_do_in_the_order_of_each_kind():
    text, order = place("<v> a <i> b <i>", {"<i>": IMAGES, "<v>": [VIDEO]})
    assert text == "two frames [7]\n a [7] b [7]"
    assert order == [VIDEO, *IMAGES]
    assert slotted([7, 1, 7, 2, 7], order) == [VideoSlot(1), 1, ImageSlot(0), 2, ImageSlot(2)]


def test_what_is_put_in_is_not_searched_again():
    text, _ = place("<i>", {"<i>": [Framed(ImageSlot(0), 7, "<i><v>")]})
    assert text == "<i><v>"


def test_kinds_may_have_tokens_of_their_own():
    clip = Framed(VideoSlot(1), 8, "[8]")
    assert slotted([8, 7, 5], [IMAGES[0], clip]) == [VideoSlot(1), ImageSlot(0), 5]


@pytest.mark.parametrize(("rendered", "placed"), [("<i>", 1), ("<i><i><i>", 3), ("", 0)])
def test_a_template_that_places_more_or_fewer_is_told_so(rendered, placed):
    with pytest.raises(InvalidRequestError, match=f"places {placed} of 2 images"):
        place(rendered, {"<i>": IMAGES})


def test_a_token_that_stands_elsewhere_too_is_refused():
    with pytest.raises(InvalidRequestError, match="places 3 of 2 images"):
        slotted([7, 7, 7], IMAGES)
