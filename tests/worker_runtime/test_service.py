"""The data plane refuses strangers, forgeries and messages of another epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from prismserve.core.types import Role
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.channel import open_channel, secret_metadata
from prismserve.protocol.worker_pb2_grpc import WorkerStub

pytestmark = pytest.mark.asyncio(loop_scope="module")
SECRET = "a secret of the test's own cluster"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def worker(open_world: Callable[[], Any]) -> AsyncIterator[Any]:
    """One decode worker."""
    yield await open_world().add(Role.DECODE)


@pytest_asyncio.fixture(loop_scope="module")
async def stub(worker: Any) -> AsyncIterator[WorkerStub]:
    """A channel to it."""
    async with open_channel(worker.info.control_address) as channel:
        yield WorkerStub(channel)


async def hello(stub: WorkerStub, secret: str = SECRET) -> tuple[Any, Any]:
    call = stub.Session(metadata=secret_metadata(secret))
    await call.write(pb.RouterMessage(hello=pb.Hello(router_id="test")))
    return call, await call.read()


async def test_a_router_is_welcomed_with_id_and_epoch(worker: Any, stub: WorkerStub) -> None:
    call, message = await hello(stub)
    assert (message.welcome.worker_id, message.welcome.epoch) == (worker.info.worker_id, worker.info.epoch)
    call.cancel()


@pytest.mark.parametrize("secret", ["", "wrong", SECRET[:-1]])
async def test_a_call_without_the_cluster_secret_is_refused(stub: WorkerStub, secret: str) -> None:
    for method, message in (
        (stub.Reserve, pb.ReserveRequest()),
        (stub.Commit, pb.CommitRequest()),
        (stub.Push, pb.PushRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(message, metadata=secret_metadata(secret))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    call = stub.Session(metadata=secret_metadata(secret))
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_session_must_begin_with_a_hello(stub: WorkerStub) -> None:
    call = stub.Session(metadata=secret_metadata(SECRET))
    await call.write(pb.RouterMessage(cancel=pb.Cancel(request_id="r")))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_malformed_submission_is_answered_with_an_error(stub: WorkerStub) -> None:
    call, _ = await hello(stub)
    request = pb.Request(request_id="bad", namespace=b"short", wire_namespace=b"short")
    await call.write(pb.RouterMessage(submit=pb.Submit(request=request, job=pb.JOB_DECODE)))
    outputs = []
    while not outputs:
        outputs = [output async for output in _outputs(call)]
    assert outputs[0].finish_reason == "error"
    assert "namespace" in outputs[0].error
    call.cancel()


async def test_a_job_of_another_role_is_refused(stub: WorkerStub) -> None:
    call, _ = await hello(stub)
    request = pb.Request(request_id="role", namespace=bytes(32), wire_namespace=bytes(32))
    await call.write(pb.RouterMessage(submit=pb.Submit(request=request, job=pb.JOB_PREFILL)))
    async for output in _outputs(call):
        assert "does not do JOB_PREFILL" in output.error
        break
    call.cancel()


async def _outputs(call: Any) -> AsyncIterator[pb.TokenOutput]:
    while True:
        message = await call.read()
        if message.WhichOneof("body") == "outputs":
            for output in message.outputs.outputs:
                yield output
            return


async def test_a_reservation_nobody_submitted_is_refused(
    worker: Any, stub: WorkerStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prismserve.decode_workers.landing.SUBMIT_WAIT_S", 0.1)
    reply = await stub.Reserve(
        pb.ReserveRequest(request_id="forged", target_epoch=worker.info.epoch), metadata=secret_metadata(SECRET)
    )
    assert not reply.granted
    assert "no router submitted" in reply.refusal
    assert worker.hub.arena.used_pages == 0


async def test_a_commit_under_a_lease_that_was_never_granted_is_refused(stub: WorkerStub) -> None:
    manifest = pb.Manifest(version=1, request_id="forged", namespace=bytes(32), layout_fingerprint=bytes(32))
    reply = await stub.Commit(pb.CommitRequest(lease_id=1, manifest=manifest), metadata=secret_metadata(SECRET))
    assert not reply.accepted
    assert "no lease" in reply.refusal


async def test_a_push_for_another_epoch_or_layout_is_refused(worker: Any, stub: WorkerStub) -> None:
    message = pb.PushRequest(source_epoch=worker.info.epoch + 1, embedding_key=bytes(32))
    reply = await stub.Push(message, metadata=secret_metadata(SECRET))
    assert not reply.found
    assert "epoch" in reply.refusal
    message = pb.PushRequest(
        source_epoch=worker.info.epoch,
        target_worker=worker.info.worker_id,
        target_epoch=worker.info.epoch,
        layout_fingerprint=bytes(32),
        embedding_key=bytes(32),
    )
    reply = await stub.Push(message, metadata=secret_metadata(SECRET))
    assert "another KV layout than it is registered with" in reply.refusal


async def test_a_push_to_a_worker_the_registry_does_not_know_is_refused(worker: Any, stub: WorkerStub) -> None:
    message = pb.PushRequest(
        source_epoch=worker.info.epoch,
        layout_fingerprint=worker.engine.layout.fingerprint(),
        target_worker="stranger",
        target_epoch=1,
        embedding_key=bytes(32),
    )
    reply = await stub.Push(message, metadata=secret_metadata(SECRET))
    assert not reply.found
    assert "not registered" in reply.refusal


async def test_stats_name_every_field_of_the_record(worker: Any) -> None:
    assert set(worker.stats_message().stats.values) == {
        field.name
        for field in dataclasses.fields(worker.stats())
        if field.name not in {"worker_id", "link_bytes_per_s"}
    }
