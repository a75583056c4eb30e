"""What one step computes: pure decisions over plain views, no tensors, no clock of its own.

One budgeted scheduler with two policies. ``stall_free`` (Sarathi-Serve, arXiv:2403.02310, algorithm 3): running decodes
always go first, then prefills under way, then new admissions; while there are decodes, prefills get a smaller share of
the step, so that the time between a decode's tokens stays bounded. ``exact_fill`` (Dynamic SplitFuse of
DeepSpeed-FastGen, arXiv:2401.08671, section 3.2): decodes first too, then every step is filled to the same size with
pieces of prompts, since throughput is concave in the size of a step.

When a decode finds no block, the sequence that ranks last is preempted. A point of priority is worth a number of
seconds of waiting, and so, up to a bound, is a cached prefix: what waits long enough is always next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Room(NamedTuple):
    """An amount of KV memory.

    Attributes:
        blocks: whole groups: one block in every layer.
        layer_blocks: single-layer blocks, which only ragged sequences use.
    """

    blocks: int
    layer_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """How steps are filled and who goes first.

    Attributes:
        fill: see the module.
        beside_decodes: prefill tokens in a step that also decodes, under ``stall_free``.
        ageing_s: waiting that a point of priority is worth, in seconds; None never lets a lower priority go first.
        prefix_bonus_s: waiting that a wholly cached prompt is worth, in seconds; less in proportion.
    """

    fill: Literal["stall_free", "exact_fill"] = "exact_fill"
    beside_decodes: int = 1 << 30
    ageing_s: float | None = None
    prefix_bonus_s: float = 0.0

    def rank(self, priority: int, arrived: float, order: int) -> tuple[int, float, int]:
        """Sort key, smallest first; it does not change as time goes by, since all age at the same rate."""
        if self.ageing_s is None:
            return -priority, arrived, order
        return 0, arrived - priority * self.ageing_s, order


@dataclass(frozen=True, slots=True)
class RunningView:
    """A sequence that holds blocks.

    Attributes:
        order: arrival number, unique; also names the sequence.
        priority: larger goes first.
        uncomputed: known tokens that can be computed now; 1 for a decode, 0 for one that waits for something else.
        new_blocks: groups it must still get before its next token can be computed.
        deadline: on the engine's clock, in seconds.
        pinned: must not be preempted, because its blocks are being read by an export.
        new_layer_blocks: the same for single-layer blocks; a sequence needs the one kind or the other.
        arrived: when it was submitted, on the engine's clock, in seconds.
    """

    order: int
    priority: int
    uncomputed: int
    new_blocks: int
    deadline: float
    pinned: bool = False
    new_layer_blocks: int = 0
    arrived: float = 0.0


@dataclass(frozen=True, slots=True)
class WaitingView:
    """A sequence that holds nothing yet.

    Attributes:
        order: arrival number.
        priority: larger goes first.
        uncomputed: tokens to compute after the prefix match.
        new_blocks: free or idle groups its admission takes up, the idle ones it matches included.
        ready: whether its image embeddings are there.
        deadline: on the engine's clock, in seconds.
        new_layer_blocks: single-layer blocks its admission takes up.
        arrived: when it was submitted, on the engine's clock, in seconds.
        cached: tokens it need not compute.
    """

    order: int
    priority: int
    uncomputed: int
    new_blocks: int
    ready: bool
    deadline: float
    new_layer_blocks: int = 0
    arrived: float = 0.0
    cached: int = 0


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
        blocks: groups that can be allocated.
        reserve: groups that an admission must leave, beside one per running sequence; 0 if nothing runs.
        layer_blocks: single-layer blocks that are free in groups already broken up.
        layers: single-layer blocks a group gives.
    """

    step_tokens: int
    running: int
    held: int
    blocks: int
    reserve: int = 0
    layer_blocks: int = 0
    layers: int = 1


class _Ledger:
    """KV memory left in the step being planned."""

    def __init__(self, budget: Budget) -> None:
        self.blocks = budget.blocks
        self.layer_blocks = budget.layer_blocks
        self.layers = budget.layers

    def fits(self, view: RunningView | WaitingView, reserve: int = 0) -> bool:
        """Whether the view gets what it needs with ``reserve`` groups to spare."""
        broken = max(0, -(-(view.new_layer_blocks - self.layer_blocks) // self.layers))
        return view.new_blocks + broken + reserve <= self.blocks

    def take(self, view: RunningView | WaitingView) -> None:
        broken = max(0, -(-(view.new_layer_blocks - self.layer_blocks) // self.layers))
        self.blocks -= view.new_blocks + broken
        self.layer_blocks += broken * self.layers - view.new_layer_blocks

    def give(self, room: Room) -> None:
        self.blocks += room.blocks
        self.layer_blocks += room.layer_blocks


class _Planner:
    """The state of one call to :func:`plan_step`."""

    def __init__(
        self, running: list[RunningView], budget: Budget, releasable: Callable[[int], Room], policy: Policy
    ) -> None:
        self.running = running
        self.budget = budget
        self.releasable = releasable
        self.policy = policy
        self.ledger = _Ledger(budget)
        self.tokens = budget.step_tokens
        self.starved = False
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
            while not self.ledger.fits(view) and position < len(candidates):
                victims = [i for i in range(position, len(candidates)) if not candidates[i].pinned]
                if not victims:
                    break
                self._preempt(candidates.pop(victims[-1]))
            if position == len(candidates) or candidates[position] is not view:
                continue
            position += 1
            if self.ledger.fits(view):
                self._take(view)
            else:
                self.starved = True
        self.running = candidates
        if self.chunks and self.policy.fill == "stall_free":
            self.tokens = min(self.tokens, self.policy.beside_decodes)

    def prefill(self) -> None:
        """Give prefills under way what is left of the budget; most hold all their blocks since admission.

        Where nothing at all can go on because those that run hold each other up, the last in rank makes room.
        """
        for view in self.running:
            if view.uncomputed == 1 or self.tokens == 0:
                continue
            if view.uncomputed and self.ledger.fits(view):
                self._take(view)
            else:
                self.starved = True
        victims = [view for view in self.running if not view.pinned]
        if self.starved and not self.chunks and not self.preempted and len(self.running) > 1 and victims:
            self._preempt(victims[-1])
            self.running.remove(victims[-1])

    def admit(self, waiting: Sequence[WaitingView]) -> list[int]:
        """Admit in rank order; one that does not fit, running or waiting, holds back the rest, so it cannot starve."""
        admitted: list[int] = []
        free_slots = self.budget.running - self.budget.held - len(self.running)
        for view in sorted(waiting, key=self._admission_rank):
            if self.tokens == 0 or free_slots <= 0 or self.preempted or self.starved:
                break
            if not view.ready:
                continue
            holders = len(self.running) + len(admitted)
            if not self.ledger.fits(view, holders + self.budget.reserve if holders else 0):
                break
            free_slots -= 1
            admitted.append(view.order)
            self._take(view)
        return admitted

    def _admission_rank(self, view: WaitingView) -> tuple[int, float, int]:
        share = view.cached / max(1, view.cached + view.uncomputed)
        return self.policy.rank(view.priority, view.arrived - share * self.policy.prefix_bonus_s, view.order)

    def _take(self, view: RunningView | WaitingView) -> None:
        tokens = min(view.uncomputed, self.tokens)
        self.ledger.take(view)
        self.tokens -= tokens
        self.chunks.append(Chunk(view.order, tokens))

    def _preempt(self, view: RunningView) -> None:
        self.preempted.append(view.order)
        self.ledger.give(self.releasable(view.order))


def plan_step(
    running: Sequence[RunningView],
    waiting: Sequence[WaitingView],
    budget: Budget,
    now: float,
    releasable: Callable[[int], Room],
    policy: Policy = Policy(),
) -> StepPlan:
    """Decide one step.

    Args:
        running: sequences that hold blocks and compute, in any order.
        waiting: sequences to admit, in any order.
        budget: limits.
        now: the engine's clock, in seconds; sequences past their deadline are expired.
        releasable: room that preempting (or expiring) a sequence, named by its order, makes; may be less than it
            holds, since blocks can be shared. Asked only when needed.
        policy: how the step is filled and who goes first.

    Returns:
        The plan. Chunks of decodes come first. A sequence is never both preempted and computed.
    """
    views: list[RunningView | WaitingView] = [*running, *waiting]
    gone = {view.order for view in views if view.deadline <= now}
    alive = sorted(
        (view for view in running if view.order not in gone),
        key=lambda view: policy.rank(view.priority, view.arrived, view.order),
    )
    planner = _Planner(alive, budget, releasable, policy)
    planner.decode()
    planner.prefill()
    admitted = planner.admit([view for view in waiting if view.order not in gone])
    return StepPlan(tuple(sorted(gone)), tuple(planner.preempted), tuple(admitted), tuple(planner.chunks))
