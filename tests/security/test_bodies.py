"""Bodies and streams that are too large, too slow or too many: refused in bounded time and memory."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc
from tests.router.scripted import Script
from tests.security.doors import CHAT, bounded_memory, http, over_grpc, serves_on
from tests.security.http2 import Http2Client

MIB = 1 << 20


async def head(cluster, *lines):
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.doors.http_port)
    writer.write("\r\n".join((f"POST {CHAT} HTTP/1.1", "Host: x", *lines, "", "")).encode())
    return reader, writer


async def status_of(reader):
    async with asyncio.timeout(10):
        return int((await reader.readline()).split()[1])


async def close(writer):
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_cap_is_413_and_not_kept(start_cluster, announced):
    cluster = await start_cluster(("decode",), max_body_bytes=MIB)
    chunk = b"x" * 65536
    with bounded_memory():
        if announced:
            reader, writer = await head(cluster, "Content-Length: 1073741824")
        else:
            reader, writer = await head(cluster, "Transfer-Encoding: chunked")
        answer = asyncio.create_task(status_of(reader))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not answer.done() and sent < 512 * MIB:
                writer.write(chunk if announced else b"10000\r\n" + chunk + b"\r\n")
                await writer.drain()
                sent += len(chunk)
                await asyncio.sleep(0)
        assert await answer == 413
        await close(writer)
    await serves_on(cluster)


async def test_one_byte_at_a_time_ends_at_the_deadline_of_the_whole_body(start_cluster):
    """Never idle, and still 408: the body has a deadline beside that between two of its parts."""
    cluster = await start_cluster(("decode",), body_timeout_s=0.6, body_idle_timeout_s=0.3)
    reader, writer = await head(cluster, "Content-Length: 1000")
    answer = asyncio.create_task(status_of(reader))
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            if answer.done():
                break
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)
    assert await answer == 408
    await close(writer)
    await serves_on(cluster)


async def test_a_flood_of_headers_is_refused(start_cluster):
    cluster = await start_cluster(("decode",))
    with bounded_memory():
        for lines in ([f"X-{number}: {'y' * 1000}" for number in range(200)], [f"X-Long: {'y' * 200_000}"]):
            reader, writer = await head(cluster, *lines)
            assert await status_of(reader) in (400, 431)
            await close(writer)
    await serves_on(cluster)


@pytest.mark.parametrize("lie", ["-1", "1e3", "99999999999999999999", "0x10", "5, 6"])
async def test_a_length_that_is_none_is_refused(start_cluster, lie):
    cluster = await start_cluster(("decode",))
    reader, writer = await head(cluster, f"Content-Length: {lie}")
    assert await status_of(reader) in (400, 413)
    await close(writer)
    await serves_on(cluster)


async def test_all_bodies_together_are_bounded(start_cluster):
    cluster = await start_cluster(("decode",), max_pending_body_bytes=4 * MIB, body_idle_timeout_s=5)
    holders = []
    for _ in range(3):
        _, writer = await head(cluster, f"Content-Length: {2 * MIB}")
        writer.write(b"x" * (MIB + MIB // 4))
        await writer.drain()
        holders.append(writer)
    async with asyncio.timeout(5):
        while cluster.service.admission.body_bytes < 3 * MIB:
            await asyncio.sleep(0.01)
    assert (await http(cluster, b"x" * MIB)).status == 429
    for writer in holders:
        await close(writer)
    async with asyncio.timeout(5):
        while cluster.service.admission.body_bytes:
            await asyncio.sleep(0.01)
    await serves_on(cluster)


async def test_a_grpc_message_over_the_cap_is_resource_exhausted(start_cluster):
    cluster = await start_cluster(("decode",), max_body_bytes=MIB)
    assert (await over_grpc(cluster, pb.GenerateRequest(prompt="x" * (2 * MIB)))).status == 413
    await serves_on(cluster)


async def test_a_grpc_message_that_says_it_has_a_gigabyte_is_refused_by_its_prefix(start_cluster):
    cluster = await start_cluster(("decode",))
    with bounded_memory():
        async with Http2Client.connect(cluster.doors.grpc_port) as client:
            await client.headers(1, "/prismserve.v1.Inference/Generate")
            await client.data(1, b"\0" + (1 << 30).to_bytes(4, "big") + bytes(8192))
            trailers = await client.trailers(1)
            # RESOURCE_EXHAUSTED
            assert trailers.get("grpc-status") == "8"
    await serves_on(cluster)


async def test_metadata_over_the_cap_is_refused(start_cluster):
    cluster = await start_cluster(("decode",))
    metadata = [(f"x-{number}", "y" * 1000) for number in range(64)]
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        call = rpc.InferenceStub(channel).Generate(pb.GenerateRequest(prompt="the"), metadata=metadata, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [reply async for reply in call]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await serves_on(cluster)


async def test_headers_that_never_end_close_the_connection(start_cluster):
    """A flood of CONTINUATION frames."""
    cluster = await start_cluster(("decode",))
    with bounded_memory():
        async with Http2Client.connect(cluster.doors.grpc_port) as client:
            await client.endless_headers(1, 64 * MIB)
            assert await client.ended()
    await serves_on(cluster)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_streams_opened_and_reset_without_end_hurt_nobody(start_cluster, answer_ids):
    """Rapid reset: another client's request is answered meanwhile, and nothing is held afterwards."""
    cluster = await start_cluster(("decode",), Script(answer_ids, pause_s=0.01))
    with bounded_memory():
        async with Http2Client.connect(cluster.doors.grpc_port) as client:
            flood = asyncio.create_task(client.rapid_reset("/prismserve.v1.Inference/Generate", 1500))
            answer = await over_grpc(cluster, pb.GenerateRequest(prompt="the red"))
            assert answer.status == 200
            await flood
        async with asyncio.timeout(30):
            while cluster.service.admission.running:
                await asyncio.sleep(0.01)
    await serves_on(cluster)
