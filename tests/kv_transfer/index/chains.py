"""Chains of keys that share prefixes, as prompts do, and a strategy for what workers announce of them."""

from __future__ import annotations

import hashlib

from hypothesis import strategies as st

PATHS = ("a" * 12, "a" * 5 + "b" * 7, "aab" + "c" * 9, "b" * 12, "a" * 5 + "b" * 3 + "d" * 4)


def chain(path: str) -> list[bytes]:
    """A key for every block of a path; each names the whole path before it."""
    return [hashlib.sha256(path[: end + 1].encode()).digest() for end in range(len(path))]


CHAINS = [chain(path) for path in PATHS]
KEYS = sorted({key for keys in CHAINS for key in keys})


@st.composite
def slices(draw) -> list[bytes]:
    """A part of one chain, in its order or in reverse."""
    keys = draw(st.sampled_from(CHAINS))
    start = draw(st.integers(0, len(keys)))
    part = keys[start : draw(st.integers(start, len(keys)))]
    return part[::-1] if draw(st.booleans()) else part


key_lists = st.one_of(
    slices(),
    st.builds(lambda one, two: one + two, slices(), slices()),
    st.lists(st.sampled_from(KEYS), max_size=8),
)


@st.composite
def lookups(draw) -> list[bytes]:
    """The start of a chain; a chain may also go on with blocks that nobody has."""
    keys = draw(st.sampled_from(CHAINS))
    known = keys[: draw(st.integers(0, len(keys)))]
    return known + [
        hashlib.sha256(known[-1] + bytes([n])).digest() for n in range(draw(st.integers(0, 3)) if known else 0)
    ]
