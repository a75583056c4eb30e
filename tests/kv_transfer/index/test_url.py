"""URLs: every documented form, and no refusal that repeats what was given."""

from __future__ import annotations

import pytest

from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.index.url import IndexUrl, parse_url


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("redis://h", IndexUrl("standalone", False, (("h", 6379),)), "redis://h:6379"),
        (
            "rediss://u:p%40s@h:7/3",
            IndexUrl("standalone", True, (("h", 7),), "u", "p@s", 3),
            "rediss://h:7",
        ),
        ("redis://:p@[::1]:7", IndexUrl("standalone", False, (("::1", 7),), None, "p"), "redis://[::1]:7"),
        (
            "redis+sentinel://u:p@a,b:7/main/2?sentinel_password=q",
            IndexUrl("sentinel", False, (("a", 26379), ("b", 7)), "u", "p", 2, "main", sentinel_password="q"),
            "redis+sentinel://a:26379,b:7/main",
        ),
        (
            "rediss+cluster://u:p@a,b?check_hostname=false",
            IndexUrl("cluster", True, (("a", 6379), ("b", 6379)), "u", "p", check_hostname=False),
            "rediss+cluster://a:6379,b:6379",
        ),
        ("unix://u:p@/run/r.sock", IndexUrl("unix", False, (), "u", "p", path="/run/r.sock"), "unix:///run/r.sock"),
    ],
)
def test_documented_forms_are_understood_and_shown_without_credentials(text, expected, shown):
    url = parse_url(text)
    assert url == expected
    assert str(url) == shown
    assert repr(url) == f"IndexUrl({shown})"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://u:hunter2@h", "unknown scheme"),
        ("h:6379", "unknown scheme"),
        ("redis://u:hunter2@", "no host"),
        ("redis://u:hunter2@h:99999", "port"),
        ("redis://u:hunter2@h:x", "port"),
        ("redis://u:hunter2@h/x", "database number"),
        ("redis://u:hunter2@a,b", "several hosts"),
        ("redis+sentinel://u:hunter2@h", "Sentinel service"),
        ("redis+cluster://u:hunter2@h/1", "database number"),
        ("redis://u:hunter2@h?password=hunter2", "unknown option"),
        ("redis://u:hunter2@h?ca=/does/not/hunter2", "does not exist"),
        ("redis://u:hunter2@h?check_hostname=hunter2", "neither true nor false"),
        ("redis://u:hun#ter2@h", "fragment"),
        ("redis://u:hunter2@[::1", "not a URL"),
        ("unix://", "no socket"),
    ],
)
def test_other_forms_are_refused_without_repeating_the_password(text, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        parse_url(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.field == "redis_url"
