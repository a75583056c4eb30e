"""Each way of getting a prompt ready costs what its bytes and tokens say, and the cheapest is taken; numbers by hand."""

from __future__ import annotations

import pytest

from prismserve.kv_transfer.costs import Holder, ImageNeed, Overheads, PromptNeed, Rates, Way, exposed_s, plan_prompt
from prismserve.kv_transfer.index.mirror import PrefixMatch
from prismserve.kv_transfer.latency import PrefillCurve

# 1,000 blocks' bytes a second from host, 100 from disk, 500 over links; 1 ms a token.
BLOCK = 1000
NEED = PromptNeed(tokens=161, block_tokens=16, block_bytes=BLOCK)
FREE = Overheads(base_s=0.0, restore_s=0.0, pull_s=0.0, handoff_s=0.0)


def rates(host=1000, disk=100, link=500, token_s=1e-3, overheads=FREE, encode_s=0.1):
    return Rates(
        curve=PrefillCurve(token_s=token_s),
        encode_default_s=encode_s,
        tiers={(name, tier): rate * BLOCK for name in "wp" for tier, rate in (("host", host), ("disk", disk))},
        links={("p", "w"): link * BLOCK},
        overheads=overheads,
    )


def device(blocks):
    return PrefixMatch(device_blocks=blocks, ready_blocks=blocks)


NOTHING = PrefixMatch()


def plan(own=NOTHING, peer=None, need=NEED, images=(), speeds=None, **more):
    holders = [] if peer is None else [Holder("p", peer)]
    return plan_prompt(need, "w", own, holders, images, speeds or rates(), **more)


def test_nothing_held_is_all_computed():
    found = plan()
    assert found.ways == (Way.RECOMPUTE,)
    assert (found.cached_tokens, found.fetch_s) == (0, 0.0)
    assert found.prefill_s == pytest.approx(0.161)


def test_what_lies_on_the_device_costs_nothing():
    found = plan(device(10))
    assert found.ways == (Way.REUSE, Way.RECOMPUTE)
    assert found.total_s == pytest.approx(0.001)


def test_the_last_token_is_always_computed():
    assert plan(device(10), need=PromptNeed(160, 16, BLOCK)).cached_tokens == 159


def test_host_memory_is_restored_at_its_rate():
    found = plan(PrefixMatch(host_blocks=10))
    assert (found.restore, found.ways) == (True, (Way.RESTORE, Way.RECOMPUTE))
    assert found.fetch_s == pytest.approx(10 / 1000)
    assert found.prefill_s == pytest.approx(0.001)


def test_a_disk_slower_than_computing_is_left_alone():
    # 10 blocks at 100 a second are 100 ms against 160 ms; at 50 a second 200 ms.
    assert plan(PrefixMatch(disk_blocks=10)).restore
    slow = plan(PrefixMatch(disk_blocks=10), speeds=rates(disk=50))
    assert (slow.restore, slow.ways) == (False, (Way.RECOMPUTE,))


def test_a_peers_blocks_are_pulled_at_the_links_rate():
    found = plan(device(2), device(10))
    assert (found.pull_from, found.pull_blocks, found.cached_tokens) == ("p", 10, 160)
    assert found.fetch_s == pytest.approx(8 / 500)
    assert Way.PULL in found.ways


def test_a_peer_that_has_it_on_disk_reads_it_first():
    found = plan(peer=PrefixMatch(disk_blocks=10), speeds=rates(disk=100, link=500))
    assert found.fetch_s == pytest.approx(10 / 500 + 10 / 100)


def test_the_faster_of_own_disk_and_a_peers_device_is_taken():
    own = PrefixMatch(disk_blocks=10)
    pulled = plan(own, device(10))
    assert (pulled.restore, pulled.pull_from) == (False, "p")
    restored = plan(own, device(10), speeds=rates(link=50))
    assert (restored.restore, restored.pull_from) == (True, None)


def test_what_is_restored_need_not_be_pulled():
    found = plan(PrefixMatch(host_blocks=6), device(10))
    assert (found.restore, found.pull_from) == (True, "p")
    assert found.fetch_s == pytest.approx(6 / 1000 + 4 / 500)


def test_overheads_decide_over_short_runs():
    dear = Overheads(restore_s=0.05, pull_s=0.05)
    assert plan(PrefixMatch(host_blocks=2), speeds=rates(overheads=dear)).ways == (Way.RECOMPUTE,)
    assert plan(peer=device(2), speeds=rates(overheads=dear)).ways == (Way.RECOMPUTE,)
    assert plan(peer=device(10), speeds=rates(overheads=dear)).pull_from == "p"


def test_a_peer_with_hardly_more_than_we_have_is_not_asked():
    assert plan(device(8), device(9), pull_blocks_min=2).pull_from is None
    assert plan(device(8), device(10), pull_blocks_min=2).pull_from == "p"


@pytest.mark.parametrize(
    ("known", "nbytes", "source", "way", "seconds"),
    [
        ((), 1, "", Way.ENCODE_IMAGE, (0.0, 0.1)),
        (("w", "p"), 1, "", Way.FIND_IMAGE, (0.0, 0.0)),
        (("p",), 10 * BLOCK, "p", Way.PULL_IMAGE, (0.02, 0.0)),
        (("p",), 100 * BLOCK, "", Way.ENCODE_IMAGE, (0.0, 0.1)),
    ],
)
def test_embeddings_are_found_pulled_or_made_again(known, nbytes, source, way, seconds):
    need = PromptNeed(161, 16, BLOCK, (ImageNeed(end_tokens=100, raw_tokens=196, nbytes=nbytes),))
    found = plan(need=need, images=(known,))
    assert found.image_sources == (source,)
    assert way in found.ways
    assert (found.fetch_s, found.encode_s) == pytest.approx(seconds)


def test_an_image_within_the_prefix_is_not_needed():
    need = PromptNeed(161, 16, BLOCK, (ImageNeed(96, 196, 1), ImageNeed(100, 196, 1)))
    found = plan(device(6), need=need, images=((), ()))
    assert found.encode_s == pytest.approx(0.1)


def test_measured_encoding_counts_tokens():
    measured = Rates(encode_token_s={"w": 0.002}, encode_default_s=9.0)
    assert measured.encode_s("w", 100) == pytest.approx(0.2)
    assert measured.encode_s("x", 100) == 9.0


def test_a_transfer_hides_behind_the_prefill_but_for_its_last_layer():
    # 10 layers, 1 s of prefill, 100 bytes at 1,000 a second: 0.1 s in all, of which a tenth follows the last layer.
    assert exposed_s(100, 10, 1.0, 1000) == pytest.approx(0.01)
    # A slow link: 2 s of sending, of which 0.9 s overlap.
    assert exposed_s(2000, 10, 1.0, 1000) == pytest.approx(1.1)
