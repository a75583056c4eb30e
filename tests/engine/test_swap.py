from __future__ import annotations

import pytest
import torch

from tests.engine.small_text import HEAD_DIM, KV_HEADS, LAYERS, Driver

TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
KEEP = {0: torch.arange(20, 30), 2: torch.tensor([[0, 5, 29, 7], [1, 2, 3, 4]])}


def crowd(text, engine, keeps=None) -> Driver:
    """Four requests that cannot all stay."""
    driver = Driver(engine, keeps)
    for number in range(4):
        engine.submit(text.request(f"s{number}", text.prompt(number, 30), 40), worker="local")
    driver.run()
    return driver


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("keeps", [{}, {"s3": KEEP, "s1": KEEP}], ids=["uniform", "ragged"])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_preempted_requests_give_the_same_tokens_either_way(text, preemption, keeps, prefix_caching) -> None:
    engine = text.engine(30, preemption=preemption, prefix_caching=prefix_caching, max_step_tokens=24)
    tokens = crowd(text, engine, keeps).tokens
    assert tokens == {f"s{n}": text.expected(text.prompt(n, 30), 40, keeps.get(f"s{n}")) for n in range(4)}
    counters = engine._stepper.counters
    assert counters.preemptions > 0
    assert (counters.swaps > 0) == (preemption == "swap")
    assert engine.pool.used_groups == engine._blocks.swap.used_bytes == 0


def test_a_swapped_request_computes_nothing_twice(text) -> None:
    engine = text.engine(30, preemption="swap", prefix_caching=False)
    crowd(text, engine)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.prefill_tokens, stats.decode_tokens) == (4 * 30, 4 * 39)


def test_without_host_memory_a_preempted_request_is_computed_again(text) -> None:
    engine = text.engine(30, preemption="swap", swap_bytes=20 * TOKEN_BYTES)
    assert crowd(text, engine).tokens == {f"s{n}": text.expected(text.prompt(n, 30), 40) for n in range(4)}
    assert engine._stepper.counters.swaps == 0
    assert engine.stats().preemptions > 0


def test_a_swapped_request_takes_over_what_the_prefix_cache_still_holds(text) -> None:
    engine = text.engine(30, preemption="swap")
    retained = []
    copy_in = engine._blocks.swap.copy_in

    def watched(sequence) -> None:
        copy_in(sequence)
        retained.append(sequence.published)

    engine._blocks.swap.copy_in = watched
    assert crowd(text, engine).tokens == {f"s{n}": text.expected(text.prompt(n, 30), 40) for n in range(4)}
    assert max(retained) > 0


def test_a_cancelled_or_expired_swapped_request_leaves_no_host_memory(text) -> None:
    now = [0.0]
    engine = text.engine(30, lambda: now[0], preemption="swap", prefix_caching=False)
    for number in range(4):
        engine.submit(text.request(f"s{number}", text.prompt(number, 30), 40, timeout_s=100.0), worker="local")
    swap = engine._blocks.swap
    while not swap.used_bytes:
        engine.step()
    engine.check_integrity()
    victims = [sequence.request.request_id for sequence in engine._stepper.waiting if sequence.swapped is not None]
    assert engine.cancel(victims[0], 0)
    engine.check_integrity()
    while not swap.used_bytes and engine.has_work:
        engine.step()
    now[0] = 200.0
    Driver(engine).run()
    assert engine.pool.used_groups == swap.used_bytes == 0
