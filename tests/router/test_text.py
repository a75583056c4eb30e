from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prismserve.router.text import StopMatcher

LETTERS = st.text("ab", max_size=3)


@given(pieces=st.lists(LETTERS, max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_any_cut_of_the_text_gives_what_the_whole_text_gives(pieces, stops):
    matcher = StopMatcher(tuple(stops))
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.hit:
            break
    else:
        shown.append(matcher.flush())
    whole = "".join(pieces)
    ends = [end for stop in stops for end in range(len(whole) + 1) if whole[:end].endswith(stop)]
    assert matcher.hit == bool(ends)
    if not ends:
        assert "".join(shown) == whole
        return
    result = "".join(shown)
    assert whole.startswith(result)
    assert not any(stop in result for stop in stops)
    assert any(whole[len(result) :].startswith(stop) for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(("END",))
    assert matcher.push("fooE") == "foo"
    assert matcher.push("Nx") == "ENx"
    assert matcher.push("EN") == ""
    assert matcher.push("D and more") == ""
    assert matcher.hit


def test_nothing_stops_before_the_matcher_is_armed():
    matcher = StopMatcher(("a",))
    assert matcher.push("aaa", armed=False) == "aaa"
    assert not matcher.hit
    assert matcher.push("xa") == "x"
    assert matcher.hit
