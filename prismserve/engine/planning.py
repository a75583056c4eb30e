"""From live sequences to the plain views that one step is planned over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prismserve.engine.scheduler import Budget, Policy, RunningView, StepPlan, WaitingView, plan_step

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Items

    from prismserve.engine.blocks import BlockManager
    from prismserve.engine.config import EngineConfig
    from prismserve.engine.scheduler import Room
    from prismserve.engine.sequence import Sequence

LOOKAHEAD = 16
"""Waiting sequences looked at in one step: bounds the prefix look-ups and the images encoded ahead."""


class StepPlanner:
    """Asks the scheduler what a step does.

    Attributes:
        policy: who goes first and how steps are filled.
    """

    def __init__(self, blocks: BlockManager, config: EngineConfig) -> None:
        """Plan over ``blocks`` within the limits of ``config``."""
        self._blocks = blocks
        self._config = config
        self.policy = Policy(
            fill=config.scheduler,
            beside_decodes=config.max_mixed_prefill_tokens,
            ageing_s=config.priority_ageing_s,
            prefix_bonus_s=config.prefix_bonus_s,
        )

    def rank(self, sequence: Sequence) -> tuple[int, float, int]:
        """Sort key of a sequence among those that wait."""
        return self.policy.rank(sequence.request.priority, sequence.timings.submitted, sequence.order)

    def plan(
        self, running: dict[int, Sequence], waiting: Items[Sequence], pinned: Iterable[int], held_slots: int, now: float
    ) -> StepPlan:
        """Decide one step.

        Args:
            running: sequences that hold blocks and compute, by order number.
            waiting: the others, in order of rank.
            pinned: order numbers of running sequences that must not be preempted.
            held_slots: running slots taken by sequences that do not run.
            now: the engine's clock, in seconds.
        """
        kept = set(pinned)
        views = [self._running_view(sequence, pinned=sequence.order in kept) for sequence in running.values()]
        room = self._blocks.room()
        budget = Budget(
            step_tokens=self._config.max_step_tokens,
            running=self._config.max_running,
            held=held_slots,
            blocks=room.blocks,
            layer_blocks=room.layer_blocks,
            layers=self._blocks.pool.layout.layers,
        )
        candidates = _expired(waiting, now)
        if len(running) + held_slots < self._config.max_running:
            candidates += self._candidates(running.values(), waiting, now)

        def releasable(order: int) -> Room:
            return self._blocks.releasable(running[order])

        return plan_step(views, candidates, budget, now, releasable, self.policy)

    def _running_view(self, sequence: Sequence, *, pinned: bool) -> RunningView:
        growth = self._blocks.growth(sequence)
        return RunningView(
            order=sequence.order,
            priority=sequence.request.priority,
            uncomputed=sequence.computable,
            new_blocks=growth.blocks,
            deadline=sequence.deadline,
            pinned=pinned,
            new_layer_blocks=growth.layer_blocks,
            arrived=sequence.timings.submitted,
        )

    def _candidates(self, running: Iterable[Sequence], waiting: Items[Sequence], now: float) -> list[WaitingView]:
        """Views of the first in rank. One whose next block is being computed by another waits to share it."""
        claimed: set[bytes] = set()
        for sequence in running:
            if sequence.uncomputed > 1 and sequence.publishable and self._config.prefix_caching:
                claimed.update(sequence.keys[sequence.published :])
        views: list[WaitingView] = []
        for sequence in waiting[:LOOKAHEAD]:
            if sequence.deadline <= now:
                continue
            view, coming = self._waiting_view(sequence, claimed)
            views.append(view)
            if view.ready and self._config.prefix_caching:
                claimed.update(coming)
        return views

    def _waiting_view(self, sequence: Sequence, claimed: set[bytes]) -> tuple[WaitingView, list[bytes]]:
        """The view, and the keys of blocks the sequence would compute."""
        coming: list[bytes] = []
        if sequence.swapped is not None:
            cached, needed = sequence.cached, self._blocks.swap.needed(sequence)
            ready = not sequence.missing_images(cached)
        else:
            match = self._blocks.match(sequence)
            cached, needed = match.tokens, self._blocks.admission(sequence, match)
            coming = sequence.keys[len(match.groups) :]
            shared = bool(coming) and coming[0] in claimed
            ready = not shared and not sequence.missing_images(cached)
        view = WaitingView(
            order=sequence.order,
            priority=sequence.request.priority,
            uncomputed=sequence.computable_from(cached),
            new_blocks=needed.blocks,
            ready=ready,
            deadline=sequence.deadline,
            new_layer_blocks=needed.layer_blocks,
            arrived=sequence.timings.submitted,
            cached=cached,
        )
        return view, coming


def _expired(waiting: Items[Sequence], now: float) -> list[WaitingView]:
    return [
        WaitingView(sequence.order, sequence.request.priority, 0, 0, ready=False, deadline=sequence.deadline)
        for sequence in waiting
        if sequence.deadline <= now
    ]
