from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from prismserve.engine.scheduler import Budget, Chunk, Policy, Room, RunningView, StepPlan, WaitingView, plan_step

LATER = 1e9


def running(order: int, uncomputed: int = 1, new_blocks: int = 0, priority: int = 0, **extra) -> RunningView:
    return RunningView(order, priority, uncomputed, new_blocks, extra.pop("deadline", LATER), **extra)


def waiting(order: int, uncomputed: int, new_blocks: int, priority: int = 0, **extra) -> WaitingView:
    ready, deadline = extra.pop("ready", True), extra.pop("deadline", LATER)
    return WaitingView(order, priority, uncomputed, new_blocks, ready, deadline, **extra)


def plan(
    run=(), wait=(), *, tokens=100, slots=8, held=0, blocks=100, now=0.0, release=lambda order: 2, policy=None, **room
) -> StepPlan:
    budget = Budget(tokens, slots, held, blocks, **room)

    def releasable(order: int) -> Room:
        given = release(order)
        return given if isinstance(given, Room) else Room(given)

    return plan_step(run, wait, budget, now, releasable, policy or Policy())


def test_decodes_come_first_then_prefills_under_way_then_admissions() -> None:
    result = plan([running(1, 50), running(2)], [waiting(3, 80, 5)])
    assert result.chunks == (Chunk(2, 1), Chunk(1, 50), Chunk(3, 49))
    assert result.admitted == (3,)
    assert result.tokens == 100


def test_a_decode_is_never_left_out_for_a_prefill() -> None:
    result = plan([running(1, 500), *(running(order) for order in range(2, 9))], tokens=10)
    assert [chunk.tokens for chunk in result.chunks] == [1] * 7 + [3]


def test_admission_stops_at_the_first_that_does_not_fit_so_that_it_cannot_starve() -> None:
    result = plan([], [waiting(1, 10, 50), waiting(2, 10, 1)], blocks=20)
    assert result.admitted == ()


def test_a_sequence_whose_images_are_not_ready_does_not_hold_back_others() -> None:
    assert plan([], [waiting(1, 10, 1, ready=False), waiting(2, 10, 1)]).admitted == (2,)


def test_admission_leaves_a_block_for_every_running_sequence() -> None:
    runners = [running(order) for order in range(3)]
    assert plan(runners, [waiting(9, 10, 8)], blocks=10).admitted == ()
    assert plan(runners, [waiting(9, 10, 7)], blocks=10).admitted == (9,)
    assert plan([], [waiting(9, 10, 10)], blocks=10).admitted == (9,)


def test_running_slots_are_bounded_with_held_ones_counted() -> None:
    queue = [waiting(order, 1, 1) for order in range(10, 20)]
    assert len(plan([running(1)], queue, slots=4, held=1).admitted) == 2


def test_higher_priority_is_admitted_first_and_preempted_last() -> None:
    assert plan([], [waiting(1, 100, 1), waiting(2, 100, 1, priority=5)]).admitted == (2,)
    result = plan([running(1, new_blocks=1, priority=5), running(2)], blocks=0)
    assert (result.preempted, result.chunks) == ((2,), (Chunk(1, 1),))


def test_the_newest_is_preempted_until_the_oldest_can_go_on() -> None:
    runners = [running(order, new_blocks=1) for order in (1, 2, 3, 4)]
    result = plan(runners, [waiting(5, 1, 0)], blocks=0, release=lambda order: 1)
    assert result.preempted == (4, 3)
    assert result.chunks == (Chunk(1, 1), Chunk(2, 1))
    assert result.admitted == ()


def test_one_that_finds_no_block_even_alone_gives_up_its_own() -> None:
    result = plan([running(1, new_blocks=1)], blocks=0, release=lambda order: 0)
    assert (result.preempted, result.chunks) == ((1,), ())


def test_a_pinned_sequence_is_never_preempted() -> None:
    result = plan([running(1, new_blocks=1), running(2, 30, pinned=True)], blocks=0)
    assert result.preempted == (1,)
    assert result.chunks == (Chunk(2, 30),)


def test_expired_sequences_are_named_and_not_computed() -> None:
    result = plan([running(1, deadline=5.0), running(2)], [waiting(3, 4, 1, deadline=4.0)], now=5.0)
    assert result.expired == (1, 3)
    assert result.chunks == (Chunk(2, 1),)


def test_stall_free_bounds_the_prefill_beside_decodes_and_exact_fill_fills_the_step() -> None:
    runners, queue = [running(1, 500), running(2), running(3)], [waiting(4, 500, 1)]
    bounded = plan(runners, queue, policy=Policy("stall_free", 20))
    assert bounded.chunks == (Chunk(2, 1), Chunk(3, 1), Chunk(1, 20))
    assert plan(runners, queue, policy=Policy("exact_fill", 20)).tokens == 100
    assert plan([running(1, 500)], queue, policy=Policy("stall_free", 20)).tokens == 100, "no decode to stall"


def test_a_short_prompt_is_cut_to_fill_the_step_exactly() -> None:
    queue = [waiting(1, 70, 1), waiting(2, 60, 1)]
    assert plan([], queue, policy=Policy("exact_fill")).chunks == (Chunk(1, 70), Chunk(2, 30))


def test_a_lower_priority_goes_first_once_it_has_waited_long_enough() -> None:
    policy = Policy(ageing_s=10.0)
    early, urgent = waiting(1, 100, 1, arrived=0.0), waiting(2, 100, 1, priority=2, arrived=19.0)
    assert plan([], [early, urgent], policy=policy).admitted == (2,)
    late = waiting(2, 100, 1, priority=2, arrived=21.0)
    assert plan([], [early, late], policy=policy).admitted == (1,)
    assert plan([], [early, late], policy=Policy(ageing_s=None)).admitted == (2,), "strict"


def test_the_longest_wait_in_rank_is_preempted_last() -> None:
    policy = Policy(ageing_s=10.0)
    runners = [running(1, new_blocks=1, arrived=5.0), running(2, arrived=0.0), running(3, priority=1, arrived=12.0)]
    result = plan(runners, blocks=0, release=lambda order: 1, policy=policy)
    assert result.preempted == (1,)
    assert [chunk.order for chunk in result.chunks] == [2, 3]


def test_a_cached_prefix_is_worth_a_bounded_wait() -> None:
    policy = Policy(prefix_bonus_s=4.0)
    plain = waiting(1, 100, 1, arrived=0.0)
    assert plan([], [plain, waiting(2, 25, 1, arrived=2.9, cached=75)], policy=policy).admitted == (2, 1)
    assert plan([], [plain, waiting(2, 25, 1, arrived=3.1, cached=75)], policy=policy).admitted == (1,)


def test_layer_blocks_come_from_broken_groups_first_and_then_break_whole_ones() -> None:
    needy = running(1, new_layer_blocks=5)
    assert plan([needy], blocks=0, layers=4, layer_blocks=5).chunks == (Chunk(1, 1),)
    assert plan([needy, running(2, new_blocks=1)], blocks=2, layers=4, layer_blocks=1).chunks == (
        Chunk(1, 1),
        Chunk(2, 1),
    )
    result = plan([needy, running(2)], blocks=0, layers=4, layer_blocks=3, release=lambda order: Room(0, 2))
    assert (result.preempted, result.chunks) == ((2,), (Chunk(1, 1),))


def test_one_with_nothing_to_compute_now_gets_no_chunk() -> None:
    assert plan([running(1, 0), running(2)]).chunks == (Chunk(2, 1),)


VIEWS = st.tuples(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 1, 7, 40]), st.integers(0, 2), st.booleans())),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(0, 9), st.booleans())),
    st.integers(1, 64),
    st.integers(1, 10),
    st.integers(0, 12),
)


@settings(max_examples=200, deadline=None)
@given(VIEWS)
def test_no_plan_exceeds_its_budget_or_touches_a_sequence_twice(drawn) -> None:
    runs, waits, tokens, slots, blocks = drawn
    run = [running(i, count, new, priority, pinned=pin) for i, (priority, count, new, pin) in enumerate(runs)]
    wait = [waiting(100 + i, count, new, priority, ready=ok) for i, (priority, count, new, ok) in enumerate(waits)]
    result = plan(run, wait, tokens=tokens, slots=slots, blocks=blocks, release=lambda order: 1)
    assert result == plan(run, wait, tokens=tokens, slots=slots, blocks=blocks, release=lambda order: 1)
    computed = [chunk.order for chunk in result.chunks]
    assert len(set(computed)) == len(computed)
    assert not set(computed) & set(result.preempted)
    assert result.tokens <= tokens
    views = {view.order: view for view in (*run, *wait)}
    assert all(0 < chunk.tokens <= views[chunk.order].uncomputed for chunk in result.chunks)
    used = sum(views[order].new_blocks for order in computed)
    assert used <= blocks + len(result.preempted)
    survivors = len(run) - len(result.preempted)
    assert not result.admitted or survivors + len(result.admitted) <= slots
    assert not any(views[order].pinned for order in result.preempted if isinstance(views[order], RunningView))
    if run and not result.chunks and not result.preempted:
        assert all(view.new_blocks > blocks for view in run)
