from __future__ import annotations

import contextlib
import dataclasses

import httpx
import pytest

from prismserve.core.types import Role
from prismserve.kv_transfer.index.memory import MemoryIndex, MemoryStore
from prismserve.models.processing import Processor
from prismserve.models.reference import reference_path
from prismserve.router.config import RouterConfig
from prismserve.router.fidelity.config import FidelityConfig
from prismserve.router.requests import ModelFacts
from prismserve.router.servers import FrontDoors
from prismserve.router.service import RouterService
from tests.router.scripted import LAYOUT, MODEL, Fabric, Script, ScriptedWorker

ANSWER = "the red circle is left of the blue square"
NO_REPLAYS = FidelityConfig(share=0)
"""Tests read what workers were sent; replays would be among it."""


@pytest.fixture(scope="session")
def processor():
    return Processor.from_directory(reference_path())


@pytest.fixture(scope="session")
def facts(processor):
    return ModelFacts("tiny", MODEL, b"e" * 32, LAYOUT, processor.max_model_len)


@pytest.fixture
def answer_ids(processor):
    return tuple(processor.encode_text(ANSWER))


@dataclasses.dataclass
class Cluster:
    service: RouterService
    doors: FrontDoors
    http: httpx.AsyncClient
    workers: dict
    start_worker: object

    @property
    def grpc_address(self):
        return f"127.0.0.1:{self.doors.grpc_port}"


@pytest.fixture
async def start_cluster(processor, facts, answer_ids):
    """Starts routers and scripted workers on loopback; everything ends with the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(roles=("prefill", "decode"), script=None, tenants=None, fidelity=NO_REPLAYS, **config):
            store, fabric = MemoryStore(), Fabric()
            workers = {}

            async def start_worker(worker_id, role, script=None):
                index = MemoryIndex(store)
                stack.push_async_callback(index.close)
                worker = ScriptedWorker(worker_id, Role(role), script or Script(answer_ids), fabric, index)
                workers[worker_id] = await worker.start()
                stack.push_async_callback(worker.stop)
                return worker

            for number, role in enumerate(roles):
                await start_worker(f"{role}-{number}", role, script and dataclasses.replace(script))
            index = MemoryIndex(store)
            stack.push_async_callback(index.close)
            settings = RouterConfig(reconcile_interval_s=0.02, stop_timeout_s=1.0, **config)
            service = RouterService(processor, facts, index, settings, tenants=tenants, fidelity=fidelity)
            await service.start()
            stack.push_async_callback(service.stop)
            doors = FrontDoors(service)
            await doors.start("127.0.0.1", 0, 0)
            stack.push_async_callback(doors.stop)
            if roles:
                assert await service.wait_ready(5.0)
            http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{doors.http_port}", timeout=20)
            await stack.enter_async_context(http)
            return Cluster(service, doors, http, workers, start_worker)

        yield start
