from __future__ import annotations

import dataclasses

import pytest

from prismserve.core.errors import WorkerUnavailableError
from prismserve.core.types import Role, WorkerInfo, WorkerState, WorkerStats
from prismserve.kv_transfer.costs import ImageNeed, Rates, Way
from prismserve.kv_transfer.index.mirror import PrefixMatch
from prismserve.kv_transfer.latency import PrefillCurve
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


def view(prompt=400, media_end=0, images=0, **more):
    """A request whose images share its first ``media_end`` slots equally."""
    ends = [media_end * (number + 1) // images for number in range(images)]
    return RequestView(prompt, 16, tuple(ImageNeed(end, 196) for end in ends), block_bytes=98_304, **more)


def held(blocks):
    return {name: PrefixMatch(device_blocks=count, ready_blocks=count) for name, count in blocks.items()}


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
        (("p1", "d1"), view(), CacheView(wire=held({"d1": 24})), "d1", None, policy.LOCAL_PREFIX),
        (("p1", "d1"), view(), CacheView(wire=held({"d1": 20})), "d1", "p1", policy.DISAGGREGATED),
        (
            ("p1", "d1"),
            view(media_end=390, images=1),
            CacheView(wire=held({"d1": 24})),
            "d1",
            "p1",
            policy.DISAGGREGATED,
        ),
        (("p1", "d1", "d2"), view(), CacheView(wire=held({"d2": 5})), "d2", "p1", policy.DISAGGREGATED),
        (("p1", "p2", "d1"), view(), CacheView(exact=held({"p2": 5})), "d1", "p2", policy.DISAGGREGATED),
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
    assert decide(("p1", "d1", "d2"), cache=CacheView(wire=held({"d1": 5})), load=load).decode_worker == "d2"
    assert decide(("p1", "d1", "d2"), cache=CacheView(wire=held({"d1": 20})), load=load).decode_worker == "d1"


def test_load_is_the_larger_of_what_we_sent_and_what_the_worker_says():
    load = LoadView({"d1": WorkerStats(waiting=1, running=1)}, {"d2": 3})
    assert load.requests("d1") == 2
    assert load.requests("d2") == 3
    assert decide(("p1", "d1", "d2"), load=load).decode_worker == "d1"


def test_a_full_decode_worker_is_avoided_even_with_the_prefix():
    load = LoadView({"d1": WorkerStats(kv_blocks_total=100, kv_blocks_used=95)})
    assert decide(("p1", "d1", "d2"), cache=CacheView(wire=held({"d1": 24})), load=load).decode_worker == "d2"


def test_workers_without_a_common_transport_are_not_paired():
    found = [worker("p1", transports=("shm",)), worker("d1", transports=("nixl",))]
    assert decide(found).reason == policy.LOCAL_NO_PREFILL


def test_blocks_are_pulled_from_the_largest_holder_when_it_pays():
    found = workers("p1", "p2", "p3", "d1")
    load = LoadView(in_flight={"p2": 9, "p3": 9})
    cache = CacheView(exact=held({"p1": 2, "p2": 8, "p3": 20}))
    decision = decide(found, cache=cache, load=load)
    assert (decision.prefill_worker, decision.pull_from, decision.pull_blocks) == ("p1", "p3", 20)
    little = decide(found, cache=CacheView(exact=held({"p1": 2, "p2": 3})), load=load)
    assert little.pull_from is None


def test_a_draining_worker_still_lends_its_blocks():
    found = [worker("p1"), worker("p2", WorkerState.DRAINING), worker("d1")]
    assert decide(found, cache=CacheView(exact=held({"p2": 10}))).pull_from == "p2"


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


FAST_D = Rates(curve=PrefillCurve(token_s=1e-3), links={("p1", "d1"): 1e6})


def cost_decide(load=None, config=None, rates=FAST_D, wire_bytes=100_000, **more):
    settings = CONFIG.model_copy(update={"local_prefill": "cost", **(config or {})})
    return place(
        view(100, wire_bytes=wire_bytes, layers=10, **more),
        workers("p1", "d1"),
        CacheView(),
        load or LoadView(),
        settings,
        rates,
    )


def test_a_decode_worker_prefills_by_itself_where_that_is_predicted_to_be_faster():
    decision = cost_decide()
    assert (decision.prefill_worker, decision.reason) == (None, policy.LOCAL_FASTER)
    # 1 ms + 100 tokens, against the same, 10 ms of the last layer's bytes and 3 ms of a handoff.
    assert decision.prediction.total_s == pytest.approx(0.101)
    assert decision.prediction.other_s == pytest.approx(0.114)
    assert cost_decide(config={"local_prefill": "short"}).reason == policy.DISAGGREGATED


def test_answers_being_written_at_the_decode_worker_are_not_held_up_for_little():
    busy = LoadView({"d1": WorkerStats(running=1)})
    assert cost_decide(busy).reason == policy.DISAGGREGATED
    assert cost_decide(busy, config={"stall_cost": 0.0, "load_cost_tokens": 0}).reason == policy.LOCAL_FASTER


def test_a_long_queue_at_the_prefill_workers_lets_the_decode_worker_help():
    fast_link = Rates(
        curve=PrefillCurve(token_s=1e-3), curves={"d1": PrefillCurve(token_s=2e-3)}, links={("p1", "d1"): 1e9}
    )
    assert cost_decide(rates=fast_link).reason == policy.DISAGGREGATED
    queue = LoadView(in_flight={"p1": 1})
    assert cost_decide(queue, rates=fast_link).reason == policy.LOCAL_FASTER


def test_nothing_is_compressed_harder_unless_it_may_be_and_pays():
    short = {"local_prefill": "short"}
    slow, fast = FAST_D, Rates(curve=PrefillCurve(token_s=1e-3), links={("p1", "d1"): 1e9})
    assert not cost_decide(config=short, wire_bytes=1_000_000).compress_harder
    may = cost_decide(config=short, wire_bytes=1_000_000, harder_wire_bytes=250_000, rates=slow)
    # 1 MB at 1 MB/s is 0.91 s beyond the prefill, a quarter of it 0.16 s.
    assert (may.compress_harder, may.prediction.ways[-1]) == (True, Way.COMPRESS_HARDER)
    assert may.prediction.transfer_s == pytest.approx(0.16)
    assert not cost_decide(config=short, wire_bytes=1_000_000, harder_wire_bytes=250_000, rates=fast).compress_harder


def test_an_own_disk_that_is_slower_than_a_peer_is_not_read():
    cache = CacheView(exact={"p1": PrefixMatch(disk_blocks=20), "p2": PrefixMatch(20, ready_blocks=20)})
    busy = LoadView(in_flight={"p2": 9})
    slow_disk = Rates(tiers={("p1", "disk"): 1e7})
    decision = place(view(), workers("p1", "p2", "d1"), cache, busy, CONFIG, slow_disk)
    assert (decision.prefill_worker, decision.pull_from, decision.restore) == ("p1", "p2", False)
    fast_disk = Rates(tiers={("p1", "disk"): 1e10})
    decision = place(view(), workers("p1", "p2", "d1"), cache, busy, CONFIG, fast_disk)
    assert (decision.prefill_worker, decision.pull_from, decision.restore) == ("p1", None, True)


def test_a_faster_worker_is_worth_a_short_queue():
    speeds = Rates(curves={"p1": PrefillCurve(token_s=1e-2), "p2": PrefillCurve(token_s=1e-3)})
    load = LoadView(in_flight={"p2": 1})
    assert place(view(), workers("p1", "p2", "d1"), CacheView(), load, CONFIG, speeds).prefill_worker == "p2"


def test_among_workers_that_prefill_for_themselves_an_idle_one_pulls_from_a_busy_holder():
    load, cache = LoadView(in_flight={"m1": 1}), CacheView(wire=held({"m1": 20}))
    decision = decide(("m1", "m2"), cache=cache, load=load)
    assert (decision.decode_worker, decision.pull_from, decision.pull_blocks) == ("m2", "m1", 20)
    slow = Rates(links={("m1", "m2"): 1e6})
    decision = place(view(), workers("m1", "m2"), cache, load, CONFIG, slow)
    assert (decision.decode_worker, decision.pull_from) == ("m1", None)


def test_a_busy_worker_that_has_the_image_is_better_than_encoding_it_again():
    load = LoadView(in_flight={"m1": 1})
    request = view(media_end=390, images=1)
    here = CacheView(wire=held({"m1": 24}), images=(("m1",),))
    slow = Rates(links={("m1", "m2"): 1e6}, encode_default_s=1.0)
    assert place(request, workers("m1", "m2"), here, load, CONFIG, slow).decode_worker == "m1"
    assert place(request, workers("m1", "m2"), CacheView(images=((),)), load, CONFIG, slow).decode_worker == "m2"
