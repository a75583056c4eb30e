"""A video through a whole cluster: HTTP and gRPC, a file and a list of frames, with the tokens of one engine in this process."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

from prismserve.client import Client, Video
from prismserve.cluster.served import ServedCluster
from prismserve.core.types import KVLayout
from prismserve.models.processing import ChatMessage, VideoSlot
from prismserve.router.calls import Call
from prismserve.router.config import RouterConfig
from prismserve.router.media import MediaReader
from prismserve.router.requests import ModelFacts, RequestBuilder
from prismserve.router.video import FrameChoice, VideoSource
from tests.models.matching import Ours, picture
from tests.models.zoo import SPECIMENS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
QUESTION = "What moves?"
TOKENS = 12
START_TIMEOUT_S = 600.0
SIZE_PX = (96, 64)
FILE_FPS, LIST_FPS = 2.0, 3.0
PLANS: dict[str, Any] = {"off": "off", "holitom": {"preset": "off", "visual": {"method": "holitom", "keep": 0.4}}}


def film(frames: int = 24, rate: int = 8) -> bytes:
    """A picture that slides over another, as an MP4 file."""
    back, front = picture(1, *SIZE_PX), picture(2, 32, 32)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *SIZE_PX, "yuv420p"
        for index in range(frames):
            shown = back.copy()
            shown.paste(front, (index * 2, 16))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(shown), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def stills(count: int = 5) -> tuple[bytes, ...]:
    """Frames as PNG files."""
    files = []
    for index in range(count):
        stream = io.BytesIO()
        shown: Image.Image = picture(3, *SIZE_PX).copy()
        shown.paste(picture(4, 32, 32), (index * 12, 8))
        shown.save(stream, "PNG")
        files.append(stream.getvalue())
    return tuple(files)


SOURCES = {
    "file": VideoSource(film(), "video", FrameChoice(fps=FILE_FPS)),
    "frames": VideoSource(stills(), "video", FrameChoice(fps=LIST_FPS)),
}


@dataclasses.dataclass
class Watching:
    """A checkpoint, the cluster that serves it, and the same checkpoint here."""

    name: str
    ours: Ours
    cluster: ServedCluster


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_onevision"])
def watching(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watching]:
    directory = tmp_path_factory.mktemp("video") / request.param
    directory.mkdir()
    SPECIMENS[request.param].save(directory, 0)
    with ServedCluster(
        ["--model", str(directory), "--fidelity-share", "0"], ready_timeout_s=START_TIMEOUT_S
    ) as cluster:
        yield Watching(request.param, Ours(directory), cluster)


async def colocated(watching: Watching, source: VideoSource, compression: Any) -> list[int]:
    """Tokens of one engine that prefills and decodes, given what a router makes of the call."""
    ours, config = watching.ours, RouterConfig()
    facts = ModelFacts(
        "here",
        b"m" * 32,
        ours.model.encoder_fingerprint,
        KVLayout("float32", 3, 2, 12, 16),
        ours.processor.max_model_len,
    )
    media = MediaReader(config)
    builder = RequestBuilder(ours.processor, facts, config, media, "off")
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    messages = (ChatMessage("user", (VideoSlot(0), QUESTION)),)
    try:
        prepared = await builder.build(Call(options, messages=messages, media=(source,), compression=compression))
    finally:
        builder.close()
        media.close()
    request = dataclasses.replace(prepared.request, request_id="here")
    return ours.run([request])["here"]


def over_http(watching: Watching, source: VideoSource, compression: Any, salt: str) -> tuple[str, dict[str, Any]]:
    """Text and our block of the usage."""

    def uri(kind: str, data: bytes | str) -> str:
        assert isinstance(data, bytes)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    content = source.content
    part: dict[str, Any]
    if isinstance(content, tuple):
        part = {"type": "video", "video": [uri("image/png", frame) for frame in content], "fps": LIST_FPS}
    else:
        part = {"type": "video_url", "video_url": {"url": uri("video/mp4", content), "fps": FILE_FPS}}
    extra = {"compression": compression, "cache_salt": salt, "ignore_eos": True}
    turn: Any = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
    with openai.OpenAI(
        base_url=watching.cluster.addresses.base_url, api_key="none", max_retries=0, timeout=120
    ) as client:
        done = client.chat.completions.create(
            model=watching.name, messages=[turn], temperature=0, max_tokens=TOKENS, extra_body=extra
        )
    assert done.usage is not None
    assert done.usage.model_extra is not None
    assert done.usage.completion_tokens == TOKENS
    return done.choices[0].message.content or "", done.usage.model_extra["prismserve"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", SOURCES)
async def test_both_front_doors_answer_with_the_tokens_of_one_engine(watching, source, plan) -> None:
    video, compression = SOURCES[source], PLANS[plan]
    expected = await colocated(watching, video, compression)
    content = list(video.content) if isinstance(video.content, tuple) else video.content
    with Client(watching.cluster.addresses.grpc) as sdk:
        answer = sdk.generate(
            QUESTION,
            videos=[Video(content, fps=video.choice.fps)],
            compression=compression,
            temperature=0,
            max_tokens=TOKENS,
            ignore_eos=True,
            # What the one door has cached must not answer for the other.
            cache_salt="grpc",
        )
    assert list(answer.token_ids) == expected
    text, report = over_http(watching, video, compression, "http")
    assert text == answer.text
    for usage in (report, dataclasses.asdict(answer.usage)):
        assert usage["videos"] == 1
        assert usage["prefill_worker"].startswith("prefill-")
        assert usage["decode_worker"].startswith("decode-")
        assert usage["kv_bytes_sent"] > 0
        assert (usage["visual_tokens_after"] < usage["visual_tokens_before"]) == (plan != "off")


async def test_the_answer_depends_on_the_video(watching) -> None:
    answers = {tuple(await colocated(watching, source, "off")) for source in SOURCES.values()}
    assert len(answers) == len(SOURCES)
