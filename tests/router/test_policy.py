from __future__ import annotations

import dataclasses

import pytest

from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.types import Role, WorkerInfo, WorkerState, WorkerStats
from prismserve.router import policy
from prismserve.router.config import RouterConfig
from prismserve.router.policy import CacheView, LoadView, RequestView, cached_tokens, place
from tests.router.scripted import LAYOUT, MODEL

CONFIG = RouterConfig()


def worker(name, state=WorkerState.READY, transports=("nixl", "shm")):
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[name[0]]
    return WorkerInfo(name, role, 1, 1, "n", "a:1", MODEL, LAYOUT, transports, b"", state)


def workers(*names):
    return [worker(name) for name in names]


def view(prompt=400, media_end=0, images=0):
    return RequestView(prompt, media_end, 16, images)


def decide(names, request=None, cache=None, load=None, config=CONFIG):
    found = names if isinstance(names[0], WorkerInfo) else workers(*names)
    return place(request or view(), found, cache or CacheView(), load or LoadView(), config)


@pytest.mark.parametrize(
    ("names", "request_view", "cache", "decode", "prefill", "reason"),
    [
        (("p1", "d1"), view(), None, "d1", "p1", policy.DISAGGREGATED),
        (("d1",), view(), None, "d1", None, policy.LOCAL_NO_PREFILL),
        (("m1",), view(), None, "m1", None, policy.LOCAL_MIXED),
        (("m1", "m2"), view(), None, "m1", None, policy.LOCAL_MIXED),
        (("p1", "m1"), view(), None, "m1", "p1", policy.DISAGGREGATED),
        (("d1", "m2"), view(), None, "d1", "m2", policy.DISAGGREGATED),
        (("p1", "d1"), view(prompt=32), None, "d1", None, policy.LOCAL_SHORT),
        (("p1", "d1"), view(prompt=33), None, "d1", "p1", policy.DISAGGREGATED),
        (("p1", "d1"), view(prompt=32, media_end=20, images=1), None, "d1", "p1", policy.DISAGGREGATED),
        (("p1", "d1"), view(), CacheView(wire={"d1": 24}), "d1", None, policy.LOCAL_PREFIX),
        (("p1", "d1"), view(), CacheView(wire={"d1": 20}), "d1", "p1", policy.DISAGGREGATED),
        (("p1", "d1"), view(media_end=390, images=1), CacheView(wire={"d1": 24}), "d1", "p1", policy.DISAGGREGATED),
        (("p1", "d1", "d2"), view(), CacheView(wire={"d2": 5}), "d2", "p1", policy.DISAGGREGATED),
        (("p1", "p2", "d1"), view(), CacheView(exact={"p2": 5}), "d1", "p2", policy.DISAGGREGATED),
        (
            ("p1", "p2", "d1"),
            view(media_end=200, images=1),
            CacheView(images=(("p2",),)),
            "d1",
            "p2",
            policy.DISAGGREGATED,
        ),
    ],
)
def test_placement(names, request_view, cache, decode, prefill, reason):
    decision = decide(names, request_view, cache)
    assert (decision.decode_worker, decision.prefill_worker, decision.reason) == (decode, prefill, reason)


def test_no_decode_worker_is_unavailable():
    with pytest.raises(WorkerUnavailableError):
        decide(("p1", "p2"))


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.DRAINING, WorkerState.LOST])
def test_workers_that_are_not_ready_get_nothing(state):
    decision = decide([worker("d1", state), worker("d2"), worker("p1", state), worker("p2")])
    assert (decision.decode_worker, decision.prefill_worker) == ("d2", "p2")


def test_load_outweighs_a_small_prefix_but_not_a_large_one():
    load = LoadView(in_flight={"d1": 1})
    assert decide(("p1", "d1", "d2"), cache=CacheView(wire={"d1": 5}), load=load).decode_worker == "d2"
    assert decide(("p1", "d1", "d2"), cache=CacheView(wire={"d1": 20}), load=load).decode_worker == "d1"


def test_load_is_the_larger_of_what_we_sent_and_what_the_worker_says():
    load = LoadView({"d1": WorkerStats(waiting=1, running=1)}, {"d2": 3})
    assert load.requests("d1") == 2
    assert load.requests("d2") == 3
    assert decide(("p1", "d1", "d2"), load=load).decode_worker == "d1"


def test_a_full_decode_worker_is_avoided_even_with_the_prefix():
    load = LoadView({"d1": WorkerStats(kv_blocks_total=100, kv_blocks_used=95)})
    assert decide(("p1", "d1", "d2"), cache=CacheView(wire={"d1": 24}), load=load).decode_worker == "d2"


def test_workers_without_a_common_transport_are_not_paired():
    found = [worker("p1", transports=("shm",)), worker("d1", transports=("nixl",))]
    assert decide(found).reason == policy.LOCAL_NO_PREFILL


def test_blocks_are_pulled_from_the_largest_holder_when_it_pays():
    found = workers("p1", "p2", "p3", "d1")
    load = LoadView(in_flight={"p2": 9, "p3": 9})
    cache = CacheView(exact={"p1": 2, "p2": 8, "p3": 20})
    decision = decide(found, cache=cache, load=load)
    assert (decision.prefill_worker, decision.pull_from, decision.pull_blocks) == ("p1", "p3", 20)
    little = decide(found, cache=CacheView(exact={"p1": 2, "p2": 3}), load=load)
    assert little.pull_from is None


def test_a_draining_worker_still_lends_its_blocks():
    found = [worker("p1"), worker("p2", WorkerState.DRAINING), worker("d1")]
    assert decide(found, cache=CacheView(exact={"p2": 10})).pull_from == "p2"


def test_embedding_holders_leave_out_the_prefill_worker_and_the_unreachable():
    found = [worker("p1"), worker("p2"), worker("p3", transports=("gds",)), worker("d1")]
    cache = CacheView(images=(("p1", "p2"), ("p2",), ("p3",), ()))
    request = view(media_end=300, images=4)
    assert decide(found, request, cache).embedding_holders == ("", "", "", "")
    prefer_p1 = LoadView(in_flight={"p2": 9})
    assert decide(found, request, cache, prefer_p1).embedding_holders == ("", "p2", "", "")


def test_the_last_prompt_token_is_always_computed():
    assert cached_tokens(view(prompt=32), 2) == 31
    assert cached_tokens(view(prompt=33), 2) == 32


def test_the_order_of_workers_does_not_matter():
    found = workers("p1", "p2", "d1", "d2", "m1")
    assert decide(found) == decide(list(reversed(found)))


def test_an_excluded_state_changes_nothing_for_others():
    found = workers("p1", "d1")
    lost = dataclasses.replace(worker("d0"), state=WorkerState.LOST)
    assert decide([lost, *found]) == decide(found)
