"""The ways to reach a server: Sentinel, Cluster, TLS, a Unix socket, and a user with the documented rights alone."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from prismserve.core.errors import ConfigurationError, IndexUnavailableError
from prismserve.core.types import Tier, WorkerState
from prismserve.kv_transfer.index.config import IndexConfig
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.redis import RedisIndex
from prismserve.kv_transfer.index.url import parse_url
from tests.kv_transfer.index.servers import QUOTED, Server, cluster_of, free_port, program, programs, sentinel_for

DOCUMENTED = re.findall(
    r"^(ACL SETUSER .*)$", Path(__file__).parents[3].joinpath("docs/redis.md").read_text(), re.MULTILINE
)

# A client of a cluster makes several connections in its first call.
PATIENT = IndexConfig(call_timeout_s=5.0, poll_interval_s=0.1)


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def allow(server: Server, cluster: str, *lines: str) -> None:
    """Make the documented user, whose password is ``narrow``."""
    for line in lines:
        words = line.replace("PASSWORD", "narrow").replace("NAME", cluster).split()
        server.command(*words, expect=b"+OK")


def granted(*lines: str) -> set[str]:
    """The commands that lines of the documentation grant."""
    return {word[1:] for line in lines for word in line.split() if word.startswith("+")}


def called(server: Server) -> set[str]:
    """The commands that were called since the statistics were reset."""
    return set(re.findall(r"cmdstat_([a-z|]+):calls", server.command("INFO", "commandstats", quiet=True).decode()))


async def use(index, info):
    """Register, renew and leave."""
    epoch = await index.register(info)
    assert await index.heartbeat(info.worker_id, epoch, WorkerState.READY)
    assert [worker.epoch for worker in await index.workers()] == [epoch]
    await index.deregister(info.worker_id, epoch)
    await index.close()


async def use_all(index, info, follow, eventually):
    """Everything that owners and routers do, losses included."""
    await index.check()
    mirror = follow(index)
    epoch = await index.register(info)
    chain = [key(n) for n in range(10)]
    assert await index.announce(info.worker_id, epoch, chain, [key(9)])
    assert await index.announce(info.worker_id, epoch, chain, tier=Tier.HOST)
    await eventually(lambda: mirror.match(chain) and mirror.match(chain)[info.worker_id].host_blocks == 1)
    assert await index.announce(info.worker_id, epoch, chain, replace=True)
    assert await index.heartbeat(info.worker_id, epoch, WorkerState.DRAINING)
    assert [worker.state for worker in await index.workers()] == [WorkerState.DRAINING]
    late = follow(index)
    await eventually(lambda: late.key_count(info.worker_id) == 10)
    assert await index.register(info) == epoch
    await index.drop_worker(info.worker_id)
    assert await index.register(info) > epoch
    await index.deregister(info.worker_id, index._claims.epoch_seen)
    await eventually(lambda: not mirror.workers())
    # Followers check now and then that nothing was lost.
    await asyncio.sleep(0.3)


@pytest.fixture
def sentinel(server, tmp_path):
    """A Sentinel with a password of its own that watches the server."""
    with sentinel_for(server, tmp_path) as watcher:
        yield watcher


@pytest.fixture(params=programs())
def nodes(request, tmp_path):
    """A Redis Cluster of three masters."""
    with cluster_of(program(request.param), tmp_path) as started:
        yield started


async def test_a_user_with_the_documented_rights_can_do_everything_and_has_no_right_too_many(
    server, cluster, config, opened, info, follow, eventually
):
    allow(server, cluster, DOCUMENTED[0])
    index = RedisIndex(parse_url(f"redis://prismserve:narrow@127.0.0.1:{server.port}/1"), cluster, config)
    other = RedisIndex(parse_url(f"redis://prismserve:narrow@127.0.0.1:{server.port}"), "another", config)
    opened += [index, other]
    server.command("CONFIG", "RESETSTAT", expect=b"+OK")
    await use_all(index, info(), follow, eventually)
    # The tests' own commands are AUTH, INFO and CONFIG.
    assert called(server) - {"auth", "info", "config|resetstat"} == granted(DOCUMENTED[0])
    with pytest.raises(IndexUnavailableError, match="ACL"):
        await other.workers()


async def test_the_master_of_a_sentinel_service_serves_the_index_to_users_with_the_documented_rights(
    server, sentinel, cluster, info
):
    allow(server, cluster, DOCUMENTED[0])
    allow(sentinel, cluster, DOCUMENTED[2])
    url = f"redis+sentinel://prismserve:narrow@127.0.0.1:{sentinel.port}/main"
    await use(await open_index(f"{url}?sentinel_username=prismserve&sentinel_password=narrow", cluster), info())


async def test_an_unknown_sentinel_service_is_refused(server, sentinel, cluster):
    with pytest.raises(ConfigurationError, match="No master found for 'other'"):
        await open_index(f"redis+sentinel://127.0.0.1:{sentinel.port}/other?sentinel_password={QUOTED}", cluster)


async def test_a_redis_cluster_serves_the_index_to_a_user_with_the_documented_rights(
    nodes, cluster, opened, info, follow, eventually
):
    for node in nodes:
        allow(node, cluster, *DOCUMENTED[:2])
    addresses = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    index = RedisIndex(parse_url(f"redis+cluster://prismserve:narrow@{addresses}"), cluster, PATIENT)
    opened.append(index)
    await use_all(index, info(), follow, eventually)


async def test_a_slot_that_moves_to_another_node_takes_the_index_with_it(
    nodes, cluster, opened, info, follow, eventually
):
    """Resharding ends with the keys gone from the old node: to the index it is a loss, and owners announce again."""
    index = RedisIndex(parse_url(nodes[0].url.replace("redis://", "redis+cluster://")), cluster, PATIENT)
    opened.append(index)
    mirror = follow(index)
    epoch = await index.register(info())
    await index.announce("w1", epoch, [key(1)])
    await eventually(lambda: mirror.holders(key(1)))
    slot = re.search(rb":(\d+)", nodes[0].command("CLUSTER", "KEYSLOT", index._names.epoch)[3:])[1].decode()
    source = next(node for node in nodes if b":0" not in node.command("CLUSTER", "COUNTKEYSINSLOT", slot)[3:])
    target = next(node for node in nodes if node is not source)
    identity = re.search(rb"[0-9a-f]{40}", target.command("CLUSTER", "MYID"))[0].decode()
    for name in re.findall(rb"prismserve:\S+", source.command("CLUSTER", "GETKEYSINSLOT", slot, "100")):
        source.command("DEL", name.decode())
    for node in (target, source, *nodes):
        node.command("CLUSTER", "SETSLOT", slot, "NODE", identity, expect=b"+OK")
    async with asyncio.timeout(15):
        while True:
            try:
                assert await index.register(info()) == epoch
                assert await index.announce("w1", epoch, [key(2)], replace=True)
                break
            except IndexUnavailableError:
                await asyncio.sleep(0.1)
    await eventually(lambda: mirror.holders(key(2)) and not mirror.holders(key(1)))
    assert b":0" not in target.command("CLUSTER", "COUNTKEYSINSLOT", slot)[3:]


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
        f"-keyout {tmp_path}/key.pem -out {tmp_path}/cert.pem"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return tmp_path / "cert.pem"


async def test_tls_is_spoken_and_the_certificate_is_checked(server, certificate, cluster, info):
    key = certificate.with_name("key.pem")
    server.kill()
    tls_port = free_port()
    server.settings = (
        f"tls-port {tls_port}\ntls-cert-file {certificate}\ntls-key-file {key}\n"
        f"tls-ca-cert-file {certificate}\ntls-auth-clients no"
    )
    try:
        server.start()
    except OSError:
        pytest.skip(f"{server.program.name} is built without TLS")
    allow(server, cluster, DOCUMENTED[0])
    url = f"rediss://prismserve:narrow@127.0.0.1:{tls_port}"
    with pytest.raises(ConfigurationError, match="cannot connect"):
        await open_index(url, cluster)
    await use(await open_index(f"{url}?ca={certificate}", cluster), info())


async def test_a_unix_socket_serves_the_index(server, tmp_path, cluster, info):
    server.kill()
    server.settings = f"unixsocket {tmp_path}/index.sock"
    server.start()
    credentials = server.url.removeprefix("redis://").rpartition("@")[0]
    await use(await open_index(f"unix://{credentials}@{tmp_path}/index.sock", cluster), info())
