"""Opening an index: one clear sentence within seconds when it cannot be used."""

from __future__ import annotations

import secrets
import socket
import time
import traceback

import pytest

from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.memory import MemoryIndex
from prismserve.kv_transfer.index.redis import RedisIndex


async def test_no_url_is_an_index_of_this_process(info):
    index = await open_index(None)
    assert isinstance(index, MemoryIndex)
    assert await index.register(info()) > 0
    await index.close()


async def test_a_server_that_answers_is_opened(shared_server, cluster, info):
    index = await open_index(shared_server.url, cluster)
    assert isinstance(index, RedisIndex)
    epoch = await index.register(info())
    await index.deregister("w1", epoch)
    await index.close()


async def test_a_port_where_nothing_listens_is_refused_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(ConfigurationError, match=f"redis://127.0.0.1:{port} .*cannot connect") as caught:
        await open_index(f"redis://user:hunter2@127.0.0.1:{port}")
    assert time.monotonic() - begun < 3
    assert caught.value.field == "redis_url"
    assert "\n" not in caught.value.message


async def test_a_port_that_never_answers_is_refused_in_two_seconds():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(ConfigurationError, match="no answer within 2 s"):
            await open_index(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - begun < 4


async def test_a_wrong_password_is_named_as_such_and_never_shown(shared_server):
    secret = secrets.token_hex(8)
    with pytest.raises(ConfigurationError, match="refused the user name or password") as caught:
        await open_index(f"redis://:{secret}@127.0.0.1:{shared_server.port}")
    assert secret not in "".join(traceback.format_exception(caught.value))


async def test_a_missing_password_is_named_as_such(shared_server):
    with pytest.raises(ConfigurationError, match="refused the user name or password"):
        await open_index(f"redis://127.0.0.1:{shared_server.port}")


async def test_an_unreachable_sentinel_is_refused():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConfigurationError, match="redis\\+sentinel"):
        await open_index(f"redis+sentinel://:hunter2@127.0.0.1:{port}/main")


async def test_a_cluster_name_that_cannot_be_stored_is_refused():
    with pytest.raises(ConfigurationError, match="cluster"):
        await open_index(None, "a{b}")


async def test_without_a_check_an_index_opens_while_its_server_is_away():
    index = await open_index("redis://127.0.0.1:1", check=False)
    await index.close()
