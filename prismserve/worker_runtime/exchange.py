"""Caches between workers: fetch what a peer holds before computing it, and serve what this worker holds.

Everything fetched is an optimisation: a peer that is gone, slow or no longer holds a block costs a miss, never the
request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from prismserve.compression.loader import codec, normalise
from prismserve.core.errors import LeaseExpiredError, PrismServeError, TransferError
from prismserve.core.prompt import block_keys, elements
from prismserve.engine.encoding import image_label
from prismserve.engine.image_cache import NO_LABEL, VisualTokens
from prismserve.kv_transfer.conversion import Side, check_registered, refusal
from prismserve.kv_transfer.manifest import Expected, build
from prismserve.kv_transfer.plan import reserve_bytes
from prismserve.kv_transfer.sender import Outgoing
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from prismserve.core.types import MediaSegment, PrefillReport, Reservation
    from prismserve.engine.pool import KVPool
    from prismserve.worker_runtime.jobs import Submission
    from prismserve.worker_runtime.peers import Peer
    from prismserve.worker_runtime.runtime import WorkerRuntime

logger = logging.getLogger(__name__)

EXACT = normalise(codec("none"), {}, "compression.wire")
"""Caches are exchanged bit for bit: what is pulled is published under the same key."""


@dataclass(slots=True)
class TransferCounters:
    """What this worker sent, and what went wrong, since start."""

    transfers: int = 0
    sent_bytes: int = 0
    raw_bytes: int = 0
    seconds: float = 0.0
    failures: int = 0
    fetched_blocks: int = 0
    fetched_embeddings: int = 0
    fetch_misses: int = 0

    def sent(self, outgoing: Outgoing) -> None:
        """Count a finished transfer."""
        self.transfers += 1
        self.sent_bytes += outgoing.bytes_sent
        self.raw_bytes += outgoing.raw_bytes
        self.seconds += outgoing.write_seconds


@dataclass(frozen=True, slots=True)
class Fetched:
    """What one request was spared, and how long that took.

    Attributes:
        seconds: before the engine saw the request.
        restored_tokens: from this worker's tiers.
        pulled_tokens: from another worker.
    """

    seconds: float
    restored_tokens: int
    pulled_tokens: int

    def into(self, report: PrefillReport) -> PrefillReport:
        """The report with these figures."""
        return dataclasses.replace(
            report,
            fetch_ms=self.seconds * 1e3,
            restored_tokens=self.restored_tokens,
            pulled_tokens=self.pulled_tokens,
        )


class TailReader:
    """Reads slots from ``first`` on, out of a pool whose groups lie in the order of the blocks there."""

    def __init__(self, pool: KVPool, first: int) -> None:
        self._read = pool.reader(range(pool.groups))
        self._first = first

    def __call__(self, layer: int, start_token: int, tokens: int, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`prismserve.kv_transfer.pieces.KVRead`."""
        return self._read(layer, start_token - self._first, tokens, rows=rows)


class Exchange:
    """Both sides of cache exchange.

    Args:
        runtime: the worker.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime
        self.counters = TransferCounters()

    # ---- fetching ----------------------------------------------------------------------------------------------

    async def fetch(self, submission: Submission, worker: Literal["local", "prefill"]) -> Fetched:
        """Fetch the prefix and the embeddings the router's hints point at; never fails the request."""
        runtime, request = self._runtime, submission.request
        started_s = time.monotonic()
        restored_tokens = await runtime.tiering.restore(submission, worker)
        await runtime.tiering.restore_images(submission, worker)
        wanted: list[Awaitable[int]] = []
        if submission.pull_from and submission.pull_blocks and submission.pull_from != runtime.info.worker_id:
            wanted.append(self.fetch_prefix(submission, worker))
        holders = dict(enumerate(submission.embedding_holders))
        seen: set[bytes] = set()
        for position, segment in enumerate(request.prompt.media_segments()):
            holder = holders.get(position, "")
            held = segment.key in runtime.engine.image_cache or segment.key in seen
            if holder and holder != runtime.info.worker_id and not held:
                seen.add(segment.key)
                wanted.append(self._fetch_embedding(submission, segment, holder))
        pulled_tokens = 0
        for outcome in await asyncio.gather(*wanted, return_exceptions=True):
            if isinstance(outcome, int):
                pulled_tokens += outcome
            elif isinstance(outcome, PrismServeError):
                self.counters.fetch_misses += 1
                logger.info("request %s: cache fetch missed: %s", request.request_id, outcome.message)
            else:
                raise outcome
        return Fetched(time.monotonic() - started_s, restored_tokens, pulled_tokens)

    async def fetch_prefix(self, submission: Submission, worker: Literal["local", "prefill"]) -> int:
        """Pull leading blocks and insert them; returns tokens that were missing here.

        Raises:
            PrismServeError: the holder is gone, does not hold them or is too slow, or there is no room.
        """
        runtime, request = self._runtime, submission.request
        peer = await runtime.peers.find(submission.pull_from)
        layout = runtime.engine.layout
        namespace = request.namespace if worker == "prefill" else request.wire_namespace
        ticket = await runtime.on_engine(
            lambda engine: engine.adopt_prefix_begin(request, submission.pull_blocks, worker=worker)
        )
        done = False
        try:
            missing = ticket.prompt_tokens - ticket.cached_tokens
            if missing <= 0:
                return 0
            expected = self._expected(submission, peer, namespace, ticket.prompt_tokens, ticket.cached_tokens)
            reservation = runtime.receiver.reserve(
                expected, reserve_bytes(missing, EXACT, layout), runtime.engine.import_writer(ticket)
            )
            slots = elements(request.prompt, request.resume_token_ids)[: ticket.prompt_tokens]
            message = self._push_request(submission, peer, reservation, namespace)
            message.block_keys = convert.join_keys(block_keys(namespace, slots, layout.block_tokens))
            message.cached_tokens = ticket.cached_tokens
            await self._receive(peer, reservation, message)
            await runtime.on_engine(lambda engine: engine.adopt_prefix_finish(ticket, request))
            done = True
            self.counters.fetched_blocks += missing // layout.block_tokens
            return missing
        finally:
            if not done:
                await runtime.on_engine(lambda engine: engine.abort_import(ticket))

    async def _fetch_embedding(self, submission: Submission, segment: MediaSegment, holder: str) -> int:
        """Pull an image's embeddings into the image cache; no tokens of the prompt are spared yet."""
        runtime = self._runtime
        peer = await runtime.peers.find(holder)
        decoder = runtime.model.decoder.config
        width = decoder.hidden_size * (1 + decoder.deepstack_layers)
        dtype = runtime.model.dtype
        rows = torch.empty((segment.tokens, width), dtype=dtype)
        row_bytes = width * dtype.itemsize

        def sink(start_token: int, tokens: int, data: torch.Tensor) -> None:
            if start_token + tokens > segment.tokens or data.numel() != tokens * row_bytes:
                message = f"embedding rows {start_token} to {start_token + tokens} do not fit {segment.tokens} rows"
                raise TransferError(message)
            rows[start_token : start_token + tokens].view(torch.uint8).view(-1).copy_(data)

        namespace = submission.request.namespace
        expected = self._expected(submission, peer, namespace, segment.tokens, 0)
        nbytes = rows.nbytes + runtime.config.transfer.page_bytes
        reservation = runtime.receiver.reserve(expected, nbytes, raw_sink=sink)
        message = self._push_request(submission, peer, reservation, namespace)
        message.embedding_key = segment.key
        reply = await self._receive(peer, reservation, message)
        positions = torch.tensor(list(reply.positions), dtype=torch.int64)
        if decoder.mrope_section and len(positions) == 3 * segment.tokens:
            positions = positions.view(3, segment.tokens)
        if positions.shape[-1] != segment.tokens or reply.raw_tokens != segment.raw_tokens:
            text = f"worker {holder} sent {positions.shape[-1]} of {reply.raw_tokens} tokens, expected {segment.tokens}"
            raise TransferError(text)
        embeds = rows.to(runtime.model.device)
        label = image_label(submission.request, segment.media_index)
        runtime.engine.image_cache.put(segment.key, VisualTokens(embeds, positions, segment.raw_tokens), label)
        self.counters.fetched_embeddings += 1
        return 0

    def _expected(
        self, submission: Submission, peer: Peer, namespace: bytes, tokens: int, cached_tokens: int
    ) -> Expected:
        request = submission.request
        return Expected(
            request_id=request.request_id,
            attempt=request.attempt,
            source_worker=peer.info.worker_id,
            source_epoch=peer.info.epoch,
            namespace=namespace,
            codec=EXACT,
            prompt_tokens=tokens,
            cached_tokens=cached_tokens,
        )

    def _push_request(
        self, submission: Submission, peer: Peer, reservation: Reservation, namespace: bytes
    ) -> pb.PushRequest:
        info = self._runtime.info
        return pb.PushRequest(
            target_worker=info.worker_id,
            target_epoch=info.epoch,
            source_epoch=peer.info.epoch,
            lease_id=reservation.lease_id,
            extent=convert.extent_to_proto(reservation.extent),
            page_bytes=reservation.page_bytes,
            ttl_s=reservation.ttl_s,
            layout_fingerprint=self._runtime.engine.layout.fingerprint(),
            codec=convert.method_to_proto(EXACT),
            namespace=namespace,
            request_id=submission.request.request_id,
            attempt=submission.request.attempt,
        )

    async def _receive(self, peer: Peer, reservation: Reservation, message: pb.PushRequest) -> pb.PushReply:
        """Ask the holder to push and wait until all of it is verified; the lease is over afterwards."""
        runtime = self._runtime
        timeout_s = runtime.config.peer_timeout_s
        try:
            reply = await peer.push(message, timeout_s)
            if not reply.found:
                runtime.receiver.release(reservation.lease_id)
                text = f"worker {peer.info.worker_id} does not hold it: {reply.refusal}"
                raise TransferError(text)
            manifest = convert.manifest_from_proto(reply.manifest)
            verified = runtime.receiver.commit(reservation.lease_id, reservation.extent.generation, manifest)
            await asyncio.wait_for(asyncio.wrap_future(verified), timeout_s)
        except TimeoutError:
            text = f"what worker {peer.info.worker_id} pushed did not all arrive"
            raise TransferError(text) from None
        finally:
            runtime.receiver.cancel(reservation.lease_id)
        return reply

    # ---- serving -----------------------------------------------------------------------------------------------

    async def serve(self, message: pb.PushRequest) -> pb.PushReply:
        """Write what a peer asks for into its extent; a PrismServeError says why not."""
        runtime = self._runtime
        if message.source_epoch != runtime.info.epoch:
            text = f"the request is for epoch {message.source_epoch}, this worker is in epoch {runtime.info.epoch}"
            raise LeaseExpiredError(text)
        peer = await runtime.peers.find(message.target_worker, message.target_epoch)
        if message.layout_fingerprint != runtime.engine.layout.fingerprint():
            source = Side(runtime.info.worker_id, runtime.engine.layout)
            target = Side(message.target_worker, peer.info.layout)
            check_registered(target, message.layout_fingerprint)
            raise refusal(
                source, target, "keys of cached blocks name one layout, so they are pulled between equal ones"
            )
        if message.embedding_key:
            return await self._serve_embedding(message, peer)
        return await self._serve_blocks(message, peer)

    async def _serve_blocks(self, message: pb.PushRequest, peer: Peer) -> pb.PushReply:
        runtime = self._runtime
        keys = convert.split_keys(message.block_keys)
        pinned = await runtime.on_engine(lambda engine: engine.pin_blocks(keys))
        try:
            held = len(pinned.table)
            staged = await asyncio.to_thread(runtime.tiering.stage, keys[held:]) if held < len(keys) else None
            found = held + (0 if staged is None else staged[1])
            if found < len(keys):
                return pb.PushReply(found=False, refusal=f"{found} of {len(keys)} blocks are held")
            outgoing = self._outgoing(message, peer)
            layers, tokens = runtime.engine.layout.layers, found * runtime.engine.layout.block_tokens
            for layer in range(layers):
                outgoing.push_from(layer, 0, pinned.tokens, runtime.engine.pool.reader(pinned.table))
                if staged is not None:
                    tail = TailReader(staged[0], pinned.tokens)
                    outgoing.push_from(layer, pinned.tokens, tokens - pinned.tokens, tail)
            layer_tokens = (tokens,) * layers
            return pb.PushReply(found=True, manifest=await self._finish(message, outgoing, layer_tokens))
        finally:
            await runtime.on_engine(lambda engine: engine.unpin(pinned.pin_id))

    async def _serve_embedding(self, message: pb.PushRequest, peer: Peer) -> pb.PushReply:
        cache, key = self._runtime.engine.image_cache, message.embedding_key
        tokens = cache.get(key)
        if tokens is None and await self._runtime.tiering.restore_image(key, NO_LABEL):
            tokens = cache.get(key)
        if tokens is None:
            return pb.PushReply(found=False, refusal="the embedding is not cached here any more")
        outgoing = self._outgoing(message, peer)
        outgoing.push_bytes(0, tokens.embeds.detach().cpu().contiguous())
        return pb.PushReply(
            found=True,
            manifest=await self._finish(message, outgoing, ()),
            visual_tokens=tokens.embeds.shape[0],
            positions=tokens.positions.flatten().tolist(),
            raw_tokens=tokens.raw_tokens,
        )

    def _outgoing(self, message: pb.PushRequest, peer: Peer) -> Outgoing:
        runtime = self._runtime
        reservation = convert.reservation_from_proto(
            pb.ReserveReply(
                granted=True,
                lease_id=message.lease_id,
                extent=message.extent,
                page_bytes=message.page_bytes,
                cached_tokens=message.cached_tokens,
                ttl_s=message.ttl_s,
            )
        )
        codec_spec = convert.method_from_proto(message.codec)
        return Outgoing(runtime.hub, peer.info, reservation, codec_spec, runtime.engine.layout)

    async def _finish(self, message: pb.PushRequest, outgoing: Outgoing, layer_tokens: tuple[int, ...]) -> pb.Manifest:
        runtime = self._runtime
        try:
            payloads = await asyncio.wait_for(asyncio.wrap_future(outgoing.complete()), runtime.config.peer_timeout_s)
        except TimeoutError:
            text = f"pushing to worker {message.target_worker} took longer than {runtime.config.peer_timeout_s:g} s"
            raise TransferError(text) from None
        finally:
            outgoing.cancel()
        self.counters.sent(outgoing)
        expected = Expected(
            request_id=message.request_id,
            attempt=message.attempt,
            source_worker=runtime.info.worker_id,
            source_epoch=runtime.info.epoch,
            namespace=message.namespace,
            codec=convert.method_from_proto(message.codec),
            prompt_tokens=max(layer_tokens, default=sum(payload.tokens for payload in payloads)),
            cached_tokens=message.cached_tokens,
        )
        manifest = build(expected, runtime.engine.layout, payloads, layer_tokens=layer_tokens, next_position=0)
        return convert.manifest_to_proto(manifest)
