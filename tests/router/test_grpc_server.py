from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc
from tests.router.conftest import ANSWER
from tests.router.scripted import Script, png


def question(**fields):
    content = [pb.ContentPart(image=png()), pb.ContentPart(text="What is left?")]
    return pb.GenerateRequest(messages=[pb.Message(role="user", content=content)], **fields)


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_generate_streams_text_tokens_and_usage(start_cluster, answer_ids):
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = rpc.InferenceStub(channel)
        replies = [r async for r in stub.Generate(question(request_id="mine-1", compression='{"visual": "visionzip"}'))]
        assert "".join(r.text for r in replies) == ANSWER
        assert tuple(i for r in replies for i in r.token_ids) == answer_ids
        assert replies[-1].finish_reason == "stop"
        usage = replies[-1].usage
        assert (usage.prefill_worker, usage.decode_worker) == ("prefill-0", "decode-1")
        assert usage.visual_tokens_after < usage.visual_tokens_before == 196
        assert json.loads(usage.compression)["visual"]["method"] == "visionzip"
        assert {r.request_id for r in replies} == {"mine-1"}
        models = await stub.ListModels(pb.ListModelsRequest())
        assert [m.id for m in models.models] == ["tiny"]
        status = json.loads((await stub.GetStatus(pb.GetStatusRequest())).json)
        assert {w["id"] for w in status["workers"]} == {"prefill-0", "decode-1"}


async def test_completion_by_prompt(start_cluster):
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        request = pb.GenerateRequest(prompt="the red", sampling=pb.SamplingParams(max_tokens=3))
        replies = [r async for r in rpc.InferenceStub(channel).Generate(request)]
        assert replies[-1].finish_reason == "length"


async def test_sampling_numbers_survive_the_32_bit_wire(start_cluster):
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        sampling = pb.SamplingParams(temperature=0.7, top_p=0.95, seed=5)
        _ = [r async for r in rpc.InferenceStub(channel).Generate(question(sampling=sampling))]
    sent = cluster.workers["prefill-0"].submits[0].request.sampling
    assert (sent.temperature, sent.top_p, sent.seed) == (0.7, 0.95, 5)


@pytest.mark.parametrize(
    ("request_message", "code", "field"),
    [
        (question(model="other"), grpc.StatusCode.NOT_FOUND, "model"),
        (
            question(sampling=pb.SamplingParams(temperature=float("nan"))),
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        (question(sampling=pb.SamplingParams(max_tokens=0)), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (question(compression="shrink"), grpc.StatusCode.INVALID_ARGUMENT, "compression"),
        (question(compression="{"), grpc.StatusCode.INVALID_ARGUMENT, "compression"),
        (question(cache_salt="a\0"), grpc.StatusCode.INVALID_ARGUMENT, "cache_salt"),
        (question(request_id="a/b"), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        (question(prompt="x"), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (
            pb.GenerateRequest(messages=[pb.Message(role="user", content=[pb.ContentPart(image=b"nope")])]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages[0].content[0].image",
        ),
        (pb.GenerateRequest(messages=[pb.Message(role="tool")]), grpc.StatusCode.INVALID_ARGUMENT, "messages[0].role"),
    ],
)
async def test_bad_requests_get_the_status_and_the_field(start_cluster, request_message, code, field):
    cluster = await start_cluster()
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [r async for r in rpc.InferenceStub(channel).Generate(request_message)]
    assert caught.value.code() is code
    trailing = dict(caught.value.trailing_metadata())
    assert trailing["prismserve-field"].startswith(field)


async def test_cancel_and_deadline_reach_the_worker(start_cluster):
    cluster = await start_cluster(("decode",), Script(silent=True))
    worker = cluster.workers["decode-0"]
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = rpc.InferenceStub(channel)
        call = stub.Generate(question())
        reading = asyncio.create_task(call.read())
        await until(lambda: len(worker.submits) == 1)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: len(worker.cancels) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [r async for r in stub.Generate(question(), timeout=0.3)]
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: len(worker.cancels) == 2)
    await until(lambda: cluster.service.admission.running == 0)


async def test_overload_and_oversize_are_resource_exhausted(start_cluster):
    cluster = await start_cluster(("decode",), Script(silent=True), max_concurrent_requests=1, max_body_bytes=100_000)
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = rpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [r async for r in stub.Generate(pb.GenerateRequest(prompt="x" * 200_000))]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        call = stub.Generate(question())
        reading = asyncio.create_task(call.read())
        await until(lambda: cluster.service.admission.running)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(2):
                _ = [r async for r in rpc.InferenceStub(channel).Generate(question())]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())["retry-after"] == "1"
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_health_follows_the_workers(start_cluster):
    cluster = await start_cluster(())
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        name = "prismserve.v1.Inference"
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await cluster.start_worker("decode-9", "decode")
        async with asyncio.timeout(5):
            while reply.status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.05)
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))


async def test_reflection_lists_the_service(start_cluster):
    cluster = await start_cluster(())
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        reply = await call.read()
        call.cancel()
    assert "prismserve.v1.Inference" in {s.name for s in reply.list_services_response.service}
