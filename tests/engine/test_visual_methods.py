"""Visual methods inside an engine: what reaches the cache of embeddings under which question."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prismserve.compression import loader
from prismserve.compression.base import Need, Share
from prismserve.core.types import CompressionPlan
from prismserve.models.processing import ChatMessage

METHODS = [
    name
    for name in loader.names("visual")
    if loader.visual_method(name).training_free and Need.TEXT_TOWER not in loader.visual_method(name).needs
]


def published(workshop, name, question):
    """Embeddings and positions one question leaves in the image cache of an engine of its own."""
    params = {} if name == "none" else {"keep": 20}
    plan = CompressionPlan(visual=loader.normalise(loader.visual_method(name), params, "compression.visual"))
    request = workshop.request("r", question, [0], visual=plan, max_tokens=1)
    scoring = workshop.processor.scoring_ids([ChatMessage("user", (question,))])
    engine = workshop.engine()
    workshop.answers(engine, [dataclasses.replace(request, scoring_token_ids=scoring)])
    held = engine.image_cache.get(next(request.prompt.media_segments()).key)
    assert held is not None
    return held


@pytest.mark.parametrize("name", METHODS)
def test_two_questions_publish_the_same_bytes_if_and_only_if_the_method_says_so(name, workshop):
    first = published(workshop, name, "How many red shapes are there?")
    other = published(workshop, name, "Read the word.")
    same = torch.equal(first.embeds, other.embeds) and torch.equal(first.positions, other.positions)
    assert same == (loader.visual_method(name).share is Share.AGNOSTIC)


@pytest.mark.parametrize("name", METHODS)
def test_survivors_keep_their_places(name, workshop):
    held = published(workshop, name, "Read the word.")
    assert held.raw_tokens == 196
    assert len(held.positions) == len(held.embeds) == (196 if name == "none" else 20)
    assert (held.positions.diff() > 0).all()
    assert held.positions[-1] < 196
