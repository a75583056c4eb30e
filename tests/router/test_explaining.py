"""Explanations and presets at both front doors: as bounded and as guarded as other requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import grpc
import pytest
from PIL import Image

from prismserve.compression.cuts import Grid
from prismserve.compression.explanation import Explanation, Medium, Stage
from prismserve.core.errors import INVALID_PREFIX, OVERLOADED_PREFIX
from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc
from prismserve.worker_runtime.explaining import reply_of
from tests.router.scripted import Script, png
from tests.router.test_openai import question
from tests.router.test_tenants import ACME, OPERATOR, bearer, tenants

PATH, PRESETS = "/v1/compression/explain", "/v1/compression/presets"
STAGE = Stage("visual", "visionzip", None, (0, 0, -1, 3))
KNOWN = reply_of(Explanation((Medium(Grid(1, 2, 2), (0.0, 0.0, 32.0, 24.0)),), (STAGE,)))


async def test_http_gives_fates_and_a_picture(start_cluster):
    cluster = await start_cluster(script=Script(explanation=KNOWN))
    answer = await cluster.http.post(PATH, json=question(compression="turbo"))
    body = answer.json()
    assert body["object"] == "compression.explanation"
    assert body["compression"]["preset"] == "turbo"
    assert body["media"] == [{"frames": 1, "rows": 2, "columns": 2, "box_px": [0.0, 0.0, 32.0, 24.0]}]
    (stage,) = body["stages"]
    assert (stage["kept"], stage["merged"], stage["dropped"]) == (2, 1, 1)
    assert stage["fates"] == [0, 0, -1, 3]
    with Image.open(io.BytesIO(base64.b64decode(body["overlay"]["data"]))) as picture:
        assert picture.format == "PNG"
    assert len(cluster.workers["prefill-0"].explained) == 1
    assert not cluster.workers["prefill-0"].submits
    bare = await cluster.http.post(PATH, json=question(compression="turbo", overlay=False))
    assert bare.json()["overlay"] is None


async def test_grpc_gives_the_same(start_cluster):
    cluster = await start_cluster(script=Script(explanation=KNOWN))
    content = [pb.ContentPart(image=png()), pb.ContentPart(text="What is left?")]
    request = pb.GenerateRequest(messages=[pb.Message(role="user", content=content)], compression="turbo")
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        reply = await rpc.InferenceStub(channel).Explain(request)
    assert json.loads(reply.json)["stages"][0]["fates"] == [0, 0, -1, 3]
    assert reply.png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("said", "status"), [(f"{INVALID_PREFIX}nothing to draw", 400), (f"{OVERLOADED_PREFIX}busy", 429), ("broken", 500)]
)
async def test_a_workers_refusal_has_its_status_and_only_the_callers_faults_are_told(start_cluster, said, status):
    cluster = await start_cluster(script=Script(fail=said))
    answer = await cluster.http.post(PATH, json=question(compression="turbo"))
    assert answer.status_code == status
    assert ("nothing to draw" in answer.text) == (status == 400)
    assert "broken" not in answer.text


@pytest.mark.parametrize("fates", [(0, 1), (0, 1, 2, 4), (0, 1, 2, -3)])
async def test_a_reply_that_does_not_fit_is_not_believed(start_cluster, fates):
    wrong = reply_of(Explanation((Medium(Grid(1, 2, 2), (0.0, 0.0, 1.0, 1.0)),), (Stage("visual", "m", None, fates),)))
    cluster = await start_cluster(script=Script(explanation=wrong))
    assert (await cluster.http.post(PATH, json=question(compression="turbo"))).status_code >= 500


async def test_a_silent_worker_costs_the_time_limit_and_no_more(start_cluster):
    cluster = await start_cluster(script=Script(silent=True), request_timeout_s=0.3)
    async with asyncio.timeout(5):
        answer = await cluster.http.post(PATH, json=question(compression="turbo"))
    assert answer.status_code == 504
    assert cluster.service.admission.running == 0


async def test_explanations_ask_for_a_key_and_count_against_its_quota(start_cluster):
    cluster = await start_cluster(script=Script(explanation=KNOWN), tenants=tenants())
    body = question(compression="turbo")
    assert (await cluster.http.post(PATH, json=body)).status_code == 401
    assert (await cluster.http.post(PATH, json=body, headers=bearer(ACME))).status_code == 200
    tenant = cluster.service.tenants.authenticate(f"Bearer {ACME}")
    with cluster.service.admission.slot(tenant):
        assert (await cluster.http.post(PATH, json=body, headers=bearer(ACME))).status_code == 429


async def test_a_wrong_body_names_the_field(start_cluster):
    cluster = await start_cluster()
    answer = await cluster.http.post(PATH, json=question(compression="no_such"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "compression")
    answer = await cluster.http.post(PATH, json=question(overlay=3))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "overlay")


async def test_an_operator_holds_and_releases_a_preset_over_http(start_cluster):
    cluster = await start_cluster(tenants=tenants())
    admin = bearer(OPERATOR)
    held = await cluster.http.post(f"{PRESETS}/turbo", json={"control": "hold"}, headers=admin)
    assert held.json()["presets"]["turbo"]["in_force"] == "balanced"
    answer = await cluster.http.post("/v1/chat/completions", json=question(compression="turbo"), headers=bearer(ACME))
    told = answer.json()["usage"]["prismserve"]["compression"]
    assert (told["preset"], told["stepped_back_from"]) == ("balanced", "turbo")
    status = (await cluster.http.get("/status", headers=admin)).json()
    assert status["fidelity"]["presets"]["turbo"]["reason"] == "operator: hold"
    await cluster.http.post(f"{PRESETS}/turbo", json={"control": "auto"}, headers=admin)
    shown = (await cluster.http.get(PRESETS, headers=admin)).json()
    assert shown["presets"]["turbo"]["in_force"] == "turbo"


async def test_only_an_admin_may_decide_about_presets(start_cluster):
    cluster = await start_cluster(tenants=tenants())
    for headers, status in (({}, 401), (bearer(ACME), 403)):
        assert (await cluster.http.get(PRESETS, headers=headers)).status_code == status
        answer = await cluster.http.post(f"{PRESETS}/turbo", json={"control": "hold"}, headers=headers)
        assert answer.status_code == status
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = rpc.InferenceStub(channel)
        asked = pb.SetPresetRequest(preset="turbo", control="hold")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetPreset(asked, metadata=[("authorization", f"Bearer {ACME}")])
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        reply = await stub.SetPreset(asked, metadata=[("authorization", f"Bearer {OPERATOR}")])
    assert json.loads(reply.json)["presets"]["turbo"]["held"]


@pytest.mark.parametrize(
    ("preset", "control"), [("off", "hold"), ("no_such", "hold"), ("turbo", "maybe"), ("turbo", 3)]
)
async def test_a_wrong_word_about_a_preset_is_refused(start_cluster, preset, control):
    cluster = await start_cluster()
    answer = await cluster.http.post(f"{PRESETS}/{preset}", json={"control": control})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in {"preset", "control"}
