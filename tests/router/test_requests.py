"""What a request asks of images, against what the model's images allow."""

from __future__ import annotations

import dataclasses
import io

import pytest

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import KVLayout
from prismserve.models.processing import ChatMessage, ImageSlot, Processor
from prismserve.router.calls import Call
from prismserve.router.config import RouterConfig
from prismserve.router.media import ImageSource, MediaReader
from prismserve.router.requests import ModelFacts, RequestBuilder
from tests.models.matching import picture
from tests.models.zoo import SPECIMENS


@pytest.fixture
def build(tmp_path):
    def make(family, images=1, compression=None, default="balanced", question="What is it?"):
        directory = tmp_path / family
        SPECIMENS[family].save(directory, 0)
        processor, config = Processor.from_directory(directory), RouterConfig()
        facts = ModelFacts("tiny", b"m" * 32, b"e" * 32, KVLayout("float32", 3, 2, 12, 16), processor.max_model_len)
        builder = RequestBuilder(processor, facts, config, MediaReader(config), default)
        parts = (*(ImageSlot(index) for index in range(images)), question)
        sources = tuple(ImageSource(png(index), f"messages[0].content[{index}]") for index in range(images))
        call = Call({}, messages=(ChatMessage("user", parts),), media=sources, compression=compression)
        return builder.build(call)

    return make


def png(seed):
    buffer = io.BytesIO()
    picture(seed, 70, 40).save(buffer, "PNG")
    return buffer.getvalue()


async def test_a_reduction_that_would_break_the_image_is_refused(build):
    with pytest.raises(InvalidRequestError, match="structure that a reduction would break") as error:
        await build("llava_next", compression="dpp")
    assert error.value.field == "compression.visual"


async def test_a_method_that_needs_what_the_encoder_does_not_show_is_refused(build):
    with pytest.raises(InvalidRequestError, match="encoder gives no cls_attention, encoder_keys"):
        await build("qwen2_vl", compression="visionzip")


@pytest.mark.parametrize(
    ("family", "visual"), [("llava", "visionzip"), ("qwen2_vl", "dpp"), ("gemma3", "dpp"), ("llava_next", "none")]
)
@pytest.mark.parametrize("asked", [{"compression": "balanced"}, {"default": "balanced"}])
async def test_a_preset_acts_as_strongly_as_the_family_allows(build, family, visual, asked):
    request = (await build(family, **{"default": "off", **asked})).request
    (segment,) = request.prompt.media_segments()
    assert (segment.tokens < segment.raw_tokens) == (visual != "none")
    plan = request.compression
    assert (plan.preset, plan.visual.name, plan.wire.name) == ("balanced", visual, "int8")


@pytest.mark.parametrize(("family", "method"), [("llava_next", "dpp"), ("qwen2_vl", "visionzip")])
async def test_a_default_method_that_cannot_act_is_left_out(build, family, method):
    request = (await build(family, default=method)).request
    (segment,) = request.prompt.media_segments()
    assert segment.tokens == segment.raw_tokens
    assert (request.compression.visual.name, request.compression.preset) == ("none", "custom")


async def test_a_method_that_can_act_does(build):
    request = (await build("qwen2_vl", compression={"visual": {"method": "uniform", "keep": 3}})).request
    (segment,) = request.prompt.media_segments()
    assert segment.tokens == 3 < segment.raw_tokens
    assert segment.position_span == segment.positions < segment.raw_tokens


async def test_without_images_any_plan_is_taken(build):
    assert (await build("llava_next", images=0, compression="visionzip")).request.compression.visual.name == "visionzip"


async def test_an_image_among_others_is_laid_out_and_keyed_as_one_of_several(build):
    alone = (await build("llava_onevision", default="off")).request.prompt
    among = (await build("llava_onevision", images=2, default="off")).request.prompt
    first, other = next(alone.media_segments()), next(among.media_segments())
    assert (first.tokens, other.tokens) == (52, 17)
    assert first.key != other.key


async def test_a_method_that_asks_about_the_question_is_keyed_by_it(build):
    asked = [
        (await build("llava", compression="cdpruner", question=text)).request for text in ("red?", "red?", "blue?")
    ]
    first, again, other = (next(request.prompt.media_segments()).key for request in asked)
    assert first == again != other
    assert asked[0].scoring_token_ids
    assert asked[0].scoring_token_ids != asked[2].scoring_token_ids


async def test_a_method_that_does_not_is_shared_by_all_questions(build):
    asked = [(await build("llava", compression="divprune", question=text)).request for text in ("red?", "blue?")]
    first, other = (next(request.prompt.media_segments()).key for request in asked)
    assert first == other
    assert not asked[0].scoring_token_ids


@pytest.fixture
def builder(processor, facts):
    config = RouterConfig()
    media = MediaReader(config)
    made = RequestBuilder(
        processor, facts, config, media, "off", lambda preset: "balanced" if preset == "turbo" else preset
    )
    yield made
    made.close()
    media.close()


def asked(compression, **options):
    return Call(
        {"temperature": 0.7, "seed": 3, **options},
        messages=(ChatMessage("user", (ImageSlot(0), "What is left?")),),
        media=(ImageSource(png(0), "image"),),
        compression=compression,
    )


def slim(call):
    return dataclasses.replace(call, options={}, media=(), compression=None)


@pytest.mark.parametrize("compression", ["quality", "cdpruner", {"visual": "prism", "prefill": "fastv"}])
async def test_a_request_built_again_has_the_keys_and_namespaces_it_had_and_is_greedy(builder, compression):
    call = asked(compression, max_tokens=40)
    first = await builder.build(call)
    again = await builder.again(slim(call), first, None, 32)
    assert (again.keys, again.wire_keys, again.image_keys) == (first.keys, first.wire_keys, first.image_keys)
    assert again.request.prompt == first.request.prompt
    assert again.request.scoring_token_ids == first.request.scoring_token_ids
    assert again.request.request_id != first.request.request_id
    sampling = again.request.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.logprobs) == (0.0, 32, 20)


async def test_a_request_built_again_under_off_is_what_off_would_have_been(builder):
    call = asked("cdpruner", max_tokens=5)
    again = await builder.again(slim(call), await builder.build(call), "off", 32)
    exact = await builder.build(dataclasses.replace(call, compression="off"))
    assert (again.keys, again.image_keys, again.request.namespace) == (
        exact.keys,
        exact.image_keys,
        exact.request.namespace,
    )
    assert again.request.sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("compression", "served", "told"),
    [
        ("turbo", "balanced", "turbo"),
        ({"preset": "turbo"}, "balanced", "turbo"),
        ({"preset": "turbo", "visual": {"keep": 0.125}}, "turbo", ""),
        ("quality", "quality", ""),
    ],
)
async def test_a_milder_preset_is_served_only_in_place_of_one_that_was_named_alone(builder, compression, served, told):
    prepared = await builder.build(asked(compression))
    assert (prepared.request.compression.preset, prepared.preset_asked) == (served, told)
