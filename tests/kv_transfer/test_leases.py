from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismserve.core.errors import LeaseExpiredError, OverloadedError
from prismserve.core.types import Extent
from prismserve.kv_transfer.leases import LeaseTable


@given(
    st.lists(
        st.tuples(st.sampled_from(["grant", "finish", "cancel", "tick"]), st.integers(0, 20), st.floats(0.1, 9)),
        max_size=80,
    )
)
def test_every_lease_is_freed_exactly_once_and_no_later_than_twice_its_ttl(steps):
    freed: list[Extent] = []
    table, now, granted = LeaseTable(freed.append, 16), 0.0, {}
    for action, pick, amount in steps:
        if action == "grant":
            try:
                lease = table.grant(Extent(0, 1, len(granted) + 1), amount, now)
            except OverloadedError:
                assert len(table) == 16
                continue
            granted[lease.lease_id] = (lease.extent, now, amount)
        elif action == "tick":
            now += amount
            table.expire(now)
        elif granted:
            lease_id = list(granted)[pick % len(granted)]
            if action == "finish":
                table.finish(lease_id)
            else:
                table.quarantine(lease_id)
        assert len(freed) == len(set(freed))
        assert len(freed) + len(table) == len(granted)
        for lease_id, (extent, since, ttl) in granted.items():
            if action == "tick" and now >= since + 2 * ttl:
                assert extent in freed
            if action == "tick" and now >= since + ttl:
                with pytest.raises(LeaseExpiredError):
                    table.active(lease_id, extent.generation)
    table.expire(now + 100)
    assert len(table) == 0
    assert table.next_deadline_s() is None


def test_a_cancelled_lease_keeps_its_pages_until_its_sender_must_have_stopped():
    freed: list[Extent] = []
    table = LeaseTable(freed.append, 4)
    lease = table.grant(Extent(0, 1, 1), 10.0, 100.0)
    assert table.quarantine(lease.lease_id)
    assert not table.quarantine(lease.lease_id)
    assert table.ended(lease.lease_id)
    assert table.matches(lease.lease_id, 1)
    table.expire(119.9)
    assert not freed
    table.expire(120.0)
    assert freed == [Extent(0, 1, 1)]
    assert table.ended(lease.lease_id)


def test_another_generation_or_an_unknown_id_is_not_active():
    table = LeaseTable(lambda extent: None, 4)
    lease = table.grant(Extent(0, 1, 7), 10.0, 0.0)
    assert table.active(lease.lease_id, 7) is lease
    for lease_id, generation in [(lease.lease_id, 6), (lease.lease_id ^ 1, 7)]:
        with pytest.raises(LeaseExpiredError):
            table.active(lease_id, generation)
    assert not table.ended(lease.lease_id ^ 1)
