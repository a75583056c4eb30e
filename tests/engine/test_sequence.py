from __future__ import annotations

import torch

from prismserve.core.prompt import block_keys, elements
from prismserve.core.types import (
    CompressionPlan,
    MediaSegment,
    Prompt,
    Request,
    SamplingParams,
    TextSegment,
)
from prismserve.engine.image_cache import VisualTokens
from prismserve.engine.sequence import Sequence, Work

A, B = b"a" * 32, b"b" * 32
PROMPT = Prompt(
    (
        TextSegment((1, 2)),
        MediaSegment(0, A, 3, 10),
        TextSegment((5,)),
        MediaSegment(1, B, 2, 10),
        MediaSegment(2, A, 3, 10),
        TextSegment((6, 7)),
    )
)


def make(resume: tuple[int, ...] = ()) -> Sequence:
    request = Request("r", 0, b"n" * 32, b"n" * 32, PROMPT, (), SamplingParams(), CompressionPlan(), resume)
    return Sequence.create(1, request, Work.LOCAL, request.namespace, 4, 0.0)


def visual(base: float, positions: list[int]) -> VisualTokens:
    return VisualTokens(torch.full((len(positions), 2), base), torch.tensor(positions), 10)


def test_survivors_keep_raster_positions_and_text_goes_on_after_the_raw_image() -> None:
    sequence = make((8, 9))
    sequence.images = {A: visual(1.0, [0, 4, 9]), B: visual(2.0, [3, 5])}
    sequence.prepare_inputs()
    assert sequence.positions.tolist() == [0, 1, 2, 6, 11, 12, 16, 18, 23, 27, 32, 33, 34, 35, 36]
    assert sequence.ids.tolist() == [1, 2, 0, 0, 0, 5, 0, 0, 0, 0, 0, 6, 7, 8, 9]
    assert sequence.next_position == 37
    assert (sequence.length, sequence.prompt_tokens) == (15, 13)


def test_embeddings_of_any_range_come_with_their_rows() -> None:
    sequence = make()
    sequence.images = {A: visual(1.0, [0, 4, 9]), B: visual(2.0, [3, 5])}
    rows, pieces = sequence.embeds(3, 9)
    assert rows.tolist() == [0, 1, 3, 4, 5]
    assert torch.cat(pieces)[:, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 1.0]
    assert sequence.embeds(0, 2) == (None, [])


def test_images_within_the_cached_prefix_are_not_missing_and_each_is_named_once() -> None:
    sequence = make()
    assert [span.segment.key for span in sequence.missing_images(0)] == [A, B]
    assert [span.segment.key for span in sequence.missing_images(6)] == [B, A]
    assert sequence.missing_images(11) == []


def test_keys_grow_with_generated_tokens_as_if_they_had_been_in_the_prompt() -> None:
    sequence = make()
    for token in (8, 9, 10, 11):
        sequence.append(token, 4)
    slots = elements(PROMPT, (8, 9, 10, 11))
    assert sequence.keys == block_keys(b"n" * 32, slots, 4)
    assert sequence.slots == slots


def test_positions_with_three_components_and_a_span_of_their_own() -> None:
    prompt = Prompt((TextSegment((1, 2)), MediaSegment(0, A, 2, 6, position_span=3), TextSegment((5, 6))))
    request = Request("r", 0, b"n" * 32, b"n" * 32, prompt, (), SamplingParams(), CompressionPlan(), (7,))
    sequence = Sequence.create(1, request, Work.LOCAL, request.namespace, 4, 0.0)
    grid = torch.tensor([[0, 0], [0, 1], [2, 1]])
    sequence.images = {A: VisualTokens(torch.zeros(2, 2), grid, 6)}
    sequence.prepare_inputs()
    assert sequence.positions.tolist() == [[0, 1, 2, 2, 5, 6, 7], [0, 1, 2, 3, 5, 6, 7], [0, 1, 4, 3, 5, 6, 7]]
    assert (sequence.next_position, sequence.context_tokens) == (8, 11)
    sequence.images = {}
    sequence.prepare_inputs()
    assert sequence.positions.tolist() == [0, 1, -1, -1, 5, 6, 7], "all slots of the image are cached"


def test_a_chunk_that_would_cut_an_image_ends_before_it_or_with_it() -> None:
    sequence = make()
    assert sequence.whole_images(0, 1) == 1
    assert sequence.whole_images(0, 3) == 2, "before the image in slots 2 to 5"
    assert sequence.whole_images(2, 1) == 3, "with it"
    assert sequence.whole_images(3, 1) == 2, "with the rest of it, where some is cached"
    assert sequence.whole_images(0, 5) == 5
    assert sequence.whole_images(5, 5) == 3
    assert sequence.images_within(3, 7) == ((2, 5), (6, 8))
