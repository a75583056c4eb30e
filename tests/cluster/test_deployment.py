from __future__ import annotations

import json
import warnings
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from prismserve.cluster import deployment
from prismserve.cluster.deployment import Target, pack, render
from prismserve.cluster.settings import Settings, load_settings, read_config
from prismserve.core.errors import ConfigurationError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CONFIG = DEPLOY / "cluster.yaml"


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(read_config(CONFIG), {})


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())


@pytest.fixture(scope="module")
def service() -> dict:
    return next(yaml.safe_load_all((DEPLOY / "kuberay-rayservice.yaml").read_text()))


@pytest.fixture(scope="module")
def front() -> dict:
    return list(yaml.safe_load_all((DEPLOY / "kuberay-rayservice.yaml").read_text()))[1]


def groups(service) -> dict[str, dict]:
    config = service["spec"]["rayClusterConfig"]
    return {"head": config["headGroupSpec"]} | {group["groupName"]: group for group in config["workerGroupSpecs"]}


def container(group) -> dict:
    (only,) = group["template"]["spec"]["containers"]
    return only


def test_the_committed_files_are_what_the_configuration_renders() -> None:
    for name, text in render(CONFIG).items():
        assert (DEPLOY / name).read_text(encoding="utf-8") == text, f"{name}: run the command in its first line"


def test_the_cluster_file_follows_the_schema_of_ray_up(cluster) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_the_cluster_file_starts_enough_machines_for_every_worker(cluster, settings) -> None:
    workers = cluster["available_node_types"]["gpu-worker"]
    gpus = workers["min_workers"] * workers["resources"]["GPU"]
    assert gpus >= settings.workers * settings.num_gpus_per_worker
    assert cluster["max_workers"] >= workers["max_workers"]
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_ray_is_started_with_token_authentication_everywhere(cluster, service) -> None:
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_the_manifest_has_what_the_ray_service_resource_requires(service) -> None:
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    config = service["spec"]["rayClusterConfig"]
    assert config["rayVersion"] == ray.__version__
    for group in groups(service).values():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert container(group)["image"]
    for group in config["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_serve_configuration_is_one_serve_accepts_and_its_args_are_the_settings(service, settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Serve's own models are written for an older pydantic
        from ray.serve.schema import ServeDeploySchema
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == deployment.IMPORT_PATH
    built = load_settings(application.args, {})
    changed = {"host", "num_gpus_per_worker", "cpus_per_worker"}
    assert built.model_dump(exclude=changed) == settings.model_dump(exclude=changed)
    assert built.host == "0.0.0.0"
    assert schema.proxy_location == "Disabled"


def test_the_application_named_by_the_manifest_exists() -> None:
    module, name = deployment.IMPORT_PATH.split(":")
    source = DEPLOY.parent / Path(*module.split(".")).with_suffix(".py")
    assert f"def {name}(" in source.read_text()


def test_workers_get_gpus_and_room_for_their_arenas(service, settings) -> None:
    group = groups(service)["gpu-worker"]
    resources = container(group)["resources"]
    assert resources["limits"] == resources["requests"]
    assert int(resources["limits"]["nvidia.com/gpu"]) * group["replicas"] >= settings.workers
    volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
    limit_gib = int(volumes["shared-memory"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    per_pod = settings.workers // group["replicas"]
    assert limit_gib << 30 >= per_pod * settings.transfer.arena_bytes
    assert "nvidia.com/gpu" not in container(groups(service)["router"])["resources"]["limits"]


def test_routers_are_ready_by_their_own_probe_and_reached_by_both_ports(service, front, settings) -> None:
    router = groups(service)["router"]
    assert router["replicas"] == settings.router_replicas
    probe = container(router)["readinessProbe"]["httpGet"]
    assert probe == {"path": "/-/healthz", "port": settings.port}
    assert front["spec"]["selector"] == router["template"]["metadata"]["labels"]
    named = {port["name"]: port["containerPort"] for port in container(router)["ports"]}
    assert named == {"http": settings.port, "grpc": settings.grpc_port}
    assert [(port["targetPort"], port["port"]) for port in front["spec"]["ports"]] == list(named.items())
    assert json.loads(json.loads(router["rayStartParams"]["resources"])) == {deployment.ROUTER_RESOURCE: 1}


def test_pods_run_without_privileges_and_without_service_links(service) -> None:
    for group in groups(service).values():
        spec = group["template"]["spec"]
        assert spec["enableServiceLinks"] is False
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        own = container(group)["securityContext"]
        assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_a_stopping_pod_has_longer_than_its_requests_may_take_to_drain(service, settings) -> None:
    for group in groups(service).values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > settings.drain_timeout_s


def test_the_redis_url_comes_from_a_secret_and_is_in_no_file(service, tmp_path) -> None:
    for group in groups(service).values():
        variables = {entry["name"]: entry for entry in container(group)["env"]}
        reference = variables["PRISMSERVE_REDIS_URL"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "prismserve", "key": "redis-url"}
    config = tmp_path / "cluster.yaml"
    config.write_text("redis_url: redis://:hunter2@redis.internal:6379/0\n")
    assert all("hunter2" not in text for text in render(config).values())


def test_the_environment_of_the_renderer_plays_no_part(monkeypatch) -> None:
    before = render(CONFIG)
    monkeypatch.setenv("PRISMSERVE_DECODE_REPLICAS", "32")
    assert render(CONFIG) == before


@pytest.mark.parametrize(
    ("values", "gpus_per_node", "per_node", "nodes"),
    [
        ({"prefill_replicas": 4, "decode_replicas": 4}, 4, 4, 2),
        ({"prefill_replicas": 1, "decode_replicas": 1}, 8, 2, 1),
        ({"prefill_replicas": 2, "decode_replicas": 3, "num_gpus_per_worker": 2}, 4, 2, 3),
        ({"prefill_replicas": 4, "decode_replicas": 4, "num_gpus_per_worker": 0.5}, 2, 4, 2),
        ({"prefill_replicas": 4, "decode_replicas": 4, "num_gpus_per_worker": 0.4}, 2, 4, 2),
        ({"prefill_replicas": 4, "decode_replicas": 4, "cpus_per_worker": 20}, 8, 2, 4),
    ],
)
def test_workers_are_packed_without_splitting_one_over_machines(values, gpus_per_node, per_node, nodes) -> None:
    packing = pack(Settings(**values), Target(gpus_per_node=gpus_per_node))
    assert (packing.workers_per_node, packing.nodes) == (per_node, nodes)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"num_gpus_per_worker": 0}, "num_gpus_per_worker"),
        ({"num_gpus_per_worker": 9}, "num_gpus_per_worker"),
        ({"cpus_per_worker": 1000}, "cpus_per_worker"),
    ],
)
def test_a_worker_that_fits_on_no_machine_is_refused(values, field) -> None:
    with pytest.raises(ConfigurationError, match=field):
        pack(Settings(**values), Target())


def test_the_command_writes_the_files_and_refuses_a_wrong_configuration(tmp_path, capsys) -> None:
    assert deployment.main([str(CONFIG), "--out", str(tmp_path / "out"), "--gpus-per-node", "8"]) == 0
    cluster = yaml.safe_load((tmp_path / "out" / "ray-cluster.yaml").read_text())
    assert cluster["available_node_types"]["gpu-worker"]["resources"]["GPU"] == 8
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("decode_replica: 2\n")
    assert deployment.main([str(wrong), "--out", str(tmp_path)]) == 2
    assert "did you mean decode_replicas" in capsys.readouterr().err
