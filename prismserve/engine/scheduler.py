"""What one step computes: pure decisions over plain views, no tensors, no clock of its own.

Stall-free chunked prefill (Sarathi-Serve, arXiv:2403.02310, algorithm 3): running decodes always go first, the rest
of the token budget goes to prefills under way, then to new admissions. When a decode finds no block, the sequence of
lowest priority that arrived last is preempted and later computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True)
class RunningView:
    """A sequence that holds blocks.

    Attributes:
        order: arrival number, unique; also names the sequence.
        priority: larger goes first.
        uncomputed: known tokens without KV; 1 for a decode.
        new_blocks: blocks it must still get before its next token can be computed.
        deadline: on the engine's clock, in seconds.
        pinned: must not be preempted, because its blocks are being read by an export.
    """

    order: int
    priority: int
    uncomputed: int
    new_blocks: int
    deadline: float
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class WaitingView:
    """A sequence that holds nothing yet.

    Attributes:
        order: arrival number.
        priority: larger goes first.
        uncomputed: tokens to compute after the prefix match.
        new_blocks: free or idle blocks its admission takes up, the idle blocks it matches included.
        ready: whether its image embeddings are there.
        deadline: on the engine's clock, in seconds.
    """

    order: int
    priority: int
    uncomputed: int
    new_blocks: int
    ready: bool
    deadline: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """``tokens`` tokens of the sequence ``order`` are computed in this step."""

    order: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Decisions for one step, to be applied in this order: expire, preempt, admit, compute."""

    expired: tuple[int, ...]
    preempted: tuple[int, ...]
    admitted: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return sum(chunk.tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one step.

    Attributes:
        step_tokens: tokens to compute.
        running: sequences that may hold blocks, those of ``held`` included.
        held: slots taken by sequences that hold blocks but do not run (imports, exports).
        blocks: blocks that can be allocated.
        reserve: blocks that an admission must leave, beside one per running sequence; 0 if nothing runs.
    """

    step_tokens: int
    running: int
    held: int
    blocks: int
    reserve: int = 0


def _rank(view: RunningView | WaitingView) -> tuple[int, int]:
    return (-view.priority, view.order)


class _Planner:
    """The state of one call to :func:`plan_step`."""

    def __init__(self, running: list[RunningView], budget: Budget, releasable: Callable[[int], int]) -> None:
        self.running = running
        self.budget = budget
        self.releasable = releasable
        self.blocks = budget.blocks
        self.tokens = budget.step_tokens
        self.preempted: list[int] = []
        self.chunks: list[Chunk] = []

    def decode(self) -> None:
        """Give every decode its token, preempting from the end of the ranking while blocks are short."""
        candidates = list(self.running)
        position = 0
        while position < len(candidates):
            view = candidates[position]
            if view.uncomputed != 1 or self.tokens == 0:
                position += 1
                continue
            while view.new_blocks > self.blocks and position < len(candidates):
                victims = [i for i in range(position, len(candidates)) if not candidates[i].pinned]
                if not victims:
                    break
                self._preempt(candidates.pop(victims[-1]))
            if position == len(candidates) or candidates[position] is not view:
                continue
            position += 1
            if view.new_blocks > self.blocks:
                continue
            self.blocks -= view.new_blocks
            self.tokens -= 1
            self.chunks.append(Chunk(view.order, 1))
        self.running = candidates

    def prefill(self) -> None:
        """Give prefills under way what is left of the budget; most hold all their blocks since admission."""
        for view in self.running:
            if view.uncomputed > 1 and self.tokens > 0 and view.new_blocks <= self.blocks:
                self.blocks -= view.new_blocks
                self._take(view)

    def admit(self, waiting: Sequence[WaitingView]) -> list[int]:
        """Admit in rank order; one that does not fit holds back those after it, so that it cannot starve."""
        admitted: list[int] = []
        free_slots = self.budget.running - self.budget.held - len(self.running)
        for view in waiting:
            if self.tokens == 0 or free_slots <= 0 or self.preempted:
                break
            if not view.ready:
                continue
            holders = len(self.running) + len(admitted)
            reserve = holders + self.budget.reserve if holders else 0
            if view.new_blocks + reserve > self.blocks:
                break
            self.blocks -= view.new_blocks
            free_slots -= 1
            admitted.append(view.order)
            self._take(view)
        return admitted

    def _take(self, view: RunningView | WaitingView) -> None:
        tokens = min(view.uncomputed, self.tokens)
        self.tokens -= tokens
        self.chunks.append(Chunk(view.order, tokens))

    def _preempt(self, view: RunningView) -> None:
        self.preempted.append(view.order)
        self.blocks += self.releasable(view.order)


def plan_step(
    running: Sequence[RunningView],
    waiting: Sequence[WaitingView],
    budget: Budget,
    now: float,
    releasable: Callable[[int], int],
) -> StepPlan:
    """Decide one step.

    Args:
        running: sequences that hold blocks and compute, in any order.
        waiting: sequences to admit, in any order.
        budget: limits.
        now: the engine's clock, in seconds; sequences past their deadline are expired.
        releasable: blocks that preempting (or expiring) a sequence, named by its order, makes available; may be
            fewer than it holds, since blocks can be shared. Asked only when needed.

    Returns:
        The plan. Chunks of decodes come first. A sequence is never both preempted and computed.
    """
    views: list[RunningView | WaitingView] = [*running, *waiting]
    gone = {view.order for view in views if view.deadline <= now}
    alive = sorted((view for view in running if view.order not in gone), key=_rank)
    planner = _Planner(alive, budget, releasable)
    planner.decode()
    planner.prefill()
    admitted = planner.admit(sorted((view for view in waiting if view.order not in gone), key=_rank))
    return StepPlan(tuple(sorted(gone)), tuple(planner.preempted), tuple(admitted), tuple(planner.chunks))
