"""The router as a Ray Serve deployment class. It listens on the front doors' ports itself (direct ingress)."""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prismserve.cluster.startup import Reporter, configure_logging
from prismserve.core.errors import EngineError, PrismServeError
from prismserve.core.heap import settle
from prismserve.core.loop_thread import LoopThread
from prismserve.core.types import KVLayout
from prismserve.engine.sizing import kv_dtype, kv_format
from prismserve.kv_transfer.index.connect import open_index
from prismserve.models.loader import encoder_fingerprint, inspect_checkpoint, model_fingerprint, resolve_dtype
from prismserve.models.processing import Processor
from prismserve.models.source import resolve_model
from prismserve.router.requests import ModelFacts
from prismserve.router.servers import FrontDoors
from prismserve.router.service import RouterService
from prismserve.router.tenants import Tenants, TenantsFile

if TYPE_CHECKING:
    from pathlib import Path

    from prismserve.cluster.settings import Settings
    from prismserve.kv_transfer.index.base import KVIndex

STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """How a router finds its cluster."""

    cluster_id: str
    cluster_secret: str
    index_url: str
    device: str
    tenants: TenantsFile | None = None


class Router:
    """One router process.

    Args:
        settings: the cluster's settings.
        facts: see :class:`RouterFacts`.
        board: start-up board, or None.
        pools: handles of the worker pools. Requests do not pass through them: the router talks to the workers'
            data planes, which it finds in the registry; binding them here makes one application of all.
    """

    def __init__(self, settings: Settings, facts: RouterFacts, board: Any, *pools: Any) -> None:
        configure_logging(settings.log_level)
        self._pools = pools
        report = Reporter(board, f"router {os.getpid()}")
        report("starting")
        self._settings = settings
        self._index: KVIndex | None = None
        self._service: RouterService | None = None
        self._doors: FrontDoors | None = None
        self._thread = LoopThread("router")
        try:
            self._thread.run(self._start(facts), settings.startup_timeout_s)
        except PrismServeError as error:
            report.failed(error.message)
            raise
        settle()
        report.ready(*self.addresses())

    async def _start(self, facts: RouterFacts) -> None:
        settings = self._settings
        directory, model = await asyncio.to_thread(self._model_facts, facts.device)
        processor = await asyncio.to_thread(Processor.from_directory, directory)
        self._index = await open_index(facts.index_url, facts.cluster_id)
        self._service = RouterService(
            processor,
            model,
            self._index,
            settings.router,
            default_compression=settings.compression,
            router_id=f"router-{os.getpid()}-{secrets.token_hex(4)}",
            cluster_secret=facts.cluster_secret,
            tenants=Tenants(facts.tenants),
            fidelity=settings.fidelity,
        )
        await self._service.start()
        self._doors = FrontDoors(self._service)
        await self._doors.start(settings.host, settings.port, settings.grpc_port)

    def _model_facts(self, device: str) -> tuple[Path, ModelFacts]:
        """What identifies the model, computed here as the workers compute it, so that only matching ones are used."""
        settings = self._settings
        directory = resolve_model(settings.model)
        info = inspect_checkpoint(directory)
        fingerprint = model_fingerprint(directory, settings.dtype, device)
        layout = KVLayout(
            dtype=kv_dtype(settings.engine.kv_cache_dtype, resolve_dtype(settings.dtype, device)),
            layers=info.layers,
            kv_heads=info.kv_heads,
            head_dim=info.head_dim,
            block_tokens=settings.engine.block_tokens,
            position_scheme=info.position_scheme,
            kv_format=kv_format(settings.engine.kv_cache_dtype, info.head_dim),
        )
        return directory, ModelFacts(
            name=settings.model_name,
            fingerprint=fingerprint,
            encoder_fingerprint=encoder_fingerprint(fingerprint),
            layout=layout,
            embedding_token_bytes=info.hidden_size * layout.dtype_bytes,
            max_model_len=min(info.max_model_len, settings.engine.max_model_len or info.max_model_len),
        )

    async def _stop(self) -> None:
        if self._doors is not None:
            await self._doors.stop()
        if self._service is not None:
            await self._service.stop()
        if self._index is not None:
            await self._index.close()

    def check_health(self) -> None:
        """Called by Serve; raises when the router cannot serve any more."""
        if not self._thread.alive:
            message = "the router's event loop has ended"
            raise EngineError(message)

    def addresses(self) -> tuple[str, str]:
        """HTTP and gRPC addresses, ``host:port`` each."""
        if self._doors is None:
            message = "the router has not started"
            raise EngineError(message)
        host = self._settings.host
        return f"{host}:{self._doors.http_port}", f"{host}:{self._doors.grpc_port}"

    def __del__(self) -> None:
        """Called by Serve when the replica is asked to stop."""
        thread = getattr(self, "_thread", None)
        if thread is not None and thread.alive:
            thread.run(self._stop(), STOP_TIMEOUT_S)
            thread.close()
