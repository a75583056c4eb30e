"""Every error of redis-py leaves as ours, and none carries credentials."""

from __future__ import annotations

import asyncio
import inspect

import pytest
import redis.asyncio
from redis import exceptions as redis_errors

from prismserve.core.errors import IndexUnavailableError
from prismserve.kv_transfer.index.client import Connection, translate
from prismserve.kv_transfer.index.url import parse_url

URL = parse_url("redis://user:hunter2@127.0.0.1:1/0")
FOREIGN = sorted(
    (
        kind
        for _, kind in inspect.getmembers(redis_errors, inspect.isclass)
        if issubclass(kind, redis_errors.RedisError)
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", [*FOREIGN, OSError, ConnectionResetError, TimeoutError, UnicodeError])
async def test_every_foreign_error_is_translated(kind):
    connection = Connection(URL, 1.0, 0.1)
    redirects = issubclass(kind, redis_errors.AskError)
    error = kind("1 127.0.0.1:2" if redirects else "went wrong")
    with pytest.raises(IndexUnavailableError) as caught:
        async with connection.call("testing"):
            raise error
    assert caught.value.__cause__ is error
    assert "hunter2" not in str(caught.value)
    assert "while testing" in caught.value.message
    await connection.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (redis_errors.AuthenticationError("invalid username-password pair"), "refused the user name or password"),
        (redis_errors.ResponseError("WRONGPASS invalid"), "refused the user name or password"),
        (redis_errors.NoPermissionError("no perm"), "may not run a command"),
        (redis_errors.OutOfMemoryError("OOM"), "memory limit"),
        (redis_errors.ReadOnlyError("READONLY"), "read-only replica"),
        (redis_errors.BusyLoadingError("LOADING"), "loading"),
        (redis_errors.TimeoutError("slow"), "no answer within 2 s"),
        (TimeoutError(), "no answer within 2 s"),
        (ConnectionRefusedError(111, "Connection refused"), "cannot connect"),
        (redis_errors.ResponseError("x" * 1000), "…"),
    ],
)
def test_messages_say_what_happened(error, words):
    message = translate(error, URL, "testing", 2.0).message
    assert words in message
    assert len(message) < 400


async def test_a_call_ends_at_its_deadline():
    connection = Connection(URL, 0.1, 0.1)
    with pytest.raises(IndexUnavailableError, match=r"no answer within 0\.1 s"):
        async with connection.call("waiting"):
            await asyncio.sleep(30)
    await connection.close()


async def test_errors_of_our_own_pass_unchanged():
    connection = Connection(URL, 1.0, 0.1)
    with pytest.raises(KeyError):
        async with connection.call("testing"):
            raise KeyError("mine")
    await connection.close()


async def test_long_commands_are_packed_as_redis_py_packs_them():
    connection = Connection(URL, 1.0, 1.0)
    fast = connection.client.connection_pool.make_connection()
    plain = redis.asyncio.Connection()
    keys = [bytes([number % 256]) * 32 for number in range(300)]
    for command in (("SADD", "prismserve:{ä}:held", *keys), ("MGET", *map(str, range(100))), ("GET", "a"), ("PING",)):
        assert b"".join(fast.pack_command(*command)) == b"".join(plain.pack_command(*command))
    assert len(fast.pack_command("SADD", "held", *keys)) == 1
    await connection.close()
