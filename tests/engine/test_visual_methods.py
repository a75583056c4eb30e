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


ORDERED = ["cls_topk", "divprune", "dpp", "random"]


def under(workshop, name, keep, index=0, **changes):
    spec = loader.normalise(loader.visual_method(name), {"keep": keep}, "compression.visual")
    question = workshop.questions(index)[0]
    request = workshop.request(f"{name}{keep}", question, [index], visual=CompressionPlan(visual=spec), max_tokens=8)
    return dataclasses.replace(request, **changes)


@pytest.mark.parametrize("name", ORDERED)
def test_a_smaller_budget_of_a_nested_method_is_derived_and_answers_as_if_encoded(name, workshop):
    large, small = under(workshop, name, 98), under(workshop, name, 49)
    engine, plain = workshop.engine(), workshop.engine(derive_images=False)
    workshop.answers(engine, [large])
    workshop.answers(plain, [large])
    assert workshop.answers(engine, [small]) == workshop.answers(plain, [small])
    assert (engine.stats().encoded_images, engine.stats().derived_images) == (1, 1)
    assert (plain.stats().encoded_images, plain.stats().derived_images) == (2, 0)
    key = next(small.prompt.media_segments()).key
    derived, encoded = engine.image_cache.get(key), plain.image_cache.get(key)
    assert torch.equal(derived.positions, encoded.positions)
    torch.testing.assert_close(derived.embeds, encoded.embeds)


def test_nothing_is_derived_for_another_tenant_another_method_or_a_larger_budget(workshop):
    engine = workshop.engine()
    workshop.answers(engine, [under(workshop, "cls_topk", 49)])
    other_salt = under(workshop, "cls_topk", 24, namespace=b"o" * 32, wire_namespace=b"o" * 32)
    others = [other_salt, under(workshop, "random", 24), under(workshop, "cls_topk", 98)]
    for count, request in enumerate(others, start=2):
        workshop.answers(engine, [request])
        assert (engine.stats().encoded_images, engine.stats().derived_images) == (count, 0)
