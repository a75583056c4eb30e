"""A router asks a real worker, beside requests that are served."""

from __future__ import annotations

import asyncio
import io

import pytest
import pytest_asyncio

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import Role
from prismserve.models.processing import ChatMessage, ImageSlot
from prismserve.models.reference.scenes import make_scene
from prismserve.router.calls import Call
from prismserve.router.media import ImageSource

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLAN = {"visual": {"method": "visionzip", "keep": 98}, "prefill": {"method": "pyramiddrop", "keep": 24}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(open_world):
    made = open_world()
    await made.add(Role.MIXED)
    await made.open_router()
    return made


def call(compression, scene=7):
    stream = io.BytesIO()
    make_scene(scene)[0].save(stream, "PNG")
    return Call(
        options={},
        messages=(ChatMessage("user", (ImageSlot(0), "What is in the image?")),),
        media=(ImageSource(stream.getvalue(), "image"),),
        compression=compression,
    )


async def test_what_is_explained_is_what_is_served_and_nothing_is_left_behind(world):
    (found, png), answer = await asyncio.gather(
        world.router.explain(call(PLAN), drawn=True), world.ask(7, "What is in the image?", PLAN)
    )
    visual, *cuts = found["stages"]
    assert (visual["method"], visual["kept"]) == ("visionzip", 98)
    assert tuple(stage["kept"] for stage in cuts) == answer.usage.visual_tokens_by_cut
    assert png.startswith(b"\x89PNG")
    (worker,) = world.workers
    stats = await worker.on_engine(lambda engine: engine.stats())
    assert (stats.running, stats.waiting) == (0, 0)


async def test_what_cannot_be_explained_says_so(world):
    with pytest.raises(InvalidRequestError, match="every visual token is kept"):
        await world.router.explain(call("off"), drawn=False)
    await world.router.explain(call("prism"), drawn=False)
