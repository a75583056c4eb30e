from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from prismserve.client import AsyncClient, AuthenticationError
from prismserve.core.errors import AuthenticationError as Unauthenticated
from prismserve.core.errors import ConfigurationError
from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc
from prismserve.router.tenants import EVERYONE, Tenants, TenantsFile, hash_key, new_key
from tests.router.scripted import Script

ACME, ACME_TOO, OTHER, OPERATOR = "psk-acme-1", "psk-acme-2", "psk-other", "psk-operator"
DOCUMENT = {
    "tenants": [
        {"name": "acme", "keys": [hash_key(ACME), hash_key(ACME_TOO)], "max_concurrent_requests": 1},
        {"name": "other", "keys": [hash_key(OTHER)], "cache_share": 0.5},
        {"name": "operator", "keys": [hash_key(OPERATOR)], "admin": True},
    ]
}
PATH = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "What is left of the blue square, and what is right of it?"}]}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def tenants():
    return Tenants(TenantsFile.read(DOCUMENT, "keys.yaml"))


def test_keys_lead_to_their_tenant():
    found = tenants().authenticate(f"Bearer {ACME_TOO}")
    assert (found.name, found.max_concurrent_requests, found.admin) == ("acme", 1, False)
    assert found.cache_share == pytest.approx(1 / 3)
    assert tenants().authenticate(f"bearer {OTHER}").cache_share == 0.5
    assert Tenants().authenticate(None) is EVERYONE


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", ACME, f"Basic {ACME}", "Bearer psk-wrong", f"Bearer {ACME}x", "Bearer \ud800"],
)
def test_anything_else_is_refused(header):
    with pytest.raises(Unauthenticated):
        tenants().authenticate(header)


def test_new_keys_are_long_and_distinct():
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50
    assert all(len(key) >= 46 and key.startswith("psk-") for key in keys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tenants": []}, "tenants"),
        ({"tenants": [{"name": "a b", "keys": [hash_key("x")]}]}, "tenants.0.name"),
        ({"tenants": [{"name": "a", "keys": ["psk-plain-text"]}]}, "sha256"),
        ({"tenants": [{"name": "a", "keys": [hash_key("x")]}, {"name": "a", "keys": [hash_key("y")]}]}, "same name"),
        ({"tenants": [{"name": "a", "keys": [hash_key("x")]}, {"name": "b", "keys": [hash_key("x")]}]}, "twice"),
        ({"tenants": [{"name": "a", "keys": [hash_key("x")], "quota": 3}]}, "tenants.0.quota"),
        ({"tenants": [{"name": "a", "keys": [hash_key("x")], "cache_share": 0}]}, "tenants.0.cache_share"),
    ],
)
def test_a_wrong_file_is_refused_by_entry_and_shows_no_key(change, reason):
    with pytest.raises(ConfigurationError, match=reason) as caught:
        TenantsFile.read(change, "keys.yaml")
    assert "psk-plain-text" not in caught.value.message


async def test_http_asks_for_a_key_before_it_reads_anything(start_cluster):
    cluster = await start_cluster(tenants=tenants())
    for method, path in (("POST", PATH), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/status")):
        answer = await cluster.http.request(method, path, content=b"{not json")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert (await cluster.http.get("/health")).status_code == 200
    assert (await cluster.http.post(PATH, json=BODY, headers=bearer("psk-wrong"))).status_code == 401
    assert (await cluster.http.post(PATH, json=BODY, headers=bearer(ACME))).status_code == 200


async def test_only_an_admin_sees_the_whole_cluster(start_cluster):
    cluster = await start_cluster(tenants=tenants())
    for path in ("/metrics", "/status"):
        refused = await cluster.http.get(path, headers=bearer(ACME))
        assert refused.status_code == 403
        assert refused.json()["error"]["type"] == "permission_error"
        assert (await cluster.http.get(path, headers=bearer(OPERATOR))).status_code == 200
    async with AsyncClient(cluster.grpc_address, api_key=ACME) as client:
        assert [model.id for model in await client.models()] == ["tiny"]
        with pytest.raises(AuthenticationError, match="admin"):
            await client.status()


async def test_grpc_asks_for_the_same_keys_and_keeps_its_schema_to_itself(start_cluster):
    cluster = await start_cluster(tenants=tenants())
    async with AsyncClient(cluster.grpc_address) as client:
        for call in (client.generate("What is left?"), client.models(), client.status()):
            with pytest.raises(AuthenticationError):
                await call
    async with AsyncClient(cluster.grpc_address, api_key=OTHER) as client:
        assert (await client.generate("What is left of the blue square?")).text
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.ServerReflectionInfo(iter([question])).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_tenant_decides_the_cache_and_the_client_cannot(start_cluster):
    cluster = await start_cluster(roles=("mixed",), tenants=tenants())
    seen = {}
    for name, key, salt in (
        ("acme", ACME, None),
        ("acme again", ACME_TOO, None),
        ("other", OTHER, None),
        ("other as acme", OTHER, "acme"),
    ):
        body = BODY if salt is None else {**BODY, "cache_salt": salt}
        assert (await cluster.http.post(PATH, json=body, headers=bearer(key))).status_code == 200
        request = cluster.workers["mixed-0"].submits[-1].request
        seen[name] = (request.namespace, request.tenant)
    assert seen["acme"] == seen["acme again"]
    assert len({namespace for namespace, _ in seen.values()}) == 3
    assert {tenant for _, tenant in seen.values()} == {"acme", "other"}


async def test_a_tenant_at_its_limit_leaves_room_for_others(start_cluster, answer_ids):
    cluster = await start_cluster(tenants=tenants(), script=Script(answer_ids, pause_s=0.1))
    first = asyncio.create_task(cluster.http.post(PATH, json=BODY, headers=bearer(ACME)))
    async with asyncio.timeout(5):
        while not cluster.service.admission.running:
            await asyncio.sleep(0.01)
    refused = await cluster.http.post(PATH, json=BODY, headers=bearer(ACME_TOO))
    assert refused.status_code == 429
    assert "retry-after" in refused.headers
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        call = rpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(prompt="the red"), metadata=(("authorization", f"Bearer {OTHER}"),)
        )
        assert [reply async for reply in call][-1].finish_reason == "stop"
    assert (await first).status_code == 200
    assert cluster.service.admission.running == 0
    assert (await cluster.http.post(PATH, json=BODY, headers=bearer(ACME))).status_code == 200
