"""Every preset can be used on every family that sees: on small random checkpoints, through the router's own requests."""

from __future__ import annotations

import dataclasses
import io

import pytest
from PIL import Image

from prismserve.compression import presets
from prismserve.compression.presets_table import FAMILIES, PRESETS, allowed
from prismserve.core.types import KVLayout, MediaKind
from prismserve.models.processing import ChatMessage, ImageSlot, VideoSlot
from prismserve.router.calls import Call
from prismserve.router.config import RouterConfig
from prismserve.router.media import ImageSource, MediaReader, VideoSource
from prismserve.router.requests import ModelFacts, RequestBuilder
from tests.models.matching import Ours, clip, picture
from tests.models.zoo import SEEING, SPECIMENS, WATCHING

TOKENS = 4


@pytest.fixture(scope="module", params=SEEING)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def ours(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    SPECIMENS[family].save(path, 0)
    return Ours(path)


def file(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def media_of(kind):
    """A picture, or the frames of a clip."""
    if kind is MediaKind.IMAGE:
        return ImageSlot(0), ImageSource(file(picture(1, 70, 40), "PNG"), "image")
    frames = [Image.fromarray(frame) for frame in clip(4, 70, 40, (0, 9, 21, 30)).frames]
    return VideoSlot(0), VideoSource(tuple(file(frame, "PNG") for frame in frames), "video")


async def built(ours, kind, compression):
    slot, source = media_of(kind)
    config = RouterConfig()
    layout = KVLayout("float32", 3, 2, 12, 16)
    facts = ModelFacts("tiny", b"m" * 32, ours.model.encoder_fingerprint, layout, ours.processor.max_model_len)
    media = MediaReader(config)
    builder = RequestBuilder(ours.processor, facts, config, media, "off")
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    call = Call(
        options, messages=(ChatMessage("user", (slot, "What is it?")),), media=(source,), compression=compression
    )
    try:
        return (await builder.build(call)).request
    finally:
        builder.close()
        media.close()


@pytest.mark.parametrize("kind", MediaKind)
@pytest.mark.parametrize("name", [name for name in presets.names() if name != "off"])
async def test_every_preset_is_answered_and_keeps_what_the_table_says(ours, family, kind, name):
    if kind is MediaKind.VIDEO and family not in WATCHING:
        pytest.skip("takes no videos")
    request = await built(ours, kind, name)
    entry = FAMILIES[ours.processor.family_name]
    expected = PRESETS[entry.images if kind is MediaKind.IMAGE else entry.videos][name]
    plan = request.compression
    assert (plan.preset, plan.visual.name, plan.wire.name) == (name, expected.visual, expected.codec)
    (segment,) = request.prompt.media_segments()
    assert (segment.tokens < segment.raw_tokens) == (expected.visual != "none")
    assert len(ours.run([dataclasses.replace(request, request_id="r")])["r"]) == TOKENS


@pytest.mark.parametrize("kind", MediaKind)
def test_the_table_says_what_the_encoder_of_the_family_gives(ours, family, kind):
    entry = FAMILIES[ours.processor.family_name]
    if kind is MediaKind.IMAGE:
        assert entry.images is allowed(ours.processor.reducible_of(kind))
    elif family in WATCHING:
        assert entry.videos is allowed(ours.processor.reducible_of(kind))
    else:
        assert not ours.processor.supports_videos
