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


@pytest.mark.parametrize("by_prompt", [False, True])
async def test_sampling_options_cross_and_logprobs_and_choices_come_back(start_cluster, answer_ids, by_prompt):
    cluster = await start_cluster(("decode",), Script(answer_ids))
    sampling = pb.SamplingParams(
        n=2, logprobs=2, logit_bias={5: -100, 6: 0.7}, choice=["yes", "no"], max_tokens=64, seed=3
    )
    message = pb.GenerateRequest(prompt="the", sampling=sampling) if by_prompt else question(sampling=sampling)
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        replies = [r async for r in rpc.InferenceStub(channel).Generate(message)]
    for index in (0, 1):
        mine = [r for r in replies if r.index == index]
        assert "".join(r.text for r in mine) == ANSWER
        assert [bool(r.finish_reason) for r in mine] == [False] * (len(mine) - 1) + [True]
        entries = [entry for r in mine for entry in r.logprobs]
        assert [entry.chosen.token_id for entry in entries] == list(answer_ids)
        assert b"".join(entry.chosen.token for entry in entries).decode() == ANSWER
        assert {entry.chosen.logprob for entry in entries} == {-0.5}
        assert all([top.logprob for top in entry.top] == [-0.5, -1.5] for entry in entries)
    assert [r.HasField("usage") for r in replies] == [False] * (len(replies) - 1) + [True]
    assert replies[-1].usage.completion_tokens == 2 * len(answer_ids)
    sent = cluster.workers["decode-0"].submits[1].request.sampling
    assert dict(sent.logit_bias) == {5: -100.0, 6: 0.7}
    assert (sent.logprobs, sent.constraint.kind, sent.constraint.text) == (2, "choice", '["yes","no"]')


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"json_schema": '{"type": "array"}'}, "json_schema", '{"type":"array"}'),
        ({"json_object": True}, "json_schema", '{"type":"object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
async def test_every_kind_of_constraint_reaches_the_worker(start_cluster, fields, kind, text):
    cluster = await start_cluster(("decode",))
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        message = question(sampling=pb.SamplingParams(**fields))
        _ = [r async for r in rpc.InferenceStub(channel).Generate(message)]
    constraint = cluster.workers["decode-0"].submits[0].request.sampling.constraint
    assert (constraint.kind, constraint.text) == (kind, text)


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
        (question(sampling=pb.SamplingParams(n=99)), grpc.StatusCode.INVALID_ARGUMENT, "n"),
        (question(sampling=pb.SamplingParams(logprobs=21)), grpc.StatusCode.INVALID_ARGUMENT, "top_logprobs"),
        (question(sampling=pb.SamplingParams(logit_bias={768: 1})), grpc.StatusCode.INVALID_ARGUMENT, "logit_bias"),
        (
            question(sampling=pb.SamplingParams(regex="a", json_object=True)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "structured_outputs",
        ),
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
