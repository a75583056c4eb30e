"""Videos as files and as frames: what is decoded, and what is refused before, while and after."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from prismserve.core.errors import InvalidRequestError
from prismserve.core.types import FrameTimes
from prismserve.router.calls import chat_call
from prismserve.router.config import RouterConfig
from prismserve.router.media import MediaReader
from prismserve.router.tenants import EVERYONE
from prismserve.router.video import FrameChoice, VideoSource, clip_of, evenly, scaled_size
from tests.router.scripted import png

FIELD = "messages[0].content[0].video_url.url"


def movie(kind="mp4", frames=30, fps=10, size=(64, 48)):
    """Frames that get brighter, in a file made here."""
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream({"mp4": "mpeg4", "webm": "libvpx-vp9"}[kind], rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), index * 200 // frames, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


async def read(content, *, config=None, **choice):
    reader = MediaReader(config or RouterConfig())
    try:
        (item,) = await reader.read([VideoSource(content, FIELD, FrameChoice(**choice))])
    finally:
        reader.close()
    return item


async def refusal(content, *, config=None, **choice):
    with pytest.raises(InvalidRequestError) as caught:
        await read(content, config=config, **choice)
    assert caught.value.field.startswith(FIELD)
    return caught.value.message


@pytest.mark.parametrize("kind", ["mp4", "webm"])
async def test_frames_are_taken_at_the_rate_or_number_asked_for(kind):
    data = movie(kind)
    for choice, count in (
        ({}, 6),
        ({"fps": 1}, 3),
        ({"num_frames": 5}, 5),
        ({"fps": 200}, 30),
        ({"num_frames": 64}, 30),
    ):
        item = await read(data, **choice)
        assert (item.frames, item.width_px, item.height_px) == (count, 64, 48)
        assert item.times.rate == pytest.approx(count / 3, rel=0.02)
        frames = np.frombuffer(item.data, np.uint8).reshape(count, 48, 64, 3)
        expected = [index * 200 // 30 for index in evenly(30, count)]
        assert np.abs(frames.mean((1, 2, 3)) - expected).max() < 6
        assert item.times.seconds == pytest.approx([index / 10 for index in evenly(30, count)], abs=0.002)


async def test_the_same_file_gives_the_same_bytes_and_is_decoded_once():
    data, reader = movie(), MediaReader(RouterConfig())
    first = await reader.read([VideoSource(data, FIELD)])
    assert await reader.read([VideoSource(data, FIELD)]) == first
    assert await reader.read([VideoSource(data, FIELD, FrameChoice(num_frames=2))]) != first
    assert (reader.decoded_videos, reader.remembered_videos) == (2, 1)
    reader.close()
    assert await read(data) == first[0]


async def test_large_frames_are_scaled_down_to_their_share():
    item = await read(movie(size=(128, 96)), num_frames=4, config=RouterConfig(max_video_bytes=4 * 3 * 3000))
    assert len(item.data) <= 4 * 3 * 3000
    assert (item.width_px, item.height_px) == scaled_size(128, 96, 3000) == (63, 47)


def test_the_hash_tells_shapes_and_times_apart():
    samples = np.arange(9000, dtype=np.uint32).astype(np.uint8)
    times = FrameTimes((0.0,), 2.0)
    wide, tall = (clip_of([samples.reshape(shape)], times) for shape in ((30, 100, 3), (100, 30, 3)))
    assert wide.data == tall.data
    slower = clip_of([samples.reshape(30, 100, 3)], FrameTimes((0.0,), 1.0))
    assert len({wide.pixel_hash, tall.pixel_hash, slower.pixel_hash}) == 3


async def test_a_list_of_frames_is_taken_as_it_is():
    item = await read((png(seed=1), png(seed=2), png(seed=3, mode="L")), fps=4)
    assert item.times == FrameTimes((0.0, 0.25, 0.5), 4.0)
    expected = np.asarray(Image.open(io.BytesIO(png(seed=2))))
    assert np.array_equal(np.frombuffer(item.data, np.uint8).reshape(3, 24, 32, 3)[1], expected)


@pytest.mark.parametrize(
    ("content", "choice", "reason"),
    [
        (b"not a video at all", {}, "only MP4 and WebM"),
        (b"\x1a\x45\xdf\xa3" + b"matroska" * 8, {}, "only MP4 and WebM"),
        (b"\0\0\0\x18ftypmp42" + bytes(64), {}, "damaged"),
        ("http://example.com/a.mp4", {}, "video URLs are off"),
        ("data:image/png;base64,AAAA", {}, "must start with data:video/"),
        ("data:video/mp4;base64,!!", {}, "valid base64"),
        ((), {}, "at least one frame"),
        ((b"x",) * 10_000, {}, "10000 frames, at most 64"),
        ((png(), png(40, 24)), {}, "all must have one size"),
        ((png(), b"nothing"), {}, "not an image"),
        ((png(),), {"num_frames": 3}, "num_frames is for video files"),
        (b"", {"num_frames": 65}, "between 1 and 64"),
        (b"", {"fps": 0.0}, "above 0"),
        (b"", {"fps": float("nan")}, "above 0"),
        (b"", {"fps": 1.0, "num_frames": 2}, "not both"),
    ],
)
async def test_what_is_not_a_video_is_refused(content, choice, reason):
    if reason == "damaged":
        pytest.importorskip("av")
    assert reason in await refusal(content, **choice)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_video_file_bytes": 100}, "at most 100 are allowed"),
        ({"max_video_source_frames": 29}, "more than 29 frames"),
        ({"max_image_side_px": 50}, "64x48 pixels; no side may have more than 50"),
        ({"max_image_pixels": 3000}, "at most 3000 pixels"),
        ({"video_timeout_s": 1e-9}, "which is the limit; send a shorter video"),
    ],
)
async def test_every_limit_is_named_when_a_file_exceeds_it(limits, reason):
    assert reason in await refusal(movie(), config=RouterConfig(**limits))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
async def test_a_truncated_file_is_refused(share):
    data = movie()
    message = await refusal(data[: int(len(data) * share)])
    assert "damaged" in message or "truncated" in message


def body(part):
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What moves?"}]}]}


def test_the_three_ways_to_write_a_video_are_read():
    uri = "data:video/mp4;base64,AAAA"
    (source,) = chat_call(
        body({"type": "video_url", "video_url": {"url": uri, "fps": 3}}), RouterConfig(), EVERYONE
    ).media
    assert (source.content, source.choice) == (uri, FrameChoice(fps=3.0))
    picture = base64.b64encode(png()).decode()
    frames = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{picture},{picture}"}}
    (source,) = chat_call(body(frames), RouterConfig(), EVERYONE).media
    assert source.content == (f"data:image/jpeg;base64,{picture}",) * 2
    (source,) = chat_call(body({"type": "video", "video": [uri, uri], "fps": 1}), RouterConfig(), EVERYONE).media
    assert (source.content, source.choice) == ((uri, uri), FrameChoice(fps=1.0))


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ({"type": "video_url", "video_url": 3}, "video_url.url"),
        ({"type": "video_url", "video_url": {"url": "data:", "fps": True}}, "video_url.fps"),
        ({"type": "video_url", "video_url": {"url": "data:", "num_frames": 2.5}}, "video_url.num_frames"),
        ({"type": "video", "video": "data:"}, "video"),
        ({"type": "video", "video": [1]}, "video[0]"),
    ],
)
def test_a_malformed_video_part_is_refused_by_field(part, field):
    with pytest.raises(InvalidRequestError) as caught:
        chat_call(body(part), RouterConfig(), EVERYONE)
    assert caught.value.field == f"messages[0].content[0].{field}"


async def test_a_model_without_video_answers_400(start_cluster):
    cluster = await start_cluster()
    picture = "data:image/png;base64," + base64.b64encode(png()).decode()
    answer = await cluster.http.post("/v1/chat/completions", json=body({"type": "video", "video": [picture]}))
    assert answer.status_code == 400
    assert "does not take videos" in answer.json()["error"]["message"]
