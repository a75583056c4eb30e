"""Sampling options at the HTTP door: what reaches the workers, and what comes back."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from prismserve.core.types import FinishReason, TokenOutput
from prismserve.router.mailbox import Mailbox, WorkerOutput
from tests.router.conftest import ANSWER
from tests.router.scripted import Script
from tests.router.test_openai import PATH, chat, question, sse_events, until

COMPLETIONS = "/v1/completions"
TEXTS = (ANSWER, "the blue square", "green")


@pytest.fixture
def answers(processor):
    return tuple(tuple(processor.encode_text(text)) for text in TEXTS)


async def chunks_of(cluster, path, body):
    async with cluster.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return [json.loads(event) async for event in sse_events(response) if event != "[DONE]"]


async def test_options_reach_the_worker(start_cluster):
    cluster = await start_cluster()
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    body = question(
        logit_bias={"5": -100, "700": 1.5},
        logprobs=True,
        top_logprobs=4,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert (await cluster.http.post(PATH, json=body)).status_code == 200
    for worker in cluster.workers.values():
        sampling = worker.submits[0].request.sampling
        assert dict(sampling.logit_bias) == {5: -100.0, 700: 1.5}
        assert sampling.logprobs == 4
        assert sampling.constraint.kind == "json_schema"
        assert json.loads(sampling.constraint.text) == schema
        assert list(json.loads(sampling.constraint.text)["properties"]) == ["b", "a"]


async def test_a_request_without_options_sends_none(start_cluster):
    cluster = await start_cluster(("decode",))
    await cluster.http.post(PATH, json=chat(logprobs=False, top_logprobs=0, logit_bias={}))
    sampling = cluster.workers["decode-0"].submits[0].request.sampling
    assert not sampling.logit_bias
    assert not sampling.HasField("logprobs")
    assert not sampling.HasField("constraint")


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_have_an_entry_per_token_with_bytes_and_alternatives(start_cluster, answer_ids, stream):
    cluster = await start_cluster()
    body = question(logprobs=True, top_logprobs=2)
    if stream:
        chunks = await chunks_of(cluster, PATH, body)
        choices = [c["choices"][0] for c in chunks if c["choices"]]
        assert sum(len(c["delta"].get("content", "")) for c in choices) == len(ANSWER)
        entries = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    else:
        entries = (await cluster.http.post(PATH, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert len(entries) == len(answer_ids)
    assert "".join(entry["token"] for entry in entries) == ANSWER
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == ANSWER
    assert {entry["logprob"] for entry in entries} == {-0.5}
    for entry in entries:
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
        assert entry["top_logprobs"][0]["token"] == entry["token"]


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_are_parallel_lists_with_offsets(start_cluster, answer_ids, stream):
    cluster = await start_cluster()
    body = {"prompt": "the red", "max_tokens": 64, "logprobs": 2}
    if stream:
        chunks = await chunks_of(cluster, COMPLETIONS, body)
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
        found = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    else:
        found = (await cluster.http.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == ANSWER
    assert found["token_logprobs"] == [-0.5] * len(answer_ids)
    assert found["text_offset"] == [len("".join(found["tokens"][:at])) for at in range(len(answer_ids))]
    assert all(top[token] == -0.5 for top, token in zip(found["top_logprobs"], found["tokens"], strict=True))


async def test_logprobs_of_nothing_but_the_chosen_tokens(start_cluster, answer_ids):
    cluster = await start_cluster()
    body = (await cluster.http.post(PATH, json=question(logprobs=True))).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert len(entries) == len(answer_ids)
    assert all(entry["top_logprobs"] == [] for entry in entries)


async def test_logprobs_survive_a_lost_worker_without_gap_or_repetition(start_cluster, answer_ids):
    cluster = await start_cluster(("prefill", "decode"), Script(answer_ids, die_at=4))
    body = (await cluster.http.post(PATH, json=question(logprobs=True))).json()
    assert body["usage"]["prismserve"]["attempts"] == 2
    entries = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == ANSWER


async def test_n_answers_share_one_prefill_and_the_others_go_to_the_same_decode_worker(start_cluster, answers):
    cluster = await start_cluster(("prefill", "prefill", "decode", "decode"), Script(answers=answers))
    body = (await cluster.http.post(PATH, json=question(n=3, temperature=1, seed=9))).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in body["choices"]] == list(TEXTS)
    assert {c["finish_reason"] for c in body["choices"]} == {"stop"}
    usage = body["usage"]
    assert usage["completion_tokens"] == sum(map(len, answers))
    requests = [s.request for w in ("prefill-0", "prefill-1") for s in cluster.workers[w].submits]
    assert usage["prompt_tokens"] == sum(s.tokens or len(s.token_ids) for s in requests[0].segments)
    assert len(requests) == 1
    decode = [w for w in cluster.workers.values() if w.role == "decode" and w.submits]
    assert len(decode) == 1
    assert len(decode[0].submits) == 3
    assert len({s.request.request_id for s in decode[0].submits}) == 3
    assert len({s.request.sampling.seed for s in decode[0].submits}) == 3
    assert decode[0].submits[0].request.sampling.seed == 9


@pytest.mark.parametrize("path", [PATH, COMPLETIONS])
async def test_streamed_choices_interleave_with_their_indexes_and_one_usage(start_cluster, answers, path):
    cluster = await start_cluster(("decode",), Script(answers=answers, pause_s=0.01))
    fields = {"n": 3, "stream_options": {"include_usage": True}, "logprobs": path == PATH or 0, "max_tokens": 64}
    body = chat(**fields) if path == PATH else {"prompt": "the", **fields}
    chunks = await chunks_of(cluster, path, body)
    texts, order, ends = ["", "", ""], [], []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        piece = choice["delta"].get("content", "") if path == PATH else choice["text"]
        texts[choice["index"]] += piece
        if piece:
            order.append(choice["index"])
        if choice["finish_reason"]:
            ends.append(choice["index"])
        assert chunk["usage"] is None
    assert texts == list(TEXTS)
    assert order != sorted(order)
    assert sorted(ends) == [0, 1, 2]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == sum(map(len, answers))
    if path == PATH:
        assert [c["choices"][0]["delta"]["role"] for c in chunks[:3]] == ["assistant"] * 3


async def test_a_disconnect_cancels_every_choice(start_cluster, answers):
    cluster = await start_cluster(("decode",), Script(answers=answers, pause_s=0.1))
    worker = cluster.workers["decode-0"]
    task = asyncio.create_task(cluster.http.post(PATH, json=chat(n=3)))
    await until(lambda: len(worker.submits) == 3)
    assert cluster.service.admission.running == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: len(worker.cancels) == 3)
    await until(lambda: cluster.service.admission.running == 0)


async def test_each_answer_takes_a_place_and_surplus_is_refused(start_cluster, answers):
    cluster = await start_cluster(("decode",), Script(answers=answers, pause_s=0.1), max_concurrent_requests=3)
    task = asyncio.create_task(cluster.http.post(PATH, json=chat(n=2)))
    await until(lambda: cluster.service.admission.running == 2)
    assert (await cluster.http.post(PATH, json=chat(n=2))).status_code == 429
    assert (await task).status_code == 200


async def test_the_official_client_reads_choices_and_logprobs(start_cluster, answers):
    cluster = await start_cluster(("decode",), Script(answers=answers * 2))
    url = f"http://127.0.0.1:{cluster.doors.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(**chat(), n=2, logprobs=True, top_logprobs=1)
        assert [c.message.content for c in answer.choices] == list(TEXTS[:2])
        assert answer.choices[1].logprobs.content[0].top_logprobs[0].logprob == -0.5
        completion = await client.completions.create(model="tiny", prompt="the", logprobs=1, max_tokens=64)
        assert completion.choices[0].logprobs.token_logprobs[0] == -0.5


async def test_a_worker_that_cannot_compile_the_constraint_makes_it_a_400(start_cluster):
    cluster = await start_cluster(("decode",), Script(fail="invalid: the constraint cannot be used: too complex"))
    response = await cluster.http.post(PATH, json=chat(response_format={"type": "json_object"}))
    assert response.status_code == 400
    assert "too complex" in response.json()["error"]["message"]


def test_merged_events_keep_tokens_and_logprobs_together():
    box = Mailbox("r", 0, 10)
    for token in (1, 2):
        box.put(WorkerOutput("w", TokenOutput("r", 0, (token,), None, logprobs=(f"of {token}",))))
    box.put(WorkerOutput("w", TokenOutput("r", 0, (3,), FinishReason.STOP, logprobs=("of 3",))))
    (event,) = box._events
    assert event.output.token_ids == (1, 2, 3)
    assert event.output.logprobs == ("of 1", "of 2", "of 3")
