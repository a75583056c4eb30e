"""The engine of one worker: requests in, one step at a time, tokens out."""

from __future__ import annotations

import time
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

import torch

from prismserve.core.errors import (
    ConfigurationError,
    EngineError,
    InvalidRequestError,
    OutOfBlocksError,
    OverloadedError,
)
from prismserve.core.types import WorkerStats
from prismserve.engine.blocks import BlockManager
from prismserve.engine.checks import accepts_layers, check_arrival, check_compactable, check_taps
from prismserve.engine.constraints import ConstraintCompiler, checked_matcher
from prismserve.engine.encoding import ImageStage
from prismserve.engine.finish import check_request
from prismserve.engine.focusing import plan_focusing
from prismserve.engine.foundation import lay_foundation
from prismserve.engine.image_cache import ImageCache
from prismserve.engine.imports import ExportView, ImportDesk, ImportTicket, LayerSink, PinnedBlocks
from prismserve.engine.metrics import Counters, MovingAverage
from prismserve.engine.pruning import plan_pruning
from prismserve.engine.runner import ModelRunner
from prismserve.engine.sequence import Sequence, State, Work
from prismserve.engine.stepper import Stepper
from prismserve.engine.vision import VisionPipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Items

    from prismserve.core.types import BlockKey, PrefillReport, Request, TokenLogprobs, TokenOutput
    from prismserve.engine.config import EngineConfig
    from prismserve.engine.constraints import Matcher
    from prismserve.engine.prefix_cache import CacheEvents, CacheOwner
    from prismserve.engine.pruning import Pruning
    from prismserve.engine.taps import Taps
    from prismserve.models.base import VisionLanguageModel
    from prismserve.models.processing import Processor

__all__ = ["Engine", "ExportView", "ImportTicket", "LayerSink", "PinnedBlocks"]


class Engine:
    """Continuous batching over a paged KV pool.

    Not thread-safe: one thread (see :class:`prismserve.engine.loop.EngineLoop`) makes all calls, except
    ``pool.read``, ``pool.write`` and writers from :meth:`import_writer` on blocks an export, pin or import holds,
    ``image_cache`` and ``constraints``.

    A finished request's last output carries the reason, and its last token may be the one that stopped it.

    Attributes:
        layout: of the KV blocks.
        pool: the blocks.
        image_cache: embeddings of images.
        vision: encodes them; for the engine's thread alone.
        max_model_len: longest sequence, in positions.
        constraints: compiles what :meth:`submit` and :meth:`begin_import` want beside a constrained request.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Size and allocate the pool; ConfigurationError if ``config`` and the model or the memory do not agree."""
        self.config = config
        self.max_model_len = config.max_model_len or model.max_model_len
        if self.max_model_len > model.max_model_len:
            message = f"max_model_len {self.max_model_len} is beyond the model's own {model.max_model_len}"
            raise ConfigurationError(message, field="max_model_len")
        foundation = lay_foundation(model, config, self.max_model_len)
        self.layout = foundation.layout
        self.pool = foundation.pool
        self.image_cache = ImageCache(config.image_cache_bytes)
        self._model = model
        self._processor = processor
        self._clock = clock
        self._blocks = BlockManager(self.pool, prefix_caching=config.prefix_caching, swap_bytes=config.swap_bytes)
        self.vision = VisionPipeline(model, processor, self.image_cache)
        self._images = ImageStage(self.vision, self.image_cache, clock, derives=config.derive_images)
        self._stepper = Stepper(
            model=model,
            blocks=self._blocks,
            images=self._images,
            runner=ModelRunner(model, self.pool, foundation.graphs),
            config=config,
            max_model_len=self.max_model_len,
            clock=clock,
        )
        self._imports = ImportDesk(self._blocks)
        self.constraints = ConstraintCompiler(processor, model.vocab_size, model.eos_token_ids, config)
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._next_order = 0

    # ---- requests --------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        *,
        worker: Literal["local", "prefill"],
        sink_factory: Callable[[ExportView], LayerSink] | None = None,
        taps: Taps | None = None,
        matcher: Matcher | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request: prompt, media and sampling.
            worker: ``local`` prefills and decodes here; ``prefill`` stops after the first token and keeps the
                blocks until :meth:`release_export`.
            sink_factory: called in the engine thread when the blocks are allocated, before the first layer runs.
            taps: what to look at in the prompt, in which layers; to be read once the first token is out.
            matcher: of the request's constraint, if it has one, from ``constraints.compile``; the engine's from now on.

        Raises:
            OverloadedError: ``max_waiting`` is reached.
            InvalidRequestError, ContextLengthError, OutOfBlocksError: the request can never run.
        """
        if len(self._stepper.waiting) >= self.config.max_waiting:
            message = f"the waiting queue is full ({self.config.max_waiting} requests)"
            raise OverloadedError(message, request_id=request.request_id)
        work = Work(worker)
        namespace = request.namespace if work is Work.PREFILL else request.wire_namespace
        sequence = self._create(request, work, namespace, matcher)
        self._check_new(sequence)
        if taps is not None:
            check_taps(taps, sequence, self.layout)
            taps.begin(sequence.length, exact_keys=self.layout.quantised)
        sequence.taps = taps
        self._sequences[sequence.identity] = sequence
        self._stepper.add(sequence, sink_factory)

    def cancel(self, request_id: str, attempt: int) -> bool:
        """Free everything of a request, wherever it is; False if it is not here.

        Whoever reads an export's blocks must have stopped; late writes to an import's blocks are refused by tag.
        """
        adopted = self._imports.cancel_adoptions(request_id, attempt)
        sequence = self._sequences.pop((request_id, attempt), None)
        if sequence is None:
            return adopted
        if sequence.state is State.IMPORTING:
            self._imports.abort_sequence(sequence)
        else:
            self._stepper.drop(sequence)
        return True

    def release_export(self, request_id: str, attempt: int) -> None:
        """Let go of a prefilled request's blocks; nothing happens if it is gone already."""
        sequence = self._sequences.get((request_id, attempt))
        if sequence is not None and sequence.state is State.EXPORTING:
            del self._sequences[sequence.identity]
            self._stepper.drop(sequence)

    def pruning(self, request_id: str, attempt: int) -> Pruning | None:
        """The cuts of a request that is here, to be read once its first token is out; None without a prefill method."""
        sequence = self._sequences.get((request_id, attempt))
        return None if sequence is None else sequence.pruning

    # ---- single layers ---------------------------------------------------------------------------------------

    def read_layer(self, request_id: str, attempt: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy out what one layer holds of a request: K after RoPE and V, each [tokens, kv_heads, head_dim]."""
        return self._blocks.read_layer(self._holder(request_id, attempt), layer)

    def compact(self, request_id: str, attempt: int, layer: int, keep: torch.Tensor) -> None:
        """Keep some of the slots that one layer holds of a request, and give the memory of the rest back.

        Positions, later tokens and other requests are not affected. The request's KV is private from now on. When it
        is preempted, the compaction is repeated at the same point of its computation.

        Args:
            request_id: of a request that computes here, or was prefilled without a sink and waits to be exported.
            attempt: its attempt.
            layer: decoder layer.
            keep: [k] or [kv_heads, k] int64: distinct slots of this layer, as it is now, for all heads or for each.
                They come to lie in the order given.

        Raises:
            InvalidRequestError: the layer or the slots make no sense.
            OutOfBlocksError: what must be copied because it is shared finds no room; nothing has changed.
            EngineError: the request holds no KV here, or an export or import is reading or writing it.
        """
        sequence = self._holder(request_id, attempt)
        check_compactable(sequence, self._model.decoder.config)
        self._blocks.compact(sequence, layer, keep)

    def export_view(self, request_id: str, attempt: int) -> ExportView:
        """The blocks of a request as they are now, ragged or not; EngineError if it holds none."""
        sequence = self._holder(request_id, attempt)
        return ExportView.of(sequence, self.layout.layers, sequence.cached)

    def _holder(self, request_id: str, attempt: int) -> Sequence:
        sequence = self._sequences.get((request_id, attempt))
        if sequence is None or sequence.state not in {State.RUNNING, State.EXPORTING}:
            message = f"request {request_id!r} attempt {attempt} holds no KV here that could be looked at"
            raise EngineError(message, request_id=request_id)
        return sequence

    # ---- KV from elsewhere -----------------------------------------------------------------------------------

    def begin_import(self, request: Request, matcher: Matcher | None = None) -> ImportTicket:
        """Allocate blocks for KV computed elsewhere, matching the prefix cache under ``request.wire_namespace``.

        ``matcher`` is as for :meth:`submit`; the same one may be given again after an OverloadedError.

        Raises:
            OverloadedError: no slot or too few blocks now.
            OutOfBlocksError, InvalidRequestError, ContextLengthError: the request can never run.
        """
        taken = len(self._stepper.running) + len(self._stepper.exporting) + self._imports.open
        if taken >= self.config.max_running:
            message = f"all {self.config.max_running} running slots are taken"
            raise OverloadedError(message, request_id=request.request_id)
        sequence = self._create(request, Work.IMPORT, request.wire_namespace, matcher)
        self._check_new(sequence)
        blocks = self.pool.blocks_for(sequence.length + 1)
        ticket = self._imports.begin(sequence, blocks, len(self._stepper.running))
        self._sequences[sequence.identity] = sequence
        return ticket

    def import_writer(self, ticket: ImportTicket) -> Callable[[int, int, torch.Tensor, torch.Tensor], None]:
        """A function (layer, start_token, keys, values) that writes into a ticket's blocks, from any thread.

        It raises LeaseExpiredError once the ticket has ended and its blocks were let go.
        """
        return self._imports.writer(ticket)

    def finish_import(
        self,
        ticket: ImportTicket,
        request: Request,
        first_token_ids: tuple[int, ...],
        next_position: int,
        report: PrefillReport | None,
        first_logprobs: tuple[TokenLogprobs, ...] = (),
        *,
        layer_tokens: tuple[int, ...] | None = None,
    ) -> None:
        """All KV of the ticket is written: publish it and join the running batch.

        The first tokens come out of the next step, with ``report``. ``layer_tokens`` are the slots written in each
        layer; None stands for all of the prompt's in every one.

        Raises:
            EngineError: the ticket has ended, or does not fit what is said; an open ticket stays open.
        """
        sequence = self._imports.peek(ticket)
        check_arrival(sequence, request, first_token_ids, next_position, first_logprobs, self._model.vocab_size)
        if layer_tokens is not None and not self.import_accepts(ticket, layer_tokens):
            message = f"{layer_tokens} slots by layer do not fit the request's prompt of {ticket.prompt_tokens}"
            raise EngineError(message, request_id=ticket.request_id)
        self._imports.finish(ticket, layer_tokens)
        self._stepper.counters.prefix_query_tokens += ticket.prompt_tokens
        self._stepper.counters.prefix_hit_tokens += ticket.cached_tokens
        self._stepper.join(sequence, first_token_ids, report, first_logprobs)
        if sequence.ended:
            del self._sequences[sequence.identity]

    def import_accepts(self, ticket: ImportTicket, layer_tokens: tuple[int, ...]) -> bool:
        """Whether KV of so many slots in each layer can be that of the ticket's request."""
        return accepts_layers(self._imports.peek(ticket), ticket, layer_tokens, self.layout.layers)

    def abort_import(self, ticket: ImportTicket) -> None:
        """Free a ticket's blocks (an import's or an adoption's); nothing happens if it has ended."""
        sequence = self._imports.abort(ticket)
        if sequence is not None and self._sequences.get(sequence.identity) is sequence:
            del self._sequences[sequence.identity]

    def adopt_prefix_begin(
        self, request: Request, blocks: int, *, worker: Literal["local", "prefill"] = "prefill"
    ) -> ImportTicket:
        """Allocate the request's first ``blocks`` full blocks, to be pulled from a holder before a submit.

        Raises:
            OverloadedError: too few blocks now.
        """
        namespace = request.namespace if worker == "prefill" else request.wire_namespace
        sequence = self._lay_out(request, Work.IMPORT, namespace)
        return self._imports.begin_adoption(sequence, blocks, len(self._stepper.running))

    def adopt_prefix_finish(self, ticket: ImportTicket, request: Request) -> None:
        """The adopted blocks are written: hand them to the prefix cache; EngineError if the ticket has ended."""
        if (request.request_id, request.attempt) != self._imports.peek(ticket).identity:
            message = "an adoption ends with its own request"
            raise EngineError(message, request_id=ticket.request_id)
        self._imports.finish_adoption(ticket)

    @property
    def encode_token_s(self) -> float:
        """Recent time of encoding one visual token before compression, in seconds; 0 before the first image."""
        return self._images.token_s.value

    def take_prefills(self) -> list[tuple[int, int, float]]:
        """Prefills since this was last asked: tokens before, tokens, and seconds; may be called from any thread.

        Only of steps that did nothing else, without encoding images, and the latest of them.
        """
        taken, prefills = [], self._stepper.prefills
        while prefills:
            taken.append(prefills.popleft())
        return taken

    @property
    def group_bytes(self) -> int:
        """Bytes of one full block over all layers, as :meth:`copy_block` gives it."""
        return self.pool.memory.group_bytes

    def copy_block(self, key: BlockKey, target: torch.Tensor) -> CacheOwner | None:
        """Copy a cached full block without holding it; may be called from any thread.

        Args:
            key: of the block.
            target: uint8 [group_bytes] on the CPU; holds garbage where None is returned.

        Returns:
            Whose block it is; None if it is not cached, or was given to somebody else while it was copied.
        """
        return self._blocks.copy_out(key, target)

    def held_blocks(self, keys: Items[BlockKey]) -> int:
        """How many leading ones of ``keys`` are cached now; a hint that may be asked for from any thread."""
        return sum(1 for _ in takewhile(lambda key: self._blocks.prefix.full_block(key) is not None, keys))

    def adopt_blocks(
        self,
        request: Request,
        first: int,
        blocks: Items[torch.Tensor],
        *,
        worker: Literal["local", "prefill"] = "prefill",
    ) -> int:
        """Put blocks that were kept elsewhere back into the prefix cache, at once.

        Args:
            request: whose prompt they are of.
            first: which block of its chain the first of them is.
            blocks: uint8 [group_bytes] each, as :meth:`copy_block` gave them under the same keys.
            worker: as for :meth:`submit`.

        Returns:
            Blocks taken in; 0 if those before ``first`` are not cached any more.

        Raises:
            OverloadedError: too few blocks now.
        """
        ticket = self.adopt_prefix_begin(request, first + len(blocks), worker=worker)
        held = ticket.cached_tokens // self.config.block_tokens
        if held < first:
            self.abort_import(ticket)
            return 0
        for index in range(held, len(ticket.table)):
            self.pool.memory.copy_group_in(ticket.table[index], blocks[index - first])
        self.adopt_prefix_finish(ticket, request)
        return len(ticket.table) - held

    def adopt_write_begin(self, ticket: ImportTicket) -> list[torch.Tensor] | None:
        """Memory of an adoption's missing blocks, uint8 [group_bytes] each, as :meth:`copy_block` gives them.

        A thread may write into it until :meth:`adopt_write_end`, which must follow; a cancelled request's blocks are
        let go only then. None where the pool is not one piece of host memory: use :meth:`adopt_blocks`.
        """
        return self._imports.write_begin(ticket)

    def adopt_write_end(self, ticket: ImportTicket, blocks: int) -> int:
        """Hand the first ``blocks`` blocks that were written to the prefix cache, the rest back to the pool.

        Returns:
            Blocks taken in; 0 if the request was cancelled meanwhile.
        """
        return self._imports.write_end(ticket, blocks)

    def pin_blocks(self, keys: Items[BlockKey]) -> PinnedBlocks:
        """Hold the longest leading run of ``keys`` that is cached, until :meth:`unpin`."""
        return self._imports.pin(keys)

    def delete_blocks(self, keys: Items[BlockKey]) -> int:
        """Evict a run of cached blocks, the last first; how many. What is in use, or has others after it, stays."""
        return self._blocks.prefix.delete(keys)

    def unpin(self, pin_id: int) -> None:
        """Let go of pinned blocks; nothing happens if the pin has ended."""
        self._imports.unpin(pin_id)

    # ---- running ---------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""
        return self._stepper.has_work

    @property
    def stalled(self) -> bool:
        """Whether the last step could move nothing on, because blocks or slots are held by exports or imports."""
        return self._stepper.stalled

    def step(self) -> list[TokenOutput]:
        """One iteration: decodes, prefill chunks and admissions in one batch; [] when there was nothing to say."""
        with torch.inference_mode():
            outputs = self._stepper.step(self._imports.open)
        self._forget_ended(outputs)
        return outputs

    def abandon_step(self, message: str) -> list[TokenOutput]:
        """After :meth:`step` raised: fail the requests it was computing, or all if those are not known."""
        outputs = self._stepper.abandon(message)
        self._forget_ended(outputs)
        return outputs

    def drain_cache_events(self) -> CacheEvents:
        """Block keys gained and lost since the last call."""
        return self._blocks.prefix.drain_events()

    def cached_keys(self) -> list[BlockKey]:
        """All block keys held, parents first."""
        return self._blocks.prefix.keys()

    def clear_prefix_cache(self) -> None:
        """Evict every cached block nobody references."""
        self._blocks.prefix.clear()

    def forget(self) -> None:
        """Back to a fresh start, as after construction: caches empty, counters zero; only while nothing runs."""
        self.clear_prefix_cache()
        self.image_cache.clear()
        self._stepper.counters = Counters()
        self._stepper.prefill_rate = MovingAverage()
        self._stepper.prefills.clear()
        self._stepper.step_ms = MovingAverage()
        self.vision.encoded = 0
        self._images.derived = 0
        self._images.token_s = MovingAverage()

    def stats(self) -> WorkerStats:
        """What this engine has done and holds; ``worker_id`` and the transfer figures are left to the worker."""
        stepper, counters = self._stepper, self._stepper.counters
        return WorkerStats(
            waiting=len(stepper.waiting),
            running=len(stepper.running) + len(stepper.exporting) + self._imports.open,
            kv_blocks_total=self.pool.groups,
            kv_blocks_used=self.pool.used_groups,
            kv_blocks_cached=len(self._blocks.prefix),
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            image_queries=counters.image_queries,
            image_hits=counters.image_hits,
            encoded_images=self.vision.encoded,
            derived_images=self._images.derived,
            prefill_tokens=counters.prefill_tokens,
            decode_tokens=counters.decode_tokens,
            preemptions=counters.preemptions,
            prefill_tokens_per_s=stepper.prefill_rate.value,
            step_ms=stepper.step_ms.value,
        )

    def check_integrity(self) -> None:
        """Compare tables, pins, reference counts, the free list and the prefix cache; EngineError on a mismatch."""
        self._blocks.check(self._sequences.values(), self._imports.held())
        for identity, sequence in self._sequences.items():
            if sequence.ended:
                message = f"request {identity[0]} has ended but is still listed"
                raise EngineError(message, request_id=identity[0])

    def _create(self, request: Request, work: Work, namespace: bytes, matcher: Matcher | None) -> Sequence:
        sequence = self._lay_out(request, work, namespace)
        sequence.matcher = checked_matcher(request.sampling.constraint, matcher, request.resume_token_ids)
        return sequence

    def _lay_out(self, request: Request, work: Work, namespace: bytes) -> Sequence:
        check_request(request, vocab_size=self._model.vocab_size, max_model_len=self.max_model_len)
        self._next_order += 1
        size = self.config.block_tokens
        sequence = Sequence.create(self._next_order, request, work, namespace, size, self._clock())
        decoder = self._model.decoder.config
        sequence.prune(plan_pruning(request, sequence.spans, decoder, self._processor, size), size)
        sequence.focus(plan_focusing(request, sequence.spans, decoder), size)
        return sequence

    def _check_new(self, sequence: Sequence) -> None:
        request = sequence.request
        if sequence.identity in self._sequences:
            message = f"request {request.request_id!r} attempt {request.attempt} is here already"
            raise InvalidRequestError(message, field="request_id", request_id=request.request_id)
        needed = self.pool.blocks_for(sequence.length + 1)
        if needed > self.pool.groups:
            message = f"the request needs {needed} KV blocks, the pool has {self.pool.groups}"
            raise OutOfBlocksError(message, request_id=request.request_id)

    def _forget_ended(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._sequences.pop((output.request_id, output.attempt), None)
