"""What a request may not say: addresses to fetch, templates, numbers that are none, parameters of the machinery."""

from __future__ import annotations

import asyncio
import math

import pytest

from prismserve.protocol import prismserve_pb2 as pb
from tests.router.test_tenants import ACME, OTHER, bearer, tenants
from tests.security.doors import assert_tells_nothing, bounded_memory, http, over_grpc, serves_on, text, user

MACHINERY = {
    "chat_template": "{{ messages.__class__.__mro__ }}",
    "chat_template_kwargs": {"enable": True},
    "mm_processor_kwargs": {"size": {"height": 1, "width": 1}},
    "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1], "remote_host": "10.0.0.1"},
}
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("max_tokens", "min_tokens", "seed", "n", "top_k", "top_logprobs")
WRONG = (math.nan, math.inf, -math.inf, 2**63, -(2**63) - 1, 10**400, "1", True, [], {})


async def test_machinery_is_not_the_callers_to_set(start_cluster):
    cluster = await start_cluster(("decode",))
    for field, value in MACHINERY.items():
        answer = await http(cluster, user(text("What is left?"), **{field: value}))
        assert (answer.status, answer.field) == (400, field)
    assert cluster.workers["decode-0"].submits == []
    await serves_on(cluster)


async def test_numbers_that_are_none_are_named_over_http(start_cluster):
    cluster = await start_cluster(("decode",))
    for field in (*NUMBERS, *INTEGERS):
        for value in WRONG:
            extra = {"logprobs": True} if field == "top_logprobs" else {}
            answer = await http(cluster, user(text("What is left?"), **{field: value}, **extra))
            assert (answer.status, answer.field) == (400, field), (field, value, answer)
    await serves_on(cluster)


async def test_numbers_that_are_none_are_named_over_grpc(start_cluster):
    cluster = await start_cluster(("decode",))
    wrong = [(field, value) for field in NUMBERS for value in (math.nan, math.inf, -math.inf, -9.0)]
    wrong += [("max_tokens", 0), ("max_tokens", 2**31 - 1), ("n", 2**31 - 1), ("seed", 2**63)]
    known = {field.name: field for field in pb.SamplingParams.DESCRIPTOR.fields}
    for field, value in wrong:
        try:
            sampling = pb.SamplingParams(**{field: value})
        except ValueError:
            # The schema itself has no room for it.
            assert known[field].cpp_type not in (known[field].CPPTYPE_FLOAT, known[field].CPPTYPE_DOUBLE)
            continue
        answer = await over_grpc(cluster, pb.GenerateRequest(prompt="the red", sampling=sampling))
        assert (answer.status, answer.field) == (400, field), (field, value, answer)
    await serves_on(cluster)


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
async def test_addresses_are_not_fetched_and_no_packet_leaves(start_cluster, kind):
    """Only data URIs are read; there is no setting that makes the router fetch a URL."""
    cluster = await start_cluster(("decode",))
    knocked = []
    server = await asyncio.start_server(lambda _, writer: (knocked.append(1), writer.close()), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    hosts = ("127.0.0.1", "localhost", "0x7f.1", "2130706433", "0", "127.1", "a@127.0.0.1", "[::ffff:127.0.0.1]")
    urls = [
        f"{scheme}://{host}:{port}/x.png" for scheme in ("http", "https", "HTTP", "ftp", "gopher") for host in hosts
    ]
    urls += [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/x.png",
        "http://[fd00:ec2::254]/",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        f"//127.0.0.1:{port}/x.png",
        "/etc/passwd",
        "data:text/html;base64,AAAA",
        f"data:image/png;base64,http://127.0.0.1:{port}/",
        "blob:x",
        "",
        "\0",
    ]
    for url in urls:
        answer = await http(cluster, user({"type": kind, kind: {"url": url}}))
        assert answer.status == 400, url
        assert answer.field.startswith("messages[0].content[0]"), url
    await asyncio.sleep(0.05)
    server.close()
    await server.wait_closed()
    assert knocked == []
    assert cluster.workers["decode-0"].submits == []
    await serves_on(cluster)


async def test_a_placeholder_in_text_is_text_at_both_doors(start_cluster, processor):
    cluster = await start_cluster(("decode",))
    typed = "<image> what <image> is <|image_pad|><|vision_start|> this <image>"
    message = pb.Message(role="user", content=[pb.ContentPart(text=typed)])
    assert (await http(cluster, user(text(typed)))).status == 200
    assert (await over_grpc(cluster, pb.GenerateRequest(messages=[message]))).status == 200
    assert (await over_grpc(cluster, pb.GenerateRequest(prompt=typed))).status == 200
    for submit in cluster.workers["decode-0"].submits:
        assert not any(segment.is_media for segment in submit.request.segments)
        assert not submit.request.media


async def test_salts_that_are_none_are_refused_and_another_tenants_salt_is_no_key(start_cluster):
    cluster = await start_cluster(("mixed",), tenants=tenants())
    question = user(text("What is left of the blue square?"))
    with bounded_memory():
        for salt in ("x" * (1 << 20), "a\0b", "\0", 5, ["acme"], {"tenant": "acme"}):
            answer = await http(cluster, {**question, "cache_salt": salt}, **bearer(OTHER))
            assert (answer.status, answer.field) == (400, "cache_salt")
    namespaces = {}
    for name, key, salt in (("acme", ACME, None), ("other", OTHER, "acme"), ("plain", OTHER, None)):
        body = question if salt is None else {**question, "cache_salt": salt}
        assert (await http(cluster, body, **bearer(key))).status == 200
        request = cluster.workers["mixed-0"].submits[-1].request
        namespaces[name] = request.namespace
        assert request.tenant == ("acme" if name == "acme" else "other")
    assert len(set(namespaces.values())) == 3


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Host", "X-Original-URL", "Expect"])
async def test_headers_that_other_servers_believe_change_nothing(start_cluster, header):
    cluster = await start_cluster(("decode",))
    answer = await cluster.http.post(
        "/v1/completions", json={"prompt": "the red"}, headers={header: "100-continue" if header == "Expect" else "x"}
    )
    assert answer.status_code == 200
    assert_tells_nothing(answer.text)


async def test_what_shows_the_whole_cluster_asks_for_an_admins_key(start_cluster):
    cluster = await start_cluster(tenants=tenants())
    for path in ("/metrics", "/status", "/v1/models", "/metrics/", "//metrics", "/%6detrics", "/v1/../metrics"):
        answer = await cluster.http.get(path)
        assert answer.status_code in (401, 404, 307), path
        assert "prismserve:" not in answer.text
        assert_tells_nothing(answer.text)
        refused = await cluster.http.get(path, headers=bearer(ACME))
        assert "prismserve:" not in refused.text


async def test_an_unexpected_error_shows_nothing_at_either_door(start_cluster, monkeypatch):
    cluster = await start_cluster(("decode",))

    async def broken(call):
        raise KeyError("/work/secret/model.py, line 7, at 10.0.0.1:6379, object 0x7f0012345678")

    monkeypatch.setattr(cluster.service._builder, "build", broken)
    for answer in (
        await http(cluster, user(text("What is left?"))),
        await http(cluster, user(text("What is left?"), stream=True)),
        await over_grpc(cluster, pb.GenerateRequest(prompt="the red")),
    ):
        assert answer.status == 500
        assert "internal error" in answer.message
        assert "secret" not in answer.message
    monkeypatch.undo()
    await serves_on(cluster)
