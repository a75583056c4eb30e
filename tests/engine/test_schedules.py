"""Whatever the schedule, the same answers and not a block lost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prismserve.core.errors import OutOfBlocksError, OverloadedError, PrismServeError
from prismserve.core.types import FinishReason
from tests.engine.small_text import LAYERS, Driver, Keep

PROMPTS = [(1, 9, 0), (2, 26, 0), (3, 30, 17), (4, 33, 17), (5, 17, 17), (6, 48, 17)]
"""(seed, tokens, shared leading tokens)"""
BLOCKS = 40
KEEPS: list[Keep | None] = [
    None,
    None,
    {0: torch.tensor([0, 3, 5])},
    {layer: torch.tensor([[0, 1, 2, 3, 8], [0, 2, 4, 6, 7]]) for layer in range(LAYERS)},
    {1: torch.arange(9).flip(0), 2: torch.arange(4)},
]

CONFIGS = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from([22, 26, 33, 120]),
        "max_step_tokens": st.sampled_from([3, 16, 33, 400]),
        "max_running": st.sampled_from([2, 4, 8]),
        "prefix_caching": st.booleans(),
        "preemption": st.sampled_from(["recompute", "swap"]),
        "swap_bytes": st.sampled_from([0, 9000, 1 << 20]),
        "scheduler": st.sampled_from(["stall_free", "exact_fill"]),
        "max_mixed_prefill_tokens": st.sampled_from([1, 8, 100]),
        "priority_ageing_s": st.sampled_from([None, 0.5, 30.0]),
        "prefix_bonus_s": st.sampled_from([0.0, 3.0]),
        "kv_cache_dtype": st.sampled_from(["auto", "auto", "fp8", "int8", "int4"]),
    }
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(0, len(KEEPS) - 1)),
        st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(0, len(KEEPS) - 1)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
    ),
    min_size=9,
    max_size=24,
)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS, EVENTS)
def test_any_schedule_gives_the_tokens_of_a_dense_cache(text, config, events) -> None:
    now = [0.0]
    engine = text.engine(config["blocks"], lambda: now[0], **{k: v for k, v in config.items() if k != "blocks"})
    driver = Driver(engine)
    expected: dict[str, list[int]] = {}
    for number, (kind, pick, choice) in enumerate(events):
        if kind == "submit":
            name, ids = f"q{number}", text.prompt(*PROMPTS[pick])
            tokens, keep = 12 + pick * 7 % 23, KEEPS[choice]
            request = text.request(name, ids, tokens, priority=choice % 3)
            engine.submit(request, worker="local")
            expected[name] = text.expected(ids, tokens, keep, config["kv_cache_dtype"])
            if keep is not None:
                driver.keeps[name] = keep
        elif kind == "cancel" and expected:
            name = sorted(expected)[pick % len(expected)]
            if engine.cancel(name, 0):
                del expected[name]
            engine.check_integrity()
        for _ in range(pick if kind == "step" else 0):
            driver.step()
            now[0] += 0.3
    done = driver.run()
    assert {name: done[name] for name in expected} == expected
    assert driver.all_finished()
    assert engine.pool.used_groups == engine._blocks.swap.used_bytes == 0
    engine.clear_prefix_cache()
    assert engine.pool.free_groups == engine.pool.groups


def test_ten_thousand_random_events_leave_no_block_in_use(text) -> None:
    draw = random.Random(7)
    engine = text.engine(BLOCKS, preemption="swap", swap_bytes=20_000, max_running=8, max_waiting=12)
    driver = Driver(engine)
    live: list[str] = []
    counts = dict.fromkeys(("submitted", "refused", "cancelled", "finished", "compacted"), 0)
    events = 0
    while events < 10_000:
        live = [name for name in live if name not in driver.ends]
        chance = draw.random()
        events += 1
        if chance < 0.25:
            prompt = text.prompt(draw.randrange(200), draw.randint(20, 50), 17)
            request = text.request(f"e{events}", prompt, draw.randint(5, 40), priority=draw.randint(0, 2))
            try:
                engine.submit(request, worker="prefill" if chance < 0.01 else "local")
            except OverloadedError:
                counts["refused"] += 1
                continue
            live.append(request.request_id)
            counts["submitted"] += 1
        elif chance < 0.33 and live:
            name = live.pop(draw.randrange(len(live)))
            assert engine.cancel(name, 0)
            counts["cancelled"] += 1
        elif chance < 0.37 and engine._stepper.running:
            sequence = draw.choice(list(engine._stepper.running.values()))
            layer = draw.randrange(LAYERS)
            held = sequence.layer_tokens(LAYERS)[layer]
            try:
                engine.compact(
                    *sequence.identity,
                    layer,
                    torch.tensor(sorted(draw.sample(range(held), held // 2)), dtype=torch.int64),
                )
            except OutOfBlocksError:
                counts["refused"] += 1
            else:
                counts["compacted"] += 1
        else:
            before = len(driver.ends)
            driver.step()
            counts["finished"] += len(driver.ends) - before
            events += len(driver.ends) - before
        if events % 40 == 0:
            engine.check_integrity()
    for name in live:
        engine.cancel(name, 0)
    engine.check_integrity()
    assert min(counts.values()) > 50, counts
    assert engine.stats().preemptions > engine._stepper.counters.swaps > 0, "both ways of preempting"
    assert engine.pool.used_groups == engine._blocks.swap.used_bytes == 0
    assert not engine.has_work
    engine.clear_prefix_cache()
    assert engine.pool.free_groups == BLOCKS


def test_what_cannot_fit_is_refused_alone(text) -> None:
    engine = text.engine(20, max_model_len=80)
    good = text.request("good", text.prompt(1, 20), 5)
    engine.submit(good, worker="local")
    for name, tokens in (("long", 80), ("longer", 400)):
        with pytest.raises(PrismServeError, match="context holds 80") as caught:
            engine.submit(text.request(name, text.prompt(2, tokens), 5), worker="local")
        assert caught.value.request_id == name
    full = text.request("full", text.prompt(3, 79), 5)
    engine.submit(full, worker="local")
    done = Driver(engine)
    assert done.run()["good"] == text.expected(text.prompt(1, 20), 5)
    assert done.ends["full"].finish_reason is FinishReason.LENGTH


def test_exports_that_hold_the_pool_delay_others_but_fail_nobody(text) -> None:
    now = [0.0]
    engine = text.engine(20, lambda: now[0], max_model_len=80, prefix_caching=False)
    engine.submit(text.request("export", text.prompt(1, 40), 5), worker="prefill")
    engine.submit(text.request("big", text.prompt(2, 50), 5), worker="local")
    late = replace(text.request("late", text.prompt(3, 50), 5), timeout_s=10.0)
    engine.submit(late, worker="local")
    driver = Driver(engine)
    for _ in range(4):
        driver.step()
    assert engine.stalled
    now[0] = 11.0
    driver.step()
    assert driver.ends["late"].finish_reason is FinishReason.ERROR
    engine.release_export("export", 0)
    assert driver.run()["big"] == text.expected(text.prompt(2, 50), 5)
