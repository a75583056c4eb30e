from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from prismserve.cluster.configuration_page import configuration_page, unit_of
from prismserve.cluster.settings import Settings, add_serve_arguments, leaves, load_settings, settings_from
from prismserve.core.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]


def compose(*arguments: str, environ: dict[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return settings_from(parser.parse_args(arguments), environ or {})


@pytest.fixture
def config(tmp_path):
    def write(tree) -> str:
        path = tmp_path / "cluster.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return str(path)

    return write


def test_nothing_given_is_the_documented_defaults() -> None:
    assert compose() == Settings()
    assert (Settings().host, Settings().port, Settings().grpc_port) == ("127.0.0.1", 8000, 9000)
    assert (Settings().compression, Settings().model, Settings().model_name) == ("off", "reference", "reference")


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(config) -> None:
    file = config({"port": 1001, "decode_replicas": 2, "engine": {"max_running": 5, "max_waiting": 6}})
    environ = {"PRISMSERVE_PORT": "1002", "PRISMSERVE_ENGINE__MAX_RUNNING": "7", "HOME": "/nowhere"}
    settings = compose("--config", file, "--port", "1003", environ=environ)
    assert settings.port == 1003
    assert compose("--config", file, environ=environ).port == 1002
    assert compose("--config", file).port == 1001
    assert (settings.engine.max_running, settings.engine.max_waiting) == (7, 6)
    assert settings.decode_replicas == 2


def test_the_file_may_be_named_by_the_environment(config) -> None:
    assert compose(environ={"PRISMSERVE_CONFIG": config({"port": 1001})}).port == 1001


def test_every_setting_can_be_given_as_flag_variable_and_file_with_the_same_result(config) -> None:
    samples = {
        "engine.kv_cache_bytes": ("512MiB", 512 << 20),
        "transfer.arena_bytes": ("1.5GiB", 3 << 29),
        "transfer.transports": ("shm,nixl", ("shm", "nixl")),
        "engine.prefix_caching": ("false", False),
        "num_gpus_per_worker": ("0.5", 0.5),
        "served_model_name": ("eyes", "eyes"),
        "redis_url": ("redis://a:6379/0", "redis://a:6379/0"),
        "startup_timeout_s": ("12.5", 12.5),
        "router.max_images": ("3", 3),
        "index.lease_ttl_s": ("7", 7.0),
    }
    by_name = {leaf.name: leaf for leaf in leaves()}
    assert set(samples) <= set(by_name)
    flags = [word for name, (text, _) in samples.items() for word in (by_name[name].flag, text)]
    variables = {by_name[name].variable: text for name, (text, _) in samples.items()}
    tree: dict = {}
    for name, (text, value) in samples.items():
        *branches, last = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = text if last.endswith("_bytes") else list(value) if isinstance(value, tuple) else value
    by_flag, by_variable, by_file = compose(*flags), compose(environ=variables), compose("--config", config(tree))
    assert by_flag == by_variable == by_file
    for name, (_, value) in samples.items():
        node = by_flag
        for part in name.split("."):
            node = getattr(node, part)
        assert node == value


def test_flags_and_variables_are_unique() -> None:
    found = list(leaves())
    assert len({leaf.flag for leaf in found}) == len({leaf.variable for leaf in found}) == len(found)


def test_the_kv_cache_is_also_sized_and_typed_by_the_names_the_field_knows() -> None:
    settings = compose("--kv-cache-memory", "3MiB", "--kv-cache-dtype", "int8")
    assert (settings.engine.kv_cache_bytes, settings.engine.kv_cache_dtype) == (3 << 20, "int8")
    assert settings == compose("--engine-kv-cache-bytes", "3MiB", "--engine-kv-cache-dtype", "int8")
    with pytest.raises(ConfigurationError, match="kv_cache_dtype"):
        compose("--kv-cache-dtype", "fp4")


def test_none_unsets_what_may_be_unset() -> None:
    assert compose("--redis-url", "none", environ={"PRISMSERVE_REDIS_URL": "redis://a"}).redis_url is None


def test_settings_survive_json() -> None:
    settings = compose("--redis-url", "redis://a:6379/0", "--transfer-transports", "shm")
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings
    assert load_settings(settings.model_dump(mode="json"), {}) == settings


def test_a_password_in_the_redis_url_is_not_in_the_representation() -> None:
    assert "hunter2" not in repr(compose("--redis-url", "redis://:hunter2@a:6379/0"))


@pytest.mark.parametrize(
    ("arguments", "environ", "parts"),
    [
        (["--decode-replicas", "-1"], {}, ["decode_replicas", "--decode-replicas", "-1"]),
        (["--port", "70000"], {}, ["port", "--port", "70000"]),
        (["--port", "web"], {}, ["port", "--port", "'web'"]),
        (["--dtype", "float16"], {}, ["dtype", "float16"]),
        (["--startup-timeout-s", "nan"], {}, ["startup_timeout_s"]),
        (["--engine-kv-cache-bytes", "much"], {}, ["engine.kv_cache_bytes", "'much'", "1MiB"]),
        ([], {"PRISMSERVE_PREFILL_REPLICAS": "x"}, ["prefill_replicas", "PRISMSERVE_PREFILL_REPLICAS"]),
        ([], {"PRISMSERVE_PREFIL_REPLICAS": "1"}, ["PRISMSERVE_PREFIL_REPLICAS", "did you mean"]),
        (["--port", "9000"], {}, ["port", "grpc_port", "9000"]),
        (["--decode-replicas", "0"], {}, ["decode_replicas", "at least 1"]),
        (["--prefill-replicas", "0", "--decode-replicas", "0"], {}, ["mixed_replicas"]),
        (["--redis-url", "http://a"], {}, ["URL"]),
        (["--cluster-name", "a b"], {}, ["cluster_name"]),
        (["--config", "/no/such/file.yaml"], {}, ["/no/such/file.yaml", "no such file"]),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it_and_its_source(arguments, environ, parts) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose(*arguments, environ=environ)
    assert caught.value.field
    assert "\n" not in caught.value.message
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("engine: {block_token: 8}", ["engine.block_token", "no such setting", "did you mean engine.block_tokens"]),
        ("engine: 3", ["engine"]),
        ("- a", ["mapping"]),
        ("a: [", ["not YAML"]),
        ("transfer: {page_bytes: 5000}", ["transfer", "page_bytes"]),
        ("transfer: {arena_bytes: lots}", ["transfer.arena_bytes", "'lots'"]),
        ("port: !!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_field(config, text, parts) -> None:
    with pytest.raises(ConfigurationError) as caught:
        compose("--config", config(text))
    assert "\n" not in caught.value.message
    for part in parts:
        assert part in caught.value.message


def test_variables_that_kubernetes_injects_for_services_are_not_settings() -> None:
    environ = {
        "PRISMSERVE_SERVE_SVC_SERVICE_HOST": "10.0.0.1",
        "PRISMSERVE_SERVE_SVC_SERVICE_PORT_HTTP": "8000",
        "PRISMSERVE_FRONT_PORT": "tcp://10.0.0.1:8000",
        "PRISMSERVE_FRONT_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert compose(environ=environ) == Settings()


def test_mixed_workers_alone_can_serve() -> None:
    settings = compose("--prefill-replicas", "0", "--decode-replicas", "0", "--mixed-replicas", "2")
    assert settings.workers == 2


def test_help_names_every_flag_once() -> None:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    text = parser.format_help()
    assert all(f"{leaf.flag} " in text for leaf in leaves())


def test_every_setting_is_documented_with_its_unit() -> None:
    for leaf in leaves():
        assert leaf.meaning, leaf.name
        numeric = leaf.info.annotation in (int, float)
        assert not numeric or unit_of(leaf), leaf.name


def test_the_configuration_page_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration_page()
