"""Asking both front doors, and judging what an answer gives away and what a request costs in memory."""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc

CHAT = "/v1/chat/completions"
GROWTH_BYTES_MAX = 64 << 20
_TELLING = re.compile(
    r"Traceback|\bFile \"|\.py\b|0x[0-9a-f]{6,}|\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<![\w:/])/(?:home|root|work|tmp|usr|proc|etc|var)\b"
)
GRPC_OF_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def assert_tells_nothing(text: str, sent: str = "") -> None:
    """No path, address or traceback, unless the caller said it first."""
    found = [match for match in _TELLING.findall(text) if match not in sent]
    assert not found, (found, text)


@dataclass
class Answer:
    """One answer of either door in the words of HTTP."""

    status: int
    field: str
    message: str


def user(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(parts)}], **fields}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(data: bytes, mime: str = "image/png") -> dict[str, Any]:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def http(cluster: Any, body: dict[str, Any] | bytes, **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply: httpx.Response = await cluster.http.post(CHAT, content=content, headers=headers)
    assert_tells_nothing(reply.text)
    if reply.status_code == 200:
        return Answer(200, "", reply.json()["choices"][0]["message"]["content"])
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return Answer(reply.status_code, error["param"] or "", error["message"])


async def over_grpc(cluster: Any, request: pb.GenerateRequest, *, send_bytes_max: int = 256 << 20) -> Answer:
    options = [("grpc.max_send_message_length", send_bytes_max), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(cluster.grpc_address, options=options) as channel:
        try:
            replies = [reply async for reply in rpc.InferenceStub(channel).Generate(request, timeout=20)]
        except grpc.aio.AioRpcError as error:
            assert_tells_nothing(error.details() or "")
            status = {code: number for number, code in reversed(GRPC_OF_HTTP.items())}.get(error.code(), 500)
            return Answer(status, dict(error.trailing_metadata()).get("prismserve-field", ""), error.details())
    return Answer(200, "", "".join(reply.text for reply in replies))


def picture_request(*pictures: bytes, **fields: Any) -> pb.GenerateRequest:
    content = [pb.ContentPart(image=data) for data in pictures]
    return pb.GenerateRequest(messages=[pb.Message(role="user", content=content)], **fields)


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """The peak of this process's memory, client included, rises by at most 64 MiB within the block."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield
    grown = _status("VmHWM") - before
    assert grown <= GROWTH_BYTES_MAX, f"memory grew by {grown >> 20} MiB"


async def serves_on(cluster: Any) -> None:
    """Both doors still answer an honest request."""
    assert (await http(cluster, user(text("What is left of the blue square?")))).status == 200
    honest = pb.GenerateRequest(prompt="the red")
    assert (await over_grpc(cluster, honest)).status == 200
    assert cluster.service.admission.running == 0
    assert cluster.service.admission.body_bytes == 0
