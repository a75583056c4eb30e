"""The live sequences and what one step does to them: plan, apply, compute, sample, publish, finish."""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import TYPE_CHECKING

from prismserve.core.errors import OutOfBlocksError, PrismServeError, outcome_text
from prismserve.core.types import FinishReason, PrefillReport, TextSegment, TokenOutput
from prismserve.engine.cutting import Stage
from prismserve.engine.finish import blocked_tokens, finish_reason, no_token_error
from prismserve.engine.imports import ExportView
from prismserve.engine.logprobs import RawScores
from prismserve.engine.metrics import Counters, MovingAverage
from prismserve.engine.planning import LOOKAHEAD, StepPlanner
from prismserve.engine.run_item import RunItem
from prismserve.engine.sampler import GREEDY, NO_TOKEN, SampleRow, TokenBias, TokenCounts, has_penalty, sample
from prismserve.engine.sequence import Sequence, State, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Items

    import torch

    from prismserve.core.types import TokenLogprobs
    from prismserve.engine.blocks import BlockManager
    from prismserve.engine.config import EngineConfig
    from prismserve.engine.encoding import ImageStage
    from prismserve.engine.imports import LayerSink
    from prismserve.engine.runner import ModelRunner
    from prismserve.engine.scheduler import StepPlan
    from prismserve.models.base import VisionLanguageModel

_PREFILLS_MAX = 64


class Stepper:
    """Sequences waiting, running and exporting, and the step that moves them on.

    Attributes:
        waiting: in order of rank.
        running: by order number.
        exporting: prefilled, with blocks still held, by order number.
        counters: totals since start.
        stalled: whether the last step moved nothing on, because blocks or slots are held elsewhere.
        step_ms: moving average of a step's length.
        prefill_rate: moving average of prefilled tokens per second, over steps that prefill.
        prefills: latest steps that did nothing but prefill one sequence: tokens before, tokens, and seconds of computing.
    """

    def __init__(
        self,
        *,
        model: VisionLanguageModel,
        blocks: BlockManager,
        images: ImageStage,
        runner: ModelRunner,
        config: EngineConfig,
        max_model_len: int,
        clock: Callable[[], float],
    ) -> None:
        """Put the parts together."""
        self.waiting: list[Sequence] = []
        self.running: dict[int, Sequence] = {}
        self.exporting: dict[int, Sequence] = {}
        self.counters = Counters()
        self.stalled = False
        self.step_ms = MovingAverage()
        self.prefill_rate = MovingAverage()
        self.prefills: deque[tuple[int, int, float]] = deque(maxlen=_PREFILLS_MAX)
        self._model = model
        self._blocks = blocks
        self._images = images
        self._runner = runner
        self._config = config
        self._planner = StepPlanner(blocks, config)
        self._max_model_len = max_model_len
        self._clock = clock
        self._factories: dict[int, Callable[[ExportView], LayerSink]] = {}
        self._sinks: dict[int, LayerSink] = {}
        self._outbox: list[TokenOutput] = []
        self._computing: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self._outbox)

    def add(self, sequence: Sequence, sink_factory: Callable[[ExportView], LayerSink] | None) -> None:
        """Queue a sequence."""
        if sink_factory is not None:
            self._factories[sequence.order] = sink_factory
        insort(self.waiting, sequence, key=self._planner.rank)

    def join(
        self,
        sequence: Sequence,
        tokens: Items[int],
        report: PrefillReport | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Take in an imported sequence whose prompt is computed, with its first tokens; they come out next step."""
        sequence.state = State.RUNNING
        self.running[sequence.order] = sequence
        self._prepare_sampling(sequence)
        self._accept(sequence, tokens, logprobs, report, self._outbox)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence and let go of its blocks."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        self.running.pop(sequence.order, None)
        self.exporting.pop(sequence.order, None)
        self._factories.pop(sequence.order, None)
        self._sinks.pop(sequence.order, None)
        self._blocks.publish_tail(sequence)
        self._blocks.release(sequence)
        self._blocks.swap.drop(sequence)
        sequence.ended = True

    def step(self, held_slots: int) -> list[TokenOutput]:
        """Run one iteration; ``held_slots`` running slots are taken by imports under way."""
        started = self._clock()
        outputs, self._outbox = self._outbox, []
        self.stalled = True
        self._prepare_images(outputs)
        self._repeat_compactions(self.running.values())
        held = held_slots + len(self.exporting)
        plan = self._planner.plan(self.running, self.waiting, self._sinks, held, started)
        by_order = {**self.running, **{sequence.order: sequence for sequence in self.waiting}}
        for order in plan.expired:
            sequence = by_order[order]
            message = f"the request's {sequence.request.timeout_s:g} s are over"
            self._fail(sequence, message, outputs)
        for order in plan.preempted:
            self._preempt(by_order[order], outputs, alone=len(self.running) + held == 1)
        for order in plan.admitted:
            self._admit(by_order[order], outputs)
        items = self._items(plan, by_order)
        if items:
            computing = self._clock()
            self._compute(items, outputs)
            self._measure(started, computing, items)
        self.stalled = self.stalled and not items and not outputs
        return outputs

    def abandon(self, message: str) -> list[TokenOutput]:
        """Fail what the interrupted step was computing, or everything if that is not known."""
        outputs, self._outbox = self._outbox, []
        victims = [sequence for sequence in self._computing if not sequence.ended]
        for sequence in victims or [*self.running.values(), *self.waiting]:
            self._fail(sequence, message, outputs)
        self._computing = []
        return outputs

    # ---- planning --------------------------------------------------------------------------------------------

    def _prepare_images(self, outputs: list[TokenOutput]) -> None:
        wanting = [
            (sequence, self._blocks.match(sequence).tokens if sequence.swapped is None else sequence.cached)
            for sequence in self.waiting[:LOOKAHEAD]
            if sequence.missing_images(0)
        ]
        if not wanting:
            return
        self._computing = [sequence for sequence, _ in wanting]
        failed, encoded = self._images.run(wanting, self._config.max_encode_images)
        for sequence, error in failed:
            self._fail(sequence, outcome_text(error), outputs)
        self._computing = []
        self.stalled = self.stalled and not encoded

    # ---- applying --------------------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence, outputs: list[TokenOutput], *, alone: bool) -> None:
        if alone and sequence.ragged is not None:
            # Nobody else holds a block, so it would find too few again; a uniform sequence always fits alone.
            if self._blocks.unshare(sequence):
                self.stalled = False
                return
            message = f"the KV pool of {self._blocks.pool.groups} blocks cannot hold the sequence and what it shares"
            self._fail(sequence, outcome_text(OutOfBlocksError(message)), outputs)
            return
        del self.running[sequence.order]
        if self._config.preemption == "swap" and self._blocks.swap_out(sequence):
            sequence.state = State.WAITING
            self.counters.swaps += 1
        else:
            self._blocks.release(sequence)
            sequence.reset()
        insort(self.waiting, sequence, key=self._planner.rank)
        self.counters.preemptions += 1

    def _repeat_compactions(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.replay and not sequence.ended:
                self._blocks.repeat_compactions(sequence)

    def _admit(self, sequence: Sequence, outputs: list[TokenOutput]) -> None:
        if sequence.swapped is not None:
            self._blocks.swap.copy_in(sequence)
        else:
            self._blocks.admit(sequence)
            if sequence.missing_images(sequence.cached):
                # An admission before this one evicted blocks this one had counted on.
                self._blocks.release(sequence)
                sequence.reset()
                return
        self.waiting.remove(sequence)
        sequence.state = State.RUNNING
        self.running[sequence.order] = sequence
        try:
            sequence.prepare_inputs()
            self._open_sink(sequence)
        except PrismServeError as error:
            self._fail(sequence, outcome_text(error), outputs)
            return
        self._prepare_sampling(sequence)
        if sequence.timings.started is None:
            sequence.timings.started = self._clock()
            self.counters.prefix_query_tokens += sequence.length
            self.counters.prefix_hit_tokens += sequence.prefix_tokens

    def _open_sink(self, sequence: Sequence) -> None:
        factory = self._factories.pop(sequence.order, None)
        if factory is None:
            return
        view = ExportView.of(sequence, self._blocks.pool.layout.layers, sequence.length)
        sequence.streamed = True
        self._sinks[sequence.order] = factory(view)

    def _prepare_sampling(self, sequence: Sequence) -> None:
        params = sequence.request.sampling
        if sequence.bias is None and params.logit_bias:
            sequence.bias = TokenBias(params.logit_bias, self._model.device)
        if sequence.counts is None and has_penalty(params):
            segments = sequence.request.prompt.segments
            prompt = (token for s in segments if isinstance(s, TextSegment) for token in s.token_ids)
            sequence.counts = TokenCounts(self._model.vocab_size, prompt, sequence.generated, self._model.device)

    def _items(self, plan: StepPlan, by_order: dict[int, Sequence]) -> list[RunItem]:
        items: list[RunItem] = []
        for chunk in plan.chunks:
            sequence = by_order[chunk.order]
            if sequence.state is not State.RUNNING or sequence.ended:
                continue
            self._blocks.grow(sequence)
            tokens = min(chunk.tokens, sequence.computable)
            if self._model.decoder.config.bidirectional_images:
                tokens = sequence.whole_images(sequence.cached, tokens)
            stage = Stage(sequence, tokens, self._blocks.pool.layout.layers) if sequence.staged else None
            items.append(RunItem(sequence, sequence.cached, tokens, tokens == sequence.uncomputed, stage))
        return sorted(items, key=lambda item: (item.sequence.ragged is not None, item.stage is not None))

    # ---- computing -------------------------------------------------------------------------------------------

    def _compute(self, items: list[RunItem], outputs: list[TokenOutput]) -> None:
        self._computing = [item.sequence for item in items]
        broken: dict[int, str] = {}
        logits = self._runner.run(items, self._exporter(items, broken))
        sampling = [item.sequence for item in items if item.samples]
        tokens, logprobs = self._sample(logits, sampling) if sampling else ([], {})
        for item in items:
            sequence = item.sequence
            sequence.advance(item.tokens, None if item.stage is None else item.stage.counts)
            if item.stage is not None and item.stage.final:
                self._blocks.trim(sequence)
            self._blocks.publish(sequence, movable=sequence.order not in self._sinks)
        self._repeat_compactions(item.sequence for item in items)
        for order, message in broken.items():
            self._fail(self.running[order], message, outputs)
        for row, (sequence, token) in enumerate(zip(sampling, tokens, strict=True)):
            if not sequence.ended:
                self._sampled(sequence, token, (logprobs[row],) if row in logprobs else (), outputs)
        self._computing = []

    def _sample(self, logits: torch.Tensor, sequences: Items[Sequence]) -> tuple[list[int], dict[int, TokenLogprobs]]:
        rows = [self._sample_row(sequence) for sequence in sequences]
        raw = RawScores(logits, rows)
        tokens = sample(logits, rows)
        return tokens, raw.of(tokens)

    def _exporter(self, items: list[RunItem], broken: dict[int, str]) -> Callable[[int], None] | None:
        exports = [item for item in items if item.sequence.order in self._sinks]
        if not exports:
            return None

        def layer_done(layer: int) -> None:
            for item in exports:
                order = item.sequence.order
                if order in broken:
                    continue
                try:
                    start, tokens = item.slots(layer)
                    if tokens:
                        self._sinks[order].layer_ready(layer, start, tokens)
                except PrismServeError as error:
                    broken[order] = error.message

        return layer_done

    def _sample_row(self, sequence: Sequence) -> SampleRow:
        params = sequence.request.sampling
        index = len(sequence.generated)
        if sequence.plain and index >= params.min_tokens:
            return GREEDY
        blocked = blocked_tokens(params, index, self._model.eos_token_ids)
        return SampleRow(params, index, sequence.counts, blocked, sequence.bias, sequence.matcher)

    def _sampled(
        self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprobs, ...], outputs: list[TokenOutput]
    ) -> None:
        if token == NO_TOKEN:
            self._fail(sequence, outcome_text(no_token_error(sequence)), outputs)
            return
        first = sequence.work is not Work.IMPORT and not sequence.reported
        report = self._report(sequence) if first else None
        if sequence.work is Work.PREFILL:
            sequence.reported = True
            del self.running[sequence.order]
            self._sinks.pop(sequence.order, None)
            sequence.images = {}
            sequence.state = State.EXPORTING
            self.exporting[sequence.order] = sequence
            outputs.append(TokenOutput(*sequence.identity, (token,), report=report, logprobs=logprobs))
            return
        self._accept(sequence, (token,), logprobs, report, outputs)

    def _accept(
        self,
        sequence: Sequence,
        tokens: Iterable[int],
        logprobs: tuple[TokenLogprobs, ...],
        report: PrefillReport | None,
        outputs: list[TokenOutput],
    ) -> None:
        """Append generated tokens, up to the one that ends the request."""
        taken: list[int] = []
        reason: FinishReason | None = None
        for token in tokens:
            sequence.append(token, self._blocks.pool.block_tokens)
            taken.append(token)
            if sequence.counts is not None:
                sequence.counts.add(token)
            if sequence.matcher is not None and not sequence.matcher.accept((token,)):
                self._fail(sequence, outcome_text(no_token_error(sequence)), outputs)
                return
            reason = finish_reason(sequence, self._model.eos_token_ids, self._max_model_len)
            if reason is not None:
                break
        if not sequence.reported:
            sequence.reported = True
            sequence.images = {}
        logprobs = logprobs[: len(taken)]
        outputs.append(TokenOutput(*sequence.identity, tuple(taken), reason, report=report, logprobs=logprobs))
        if reason is not None:
            self.drop(sequence)

    def _fail(self, sequence: Sequence, message: str, outputs: list[TokenOutput]) -> None:
        if not sequence.ended:
            self.drop(sequence)
            outputs.append(TokenOutput(*sequence.identity, (), FinishReason.ERROR, error=message))

    # ---- measuring -------------------------------------------------------------------------------------------

    def _report(self, sequence: Sequence) -> PrefillReport:
        timings, prompt, layout = sequence.timings, sequence.request.prompt, self._blocks.pool.layout
        images = len(sequence.spans)
        hits = max(0, images - timings.images_encoded)
        self.counters.image_queries += images
        self.counters.image_hits += hits
        now = self._clock()
        return PrefillReport(
            cached_tokens=sequence.prefix_tokens,
            computed_tokens=sequence.length - sequence.prefix_tokens,
            images=images,
            images_cached=hits,
            encode_ms=timings.encode_s * 1e3,
            prefill_ms=(now - (timings.started if timings.started is not None else now)) * 1e3,
            kv_bytes_raw=prompt.raw_tokens * layout.token_bytes,
            kv_bytes_kept=_prompt_slots(sequence, layout.layers) * layout.token_layer_bytes,
            visual_tokens_by_cut=() if sequence.pruning is None else tuple(sequence.pruning.kept),
        )

    def _measure(self, started: float, computing: float, items: list[RunItem]) -> None:
        now = self._clock()
        elapsed = max(now - started, 1e-9)
        decoded = sum(item.tokens == 1 and item.samples for item in items)
        prefilled = sum(item.tokens for item in items) - decoded
        self.counters.decode_tokens += decoded
        self.counters.prefill_tokens += prefilled
        self.step_ms.add(elapsed * 1e3)
        if prefilled:
            self.prefill_rate.add(prefilled / elapsed)
            if len(items) == 1 and items[0].stage is None:
                self.prefills.append((items[0].start, prefilled, now - computing))


def _prompt_slots(sequence: Sequence, layers: int) -> int:
    """Cache slots over all layers that the prompt was left with."""
    if sequence.pruning is None:
        return sequence.request.prompt.tokens * layers
    return sum(sequence.layer_tokens(layers)) - layers * (sequence.cached - sequence.pruning.prompt_tokens)
