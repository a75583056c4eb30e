from __future__ import annotations

import asyncio
import base64
import json

import openai
import pytest

from prismserve.core.types import FinishReason
from prismserve.protocol import worker_pb2 as pb
from tests.router.conftest import ANSWER
from tests.router.scripted import Script, png

PATH = "/v1/chat/completions"


def image_part(data, mime="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}


def chat(*parts, **fields):
    content = list(parts) if parts else "What is left of the blue square?"
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def question(**fields):
    return chat(image_part(png()), {"type": "text", "text": "What is left?"}, **fields)


async def sse_events(response):
    async for line in response.aiter_lines():
        if line:
            assert line.startswith("data: ")
            yield line.removeprefix("data: ")


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_whole_answer_names_both_workers_and_reports_usage(start_cluster):
    cluster = await start_cluster()
    body = (await cluster.http.post(PATH, json=question())).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    ours = usage["prismserve"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16
    assert (ours["prefill_worker"], ours["decode_worker"]) == ("prefill-0", "decode-1")
    assert (ours["visual_tokens_before"], ours["visual_tokens_after"]) == (196, 196)
    assert ours["kv_bytes_sent"] == 50
    assert ours["transport"] == "shm"
    assert ours["ttft_ms"] > 0
    assert ours["attempts"] == 1


async def test_compression_reduces_the_visual_tokens_that_reach_the_worker(start_cluster):
    cluster = await start_cluster()
    plan = {"visual": {"method": "visionzip", "keep": 49}, "wire": {"codec": "int8"}}
    body = (await cluster.http.post(PATH, json=question(compression=plan))).json()
    ours = body["usage"]["prismserve"]
    assert (ours["visual_tokens_before"], ours["visual_tokens_after"]) == (196, 49)
    assert ours["compression"]["visual"]["method"] == "visionzip"
    request = cluster.workers["prefill-0"].submits[0].request
    assert [s.tokens for s in request.segments if s.is_media] == [49]
    assert request.namespace != request.wire_namespace


async def test_stream_has_role_text_end_usage_and_done(start_cluster):
    cluster = await start_cluster()
    body = question(stream=True, stream_options={"include_usage": True})
    async with cluster.http.stream("POST", PATH, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event async for event in sse_events(response)]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == ANSWER
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prismserve"]["decode_worker"] == "decode-1"
    assert len({c["id"] for c in chunks}) == 1


async def test_the_official_client_can_chat_stream_complete_and_list(start_cluster):
    cluster = await start_cluster()
    url = f"http://127.0.0.1:{cluster.doors.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(**question())
        assert answer.choices[0].message.content == ANSWER
        stream = await client.chat.completions.create(**question(), stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == ANSWER
        completion = await client.completions.create(model="tiny", prompt="the red", max_tokens=64)
        assert completion.choices[0].text == ANSWER
        assert [m.id async for m in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**question(), "model": "other"})
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**question(), temperature=-1)
        assert caught.value.param == "temperature"


async def test_completion_takes_token_ids(start_cluster, processor):
    cluster = await start_cluster()
    ids = processor.encode_text("what is red")
    body = (await cluster.http.post("/v1/completions", json={"prompt": ids})).json()
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens_ends_the_text_and_cancels_the_worker(start_cluster, stream):
    cluster = await start_cluster(script=None)
    cluster.workers["decode-1"].script.pause_s = 0.02
    body = question(stop=["circle is", "never"], stream=stream)
    if stream:
        async with cluster.http.stream("POST", PATH, json=body) as response:
            chunks = [json.loads(e) async for e in sse_events(response) if e != "[DONE]"]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = (await cluster.http.post(PATH, json=body)).json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert text == ANSWER[: ANSWER.index("circle is")]
    assert reason == "stop"
    await until(lambda: cluster.workers["decode-1"].cancels)


async def test_text_held_back_for_a_stop_string_that_never_comes_is_given(start_cluster):
    cluster = await start_cluster()
    body = (await cluster.http.post(PATH, json=question(stop=["square root"]))).json()
    assert body["choices"][0]["message"]["content"] == ANSWER


async def test_max_tokens_ends_with_length(start_cluster):
    cluster = await start_cluster()
    body = (await cluster.http.post(PATH, json=question(max_tokens=3))).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels_at_the_worker(start_cluster, stream):
    cluster = await start_cluster()
    decode = cluster.workers["decode-1"]
    decode.script.pause_s = 0.2
    task = asyncio.create_task(_post_slowly(cluster, question(stream=stream)))
    await until(lambda: decode.submits)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: decode.cancels)
    await until(lambda: cluster.service.admission.running == 0)


async def _post_slowly(cluster, body):
    async with cluster.http.stream("POST", PATH, json=body) as response:
        async for _ in response.aiter_bytes():
            pass


@pytest.mark.parametrize("die_at", [0, 1, 5])
async def test_stream_is_unbroken_when_the_decode_worker_dies(start_cluster, answer_ids, die_at):
    cluster = await start_cluster(("prefill", "decode"), Script(answer_ids, die_at=die_at))
    body = question(stream=True, stream_options={"include_usage": True})
    async with cluster.http.stream("POST", PATH, json=body) as response:
        chunks = [json.loads(e) async for e in sse_events(response) if e != "[DONE]"]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == ANSWER
    assert chunks[-1]["usage"]["prismserve"]["attempts"] == 2
    resumed = cluster.workers["decode-1"].submits[-1].request
    assert resumed.attempt == 1
    assert tuple(resumed.resume_token_ids) == answer_ids[:die_at]


async def test_another_worker_goes_on_when_one_is_killed(start_cluster):
    cluster = await start_cluster(("prefill", "decode", "decode"))
    for worker in cluster.workers.values():
        worker.script.pause_s = 0.03
    task = asyncio.create_task(cluster.http.post(PATH, json=question()))
    await until(lambda: cluster.workers["decode-1"].submits)
    await asyncio.sleep(0.1)
    await cluster.workers["decode-1"].die()
    body = (await task).json()
    assert body["choices"][0]["message"]["content"] == ANSWER
    assert body["usage"]["prismserve"]["decode_worker"] == "decode-2"


async def test_a_retryable_prefill_failure_moves_to_another_prefill_worker(start_cluster):
    cluster = await start_cluster(("prefill", "prefill", "decode"))
    cluster.workers["prefill-0"].script.fail = "retryable: the transfer failed at /tmp/secret"
    body = (await cluster.http.post(PATH, json=question())).json()
    assert body["choices"][0]["message"]["content"] == ANSWER
    assert body["usage"]["prismserve"]["prefill_worker"] == "prefill-1"
    assert cluster.workers["decode-2"].cancels


@pytest.mark.parametrize("others", [(), ("decode",)])
async def test_a_decode_worker_that_waits_in_vain_for_kv_is_not_paired_with_that_sender_again(start_cluster, others):
    cluster = await start_cluster(("prefill", "decode", *others))
    for name in ("decode-1", "decode-2")[: 1 + len(others)]:
        cluster.workers[name].script.fail = "retryable: no KV arrived in time"
        cluster.workers[name].script.fail_job = pb.JOB_DECODE
    body = (await cluster.http.post(PATH, json=question())).json()
    assert body["choices"][0]["message"]["content"] == ANSWER
    assert body["usage"]["prismserve"]["attempts"] == 2
    assert len(cluster.workers["prefill-0"].submits) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("retryable: transfer failed at /tmp/secret 10.0.0.1:99", 503),
        ("retryable: overloaded: /tmp/secret", 429),
        ("Traceback /tmp/secret", 500),
        ("invalid: the prompt needs more blocks than there are", 400),
    ],
)
async def test_worker_failures_become_statuses_without_details(start_cluster, error, status):
    cluster = await start_cluster(("decode",), Script(fail=error))
    response = await cluster.http.post(PATH, json=chat())
    assert response.status_code == status
    assert "secret" not in response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_deadline_is_504(start_cluster):
    cluster = await start_cluster(("decode",), Script(silent=True), request_timeout_s=0.2)
    assert (await cluster.http.post(PATH, json=chat())).status_code == 504
    await until(lambda: cluster.workers["decode-0"].cancels)


async def test_without_workers_health_and_requests_are_503(start_cluster):
    cluster = await start_cluster(())
    assert (await cluster.http.get("/health")).status_code == 503
    assert (await cluster.http.get("/-/healthz")).status_code == 200
    assert (await cluster.http.post(PATH, json=chat())).status_code == 503
    await cluster.start_worker("decode-9", "decode")
    assert await cluster.service.wait_ready(5)
    assert (await cluster.http.get("/health")).status_code == 200
    assert (await cluster.http.post(PATH, json=chat())).status_code == 200


async def test_more_than_the_allowed_requests_get_429_at_once(start_cluster):
    cluster = await start_cluster(("decode",), Script(silent=True), max_concurrent_requests=1)
    task = asyncio.create_task(cluster.http.post(PATH, json=chat()))
    await until(lambda: cluster.service.admission.running)
    refused = await cluster.http.post(PATH, json=chat())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_large_and_slow_bodies_and_slow_headers_are_refused(start_cluster):
    cluster = await start_cluster(
        ("decode",), max_body_bytes=10_000, body_idle_timeout_s=0.2, body_timeout_s=1, header_timeout_s=0.3
    )
    assert (await cluster.http.post(PATH, content=b"x" * 10_001)).status_code == 413

    async def endless():
        for _ in range(100):
            yield b"x" * 1000

    assert (await cluster.http.post(PATH, content=endless())).status_code == 413
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    for start in (head, head[:20]):
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.doors.http_port)
        writer.write(start)
        async with asyncio.timeout(3):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()
        await writer.wait_closed()
    assert cluster.service.admission.body_bytes == 0


BAD_FIELDS = [
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -1),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**63),
    ("max_tokens", 1e3),
    ("max_tokens", True),
    ("max_tokens", 5000),
    ("min_tokens", 5000),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", "1"),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop", "x" * 257),
    ("stop", [1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [768]),
    ("ignore_eos", 1),
    ("stream", "yes"),
    ("tools", [{"type": "function"}]),
    ("n", 0),
    ("n", 17),
    ("n", "2"),
    ("logprobs", 3),
    ("top_logprobs", 3),
    ("logit_bias", [1]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"768": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "much"}),
    ("logit_bias", {str(token): 1 for token in range(768)} | {f"0{token}": 1 for token in range(768)}),
    ("response_format", "json"),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}),
    ("structured_outputs", {}),
    ("structured_outputs", {"regex": ""}),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}),
    ("structured_outputs", {"json": "{"}),
    ("structured_outputs", {"json": {"const": float("inf")}}),
    ("structured_outputs", {"structural_tag": "x"}),
    ("guided_choice", []),
    ("guided_choice", ["a", ""]),
    ("guided_grammar", 5),
    ("guided_regex", "a" * 70_000),
    ("chat_template", "{{ messages }}"),
    ("mm_processor_kwargs", {"size": 1}),
    ("chat_template_kwargs", {"a": 1}),
    ("kv_transfer_params", {"block": 1}),
    ("cache_salt", "x" * 257),
    ("cache_salt", "a\0b"),
    ("cache_salt", 5),
    ("compression", 3),
    ("compression", "shrink"),
    ("compression", {"visual": {"method": "nothere"}}),
    ("compression", {"wire": {"codec": "int8", "zip": 1}}),
    ("compression", {"colour": 1}),
    ("messages", []),
    ("messages", "hello"),
    ("messages", None),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"role": "user", "content": 7}]),
    ("messages", [{"role": "user", "content": [{"type": "video_url"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]),
    ("messages", [{"role": "system", "content": [image_part(png())]}]),
    ("messages", [{"role": "user", "content": "word " * 5000}]),
    ("messages", [{"role": "user", "content": [image_part(b"GIF89a" + b"x" * 99)]}]),
    ("messages", [{"role": "user", "content": [image_part(png()[:-20])]}]),
    ("messages", [{"role": "user", "content": [image_part(png())] * 17}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}]}],
    ),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
    ("stream_options", {"include_usage": True}),
]


async def test_bad_fields_get_400_with_the_field_named_and_the_cluster_serves_on(start_cluster):
    cluster = await start_cluster(("decode",))
    for field, value in BAD_FIELDS:
        content = json.dumps({**chat(), field: value})
        response = await cluster.http.post(PATH, content=content)
        assert response.status_code == 400, (field, value, response.text)
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert (error["param"] or "").startswith(field), (field, value, error)
        assert "/work" not in response.text
    assert (await cluster.http.post(PATH, json=chat())).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"a":' * 100, b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"]
)
async def test_bodies_that_are_no_json_object_get_400(start_cluster, body):
    cluster = await start_cluster(("decode",))
    response = await cluster.http.post(PATH, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"


async def test_unknown_fields_and_harmless_values_are_ignored(start_cluster):
    cluster = await start_cluster(("decode",))
    extra = {"n": 1, "tools": [], "logprobs": False, "user": "me", "whatever": 1, "response_format": {"type": "text"}}
    assert (await cluster.http.post(PATH, json=chat(**extra))).status_code == 200


async def test_unknown_compression_names_are_answered_with_what_there_is(start_cluster):
    cluster = await start_cluster(("decode",))
    error = (await cluster.http.post(PATH, json=chat(compression="shrink"))).json()["error"]
    assert "visionzip" in error["message"]
    assert "balanced" in error["message"]


async def test_unknown_paths_and_methods_have_openai_shape(start_cluster):
    cluster = await start_cluster(("decode",))
    assert (await cluster.http.get("/nothing")).json()["error"]["type"] == "invalid_request_error"
    assert (await cluster.http.get(PATH)).status_code == 405
    assert (await cluster.http.get("/v1/models/other")).status_code == 404
    assert (await cluster.http.get("/v1/models/tiny")).json()["id"] == "tiny"


async def test_a_typed_image_placeholder_is_text(start_cluster):
    cluster = await start_cluster(("decode",))
    await cluster.http.post(PATH, json=chat({"type": "text", "text": "<image> what is this <image>"}))
    request = cluster.workers["decode-0"].submits[0].request
    assert not any(s.is_media for s in request.segments)


async def test_a_repeated_image_is_decoded_once(start_cluster):
    cluster = await start_cluster()
    for _ in range(3):
        await cluster.http.post(PATH, json=question())
    router = cluster.service.status()["router"]
    assert (router["images_decoded"], router["images_remembered"]) == (1, 2)


async def test_salts_separate_namespaces_and_embeddings(start_cluster):
    cluster = await start_cluster()
    for salt in ("", "a", "a", "b"):
        await cluster.http.post(PATH, json=question(**({"cache_salt": salt} if salt else {})))
    requests = [s.request for s in cluster.workers["prefill-0"].submits]
    assert len({r.namespace for r in requests}) == 3
    assert len({s.key for r in requests for s in r.segments if s.is_media}) == 3


async def test_metrics_and_status_show_the_workers(start_cluster):
    cluster = await start_cluster()
    await cluster.http.post(PATH, json=question())
    text = (await cluster.http.get("/metrics")).text
    assert 'prismserve:time_to_first_token_seconds_count{model_name="tiny"} 1.0' in text
    assert "prismserve:kv_cache_usage_perc" in text
    assert 'prismserve:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in text
    status = (await cluster.http.get("/status")).json()
    by_id = {w["id"]: w for w in status["workers"]}
    assert set(by_id) == {"prefill-0", "decode-1"}
    assert {"id", "role", "pid", "node", "state", "epoch"} <= set(by_id["decode-1"])
    assert by_id["decode-1"]["state"] == "ready"
    assert by_id["decode-1"]["kv"]["usage"] == 0.1
    assert status["pools"]["prefill"]["ready"] == 1


async def test_finish_reason_of_the_worker_is_passed_on(start_cluster, answer_ids):
    cluster = await start_cluster(("decode",), Script(answer_ids, finish=FinishReason.LENGTH))
    body = (await cluster.http.post(PATH, json=chat())).json()
    assert body["choices"][0]["finish_reason"] == "length"
