"""The other ways to reach a server: Sentinel, TLS, and a Unix socket."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time

import pytest

from prismserve.core.errors import ConfigurationError
from prismserve.core.types import WorkerState
from prismserve.kv_transfer.index.connect import open_index
from prismserve.kv_transfer.index.embedded import find_program


async def use(index, info):
    """Register, renew and leave."""
    epoch = await index.register(info)
    assert await index.heartbeat(info.worker_id, epoch, WorkerState.READY)
    assert [worker.epoch for worker in await index.workers()] == [epoch]
    await index.deregister(info.worker_id, epoch)
    await index.close()


@pytest.fixture
def sentinel(server, tmp_path):
    """A Sentinel with a password of its own that watches the server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nrequirepass watch\n"
        f"sentinel monitor main 127.0.0.1 {server.port} 1\n"
        f'sentinel auth-pass main "{server.password}"\n'
    )
    process = subprocess.Popen([find_program(), config, "--sentinel"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    yield port
    process.kill()
    process.wait(10)


async def test_the_master_of_a_sentinel_service_serves_the_index(server, sentinel, cluster, info):
    credentials = server.url.removeprefix("redis://").rpartition("@")[0]
    url = f"redis+sentinel://{credentials}@127.0.0.1:{sentinel}/main?sentinel_password=watch"
    await use(await open_index(url, cluster), info())


async def test_an_unknown_sentinel_service_is_refused(server, sentinel, cluster):
    with pytest.raises(ConfigurationError, match="No master found for 'other'"):
        await open_index(f"redis+sentinel://127.0.0.1:{sentinel}/other?sentinel_password=watch", cluster)


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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        tls_port = listener.getsockname()[1]
    server.settings = (
        f"tls-port {tls_port}\ntls-cert-file {certificate}\ntls-key-file {key}\n"
        f"tls-ca-cert-file {certificate}\ntls-auth-clients no"
    )
    try:
        server.start()
    except OSError:
        pytest.skip(f"{server.program.name} is built without TLS")
    url = server.url.replace("redis://", "rediss://").replace(str(server.port), str(tls_port))
    with pytest.raises(ConfigurationError, match="cannot connect"):
        await open_index(url, cluster)
    await use(await open_index(f"{url}?ca={certificate}", cluster), info())


async def test_a_unix_socket_serves_the_index(server, tmp_path, cluster, info):
    server.kill()
    server.settings = f"unixsocket {tmp_path}/index.sock"
    server.start()
    credentials = server.url.removeprefix("redis://").rpartition("@")[0]
    await use(await open_index(f"unix://{credentials}@{tmp_path}/index.sock", cluster), info())
