"""Methods for videos inside an engine, from frames to tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prismserve.compression import loader
from prismserve.compression.base import Share
from prismserve.core.types import CompressionPlan
from prismserve.engine.config import EngineConfig
from prismserve.engine.engine import Engine
from prismserve.engine.questioning import QuestionAttention
from prismserve.models.processing import ChatMessage
from tests.models.dense_backend import DenseBackend
from tests.models.matching import Case, Ours, clip
from tests.models.zoo import SPECIMENS

METHODS = ("holitom", "dycoke", "fastvid", "chatunivi", "longvu", "dynamicvlm", "llamavid", "vqtoken", "flexselect")
VIDEO = clip(4, 70, 40, (0, 9, 21, 30, 44))
TOKENS = 6


@pytest.fixture(scope="module", params=["qwen3_vl", "llava_onevision"])
def ours(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    SPECIMENS[request.param].save(path, 0)
    return Ours(path)


def answered(ours, plan, question="What moves?"):
    """Tokens of a request about a short video, and what it left in the image cache of an engine of its own."""
    request = ours.request("r", Case(question, videos=(VIDEO,)), TOKENS, plan)
    scoring = ours.processor.scoring_ids([ChatMessage("user", (question,))])
    engine = Engine(ours.model, ours.processor, EngineConfig(kv_cache_bytes=32 << 20, max_model_len=1024))
    engine.submit(dataclasses.replace(request, scoring_token_ids=scoring), worker="local")
    tokens = []
    while engine.has_work:
        for output in engine.step():
            assert not output.error
            tokens += output.token_ids
    return tokens, engine.image_cache.get(next(request.prompt.media_segments()).key)


def plan(name, **params):
    return CompressionPlan(visual=loader.normalise(loader.visual_method(name), params, "compression.visual"))


def test_keeping_every_token_answers_as_without_compression(ours):
    expected, raw = answered(ours, plan("none"))
    for name in METHODS:
        tokens, held = answered(ours, plan(name, keep=1.0))
        assert tokens == expected, name
        assert torch.equal(held.embeds, raw.embeds), name


@pytest.mark.parametrize("name", METHODS)
def test_a_reduced_video_keeps_places_and_depends_on_the_question_only_if_it_says_so(ours, name):
    layout = ours.processor.video_layout(70, 40, VIDEO.times)
    _, held = answered(ours, plan(name, keep=5))
    _, other = answered(ours, plan(name, keep=5), "Read the longer word in it.")
    assert len(held.embeds) == layout.kept(5)
    places = torch.arange(layout.tokens)[None] if layout.positions is None else layout.positions
    ours_at = held.positions.reshape(places.shape[0], -1)
    assert {tuple(at) for at in ours_at.T.tolist()} <= {tuple(at) for at in places.T.tolist()}
    if loader.visual_method(name).share is Share.AGNOSTIC:
        assert torch.equal(held.embeds, other.embeds)


@pytest.mark.parametrize("depth", [0.0, 0.5, 0.99])
def test_the_question_sees_what_attention_written_out_gives(ours, depth):
    video = ours.processor.preprocess_video(VIDEO.frames, VIDEO.times)
    (encoded,) = ours.model.encode_images([video], frozenset())
    decoder, layout = ours.model.decoder, video.layout
    media, text = ours.model.project(encoded.tokens), decoder.embed(torch.tensor([5, 9, 17, 3]))
    asked = QuestionAttention(decoder, layout, media, encoded.deepstack, text)
    slots = layout.tokens
    if layout.positions is None:
        positions = torch.arange(slots + 4)
    else:
        positions = torch.cat((layout.positions, (layout.position_span + torch.arange(4)).expand(3, 4)), 1)
    rotary, scale = decoder.rotary(positions), decoder.config.head_dim**-0.5
    x, backend = torch.cat((media, text)), DenseBackend(decoder.config.layers, scale)
    reference = int(depth * decoder.config.layers)
    for index in range(reference):
        x = decoder.layer(index, x, rotary, backend)
        if encoded.deepstack is not None and index < len(encoded.deepstack):
            x = torch.cat((x[:slots] + encoded.deepstack[index], x[slots:]))
    q, k, _ = decoder.project(reference, x, rotary)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    raster = torch.arange(slots) if layout.raster is None else layout.raster
    rows = [
        torch.einsum("hd,shd->hs", q[slots + i], k[: slots + i + 1]).mul(scale).softmax(-1)[:, raster] for i in range(4)
    ]
    rows = torch.stack(rows).flatten(0, 1)
    assert torch.allclose(asked(depth, "mean"), rows.mean(0), atol=1e-6)
    assert torch.allclose(asked(depth, "max"), rows.amax(0), atol=1e-6)
    assert not QuestionAttention(decoder, layout, media, None, text[:0])(depth, "mean").any()


INSIDE = {"fastv": {"keep": 5}, "framefusion": {"cost": 0.3}, "sttm": {"spatial": 0.5}, "holitom_inner": {"keep": 5}}
UNCHANGED = {"fastv": {"keep": 1.0}, "framefusion": {"cost": 1.0}, "sttm": {"spatial": 1.1, "temporal": 1.1}}


def inside(name, **params):
    method = loader.prefill_method(name)
    return CompressionPlan(
        visual=loader.normalise(loader.visual_method("none"), {}, "compression.visual"),
        prefill=loader.normalise(method, params, "compression.prefill"),
    )


@pytest.fixture(scope="module", params=["llava_onevision", "internvl"])
def closed(request, tmp_path_factory):
    """A model that puts a learned token behind the last frame, or text between frames."""
    path = tmp_path_factory.mktemp("closed")
    SPECIMENS[request.param].save(path, 0)
    return Ours(path)


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_stands_behind_the_frames_is_no_matter_to_a_prefill_method_that_keeps_all(closed, name):
    assert answered(closed, inside(name, **UNCHANGED[name]))[0] == answered(closed, plan("none"))[0]


@pytest.mark.parametrize("name", INSIDE)
def test_a_prefill_method_chooses_among_the_tokens_of_the_frames_and_leaves_the_others(closed, name, monkeypatch):
    layout = closed.processor.video_layout(70, 40, VIDEO.times)
    assert layout.tokens > layout.raster_tokens
    seen = []
    chosen = loader.prefill_method(name)
    original = type(chosen).plan

    def plan_and_look(self, cut, inputs, config):
        seen.append((inputs.tokens, inputs.places.tolist(), inputs.grids))
        return original(self, cut, inputs, config)

    monkeypatch.setattr(type(chosen), "plan", plan_and_look)
    answered(closed, inside(name, **INSIDE[name]))
    tokens, places, grids = seen[0]
    assert tokens == layout.raster_tokens == sum(grid.tokens for grid in grids)
    assert places == list(range(layout.raster_tokens))


def test_a_prefill_method_behind_a_visual_one_sees_where_the_survivors_were(closed, monkeypatch):
    seen = []
    method = loader.prefill_method("fastv")
    original = type(method).plan

    def plan_and_look(self, cut, inputs, config):
        seen.append(inputs.places.tolist())
        return original(self, cut, inputs, config)

    monkeypatch.setattr(type(method), "plan", plan_and_look)
    both = dataclasses.replace(inside("fastv", keep=2), visual=plan("uniform", keep=5).visual)
    _, held = answered(closed, both)
    raster = closed.processor.video_layout(70, 40, VIDEO.times).raster.tolist()
    assert seen == [[raster.index(at) for at in held.positions.tolist() if at in raster]]
    assert len(seen[0]) == 5
