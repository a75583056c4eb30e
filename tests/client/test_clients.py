"""Both clients against a real server: the same story told twice, once per colour of function."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import grpc
import pytest

from prismserve.client import (
    AsyncClient,
    Client,
    ClientClosedError,
    IncompleteAnswerError,
    InternalServerError,
    RequestError,
    RetryPolicy,
    TimeoutExceededError,
    UnavailableError,
    Usage,
)
from prismserve.protocol import prismserve_pb2 as pb
from tests.client.conftest import Failure

QUICK = RetryPolicy(attempts_max=3, backoff_s=0.01, backoff_max_s=0.02)


class Both:
    """Runs one call through the sync or the async client."""

    def __init__(self, kind: str, target: str) -> None:
        self.kind, self.target = kind, target

    def call(self, name: str, *args, client_options=None, **options):
        settings = {"timeout_s": 10, "retry": QUICK, **(client_options or {})}
        if self.kind == "sync":
            with Client(self.target, **settings) as client:
                result = getattr(client, name)(*args, **options)
                return list(result) if name == "stream" else result

        async def run():
            async with AsyncClient(self.target, **settings) as client:
                if name == "stream":
                    return [delta async for delta in client.stream(*args, **options)]
                return await getattr(client, name)(*args, **options)

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def both(request, server) -> Both:
    return Both(request.param, server.target)


def test_an_answer_holds_all_text_tokens_and_usage(both) -> None:
    answer = both.call("generate", "hello", max_tokens=3)
    assert answer.text == "one two three"
    assert answer.token_ids == (1, 2, 3)
    assert answer.finish_reason == "stop"
    assert answer.request_id == "r-1"
    assert answer.usage == Usage(prompt_tokens=9, completion_tokens=3, transport="shm", ttft_ms=1.5, decode_worker="d")


def test_a_stream_gives_one_delta_per_message_and_usage_only_at_the_end(both) -> None:
    deltas = both.call("stream", "hello")
    assert [delta.text for delta in deltas] == ["one", " two", " three", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]
    assert [delta.usage is not None for delta in deltas] == [False, False, False, True]


def test_several_answers_are_kept_apart_and_share_one_usage(both) -> None:
    answer = both.call("generate", "hello", n=3)
    assert [choice.text for choice in answer.choices] == ["one two three"] * 3
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length", "length"]
    assert (answer.text, answer.finish_reason) == ("one two three", "stop")
    assert answer.usage.completion_tokens == 3
    deltas = both.call("stream", "hello", n=3)
    assert [delta.index for delta in deltas[:3]] == [0, 1, 2]
    assert [delta.usage is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]


def test_an_answer_that_lacks_one_of_its_choices_is_incomplete(server, both) -> None:
    server.service.finish = False
    with pytest.raises(IncompleteAnswerError):
        both.call("generate", "hello", n=2)


def test_logprobs_are_reported_per_token_with_alternatives(both) -> None:
    answer = both.call("generate", "hello", logprobs=1)
    assert b"".join(entry.token for entry in answer.logprobs) == b"one two three"
    assert [(entry.token_id, entry.logprob, len(entry.top)) for entry in answer.logprobs] == [
        (1, -0.5, 1),
        (2, -0.5, 1),
        (3, -0.5, 1),
    ]
    assert answer.logprobs[0].top[0].token == b"one"
    assert both.call("generate", "hello").logprobs == ()


def test_models_and_status_are_typed_and_unknown_counters_stay_in_the_document(both) -> None:
    (model,) = both.call("models")
    assert (model.id, model.max_model_len) == ("reference", 512)
    status = both.call("status")
    (worker,) = status.workers
    assert (worker.id, worker.role, worker.pid, worker.node) == ("decode-1", "decode", 4321, "node-a")
    assert (worker.state, worker.epoch, worker.stats.running) == ("ready", 7, 2)
    assert status.document["workers"][0]["stats"]["a_counter_of_the_future"] == 1


@pytest.mark.parametrize("document", ["", "[]", '{"workers": [{"id": "x"}]}', '{"workers": 3}'])
def test_a_status_document_that_is_not_one_is_an_error_not_a_crash(server, both, document) -> None:
    server.service.status = document
    with pytest.raises(InternalServerError, match="status document"):
        both.call("status")


def test_unavailable_before_the_first_message_is_retried(server, both) -> None:
    server.service.failures = [Failure(grpc.StatusCode.UNAVAILABLE)] * 2
    assert both.call("generate", "hello").text == "one two three"
    assert server.service.calls == 3


def test_retries_are_bounded(server, both) -> None:
    server.service.failures = [Failure(grpc.StatusCode.UNAVAILABLE)] * 5
    with pytest.raises(UnavailableError):
        both.call("generate", "hello")
    assert server.service.calls == 3


def test_nothing_is_retried_after_the_first_message(server, both) -> None:
    server.service.failures = [Failure(grpc.StatusCode.UNAVAILABLE, after_messages=1)]
    with pytest.raises(UnavailableError) as caught:
        both.call("generate", "hello")
    assert server.service.calls == 1
    assert caught.value.request_id == "r-1"


def test_overload_is_retried_no_sooner_than_the_server_said(server, both) -> None:
    server.service.failures = [Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("retry-after", "0.3"),))]
    start_s = time.monotonic()
    assert both.call("generate", "hello").finish_reason == "stop"
    assert time.monotonic() - start_s >= 0.3
    assert server.service.calls == 2


def test_unary_calls_are_retried_too(server, both) -> None:
    server.service.failures = [Failure(grpc.StatusCode.UNAVAILABLE)]
    assert len(both.call("models")) == 1
    assert server.service.calls == 2


def test_every_call_carries_a_deadline(server, both) -> None:
    both.call("generate", "hello")
    both.call("generate", "hello", timeout_s=3)
    first_s, second_s = server.service.deadlines_s
    # gRPC reports what is left with a grain of milliseconds, rounded up.
    assert 5 < first_s <= 10.1
    assert 0 < second_s <= 3.1


def test_a_slow_answer_ends_at_its_deadline(server, both) -> None:
    server.service.pause_s = 5.0
    start_s = time.monotonic()
    with pytest.raises(TimeoutExceededError):
        both.call("generate", "hello", timeout_s=0.3)
    assert time.monotonic() - start_s < 3


def test_a_stream_without_a_last_message_is_an_error(server, both) -> None:
    server.service.finish = False
    with pytest.raises(IncompleteAnswerError, match="3 tokens"):
        both.call("stream", "hello")


def test_an_unreachable_server_is_unavailable_within_the_deadline(server, both) -> None:
    server.stop()
    with pytest.raises(UnavailableError):
        both.call("generate", "hello", timeout_s=5)


def test_the_api_key_travels_as_a_bearer_token(server, both) -> None:
    both.call("generate", "hello", client_options={"api_key": "k-1"})
    assert server.service.metadata[0]["authorization"] == "Bearer k-1"


def test_a_large_image_passes(server, both) -> None:
    both.call("generate", "hello", images=[bytes(8 << 20)])
    assert len(server.service.requests[0].messages[0].content[0].image) == 8 << 20


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_timeout_without_sense_is_refused(both, timeout_s) -> None:
    with pytest.raises(RequestError, match="timeout_s"):
        both.call("generate", "hello", timeout_s=timeout_s)


def test_closing_a_sync_stream_cancels_the_request_at_the_server(server) -> None:
    server.service.pause_s = 30.0
    with Client(server.target, timeout_s=60) as client:
        stream = client.stream("hello")
        assert next(stream).text == "one"
        stream.close()
        assert server.service.cancelled.wait(5)


async def test_closing_an_async_stream_cancels_the_request_at_the_server(server) -> None:
    server.service.pause_s = 30.0
    async with AsyncClient(server.target, timeout_s=60) as client:
        stream = client.stream("hello")
        assert (await anext(stream)).text == "one"
        await stream.aclose()
        assert await asyncio.to_thread(server.service.cancelled.wait, 5)


async def test_cancelling_the_task_of_an_answer_cancels_the_request_at_the_server(server) -> None:
    server.service.pause_s = 30.0
    async with AsyncClient(server.target, timeout_s=60) as client:
        task = asyncio.create_task(client.generate("hello"))
        while not server.service.calls:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.service.cancelled.wait, 5)


def test_many_threads_share_one_client(server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Client(server.target, timeout_s=10) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: client.generate(f"q{index}"), range(16)))
    assert {answer.text for answer in answers} == {"one two three"}


def test_a_closed_client_says_so(server) -> None:
    client = Client(server.target)
    client.close()
    client.close()
    with pytest.raises(ClientClosedError):
        client.models()
    with pytest.raises(ClientClosedError):
        client.generate("hello")


async def test_a_closed_async_client_says_so(server) -> None:
    client = AsyncClient(server.target)
    await client.close()
    await client.close()
    with pytest.raises(ClientClosedError):
        await client.models()
    with pytest.raises(ClientClosedError):
        await client.generate("hello")


def test_a_malformed_request_raises_when_the_stream_is_asked_for(server) -> None:
    with Client(server.target) as client, pytest.raises(RequestError):
        client.stream("hello", max_tokens=-1)


@pytest.mark.parametrize("target", ["", "localhost", "http://127.0.0.1:9000", "a b:1"])
def test_an_address_that_is_none_is_refused(target) -> None:
    with pytest.raises(RequestError, match="host:port"):
        Client(target)


def test_usage_has_every_field_of_the_schema() -> None:
    assert {item.name for item in dataclasses.fields(Usage)} == {item.name for item in pb.Usage.DESCRIPTOR.fields}


def test_a_preset_is_held_and_its_state_comes_back(server, both) -> None:
    found = both.call("set_preset", "turbo", "hold")
    assert server.service.presets == [("turbo", "hold")]
    assert found["presets"]["turbo"]["in_force"] == "balanced"


@pytest.mark.parametrize("document", ["", "[]", "{}", '{"presets": 3}'])
def test_a_state_of_presets_that_is_none_is_an_error_not_a_crash(server, both, document) -> None:
    server.service.fidelity = document
    with pytest.raises(InternalServerError, match="state of the presets"):
        both.call("set_preset", "turbo", "hold")
