from __future__ import annotations

import json
import shutil
import socket

import grpc
import pytest
import torch

from prismserve.cluster import checks
from prismserve.cluster.checks import CheckResult
from prismserve.cluster.settings import Settings
from prismserve.core.errors import ConfigurationError
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.index.embedded import EmbeddedServer
from prismserve.models.loader import inspect_checkpoint
from prismserve.models.reference import reference_path

GIB = 1 << 30


def settings(**values) -> Settings:
    return Settings(**{"port": 0, "grpc_port": 0, **values})


def test_a_sound_configuration_passes_every_check() -> None:
    results = checks.preflight(settings())
    assert all(result.ok and not result.advice for result in results)
    assert {result.name for result in results} >= {"port", "grpc_port", "model", "memory", "ray", "nixl", "redis"}


def test_preflight_stops_at_the_first_failure_with_its_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"/no/such/model.*--model") as caught:
        checks.preflight(settings(model="/no/such/model"))
    assert caught.value.field == "model"


@pytest.mark.parametrize("name", ["port", "grpc_port"])
def test_a_busy_port_is_named_with_the_flag_that_changes_it(name) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        result = checks.check_port("127.0.0.1", port, name)
    assert not result.ok
    assert str(port) in result.detail
    assert "--" + name.replace("_", "-") in result.advice
    assert checks.check_port("127.0.0.1", port, name).ok


def test_a_port_that_a_grpc_server_shares_is_busy_too() -> None:
    server = grpc.server(None, options=(("grpc.so_reuseport", 1),))
    port = server.add_insecure_port("127.0.0.1:0")
    try:
        assert not checks.check_port("127.0.0.1", port, "grpc_port").ok
    finally:
        server.stop(None).wait(5)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_a_host_that_is_not_this_machine_is_refused(host) -> None:
    result = checks.check_port(host, 0, "port")
    assert not result.ok
    assert host in result.detail
    assert "--host" in result.advice


def test_an_unknown_compression_lists_those_there_are() -> None:
    result = checks.check_compression(settings(compression="zap"))
    assert not result.ok
    assert "balanced" in result.detail


def test_an_incomplete_checkpoint_is_one_sentence(tmp_path) -> None:
    shutil.copy(reference_path() / "config.json", tmp_path)
    result, info = checks.check_model(settings(model=str(tmp_path)))
    assert (result.ok, info) == (False, None)
    assert "\n" not in result.sentence


def test_an_unsupported_architecture_is_one_sentence(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"], "model_type": "none"}))
    result, _ = checks.check_model(settings(model=str(tmp_path)))
    assert not result.ok
    assert "NoSuchModel" in result.detail


def test_a_context_beyond_the_model_is_refused() -> None:
    result, _ = checks.check_model(settings(engine={"max_model_len": 10**7}))
    assert not result.ok
    assert "max_model_len" in result.detail


def test_a_hub_name_is_not_fetched_by_a_look() -> None:
    result, info = checks.check_model(settings(model="nobody-here/no-such-model"), fetch=False)
    assert result.ok
    assert info is None


def test_memory_counts_weights_kv_arenas_and_processes_of_every_replica() -> None:
    info = inspect_checkpoint(reference_path())
    one = checks.memory_need(settings(prefill_replicas=0, decode_replicas=0, mixed_replicas=1), info, 4, on_gpu=False)
    four = checks.memory_need(settings(prefill_replicas=2, decode_replicas=2), info, 4, on_gpu=False)
    assert four.weight_bytes == 4 * one.weight_bytes > 0
    assert four.kv_bytes == 4 * one.kv_bytes > 0
    assert four.arena_bytes == 4 * TransferConfig().arena_bytes
    assert four.total_bytes > one.total_bytes
    on_gpu = checks.memory_need(settings(), info, 2, on_gpu=True)
    assert (on_gpu.weight_bytes, on_gpu.kv_bytes) == (0, 0)


def test_too_little_memory_says_how_much_is_needed_and_what_to_lower() -> None:
    info = inspect_checkpoint(reference_path())
    result = checks.check_memory(settings(), info, lambda: GIB)
    assert not result.ok
    assert "too little memory" in result.detail
    assert "--decode-replicas" in result.advice
    assert checks.check_memory(settings(), info, lambda: 64 * GIB).ok


def test_memory_of_another_cluster_is_not_judged_by_this_machine() -> None:
    info = inspect_checkpoint(reference_path())
    assert checks.check_memory(settings(ray_address="auto"), info, lambda: 0).ok


@pytest.mark.parametrize(
    ("listing", "files", "expected"),
    [
        (
            "0::/a/b\n",
            {"a/b/memory.max": "1000", "a/b/memory.current": "600", "a/b/memory.stat": "anon 1\ninactive_file 100\n"},
            500,
        ),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "600"}, None),
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max", "a/b/memory.current": "1", "a/memory.max": "900", "a/memory.current": "800"},
            100,
        ),
        (
            "4:cpu,memory:/c\n",
            {
                "memory/c/memory.limit_in_bytes": "1000",
                "memory/c/memory.usage_in_bytes": "950",
                "memory/c/memory.stat": "total_inactive_file 50\n",
            },
            100,
        ),
        ("2:cpu:/c\n", {}, None),
        ("0::/a\n", {"a/memory.max": "100", "a/memory.current": "200"}, 0),
    ],
)
def test_available_memory_is_bounded_by_the_control_group(tmp_path, listing, files, expected) -> None:
    process, control = tmp_path / "proc", tmp_path / "cgroup"
    process.mkdir()
    (process / "cgroup").write_text(listing)
    for name, text in files.items():
        (control / name).parent.mkdir(parents=True, exist_ok=True)
        (control / name).write_text(text)
    found = checks.available_memory_bytes(process, control)
    assert found > GIB // 8 if expected is None else found == expected


def test_shared_memory_must_hold_every_arena(tmp_path) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    arena_bytes = free_bytes // 65536 * 65536
    result = checks.check_shared_memory(settings(transfer={"arena_bytes": arena_bytes}), tmp_path)
    assert not result.ok
    assert "--transfer-arena-bytes" in result.advice
    assert checks.check_shared_memory(settings(transfer={"arena_bytes": 1 << 20}), tmp_path).ok
    assert not checks.check_shared_memory(settings(), tmp_path / "none").ok


def test_an_unreachable_redis_is_named_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = checks.check_redis(settings(redis_url=f"redis://:hunter2@127.0.0.1:{port}/0"))
    assert not result.ok
    assert str(port) in result.detail
    assert "hunter2" not in result.sentence
    assert "--redis-url" in result.advice


def test_a_living_redis_passes() -> None:
    server = EmbeddedServer()
    url = server.start()
    try:
        result = checks.check_redis(settings(redis_url=url))
    finally:
        server.stop()
    assert result.ok, result.sentence


def test_nixl_is_asked_for_only_when_a_transport_names_it() -> None:
    assert checks.check_nixl(settings(transfer={"transports": ("shm",)})).detail == "not among transfer.transports"


def test_more_gpus_than_there_are_is_refused_unless_the_cluster_is_elsewhere() -> None:
    more = torch.cuda.device_count() + 1.0
    asked = {"num_gpus_per_worker": more}
    assert not checks.check_gpu(settings(**asked)).ok
    assert checks.check_gpu(settings(**asked, ray_address="auto")).ok


def test_a_result_is_one_sentence() -> None:
    assert CheckResult("x", ok=False, detail="it is broken", advice="mend it").sentence == "it is broken; mend it"
    assert CheckResult("x", ok=True, detail="it is well").sentence == "it is well"
